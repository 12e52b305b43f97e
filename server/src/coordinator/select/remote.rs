//! Selection on a worker's device.
use super::{PART_CANDIDATES, Selector, local::LocalSelector};
use crate::{
    coordinator::{
        score::scored::Scored,
        workers::{failover::Failover, pool::Pool, replies::check_selected, worker::Worker},
    },
    error::{Result, from_status},
    traces::carrying,
};
use async_trait::async_trait;
use std::{ops::Range, sync::Arc};
use superbatch_proto::{
    PART_BYTES,
    v1::{
        CandidatesPart, EmbeddingPart, Reason, SelectBegin, SelectRequest, SelectResponse, Tower,
        select_request::Message,
    },
};

/// Selects on a worker's device.
pub struct WorkerSelector {
    pub pool: Arc<Pool>,
    /// For uniform draws: they need no device, and their answer lists every candidate, too many for
    /// one message.
    pub local: LocalSelector,
    /// Prefix of the device's name of the workers to use; empty for any device.
    pub device: &'static str,
}

/// Returns a `SelectBegin` with as many candidates as one message should hold, then messages with
/// the rest.
pub fn candidates(mut begin: SelectBegin) -> Vec<Message> {
    let (positions, holes, terms) = (
        std::mem::take(&mut begin.positions),
        std::mem::take(&mut begin.holes),
        std::mem::take(&mut begin.terms),
    );
    let (mut positions, mut holes, mut terms) = (
        positions.chunks(PART_CANDIDATES),
        holes.chunks(PART_CANDIDATES),
        terms.chunks(PART_CANDIDATES),
    );
    let mut next = || match (positions.next(), holes.next(), terms.next()) {
        (None, None, None) => None,
        (positions, holes, terms) => Some(CandidatesPart {
            positions: positions.unwrap_or_default().to_vec(),
            holes: holes.unwrap_or_default().to_vec(),
            terms: terms.unwrap_or_default().to_vec(),
        }),
    };
    let first = next().unwrap_or_default();
    (begin.positions, begin.holes, begin.terms) = (first.positions, first.holes, first.terms);
    let rest = std::iter::from_fn(next);
    [Message::Begin(begin)]
        .into_iter()
        .chain(rest.map(Message::Candidates))
        .collect()
}

/// Both models' embeddings: the learner's, then the reference's.
type Both = Arc<[(Tower, Option<Scored>); 2]>;

/// Cuts embeddings into messages. Each is made when it is sent: of a super-batch of gigabytes no
/// second copy is in memory.
fn parts(both: Both) -> impl Iterator<Item = Message> + Send {
    (0..both.len()).flat_map(move |model| {
        let both = both.clone();
        let (rows, step) = both[model].1.as_ref().map_or((0, 1), |scored| {
            let dim = scored.embedded.dim.max(1);
            let step = (PART_BYTES / (8 * dim)).max(1);
            (scored.embedded.image.len() / dim, step)
        });
        (0..rows).step_by(step).filter_map(move |first| {
            let (tower, scored) = &both[model];
            let part = part(*tower, scored.as_ref()?, first..(first + step).min(rows));
            Some(Message::Embedding(part))
        })
    })
}

fn part(tower: Tower, scored: &Scored, rows: Range<usize>) -> EmbeddingPart {
    let embedded = &scored.embedded;
    let dim = embedded.dim;
    let range = rows.start * dim..rows.end * dim;
    EmbeddingPart {
        tower: tower as i32,
        first: rows.start as u32,
        rows: rows.len() as u32,
        dim: dim as u32,
        image: embedded.image.bytes(range.clone()),
        text: embedded.text.bytes(range),
    }
}

#[async_trait]
impl Selector for WorkerSelector {
    async fn select(
        &self,
        begin: SelectBegin,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse> {
        if learner.is_none() && reference.is_none() {
            return self.local.select(begin, None, None).await;
        }
        let asked = begin.clone();
        let candidates = candidates(begin);
        let both: Both = Arc::new([(Tower::Learner, learner), (Tower::Reference, reference)]);
        let mut failover = Failover::new(&self.pool).on(self.device);
        loop {
            let worker = failover.worker().await?;
            let messages = candidates.clone().into_iter().chain(parts(both.clone()));
            match self.select_on(&worker, messages, &asked).await {
                Ok(selected) => return Ok(selected),
                Err(error) => failover.failed(&worker, error)?,
            }
        }
    }
}

impl WorkerSelector {
    async fn select_on(
        &self,
        worker: &Worker,
        messages: impl Iterator<Item = Message> + Send + 'static,
        asked: &SelectBegin,
    ) -> Result<SelectResponse> {
        let mut client = worker.client();
        let requests = messages.map(|message| SelectRequest {
            message: Some(message),
        });
        let answer = client.select(carrying(tokio_stream::iter(requests)));
        let answer = self
            .pool
            .replies()
            .within(worker, "a selection", answer)
            .await?;
        let selected = answer
            .map_err(|status| from_status(status, Reason::NoWorkers))?
            .into_inner();
        check_selected(asked, &selected)?;
        Ok(selected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::{
        score::fetch::fetch_rows,
        workers::{pool::Home, prepare::prepare, replies::Replies},
    };
    use prost::Message as _;
    use std::time::Duration;
    use superbatch_proto::{
        SUPER_BATCH_SIZE_MAX,
        v1::{ComputeDtype, EmbeddingDtype, ModelRef, RegisterRequest},
    };
    use tokio::net::TcpListener;

    /// Candidates whose keys take the most bytes, every one a hole.
    fn begin(count: u32) -> SelectBegin {
        let positions = (0..count).map(|n| u64::MAX - u64::from(n)).collect();
        SelectBegin {
            positions,
            holes: (0..count).collect(),
            terms: (0..count).map(f64::from).collect(),
            step: 7,
            ..Default::default()
        }
    }

    #[test]
    fn candidates_of_any_super_batch_fit_in_messages_and_come_back_in_order() {
        for count in [
            0,
            1,
            PART_CANDIDATES as u32,
            PART_CANDIDATES as u32 + 1,
            SUPER_BATCH_SIZE_MAX,
        ] {
            let whole = begin(count);
            let mut joined = SelectBegin::default();
            for (number, message) in candidates(whole.clone()).into_iter().enumerate() {
                let request = SelectRequest {
                    message: Some(message),
                };
                assert!(
                    request.encoded_len() <= PART_BYTES,
                    "{} bytes",
                    request.encoded_len()
                );
                match request.message {
                    Some(Message::Begin(begin)) if number == 0 => joined = begin,
                    Some(Message::Candidates(part)) if number > 0 => {
                        joined.positions.extend(part.positions);
                        joined.holes.extend(part.holes);
                        joined.terms.extend(part.terms);
                    }
                    other => panic!("message {number} is {other:?}"),
                }
            }
            assert!(joined == whole, "{count} candidates");
        }
    }

    /// Returns a pool whose one worker accepts connections and never answers.
    async fn silent_worker() -> (Pool, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let mut taken = Vec::new();
            while let Ok((socket, _)) = listener.accept().await {
                taken.push(socket);
            }
        });
        let patience = Duration::from_millis(1);
        let pool = Pool::new(Duration::from_secs(60), patience, Home::default());
        let replies = Replies {
            silence_max: Duration::from_millis(50),
            ..Default::default()
        };
        let pool = pool.with_replies(replies);
        let request = RegisterRequest {
            address: address.clone(),
            ..Default::default()
        };
        pool.register(&request, std::time::Instant::now()).unwrap();
        (pool, address)
    }

    #[tokio::test]
    async fn no_call_waits_for_a_silent_worker_without_end() {
        let (pool, at) = silent_worker().await;
        let prepared = prepare(&pool, ModelRef::default(), true).await;
        let said = [(prepared.unwrap_err(), at, "a model")];
        let (pool, at) = silent_worker().await;
        let fetched = fetch_rows(
            &pool,
            superbatch_proto::v1::FetchRowsRequest::default(),
            Failover::new(&pool),
        )
        .await;
        let said = said
            .into_iter()
            .chain([(fetched.unwrap_err(), at, "that it reads rows")]);
        let (pool, at) = silent_worker().await;
        let selector = WorkerSelector {
            pool: Arc::new(pool),
            local: LocalSelector::new(1).unwrap(),
            device: "",
        };
        let values = || crate::selection::Values::with_capacity(EmbeddingDtype::F32, 0);
        let scored = Scored {
            embedded: crate::selection::Embedded {
                image: values(),
                text: values(),
                dim: 1,
            },
            scale: 1.0,
            bias: None,
            digest: String::new(),
            files: Default::default(),
            compute_dtype: ComputeDtype::F32,
            device: String::new(),
            flops: 0.0,
            text_flops: 0.0,
            seconds: 0.0,
            not_finite: Vec::new(),
        };
        let selected = selector.select(begin(1), Some(scored), None).await;
        let said = said.chain([(selected.unwrap_err(), at, "a selection")]);
        for (error, at, what) in said {
            assert_eq!(error.reason(), Reason::NoWorkers);
            let told = error.chain();
            assert!(
                told.contains(&at) && told.contains(&format!("while {what}")),
                "{told}"
            );
            assert!(told.contains("worker_silence_seconds"), "{told}");
        }
    }

    #[test]
    fn a_common_super_batch_needs_one_message() {
        assert_eq!(candidates(begin(20_480)).len(), 1);
    }
}
