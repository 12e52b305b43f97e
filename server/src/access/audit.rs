//! The audit log: for each act one line of JSON that says who did what to which run, and how it
//! ended.
use super::Peer;
use crate::{
    error::{Error, Result},
    metrics,
};
use serde_json::{Value, json};
use std::{
    fmt,
    fs::File,
    io::Write,
    path::Path,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, channel, sync_channel},
    },
    time::{Duration, SystemTime},
};

/// Lines that wait to be written. If the queue is full, a line is counted and lost: a slow or full
/// disk must not stop training.
const WAITING_MAX: usize = 4096;
/// How long the waiting lines may take when the process ends: a disk that does not answer must not
/// hold it.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// Writes to a file, or discards if none is set. Cheap to clone. When the last clone is dropped,
/// all waiting lines are written, as far as the disk takes them within [`FLUSH_MAX`].
#[derive(Clone, Default)]
pub struct Audit(Option<Arc<Writer>>);

struct Writer {
    lines: Option<SyncSender<String>>,
    /// Nothing is sent: the other end is dropped when the thread ends. In a mutex, since a receiver
    /// cannot be shared among threads.
    ended: Mutex<Receiver<()>>,
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Audit"
        } else {
            "Audit(none)"
        })
    }
}

impl Audit {
    /// Appends to the file at `path`.
    ///
    /// # Errors
    /// `InvalidArgument` if it cannot be opened.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = File::options();
        let file = options.append(true).create(true).mode(0o600).open(path);
        let file = file.map_err(|e| {
            let message = format!("cannot write the audit log to {}", path.display());
            Error::invalid("audit.file", message).because(e)
        })?;
        // A thread of its own, since callers are async tasks and a write may block for as long as
        // the disk does.
        let (lines, written) = sync_channel(WAITING_MAX);
        let (ends, ended) = channel::<()>();
        let writing = move || {
            write(file, &written);
            drop(ends);
        };
        let thread = std::thread::Builder::new()
            .name("audit".into())
            .spawn(writing);
        thread.map_err(|e| Error::internal("cannot start a thread").because(e))?;
        Ok(Self(Some(Arc::new(Writer {
            lines: Some(lines),
            ended: Mutex::new(ended),
        }))))
    }

    /// Notes what `who` (a token's name) did from which address to which run, and how it ended.
    pub fn record<T>(
        &self,
        what: &'static str,
        who: Option<&str>,
        peer: Peer,
        run: Option<&str>,
        outcome: &Result<T>,
        detail: Value,
    ) {
        let Some(lines) = self.0.as_ref().and_then(|writer| writer.lines.as_ref()) else {
            return;
        };
        let line = line(SystemTime::now(), what, who, peer, run, outcome, detail);
        match lines.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                metrics::audit_lost().increment(1);
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Without a sender the thread writes the waiting lines and ends.
        drop(self.lines.take());
        let Ok(ended) = self.ended.get_mut() else {
            return;
        };
        if ended.recv_timeout(FLUSH_MAX) == Err(RecvTimeoutError::Timeout) {
            tracing::error!("the audit log's disk does not answer; its last lines are lost");
        }
    }
}

fn write(mut file: File, lines: &Receiver<String>) {
    let mut failing = false;
    for line in lines {
        match file.write_all(line.as_bytes()) {
            Ok(()) => failing = false,
            Err(error) => {
                metrics::audit_lost().increment(1);
                if !failing {
                    tracing::error!(%error, "cannot write the audit log");
                }
                failing = true;
            }
        }
    }
}

fn line<T>(
    at: SystemTime,
    what: &str,
    who: Option<&str>,
    peer: Peer,
    run: Option<&str>,
    outcome: &Result<T>,
    detail: Value,
) -> String {
    let mut line = json!({
        "time": humantime::format_rfc3339_millis(at).to_string(),
        "what": what,
        "outcome": if outcome.is_ok() { "accepted" } else { "refused" },
        "who": who,
        "address": peer.address.map(|address| address.ip().to_string()),
        "run": run,
    });
    if let Err(error) = outcome {
        line["reason"] = superbatch_proto::reason_name(error.reason()).into();
    }
    if !detail.is_null() {
        line["detail"] = detail;
    }
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::Reason;

    #[test]
    fn what_is_noted_is_a_line_of_json() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let audit = Audit::open(Some(&path)).unwrap();
        let peer = Peer {
            address: Some("10.0.0.7:4711".parse().unwrap()),
        };
        audit.record(
            "open",
            Some("alice"),
            peer,
            Some("a\n\"b"),
            &Ok(()),
            json!(null),
        );
        let refused = Err::<(), _>(Error::new(Reason::WeightsRefused, "NaN"));
        audit.record("push", None, peer, Some("c"), &refused, json!({"step": 3}));
        drop(audit);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["run"], "a\n\"b");
        assert_eq!(lines[0]["who"], "alice");
        assert_eq!(lines[0]["outcome"], "accepted");
        assert_eq!(lines[1]["reason"], "WEIGHTS_REFUSED");
        assert_eq!(lines[1]["address"], "10.0.0.7");
        assert_eq!(lines[1]["detail"]["step"], 3);
        let time = lines[1]["time"].as_str().unwrap();
        assert!(humantime::parse_rfc3339(time).is_ok(), "{time}");
        assert!(Audit::open(Some(&folder.path().join("no/audit"))).is_err());
    }
}
