//! One rank's batch: the rows of its share, in the way of the run's delivery.
use crate::{
    blocking::blocking,
    coordinator::{
        runs::{registry::Coordinator, run::Run},
        score::kept::Data,
        serve::{
            output,
            ready::{Encoded, Ready, Share},
            share,
            tickets::{Terms, tickets},
        },
    },
    error::{Error, Result},
    ipc, metrics, traces,
};
use bytes::Bytes;
use std::{sync::Arc, time::SystemTime};
use superbatch_proto::{
    Checksum,
    v1::{
        BatchHeader, BatchTrailer, Delivery, Intent, ReceiptSummary, RunSpec, SelectBatchRequest,
        Ticket,
    },
};
use tokio::time::Instant;
use tracing::Span;

/// One rank's slice, ready to be sent.
pub(crate) struct Batch {
    pub header: BatchHeader,
    /// The rest of the stream, from the offset on.
    pub parts: Vec<Bytes>,
    pub trailer: BatchTrailer,
    /// Ends when the batch is sent.
    pub span: Span,
}

/// How one request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Whole,
    Located,
    /// The service's own columns, and tickets for the rest.
    Tickets,
}

/// Returns one rank's batch, once its step is decided.
///
/// # Errors
/// Those of the step; `InvalidArgument` for a delivery that the run does not have, or an offset
/// beyond the stream.
pub(crate) async fn batch(
    coordinator: &Coordinator,
    request: &SelectBatchRequest,
) -> Result<Batch> {
    let run = coordinator.run(&request.run_id).await?;
    let delivery = delivery(&run.run().spec(), request)?;
    run.run().calls.train();
    let asked = Instant::now();
    let need = request.intent() != Intent::Prefetch;
    let ready = run.select(request, need).await?;
    let waited = asked.elapsed().as_secs_f64();
    let summary = ready.receipt.summary.clone().unwrap_or_default();
    let span = traces::serve(&summary, request.rank, waited);
    if need {
        metrics::trainer_wait().record(waited);
        run.run().note_wait(request.step, asked.elapsed());
    } else {
        run.run().note_served_ahead(request.step);
    }
    let (way, why) = way(run.run(), delivery, &ready).await?;
    // A stream that goes on where it broke is no further batch.
    if let Some(why) = why.filter(|_| request.resume_offset == 0) {
        metrics::direct_fallbacks(why).increment(1);
    }
    let (stream, tickets) = encoded(run.run(), request, &ready, way).await?;
    let stream_bytes = stream.bytes();
    if request.resume_offset > stream_bytes {
        let message = format!(
            "resume_offset {} is beyond the stream's {stream_bytes} bytes",
            request.resume_offset
        );
        return Err(Error::invalid("resume_offset", message));
    }
    metrics::sent_bytes(way.name()).increment(stream_bytes - request.resume_offset);
    let rows = summary.sub_batch_size / request.world_size;
    let receipt = ReceiptSummary {
        generation: request.generation,
        run_totals: None,
        ..summary
    };
    Ok(Batch {
        header: BatchHeader {
            receipt: Some(receipt),
            rank: request.rank,
            world_size: request.world_size,
            rows,
            stream_bytes,
            offset: request.resume_offset,
            tickets,
        },
        trailer: BatchTrailer {
            rows,
            xxh3: stream.checksum,
        },
        parts: ipc::from_offset(stream.parts, request.resume_offset).collect(),
        span,
    })
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Whole => "coordinator",
            Self::Located => "locators",
            Self::Tickets => "direct",
        }
    }
}

/// Returns the delivery that a request asks for.
///
/// # Errors
/// `InvalidArgument` if the run does not have it.
fn delivery(spec: &RunSpec, request: &SelectBatchRequest) -> Result<Delivery> {
    let (of_run, asked) = (spec.delivery(), request.delivery());
    match (of_run, asked) {
        (Delivery::Locators, Delivery::Unspecified) => Ok(of_run),
        (_, Delivery::Unspecified) => Ok(Delivery::Coordinator),
        (Delivery::Direct, Delivery::Coordinator) => Ok(asked),
        (of_run, asked) if of_run == asked => Ok(asked),
        (of_run, asked) => {
            let [has, wants] = [of_run, asked].map(superbatch_proto::reflect::Word::word);
            let message = format!(
                "the run was opened with delivery {has}, and the request asks for {wants}; open \
                another run with delivery {wants}"
            );
            Err(Error::invalid("delivery", message))
        }
    }
}

/// Returns how a request is answered, and why a run with direct delivery is not served directly.
/// Rows that this process must stream and does not hold are read again.
async fn way(run: &Run, delivery: Delivery, ready: &Ready) -> Result<(Way, Option<&'static str>)> {
    let is_on_workers = matches!(ready.rows, Data::OnWorkers(_));
    let (way, why) = way_of(run.spec().delivery(), delivery, is_on_workers, || {
        let live = run.deps.pool.live(std::time::Instant::now());
        live.iter().all(|worker| worker.ticket_key.is_some())
    });
    if way == Way::Whole && is_on_workers {
        ready.fetched(run.rows_again(&ready.receipt)).await?;
    }
    Ok((way, why))
}

/// As [`way`]: `of_run` is the run's delivery, `asked` the request's. `have_addresses` tells
/// whether trainers can reach all workers.
fn way_of(
    of_run: Delivery,
    asked: Delivery,
    is_on_workers: bool,
    have_addresses: impl FnOnce() -> bool,
) -> (Way, Option<&'static str>) {
    match (of_run, asked) {
        (_, Delivery::Locators) => (Way::Located, None),
        (Delivery::Direct, Delivery::Direct) if is_on_workers => (Way::Tickets, None),
        (Delivery::Direct, _) if is_on_workers => (Way::Whole, Some("asked")),
        (Delivery::Direct, _) if have_addresses() => (Way::Whole, Some("not_held")),
        (Delivery::Direct, _) => (Way::Whole, Some("no_address")),
        _ => (Way::Whole, None),
    }
}

/// Returns the rank's stream and its tickets. A stream that is kept is not made again.
async fn encoded(
    run: &Arc<Run>,
    request: &SelectBatchRequest,
    ready: &Arc<Ready>,
    way: Way,
) -> Result<(Encoded, Vec<Ticket>)> {
    // Tickets end, so they are made for each answer.
    let share = (way != Way::Tickets).then_some(Share {
        rank: request.rank,
        world_size: request.world_size,
        is_located: way == Way::Located,
    });
    if let Some(kept) = share.and_then(|share| ready.stream(share)) {
        return Ok((kept, Vec::new()));
    }
    let (run, request, ready) = (run.clone(), request.clone(), ready.clone());
    // Copies and hashes all bytes of the rank's slice, off the async threads.
    blocking("encoding the batch", move || {
        let (parts, tickets) = rank_parts(&run, &request, &ready, way)?;
        let mut checksum = Checksum::default();
        for part in &parts {
            checksum.update(part);
        }
        let checksum = checksum.finish().to_vec().into();
        let stream = Encoded { parts, checksum };
        if let Some(share) = share {
            ready.keep_stream(share, &stream);
        }
        Ok((stream, tickets))
    })
    .await
}

/// Returns the rank's stream and its tickets.
fn rank_parts(
    run: &Run,
    request: &SelectBatchRequest,
    ready: &Arc<Ready>,
    way: Way,
) -> Result<(Vec<Bytes>, Vec<Ticket>)> {
    let (spec, receipt, schema) = (run.spec(), &ready.receipt, &run.output_schema);
    let groups = share::groups(&receipt.chosen);
    let (rank, world) = (request.rank, request.world_size);
    let (seed, step, micro) = (spec.seed, request.step, spec.micro_batches);
    let indices = share::slice(seed, step, &groups, world, micro, rank)?;
    let table = || {
        let not_in_hand = || Error::internal("the rows of a step are not in hand");
        ready.table().ok_or_else(not_in_hand)
    };
    let parts = match (way, &ready.rows) {
        (Way::Tickets, Data::OnWorkers(rows)) => {
            let terms = Terms {
                request,
                generation: receipt.summary.as_ref().map_or(0, |s| s.generation),
                server_name: run.deps.pool.server_name(),
                now: SystemTime::now(),
                life: run.deps.limits.ticket_life,
            };
            let tickets = tickets(rows, &indices, &terms)?;
            return Ok((output::own_stream(schema, receipt, &indices)?, tickets));
        }
        (Way::Located, _) => {
            output::located_stream(schema, (table()?, &run.manifest), receipt, &indices)?
        }
        _ => output::rank_stream(schema, table()?, receipt, &indices)?,
    };
    Ok((parts, Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::Reason;

    #[test]
    fn a_batch_that_comes_whole_says_why() {
        use Delivery::{Coordinator, Direct, Locators};
        let why = |run, asked, held, addresses| way_of(run, asked, held, || addresses);
        for addresses in [true, false] {
            assert_eq!(why(Direct, Direct, true, addresses), (Way::Tickets, None));
            let asked = (Way::Whole, Some("asked"));
            assert_eq!(why(Direct, Coordinator, true, addresses), asked);
            let through = why(Coordinator, Coordinator, false, addresses);
            assert_eq!(through, (Way::Whole, None));
            let located = why(Locators, Locators, false, addresses);
            assert_eq!(located, (Way::Located, None));
        }
        let not_held = (Way::Whole, Some("not_held"));
        assert_eq!(why(Direct, Direct, false, true), not_held);
        let no_address = (Way::Whole, Some("no_address"));
        assert_eq!(why(Direct, Direct, false, false), no_address);
    }

    #[test]
    fn a_run_serves_its_own_delivery_and_direct_ones_two() {
        let of = |run: Delivery, asked: Delivery| {
            let spec = RunSpec {
                delivery: run.into(),
                ..Default::default()
            };
            let request = SelectBatchRequest {
                delivery: asked.into(),
                ..Default::default()
            };
            delivery(&spec, &request).map_err(|error| error.reason())
        };
        use Delivery::{Coordinator, Direct, Locators, Unspecified};
        for run in [Coordinator, Direct, Locators] {
            assert_eq!(of(run, run), Ok(run));
        }
        assert_eq!(of(Direct, Coordinator), Ok(Coordinator));
        assert_eq!(of(Direct, Unspecified), Ok(Coordinator));
        assert_eq!(of(Locators, Unspecified), Ok(Locators));
        for (run, asked) in [
            (Coordinator, Direct),
            (Coordinator, Locators),
            (Direct, Locators),
            (Locators, Coordinator),
            (Locators, Direct),
        ] {
            assert_eq!(
                of(run, asked),
                Err(Reason::InvalidArgument),
                "{run:?} {asked:?}"
            );
        }
    }
}
