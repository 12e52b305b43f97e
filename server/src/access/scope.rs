//! The scope that each method of the protocol needs.
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a token allows, on the runs of its patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Open a run, add phases, rewind it, close it.
    Open,
    /// Take batches.
    Select,
    /// Push weights.
    Push,
    /// Look at runs and receipts.
    Read,
    /// All of the above, and `/metrics` if that asks for a token.
    Admin,
    /// Register as a worker, and nothing else.
    Worker,
}

impl Scope {
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Select => "select",
            Self::Push => "push",
            Self::Read => "read",
            Self::Admin => "admin",
            Self::Worker => "worker",
        }
    }

    /// Returns whether a token of scope `self` may do what needs `other`. `admin` does not cover
    /// `worker`: a registered worker gets model URIs and its numbers go into receipts, so that
    /// power is given only explicitly.
    pub fn covers(self, other: Self) -> bool {
        self == other || (self == Self::Admin && other != Self::Worker)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a call has to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// No token: the call says only whether the process serves.
    Nothing,
    /// A valid token of any scope.
    Token,
    Scope(Scope),
    /// The secret of the coordinator with which the worker registered.
    Coordinator,
}

/// Returns what a call of `path` (`/package.Service/Method`) needs. A method that is not listed
/// needs the widest scope, so that a new method is closed until someone decides otherwise.
pub fn needed(path: &str) -> Need {
    let (service, method) = path
        .trim_start_matches('/')
        .split_once('/')
        .unwrap_or((path, ""));
    match (service, method) {
        ("grpc.health.v1.Health", _) => Need::Nothing,
        (service, _) if service.starts_with("grpc.reflection.") => Need::Token,
        ("superbatch.v1.WorkerService", _) => Need::Coordinator,
        // The service itself checks the ticket of each call.
        ("superbatch.v1.DeliveryService", "FetchTicket") => Need::Nothing,
        ("superbatch.v1.CoordinatorService", "Register") => Need::Scope(Scope::Worker),
        ("superbatch.v1.SelectionService", method) => Need::Scope(match method {
            "OpenRun" | "AppendPhases" | "Rewind" | "CloseRun" => Scope::Open,
            "SelectBatch" => Scope::Select,
            "PushWeights" | "AnnouncePush" | "ReportLosses" => Scope::Push,
            "GetRun" | "ListRuns" | "GetReceipt" | "ListWeights" => Scope::Read,
            // It reads a whole version, and a trainer needs it.
            "GetWeightsDigests" => Scope::Push,
            "RollBackWeights" => Scope::Admin,
            _ => Scope::Admin,
        }),
        _ => Need::Scope(Scope::Admin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use superbatch_proto::v1::FILE_DESCRIPTOR_SET;
    use tonic_health::pb::FILE_DESCRIPTOR_SET as HEALTH;

    #[derive(Clone, PartialEq, Message)]
    struct Set {
        #[prost(message, repeated, tag = "1")]
        file: Vec<File>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct File {
        #[prost(string, tag = "2")]
        package: String,
        #[prost(message, repeated, tag = "6")]
        service: Vec<Service>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Service {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(message, repeated, tag = "2")]
        method: Vec<Method>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Method {
        #[prost(string, tag = "1")]
        name: String,
    }

    /// Every method of the protocol, as the descriptors say.
    fn methods(descriptors: &[u8]) -> Vec<String> {
        let set = Set::decode(descriptors).unwrap();
        let mut found = Vec::new();
        for file in set.file {
            for service in file.service {
                found.extend(
                    service
                        .method
                        .iter()
                        .map(|m| format!("/{}.{}/{}", file.package, service.name, m.name)),
                );
            }
        }
        found.sort();
        found
    }

    #[test]
    fn every_method_needs_what_the_table_says() {
        let s = |scope| Need::Scope(scope);
        let table = [
            ("/grpc.health.v1.Health/Check", Need::Nothing),
            ("/grpc.health.v1.Health/Watch", Need::Nothing),
            (
                "/superbatch.v1.CoordinatorService/Register",
                s(Scope::Worker),
            ),
            ("/superbatch.v1.DeliveryService/FetchTicket", Need::Nothing),
            (
                "/superbatch.v1.SelectionService/AnnouncePush",
                s(Scope::Push),
            ),
            (
                "/superbatch.v1.SelectionService/AppendPhases",
                s(Scope::Open),
            ),
            ("/superbatch.v1.SelectionService/CloseRun", s(Scope::Open)),
            ("/superbatch.v1.SelectionService/GetReceipt", s(Scope::Read)),
            ("/superbatch.v1.SelectionService/GetRun", s(Scope::Read)),
            (
                "/superbatch.v1.SelectionService/GetWeightsDigests",
                s(Scope::Push),
            ),
            ("/superbatch.v1.SelectionService/ListRuns", s(Scope::Read)),
            (
                "/superbatch.v1.SelectionService/ListWeights",
                s(Scope::Read),
            ),
            ("/superbatch.v1.SelectionService/OpenRun", s(Scope::Open)),
            (
                "/superbatch.v1.SelectionService/PushWeights",
                s(Scope::Push),
            ),
            (
                "/superbatch.v1.SelectionService/ReportLosses",
                s(Scope::Push),
            ),
            ("/superbatch.v1.SelectionService/Rewind", s(Scope::Open)),
            (
                "/superbatch.v1.SelectionService/RollBackWeights",
                s(Scope::Admin),
            ),
            (
                "/superbatch.v1.SelectionService/SelectBatch",
                s(Scope::Select),
            ),
            ("/superbatch.v1.WorkerService/FetchRows", Need::Coordinator),
            (
                "/superbatch.v1.WorkerService/PrepareModel",
                Need::Coordinator,
            ),
            ("/superbatch.v1.WorkerService/Score", Need::Coordinator),
            ("/superbatch.v1.WorkerService/Select", Need::Coordinator),
        ];
        let mut known = methods(FILE_DESCRIPTOR_SET);
        known.extend(methods(HEALTH));
        known.sort();
        known.dedup();
        let listed: Vec<&str> = table.iter().map(|(path, _)| *path).collect();
        assert_eq!(known, listed, "each method is in this table");
        for (path, need) in table {
            assert_eq!(needed(path), need, "{path}");
        }
        let unknown = "/superbatch.v1.SelectionService/Anything";
        assert_eq!(needed(unknown), s(Scope::Admin));
        assert_eq!(needed("nonsense"), s(Scope::Admin));
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        assert_eq!(needed(reflection), Need::Token);
    }

    #[test]
    fn the_manual_lists_each_method_with_its_scope() {
        let manual = include_str!("../../../docs/security.md");
        let (_, table) = manual.split_once("| scope | allows |").unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        for path in methods(FILE_DESCRIPTOR_SET) {
            let (_, method) = path.rsplit_once('/').unwrap();
            let code = format!("`{method}`");
            let rows: Vec<&str> = table.lines().filter(|row| row.contains(&code)).collect();
            match needed(&path) {
                Need::Scope(scope) => {
                    let row = format!("| `{scope}` |");
                    assert_eq!(rows.len(), 1, "{path} is in one row: {rows:?}");
                    assert!(rows[0].starts_with(&row), "{path}: {}", rows[0]);
                }
                Need::Nothing => assert!(manual.contains(&code), "{path} is open"),
                Need::Token | Need::Coordinator => assert!(rows.is_empty(), "{path}: {rows:?}"),
            }
        }
    }

    #[test]
    fn an_admin_is_no_worker() {
        assert!(Scope::Admin.covers(Scope::Push) && !Scope::Admin.covers(Scope::Worker));
        assert!(!Scope::Worker.covers(Scope::Read) && !Scope::Open.covers(Scope::Select));
    }
}
