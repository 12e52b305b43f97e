//! `superbatch token`: the tokens of trainers, operators and workers.
use super::{table::table, user::user};
use crate::{
    access::{
        Peer,
        audit::Audit,
        scope::Scope,
        tokens::{Entry, Tokens, hash, new_secret},
    },
    config::{self, Config},
    error::{Error, Result},
};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use superbatch_proto::ids::is_run_id;

#[derive(Args)]
pub struct TokenArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a token and print it. The file keeps only its hash, so the token is shown this once
    #[command(after_long_help = "\
Examples:
  superbatch token new trainer --file tokens.yaml --runs 'team-a-*' --expires 90d")]
    New(NewArgs),
    /// List the tokens of the file
    #[command(after_long_help = "\
Examples:
  superbatch token list --file tokens.yaml")]
    List(ListArgs),
    /// Take a token out of the file; services that read the file refuse it a second later
    #[command(after_long_help = "\
Examples:
  superbatch token revoke trainer --file tokens.yaml")]
    Revoke(RevokeArgs),
}

/// The file of tokens.
#[derive(Args)]
struct FileArgs {
    /// The file of tokens. Comes before `auth.tokens_file` of the settings
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// YAML file of settings, for `auth.tokens_file` and `audit.file`
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Where a change is noted.
#[derive(Args)]
struct AuditArgs {
    /// The audit log that gets a line. Comes before `audit.file` of the settings
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,
}

#[derive(Args)]
struct NewArgs {
    /// The holder's name in logs and the audit log
    name: String,
    /// What it allows. open: open, change and close runs; select: take batches; push: push weights;
    /// read: look at runs and receipts; admin: all of these; worker: register as a worker
    #[arg(long, value_delimiter = ',', default_value = "open,select,push,read")]
    scopes: Vec<Scope>,
    /// Runs that it is for; `*` stands for any text. May be given several times
    #[arg(long, value_name = "PATTERN", default_value = "*")]
    runs: Vec<String>,
    /// How long it is valid, such as 90d or 12h. Without it, until it is revoked
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    expires: Option<Duration>,
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    audit: AuditArgs,
}

#[derive(Args)]
struct ListArgs {
    /// Print one JSON object a token instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args)]
struct RevokeArgs {
    /// The token's name
    name: String,
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    audit: AuditArgs,
}

/// Runs the command. Returns the text to print.
///
/// # Errors
/// `InvalidArgument` if the file cannot be used, or the name does not fit.
pub fn run(args: &TokenArgs) -> Result<String> {
    match &args.command {
        Command::New(args) => new(args, SystemTime::now()),
        Command::List(args) => list(args, SystemTime::now()),
        Command::Revoke(args) => revoke(args),
    }
}

impl FileArgs {
    /// Returns the settings of the file and the environment.
    fn settings(&self) -> Result<Config> {
        let settings = Config::load(self.config.as_deref(), config::environment());
        match (settings, &self.config, &self.file) {
            (Ok(settings), _, _) => Ok(settings),
            // With a file given, the command must work even if the environment is invalid.
            (Err(error), None, Some(_)) => {
                let error = error.chain();
                eprintln!("superbatch: the environment's settings are left out: {error}");
                Ok(Config::default())
            }
            (Err(error), _, _) => Err(error),
        }
    }

    fn path(&self, settings: &Config) -> Result<PathBuf> {
        let set = settings.auth.tokens_file.as_ref();
        self.file.as_ref().or(set).cloned().ok_or_else(|| {
            let message =
                "say which file of tokens: --file FILE, or auth.tokens_file in the settings";
            Error::invalid("auth.tokens_file", message)
        })
    }
}

impl AuditArgs {
    /// Opens the log, before anything is changed.
    fn open(&self, settings: &Config) -> Result<Audit> {
        let set = settings.audit.file.as_deref();
        Audit::open(self.audit.as_deref().or(set))
    }
}

/// Notes what was done to the tokens, and by whom.
fn note<T>(audit: &Audit, what: &'static str, written: &Result<T>, detail: Value) {
    let who = user();
    audit.record(what, Some(&who), Peer::default(), None, written, detail);
}

/// Reads the tokens of a file, which need not exist yet.
fn read_tokens(path: &Path) -> Result<Tokens> {
    if path.exists() {
        Tokens::read(path)
    } else {
        Ok(Tokens::default())
    }
}

fn new(args: &NewArgs, now: SystemTime) -> Result<String> {
    let settings = args.file.settings()?;
    let (path, audit) = (args.file.path(&settings)?, args.audit.open(&settings)?);
    let mut tokens = read_tokens(&path)?;
    if !is_run_id(&args.name) {
        let message = format!(
            "{:?} cannot name a token: use letters, digits, '-', '_' and '.'",
            args.name
        );
        return Err(Error::invalid("name", message));
    }
    if tokens.tokens.iter().any(|entry| entry.name == args.name) {
        let message = format!(
            "{} has a token {:?}; revoke it first, or take another name",
            path.display(),
            args.name
        );
        return Err(Error::invalid("name", message));
    }
    let until = args.expires.map(|time| {
        let until = now.checked_add(time).ok_or_else(|| {
            Error::invalid("expires", "that is too far ahead; leave --expires out")
        })?;
        Ok::<_, Error>(humantime::format_rfc3339_seconds(until).to_string())
    });
    let token = new_secret();
    let entry = Entry {
        name: args.name.clone(),
        sha256: hash(&token),
        scopes: args.scopes.clone(),
        runs: args.runs.clone(),
        expires: until.transpose()?,
    };
    let detail = json!({"token": entry.name, "scopes": entry.scopes, "runs": entry.runs,
        "expires": entry.expires});
    tokens.tokens.push(entry);
    let written = tokens.write(&path);
    note(&audit, "token new", &written, detail);
    written?;
    eprintln!(
        "superbatch: added to {}; the token is not shown again",
        path.display()
    );
    Ok(format!("{token}\n"))
}

fn list(args: &ListArgs, now: SystemTime) -> Result<String> {
    let path = args.file.path(&args.file.settings()?)?;
    let tokens = Tokens::read(&path)?;
    let scopes = |entry: &Entry| {
        let names: Vec<&str> = entry.scopes.iter().map(|scope| scope.name()).collect();
        names.join(",")
    };
    if args.json {
        let line = |entry: &Entry| {
            let shown = json!({
                "name": entry.name, "scopes": entry.scopes, "runs": entry.runs,
                    "expires": entry.expires,
                "expired": entry.is_expired(now),
            });
            format!("{shown}\n")
        };
        return Ok(tokens.tokens.iter().map(line).collect());
    }
    if tokens.tokens.is_empty() {
        return Ok(format!("no tokens in {}\n", path.display()));
    }
    let mut rows = vec![
        ["token", "scopes", "runs", "expires"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(tokens.tokens.iter().map(|entry| {
        let expires = entry.expires.clone().unwrap_or_else(|| "never".into());
        let expires = if entry.is_expired(now) {
            format!("{expires} (expired)")
        } else {
            expires
        };
        vec![
            entry.name.clone(),
            scopes(entry),
            entry.runs.join(","),
            expires,
        ]
    }));
    Ok(table(&rows))
}

fn revoke(args: &RevokeArgs) -> Result<String> {
    let settings = args.file.settings()?;
    let path = args.file.path(&settings)?;
    // The log belongs to the service's user. A token that leaked must go all the same.
    let audit = args.audit.open(&settings).unwrap_or_else(|error| {
        eprintln!("superbatch: this is not noted: {}", error.chain());
        Audit::default()
    });
    let mut tokens = Tokens::read(&path)?;
    let before = tokens.tokens.len();
    tokens.tokens.retain(|entry| entry.name != args.name);
    if tokens.tokens.len() == before {
        let message = format!("{} has no token {:?}", path.display(), args.name);
        return Err(Error::invalid("name", message));
    }
    let written = tokens.write(&path);
    note(
        &audit,
        "token revoke",
        &written,
        json!({"token": args.name}),
    );
    written?;
    Ok(format!("revoked {}\n", args.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> FileArgs {
        FileArgs {
            file: Some(folder.join("tokens.yaml")),
            config: None,
        }
    }

    fn new_args(folder: &Path, name: &str, expires: Option<u64>) -> NewArgs {
        NewArgs {
            name: name.into(),
            scopes: vec![Scope::Select],
            runs: vec!["a-*".into()],
            expires: expires.map(Duration::from_secs),
            file: files(folder),
            audit: audit(folder),
        }
    }

    fn audit(folder: &Path) -> AuditArgs {
        AuditArgs {
            audit: Some(folder.join("audit.jsonl")),
        }
    }

    #[test]
    fn tokens_are_made_listed_and_revoked() {
        let folder = tempfile::tempdir().unwrap();
        let now = humantime::parse_rfc3339("2026-11-28T00:00:00Z").unwrap();
        let token = new(&new_args(folder.path(), "alice", Some(86_400)), now).unwrap();
        let other = new(&new_args(folder.path(), "bob", None), now).unwrap();
        let tokens = Tokens::read(&folder.path().join("tokens.yaml")).unwrap();
        let alice = tokens.find(token.trim()).unwrap();
        assert_eq!(alice.name, "alice");
        assert_eq!(alice.expires.as_deref(), Some("2026-11-29T00:00:00Z"));
        assert!(alice.is_for("a-1") && !alice.is_for("b"));
        let again = new(&new_args(folder.path(), "alice", None), now).unwrap_err();
        assert_eq!(again.value("field"), Some("name"));
        let args = ListArgs {
            json: false,
            file: files(folder.path()),
        };
        let later = now + Duration::from_secs(100_000);
        let shown = list(&args, later).unwrap();
        assert!(shown.contains("2026-11-29T00:00:00Z (expired)"), "{shown}");
        assert!(shown.contains("never"), "{shown}");
        assert!(!shown.contains(token.trim()) && !shown.contains(&hash(token.trim())));
        let args = |name: &str| RevokeArgs {
            name: name.into(),
            file: files(folder.path()),
            audit: audit(folder.path()),
        };
        revoke(&args("alice")).unwrap();
        assert!(revoke(&args("alice")).is_err());
        let noted = std::fs::read_to_string(folder.path().join("audit.jsonl")).unwrap();
        let lines = noted.lines().map(serde_json::from_str);
        let lines: Vec<Value> = lines.collect::<Result<_, _>>().unwrap();
        let told: Vec<_> = lines
            .iter()
            .map(|line| (line["what"].as_str(), line["detail"]["token"].as_str()))
            .collect();
        let expected = [
            (Some("token new"), Some("alice")),
            (Some("token new"), Some("bob")),
            (Some("token revoke"), Some("alice")),
        ];
        assert_eq!(told, expected);
        assert!(lines.iter().all(|line| line["who"] == user()));
        let tokens = Tokens::read(&folder.path().join("tokens.yaml")).unwrap();
        assert!(tokens.find(token.trim()).is_none() && tokens.find(other.trim()).is_some());
    }

    #[test]
    fn a_token_is_revoked_though_the_audit_log_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let token = new(&new_args(folder.path(), "alice", None), SystemTime::now()).unwrap();
        let args = RevokeArgs {
            name: "alice".into(),
            file: files(folder.path()),
            audit: audit(&folder.path().join("none")),
        };
        revoke(&args).unwrap();
        let tokens = Tokens::read(&folder.path().join("tokens.yaml")).unwrap();
        assert!(tokens.find(token.trim()).is_none());
        let mut args = new_args(folder.path(), "bob", None);
        args.audit = audit(&folder.path().join("none"));
        assert!(new(&args, SystemTime::now()).is_err(), "a new one is noted");
    }
}
