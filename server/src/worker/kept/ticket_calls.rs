//! How many `FetchTicket` calls are served at a time, of all tickets and of one.
use crate::error::{Error, Result};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use superbatch_proto::v1::Reason;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Calls that are served at a time. Each has some MiB of encoded rows under way, and a few fill the
/// network.
const CALLS_MAX: usize = 64;
/// Of them, those of one ticket. A client has one, and another one beside it when the first broke
/// and that was not noticed yet.
const CALLS_OF_TICKET_MAX: u32 = 4;
/// How long a call waits for its turn. Clients wait longer for the first bytes.
const TURN_MAX: Duration = Duration::from_secs(10);

/// Calls by the ticket they came with.
type ByTicket = Arc<Mutex<HashMap<Vec<u8>, u32>>>;

pub(crate) struct TicketCalls {
    permits: Arc<Semaphore>,
    by_ticket: ByTicket,
}

/// A call that is served for as long as this lives.
pub(crate) struct Admitted {
    _of_ticket: OfTicket,
    _permit: OwnedSemaphorePermit,
}

/// A call that is counted among those of its ticket.
struct OfTicket {
    ticket: Vec<u8>,
    by_ticket: ByTicket,
}

impl Default for TicketCalls {
    fn default() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(CALLS_MAX)),
            by_ticket: Arc::default(),
        }
    }
}

impl TicketCalls {
    /// Waits for the call's turn. `ticket` was verified.
    ///
    /// # Errors
    /// `Overloaded` if the ticket has too many calls, or no turn comes.
    pub(crate) async fn admit(&self, ticket: &[u8]) -> Result<Admitted> {
        let of_ticket = self.of_ticket(ticket)?;
        let turn = timeout(TURN_MAX, self.permits.clone().acquire_owned()).await;
        let permit = turn.ok().and_then(Result::ok).ok_or_else(|| {
            let message = format!("{CALLS_MAX} calls of trainers are served already");
            Error::new(Reason::Overloaded, message)
        })?;
        Ok(Admitted {
            _of_ticket: of_ticket,
            _permit: permit,
        })
    }

    fn of_ticket(&self, ticket: &[u8]) -> Result<OfTicket> {
        let mut by_ticket = self.by_ticket.lock().expect("no panic while held");
        let calls = by_ticket.entry(ticket.to_vec()).or_default();
        if *calls >= CALLS_OF_TICKET_MAX {
            let message = format!("{CALLS_OF_TICKET_MAX} calls with this ticket are open already");
            return Err(Error::new(Reason::Overloaded, message));
        }
        *calls += 1;
        Ok(OfTicket {
            ticket: ticket.to_vec(),
            by_ticket: self.by_ticket.clone(),
        })
    }
}

impl Drop for OfTicket {
    fn drop(&mut self) {
        let mut by_ticket = self.by_ticket.lock().expect("no panic while held");
        if let Some(calls) = by_ticket.get_mut(&self.ticket) {
            *calls -= 1;
            if *calls == 0 {
                by_ticket.remove(&self.ticket);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_ticket_opens_few_calls() {
        let calls = TicketCalls::default();
        let mut open = Vec::new();
        for _ in 0..CALLS_OF_TICKET_MAX {
            open.push(calls.admit(b"one").await.ok().unwrap());
        }
        let refused = calls.admit(b"one").await.err().unwrap();
        assert_eq!(refused.reason(), Reason::Overloaded);
        assert!(calls.admit(b"another").await.is_ok());
        open.pop();
        assert!(calls.admit(b"one").await.is_ok());
        open.clear();
        assert!(calls.by_ticket.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_call_waits_for_its_turn() {
        let calls = TicketCalls::default();
        let mut open = Vec::new();
        for n in 0..CALLS_MAX {
            open.push(calls.admit(&[n as u8]).await.ok().unwrap());
        }
        let waits = calls.admit(b"next");
        let mut waits = std::pin::pin!(waits);
        assert!(futures::poll!(&mut waits).is_pending());
        open.pop();
        assert!(waits.await.is_ok());
    }
}
