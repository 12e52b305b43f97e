//! `superbatch doctor`: tries everything that a service will need, and says what to do if something
//! is wrong.
mod models;
mod of_worker;

use super::ConfigArgs;
use crate::{
    access::tokens::Tokens,
    app,
    blocking::blocking,
    config::Config,
    error::{Error, Result},
    storage::{DiskCache, Location, Stores, nonce, probe},
    worker::Worker,
};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    time::{Duration, Instant, SystemTime},
};
use superbatch_proto::v1::Reason;

/// How far the clock may be off. Stores refuse signed requests of a clock that is 15 minutes off,
/// so this warns long before.
const CLOCK_OFF_MAX: Duration = Duration::from_secs(60);

/// Starts nothing that keeps running. Leaves in the state only what a service writes at its start.
#[derive(Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub settings: ConfigArgs,
    /// The process that the settings are for
    #[arg(long, value_enum, default_value_t = Role::Coordinator)]
    role: Role,
    /// Data that a run will read, to try whether it is allowed and found. May be given several
    /// times
    #[arg(long, value_name = "URI")]
    source: Vec<String>,
    /// A model's folder that a run will name. May be given several times
    #[arg(long, value_name = "URI")]
    model: Vec<String>,
}

/// The process that is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// `superbatch serve`
    Coordinator,
    /// `superbatch worker`
    Worker,
}

/// The name of a check, and its result.
type Check = (String, Result<String>);

/// # Errors
/// `InvalidArgument` if a check failed; all of them are printed.
pub async fn run(config: &Config, args: &DoctorArgs) -> Result<String> {
    let mut checks: Vec<Check> = ports(config, args.role);
    checks.push(("certificates".into(), certificates(config)));
    match args.role {
        Role::Coordinator => checks.push(("tokens".into(), tokens(config, SystemTime::now()))),
        Role::Worker => checks.extend(of_worker::checks(config).await),
    }
    let stores = Stores::new(config.storage.clone());
    if let Some(folder) = &config.worker.disk_cache_dir {
        let bytes_max = config.worker.disk_cache_bytes;
        let checked = disk_cache(folder, bytes_max).await;
        checks.push(("worker.disk_cache_dir".into(), checked));
    }
    let state = config.state_uri().and_then(|uri| stores.open(&uri));
    match state {
        Ok(state) => {
            checks.push(("state".into(), conditional_create(&state).await));
            checks.push(("clock".into(), clock(&state).await));
            let has_worker = args.role == Role::Worker || config.coordinator.workers_embedded;
            let device = if has_worker {
                device(config, &stores, &state)
            } else {
                Ok("no worker in this process".into())
            };
            checks.push(("device".into(), device));
        }
        Err(error) => checks.push(("state".into(), Err(error))),
    }
    for uri in &args.source {
        checks.push((format!("source {uri}"), source(&stores, uri).await));
    }
    for uri in &args.model {
        let checked = models::check(config, &stores, uri).await;
        checks.push((format!("model {uri}"), checked));
    }
    report(&checks)
}

/// Returns the results as lines for people; failures come last, as an error.
fn report(checks: &[Check]) -> Result<String> {
    let line = |(what, outcome): &Check| match outcome {
        Ok(found) => format!("ok    {what}: {found}\n"),
        Err(error) => format!("FAIL  {what}: {}\n", error.chain()),
    };
    let text: String = checks.iter().map(line).collect();
    let failed = checks
        .iter()
        .filter(|(_, outcome)| outcome.is_err())
        .count();
    if failed == 0 {
        return Ok(text);
    }
    let message = format!("{failed} of {} checks failed\n{text}", checks.len());
    Err(Error::new(Reason::InvalidArgument, message.trim_end()))
}

/// Checks that each port is free.
fn ports(config: &Config, role: Role) -> Vec<Check> {
    let health = ("health_listen", config.health_listen);
    let listens = match role {
        Role::Coordinator => vec![
            ("listen", Some(config.listen)),
            ("metrics_listen", config.metrics_listen),
            health,
            ("page_listen", config.page_listen),
        ],
        Role::Worker => {
            let own = &config.worker_role;
            vec![
                ("worker_role.listen", Some(own.listen)),
                ("worker_role.metrics_listen", own.metrics_listen),
                health,
            ]
        }
    };
    let tried = |(field, address): (&str, Option<SocketAddr>)| {
        let address = address?;
        let bound = TcpListener::bind(address).map_err(|e| {
            let message = format!("cannot listen on {address}; stop what does, or set `{field}`");
            Error::invalid(field, message).because(e)
        });
        Some((
            field.to_owned(),
            bound.map(|_| format!("{address} is free")),
        ))
    };
    listens.into_iter().filter_map(tried).collect()
}

fn certificates(config: &Config) -> Result<String> {
    app::check_tls(&config.tls)?;
    Ok(match (config.tls.is_on(), &config.tls.client_ca) {
        (false, _) => "none; connections are plain".into(),
        (true, None) => "the service's can be used".into(),
        (true, Some(_)) => "the service's can be used; clients have to show theirs".into(),
    })
}

fn tokens(config: &Config, now: SystemTime) -> Result<String> {
    let Some(path) = &config.auth.tokens_file else {
        return Ok("none are asked for".into());
    };
    let tokens = Tokens::read(path)?.tokens;
    let expired = tokens.iter().filter(|t| t.is_expired(now)).count();
    if tokens.len() == expired {
        let message = format!(
            "{} holds no token that is valid; make one with `superbatch token new`",
            path.display()
        );
        return Err(Error::invalid("auth.tokens_file", message));
    }
    Ok(format!("{}, {expired} of them expired", tokens.len()))
}

/// Checks that the cache's folder is free, and its disk large enough.
async fn disk_cache(folder: &Path, bytes_max: u64) -> Result<String> {
    let folder = folder.to_owned();
    let check = move || DiskCache::check(&folder, bytes_max);
    blocking("checking the disk cache", check).await
}

/// Checks that the store can hold state: a conditional create must fail for an existing key.
async fn conditional_create(state: &Location) -> Result<String> {
    let begun = Instant::now();
    probe(state).await?;
    let took = begun.elapsed().as_millis();
    Ok(format!("{} creates each key once ({took} ms)", state.uri()))
}

/// Compares this machine's clock with the store's.
async fn clock(state: &Location) -> Result<String> {
    let key = format!("doctor-{}", nonce());
    state.put(&key, Bytes::from_static(b"clock")).await?;
    let (now, written) = (SystemTime::now(), state.head(&key).await);
    state.delete(&key).await?;
    let written = written?.map(|meta| SystemTime::from(meta.last_modified));
    let Some(written) = written else {
        let message = "what was just written is not there; the store is not consistent";
        return Err(Error::new(Reason::StorageUnsafe, message));
    };
    let off = now
        .duration_since(written)
        .unwrap_or_else(|early| early.duration());
    if off > CLOCK_OFF_MAX {
        let message = format!(
            "this machine's clock is {} s from the store's; set it (NTP), or requests will be \
            refused",
            off.as_secs()
        );
        return Err(Error::new(Reason::InvalidArgument, message));
    }
    Ok(format!("within {} s of the store's", off.as_secs() + 1))
}

fn device(config: &Config, stores: &Stores, state: &Location) -> Result<String> {
    let worker = Worker::new(&config.worker, stores.clone(), state.clone())?;
    let info = worker.info();
    Ok(format!("{}, {} threads", info.device, info.threads))
}

async fn source(stores: &Stores, uri: &str) -> Result<String> {
    let plain = uri.split(['{', '*']).next().unwrap_or(uri);
    // A pattern's folder.
    let folder = if plain == uri {
        plain
    } else {
        plain.rsplit_once('/').map_or(plain, |(folder, _)| folder)
    };
    let objects = stores.open_allowed(folder)?.list("").await?;
    if objects.is_empty() {
        let message = format!("there is nothing below {folder}");
        return Err(Error::new(Reason::DatasetEmpty, message));
    }
    let bytes: u64 = objects.iter().map(|(_, meta)| meta.size).sum();
    let gib = bytes as f64 / f64::from(1 << 30);
    Ok(format!("{} objects, {gib:.3} GiB", objects.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::tokens::new_secret;

    #[tokio::test]
    async fn what_is_wrong_is_said_beside_what_is_right() {
        let folder = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let free = "127.0.0.1:0".parse().unwrap();
        let mut config = Config {
            listen: free,
            metrics_listen: Some(taken.local_addr().unwrap()),
            page_listen: None,
            state: format!("file://{}/state", folder.path().display()),
            ..Config::default()
        };
        config.coordinator.workers_embedded = false;
        let args = |source: &str| DoctorArgs {
            settings: ConfigArgs::default(),
            role: Role::Coordinator,
            source: vec![source.into()],
            model: vec![],
        };
        let nothing = format!("file://{}/nothing", folder.path().display());
        let said = run(&config, &args(&nothing)).await.unwrap_err().chain();
        for line in [
            "2 of 8 checks failed",
            "FAIL  metrics_listen: cannot listen on",
            "ok    state: file://",
            "ok    clock: within",
            "ok    tokens: none are asked for",
            "is nothing below",
        ] {
            assert!(said.contains(line), "{line} in {said}");
        }
        drop(taken);
        let state = format!("file://{}/state", folder.path().display());
        config.worker.disk_cache_dir = Some(folder.path().join("caches/own"));
        config.worker.disk_cache_bytes = u64::MAX;
        let said = run(&config, &args(&state)).await.unwrap_err().chain();
        assert!(said.contains("1 of 9 checks failed"), "{said}");
        assert!(said.contains("lower it, or name a larger disk"), "{said}");
        config.worker.disk_cache_bytes = 1;
        let said = run(&config, &args(&state)).await.unwrap();
        assert!(!said.contains("FAIL"), "{said}");
        assert!(
            said.contains("ok    worker.disk_cache_dir: 0.000 of"),
            "{said}"
        );
        assert!(!folder.path().join("caches").exists(), "another may own it");
        let left = std::fs::read_dir(folder.path().join("state")).unwrap();
        let names: Vec<_> = left.map(|e| e.unwrap().file_name()).collect();
        assert!(
            !names
                .iter()
                .any(|name| name.to_string_lossy().starts_with("doctor"))
        );
    }

    #[tokio::test]
    async fn a_worker_is_tried_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        // Nobody listens there any more.
        let closed = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let token = folder.path().join("token");
        let mut config = Config {
            state: format!("file://{}/state", folder.path().display()),
            ..Config::default()
        };
        config.worker.threads = 1;
        config.worker_role.listen = taken.local_addr().unwrap();
        config.worker_role.coordinator = format!("http://{closed}");
        config.worker_role.token_file = Some(token.clone());
        let args = DoctorArgs {
            settings: ConfigArgs::default(),
            role: Role::Worker,
            source: vec![],
            model: vec![],
        };
        let said = run(&config, &args).await.unwrap_err().chain();
        for line in [
            "FAIL  worker_role.listen: cannot listen on",
            "FAIL  worker_role.token_file: ",
            "FAIL  worker_role.coordinator: ",
            "ok    state: file://",
        ] {
            assert!(said.contains(line), "{line} in {said}");
        }
        assert!(
            !said.contains("  listen: ") && !said.contains("page_listen"),
            "{said}"
        );
        let made = new_secret();
        for (text, line) in [
            ("two words", "FAIL  worker_role.token_file: "),
            ("hunter2", "holds was not made by `superbatch token new`"),
            (made.as_str(), "token holds a token"),
        ] {
            std::fs::write(&token, text).unwrap();
            let said = run(&config, &args).await.unwrap_err().chain();
            assert!(said.contains(line), "{line} in {said}");
            assert!(!said.contains(text), "{said}");
        }
    }
}
