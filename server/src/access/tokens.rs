//! Tokens: random secrets. The file of tokens holds only their hashes.
use super::{pattern::fits, scope::Scope};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{path::Path, time::SystemTime};
use subtle::ConstantTimeEq;
use superbatch_proto::ids::is_run_id;

/// The prefix of every token, by which secret scanners recognise tokens in source code.
const PREFIX: &str = "sbt_";
/// Random bytes of a token, and digits of its hash. 256 random bits cannot be guessed, so a plain
/// SHA-256 is enough; the slow hashes that passwords need would delay every call.
const SECRET_BYTES: usize = 32;
const HASH_DIGITS: usize = 64;

/// A file of tokens. YAML, written by `superbatch token` or by hand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    #[serde(default)]
    pub tokens: Vec<Entry>,
}

/// One token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The holder's name in logs and the audit log.
    pub name: String,
    /// SHA-256 of the token's text, in hexadecimal digits.
    pub sha256: String,
    pub scopes: Vec<Scope>,
    /// Patterns of the runs that the token is for; `*` stands for any text.
    #[serde(default = "all_runs")]
    pub runs: Vec<String>,
    /// When it expires, such as 2027-01-31T00:00:00Z. Absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}

fn all_runs() -> Vec<String> {
    vec!["*".into()]
}

impl Entry {
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|held| held.covers(scope))
    }

    pub fn is_for(&self, run_id: &str) -> bool {
        self.runs.iter().any(|pattern| fits(pattern, run_id))
    }

    /// Returns whether the token has expired. An unreadable time counts as expired.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        let until = |text: &String| humantime::parse_rfc3339_weak(text).ok();
        self.expires
            .as_ref()
            .is_some_and(|text| until(text).is_none_or(|until| now >= until))
    }
}

impl Tokens {
    /// # Errors
    /// `InvalidArgument`, naming the file and the entry, never a hash.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            let message = format!("cannot read the tokens in {}", path.display());
            Error::invalid("auth.tokens_file", message).because(e)
        })?;
        Self::parse(&text).map_err(|e| e.about(path.display()))
    }

    pub fn parse(text: &str) -> Result<Self> {
        let read: Option<Self> = serde_yaml_ng::from_str(text).map_err(|e| {
            let message = "this is no file of tokens; `superbatch token new` writes one";
            // Only the line number: the parser's message might quote the file, hashes included.
            let place = e.location().map_or(0, |at| at.line());
            Error::invalid("auth.tokens_file", format!("{message} (line {place})"))
        })?;
        let tokens = read.unwrap_or_default();
        tokens.check()?;
        Ok(tokens)
    }

    fn check(&self) -> Result<()> {
        for (at, entry) in self.tokens.iter().enumerate() {
            let wrong = |what: &str| {
                let message = format!("token {:?} {what}", entry.name);
                Err(Error::invalid("auth.tokens_file", message))
            };
            let is_hash = |text: &str| {
                text.len() == HASH_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit())
            };
            if !is_run_id(&entry.name) {
                return wrong("needs a name of letters, digits, '-', '_' and '.'");
            }
            if self.tokens[..at]
                .iter()
                .any(|other| other.name == entry.name)
            {
                return wrong("is there twice; give each a name of its own");
            }
            if !is_hash(&entry.sha256) {
                return wrong("has no SHA-256 of 64 hexadecimal digits");
            }
            if entry.scopes.is_empty() {
                return wrong("has no scopes");
            }
            let is_time = |text: &String| humantime::parse_rfc3339_weak(text).is_ok();
            if !entry.expires.as_ref().is_none_or(is_time) {
                return wrong("has no time in `expires`; write 2027-01-31T00:00:00Z");
            }
        }
        Ok(())
    }

    /// Returns the entry of a token. Every entry is compared, each in constant time, so that the
    /// time of an answer reveals nothing about the known hashes.
    pub fn find(&self, token: &str) -> Option<&Entry> {
        let hash = hash(token);
        let mut found = None;
        for entry in &self.tokens {
            let known = entry.sha256.to_ascii_lowercase();
            if bool::from(hash.as_bytes().ct_eq(known.as_bytes())) {
                found = Some(entry);
            }
        }
        found
    }

    /// Writes the file atomically (a new file, then a rename), readable by its owner only. A
    /// process that reloads tokens must never see half a file.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        use std::{io::Write, os::unix::fs::OpenOptionsExt};
        let text = serde_yaml_ng::to_string(self);
        let text = text.map_err(|e| Error::internal("tokens cannot be written").because(e))?;
        let beside = path.with_extension(format!("new-{}", std::process::id()));
        let written = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .and_then(|()| std::fs::rename(&beside, path));
        written.map_err(|e| {
            // Removes the half-written file, if there is one.
            drop(std::fs::remove_file(&beside));
            let message = format!("cannot write the tokens to {}", path.display());
            Error::invalid("auth.tokens_file", message).because(e)
        })
    }
}

/// Makes a new token.
pub fn new_secret() -> String {
    let secret: [u8; SECRET_BYTES] = rand::random();
    format!("{PREFIX}{}", hex::encode(secret))
}

/// Returns whether a text has the form of the tokens that [`new_secret`] makes.
pub fn has_form(text: &str) -> bool {
    let secret = text.strip_prefix(PREFIX);
    secret.is_some_and(|secret| {
        secret.len() == 2 * SECRET_BYTES && secret.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

pub fn hash(token: &str) -> String {
    hex::encode(Sha256::digest(token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, token: &str) -> Entry {
        Entry {
            name: name.into(),
            sha256: hash(token),
            scopes: vec![Scope::Select],
            runs: all_runs(),
            expires: None,
        }
    }

    #[test]
    fn a_token_is_found_by_its_hash_alone() {
        let (first, second) = (new_secret(), new_secret());
        assert!(first != second && has_form(&first) && has_form(&second));
        assert!(!has_form(&first[1..]) && !has_form(&first[..first.len() - 1]));
        let tokens = Tokens {
            tokens: vec![entry("a", &first), entry("b", &second)],
        };
        let text = serde_yaml_ng::to_string(&tokens).unwrap();
        assert!(!text.contains(&first) && !text.contains("sbt_"));
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!(tokens.find(&second).map(|e| e.name.as_str()), Some("b"));
        assert_eq!(tokens.find("sbt_wrong"), None);
        assert_eq!(
            tokens.find(&tokens.tokens[0].sha256),
            None,
            "a hash is no token"
        );
        assert_eq!(
            hash("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn what_a_file_may_not_hold_is_named_without_hashes() {
        let hash = hash("x");
        let good = format!("{{name: a, sha256: {hash}, scopes: [open]}}");
        for (text, says) in [
            (format!("tokens: [{good}, {good}]"), "is there twice"),
            (
                "tokens: [{name: a, sha256: abc, scopes: [open]}]".into(),
                "no SHA-256",
            ),
            (
                format!("tokens: [{{name: a b, sha256: {hash}, scopes: [open]}}]"),
                "needs a name",
            ),
            (
                format!("tokens: [{{name: a, sha256: {hash}, scopes: []}}]"),
                "no scopes",
            ),
            (
                format!("tokens: [{{name: a, sha256: {hash}, scopes: [all]}}]"),
                "no file of tokens",
            ),
            (
                format!("tokens: [{{name: a, sha256: {hash}, scopes: [open], expires: soon}}]"),
                "no time",
            ),
            ("sbt_123".into(), "no file of tokens"),
        ] {
            let error = Tokens::parse(&text).unwrap_err().chain();
            assert!(error.contains(says), "{text}: {error}");
            assert!(!error.contains(&hash) && !error.contains("sbt_"), "{error}");
        }
        assert_eq!(Tokens::parse("").unwrap(), Tokens::default());
    }

    #[test]
    fn a_token_expires() {
        let mut entry = entry("a", "x");
        let at = |text: &str| humantime::parse_rfc3339(text).unwrap();
        assert!(!entry.is_expired(at("2026-01-01T00:00:00Z")));
        entry.expires = Some("2026-06-01T00:00:00Z".into());
        assert!(!entry.is_expired(at("2026-05-31T23:59:59Z")));
        assert!(entry.is_expired(at("2026-06-01T00:00:00Z")));
    }

    #[test]
    fn a_file_is_replaced_whole_and_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.yaml");
        std::fs::write(&path, "tokens: []\n").unwrap();
        let tokens = Tokens {
            tokens: vec![entry("a", "x")],
        };
        tokens.write(&path).unwrap();
        assert_eq!(Tokens::read(&path).unwrap(), tokens);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = tokens.write(&folder.path().join("no/tokens")).unwrap_err();
        assert!(error.chain().contains("no/tokens"), "{}", error.chain());
    }
}
