//! Connections to the workers that hold rows for trainers.
use crate::{Error, Result};
use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, MutexGuard, atomic::AtomicU64},
    time::Duration,
};
use superbatch_proto::{
    MESSAGE_BYTES_MAX,
    v1::{Ticket, delivery_service_client::DeliveryServiceClient},
};
use superbatch_transport::Dialer;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};

/// How long a worker that could not be reached is not tried again. Without it, each batch would
/// wait for the same connection before it goes to the coordinator.
const LOST_FOR: Duration = Duration::from_secs(30);
/// Workers to which connections are kept. With more, all are opened anew.
const LINES_MAX: usize = 4096;

pub(crate) type Api = DeliveryServiceClient<Channel>;
type Tune = Box<dyn Fn(Endpoint) -> Endpoint + Send + Sync>;

/// Connections by address and name. They open at their first call, and restore themselves.
pub(crate) struct Workers {
    dialer: Dialer,
    tune: Tune,
    /// Whether rows may come without TLS from another machine.
    allow_plain: bool,
    lines: Mutex<HashMap<(String, String), Line>>,
    /// Batches that workers sent, and batches that the coordinator sent in their place.
    pub(crate) direct: AtomicU64,
    pub(crate) fallbacks: AtomicU64,
}

struct Line {
    api: Api,
    lost_at: Option<Instant>,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").finish_non_exhaustive()
    }
}

impl Workers {
    pub(crate) fn new(dialer: Dialer, allow_plain: bool, tune: Tune) -> Self {
        Self {
            dialer,
            tune,
            allow_plain,
            lines: Mutex::default(),
            direct: AtomicU64::new(0),
            fallbacks: AtomicU64::new(0),
        }
    }

    /// Returns the connection for a ticket.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that may not be used, or that could not be reached a
    /// moment ago.
    pub(crate) fn line(&self, ticket: &Ticket) -> Result<Api> {
        if !self.allow_plain && !is_safe(&ticket.address) {
            let message = format!(
                "the worker at {} has no TLS, and the coordinator was not reached over a network \
                without TLS; give the worker a certificate, or say allow_insecure on a network \
                that you trust whole",
                ticket.address
            );
            return Err(Error::invalid("ticket", message));
        }
        let mut lines = self.lock();
        let key = (ticket.address.clone(), ticket.server_name.clone());
        if let Some(line) = lines.get(&key) {
            if line.lost_at.is_some_and(|at| at.elapsed() < LOST_FOR) {
                let message = format!("the worker at {} could not be reached", ticket.address);
                return Err(Error::invalid("ticket", message));
            }
            return Ok(line.api.clone());
        }
        let dialer = match ticket.server_name.as_str() {
            "" => self.dialer.unnamed(),
            name => self.dialer.named(name),
        };
        let channel = dialer.connect_lazy(&ticket.address, &self.tune);
        let channel = channel.map_err(|e| {
            Error::invalid("ticket", format!("{:?} is no address: {e}", ticket.address))
        })?;
        let api = Api::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        if lines.len() >= LINES_MAX {
            lines.clear();
        }
        let line = Line {
            api: api.clone(),
            lost_at: None,
        };
        lines.insert(key, line);
        Ok(api)
    }

    /// Notes whether a worker answered.
    pub(crate) fn note_answer(&self, ticket: &Ticket, answered: bool) {
        let key = (ticket.address.clone(), ticket.server_name.clone());
        if let Some(line) = self.lock().get_mut(&key) {
            line.lost_at = (!answered).then(Instant::now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), Line>> {
        self.lines.lock().expect("no panic while held")
    }
}

/// Returns whether the connection to an address is encrypted or local.
fn is_safe(address: &str) -> bool {
    let uri: Option<tonic::transport::Uri> = address.parse().ok();
    uri.is_some_and(|uri| {
        uri.scheme_str() == Some("https")
            || uri.host().is_some_and(crate::credentials::is_this_machine)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(address: &str) -> Ticket {
        Ticket {
            address: address.into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_lost_worker_is_left_alone_for_a_while() {
        let workers = Workers::new(Dialer::default(), true, Box::new(|endpoint| endpoint));
        let there = ticket("http://10.0.0.7:1");
        assert!(workers.line(&there).is_ok());
        workers.note_answer(&there, false);
        assert!(workers.line(&there).is_err());
        workers.note_answer(&there, true);
        assert!(workers.line(&there).is_ok());
        assert!(workers.line(&ticket("nonsense\n")).is_err());
    }

    #[tokio::test]
    async fn rows_come_in_the_clear_only_where_the_coordinator_does() {
        let workers = Workers::new(Dialer::default(), false, Box::new(|endpoint| endpoint));
        assert!(workers.line(&ticket("http://10.0.0.7:1")).is_err());
        for safe in ["https://10.0.0.7:1", "http://127.0.0.1:1"] {
            assert!(workers.line(&ticket(safe)).is_ok(), "{safe}");
        }
    }
}
