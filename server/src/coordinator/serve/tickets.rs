//! Tickets for the rows of one rank, which its client fetches from the workers that hold them.
use crate::{
    coordinator::score::kept::{OnWorkers, Part},
    error::{Error, Result},
    ticket::expiry,
};
use std::time::{Duration, SystemTime};
use superbatch_proto::v1::{SelectBatchRequest, Ticket, TicketClaims};

/// What a stream has beside the rows' bytes, if there are few.
const STREAM_BESIDE_BYTES: u64 = 16 << 20;

/// Returns the most bytes of a stream of rows that take so many bytes of a worker's memory. An
/// Arrow stream describes and aligns each column of each record batch. Two batches that follow each
/// other have more than 4 MiB of rows, so this adds far less than half.
fn stream_bytes_max(held: u64) -> u64 {
    held.saturating_add(held / 2)
        .saturating_add(STREAM_BESIDE_BYTES)
}

/// What all tickets of one answer share.
pub struct Terms<'a> {
    pub request: &'a SelectBatchRequest,
    /// The generation that made the choice, for which the rows are held.
    pub generation: u32,
    /// The name in the workers' certificates.
    pub server_name: &'a str,
    pub now: SystemTime,
    pub life: Duration,
}

/// Returns the tickets for the rows at `indices` of the draw, which are the rank's batch in order:
/// one for each worker that holds some.
///
/// # Errors
/// `Internal` if a worker that holds rows has no key.
pub fn tickets(rows: &OnWorkers, indices: &[usize], terms: &Terms<'_>) -> Result<Vec<Ticket>> {
    // Of each part, the rows there and the numbers in the batch.
    let mut wanted: Vec<(Vec<u32>, Vec<u32>)> = vec![Default::default(); rows.parts.len()];
    for (number, index) in (0_u32..).zip(indices) {
        let (part, row) = rows.places[*index];
        let (there, here) = &mut wanted[part as usize];
        there.push(row);
        here.push(number);
    }
    let asked = rows.parts.iter().zip(wanted);
    let tickets = asked.filter(|(_, (there, _))| !there.is_empty());
    let ticket = |(part, (there, here)): (&Part, (Vec<u32>, Vec<u32>))| {
        let key =
            part.worker.ticket_key.as_ref().ok_or_else(|| {
                Error::internal("rows are held by a worker that serves no tickets")
            })?;
        let claims = TicketClaims {
            run_id: terms.request.run_id.clone(),
            generation: terms.generation,
            step: terms.request.step,
            rank: terms.request.rank,
            world_size: terms.request.world_size,
            kept: part.id,
            rows: there,
            expires_unix_ms: expiry(terms.now, terms.life),
        };
        Ok(Ticket {
            address: part.worker.address.clone(),
            server_name: terms.server_name.to_owned(),
            ticket: key.sign(&claims),
            rows: here,
            stream_bytes_max: stream_bytes_max(part.bytes),
        })
    };
    tickets.map(ticket).collect()
}
