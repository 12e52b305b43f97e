//! The streams of a push: which may join it, what they send, and the one answer that all of them
//! get.
use super::{
    Inner, ModelShape, Weights,
    book::Snapshot,
    count_failure, lag,
    member::{Fault, Member},
    publish::conflict,
    staging::Staged,
};
use crate::{
    bounds::{LABEL_BYTES_MAX, PARTS_MAX, check_bytes, check_count},
    error::{Error, Result},
};
use futures::Stream;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, MutexGuard},
};
use superbatch_proto::v1::{PushStart, PushWeightsRequest, Reason, WeightsVersion, lag::Bound};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Most pushes of one run that are staged at the same time; each may take `push_bytes_max` of
/// memory.
const PUSHES_AT_ONCE_MAX: usize = 4;

/// Most refusals that are remembered.
const REFUSALS_KEPT: usize = 64;

pub type At = (u32, i64);
/// The answer of a push; `None` until there is one. It holds a `Status` since errors cannot be
/// cloned and every stream gets the answer.
pub type Answer = Option<Result<WeightsVersion, Status>>;

/// The pushes of a run that are under way, by generation and step.
#[derive(Default)]
pub struct Staging {
    pub pushes: BTreeMap<At, Push>,
    next_stream: u64,
}

pub struct Push {
    pub id: String,
    /// `None` once the push is whole and is being published.
    pub staged: Option<Staged>,
    pub streams: BTreeMap<u64, Rank>,
    pub started: Instant,
    pub answer: watch::Sender<Answer>,
}

pub struct Rank {
    pub rank: u32,
    pub ended: bool,
    pub superseded: CancellationToken,
}

enum Joined {
    Published(WeightsVersion),
    Sending(Member),
    /// The push is whole already, and only its answer is awaited.
    Waiting(Member),
}

impl Weights {
    /// Takes one stream of a push (its messages after the start), and answers when the whole push
    /// is published or refused. `generation` is the run's current one.
    ///
    /// Dropping the future, or an error in `messages`, removes this stream's parts. The stream may
    /// be sent again under the same `push_id`. A push that is published already gets the same
    /// answer again.
    ///
    /// # Errors
    /// `GenerationStale`, `PushOffCadence`, `PushConflict`, `Overloaded`, `Unimplemented`,
    /// `InvalidArgument` for what cannot be pushed; `WeightsRefused` and `MessageTooLarge`, naming
    /// the first bad tensor; and the errors of the verifier and of storage.
    pub async fn push<S>(
        &self,
        generation: u32,
        start: PushStart,
        messages: S,
    ) -> Result<WeightsVersion>
    where
        S: Stream<Item = Result<PushWeightsRequest, Status>> + Send + Unpin,
    {
        let joined = match self.0.admit(generation, &start) {
            Ok(()) => self.join(&start).await,
            Err(e) => Err(e),
        };
        let member = match joined.inspect_err(|e| count_failure(e.reason()))? {
            Joined::Published(version) => {
                let (run, step) = (&self.0.spec.run_id, start.step);
                // The parts are not read, so the client compares the digest with what it would have
                // sent.
                tracing::info!(
                    run,
                    step,
                    version = version.version,
                    digest = version.digest,
                    "push published already"
                );
                return Ok(version);
            }
            Joined::Waiting(member) => return member.wait_for_answer().await,
            Joined::Sending(member) => member,
        };
        let sent = tokio::select! {
            // The answer may come while this stream still sends: another stream's bad tensor has
            // refused the push, or a newer stream of this rank took over. Reading on would only
            // take memory.
            biased;
            answer = member.wait_for_answer() => return answer,
            sent = member.receive(messages) => sent,
        };
        match sent {
            Ok(()) => member.end(),
            Err(Fault::Broken(e)) => return Err(e),
            Err(Fault::Refused(e)) => member.refuse(|_| e),
        }
        if let Ok(answer) = timeout(self.0.spec.push_deadline, member.wait_for_answer()).await {
            return answer;
        }
        member.refuse(Staged::incomplete);
        member.wait_for_answer().await
    }

    async fn join(&self, start: &PushStart) -> Result<Joined> {
        let lost = match self.0.published(start)? {
            Some(version) if !self.0.is_lost(start).await => {
                return Ok(Joined::Published(version));
            }
            published => published.is_some(),
        };
        let shape = self.0.shape().await?;
        let at = (start.generation, start.step);
        let mut staging = self.0.lock();
        // Checked again under the lock, since the push may have been published while the shape was
        // awaited. A push leaves the staging area only after it has entered the book, so it is
        // found in one of them; without this check it would be staged and published a second time.
        if let Some(version) = self.0.published(start)?.filter(|_| !lost) {
            return Ok(Joined::Published(version));
        }
        if !staging.pushes.contains_key(&at) && staging.pushes.len() >= PUSHES_AT_ONCE_MAX {
            let message = format!(
                "{PUSHES_AT_ONCE_MAX} pushes of this run are on their way; push again when one is \
                done"
            );
            return Err(Error::new(Reason::Overloaded, message));
        }
        let stream = staging.next_stream;
        staging.next_stream += 1;
        let push = staging
            .pushes
            .entry(at)
            .or_insert_with(|| Push::new(start, shape, self.0.spec.push_bytes_max));
        let superseded = push.join(stream, start)?;
        let (answer, whole) = (push.answer.subscribe(), push.staged.is_none());
        self.0.publish_traffic(&staging, None);
        let member = Member {
            inner: self.0.clone(),
            at,
            stream,
            answer,
            superseded,
        };
        Ok(if whole {
            Joined::Waiting(member)
        } else {
            Joined::Sending(member)
        })
    }
}

impl Inner {
    pub fn lock(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().expect("no panic while held")
    }

    /// Updates the traffic: all staged pushes, and a push that has just ended, in one change. In
    /// two changes a waiting step could see the push in neither set for a moment, and fall back.
    pub fn publish_traffic(&self, staging: &Staging, ended: Option<(At, &Result<WeightsVersion>)>) {
        let staged: BTreeSet<At> = staging.pushes.keys().copied().collect();
        self.traffic.send_if_modified(|traffic| {
            let old = traffic.clone();
            traffic.refused.retain(|at, _| !staged.contains(at));
            match ended {
                Some((at, Err(error))) if error.reason().is_transient() => {
                    drop(traffic.failed.insert(at, error.chain()))
                }
                Some((at, Err(error))) => {
                    traffic.announced.ended(at);
                    traffic.refused.insert(at, error.chain());
                }
                Some((at, Ok(_))) => {
                    traffic.announced.ended(at);
                    traffic.failed.remove(&at);
                }
                None => {}
            }
            // Only steps that are being decided look these up, so old entries can go.
            for told in [&mut traffic.refused, &mut traffic.failed] {
                while told.len() > REFUSALS_KEPT {
                    told.pop_first();
                }
            }
            traffic.staging = staged;
            *traffic != old
        });
    }

    /// Checks that such a push may come at all.
    fn admit(&self, generation: u32, start: &PushStart) -> Result<()> {
        self.check_due(generation, start.generation, start.step)?;
        if start.base_version.is_some() {
            let message = "pushing changed tensors only (base_version) is not built yet; push all";
            return Err(Error::new(Reason::Unimplemented, message).with("feature", "base_version"));
        }
        if start.push_id.is_empty() {
            return Err(Error::invalid(
                "push_id",
                "push_id is empty; give one id to all ranks' streams of a push",
            ));
        }
        check_bytes("push_id", &start.push_id, LABEL_BYTES_MAX)?;
        check_count("expected_parts", start.expected_parts as usize, PARTS_MAX)
    }

    /// Checks that a push of `step` may come in generation `asked`, while the run is at `current`.
    pub(super) fn check_due(&self, current: u32, asked: u32, step: i64) -> Result<()> {
        if asked != current {
            let message = format!("the run is at generation {current}, and the push is of {asked}");
            return Err(Error::new(Reason::GenerationStale, message).with("generation", current));
        }
        let (every, initial) = (self.spec.push_every_steps, self.spec.first_push);
        let expected = match u64::try_from(step) {
            Ok(step) => {
                matches!(self.spec.lag.bound, Some(Bound::AtMost(_)))
                    || lag::on_cadence(step, every)
            }
            Err(_) => step == -1 && initial,
        };
        if expected {
            return Ok(());
        }
        let message = match step {
            0.. => format!(
                "no push is due after step {step}: push_every_steps is {every}, the next is due \
                after step {}",
                lag::next_push(step.unsigned_abs(), every)
            ),
            -1 => "step -1 is for runs whose learner says first_push".to_owned(),
            _ => format!("step {step} is no step; -1 is the initial push"),
        };
        Err(Error::new(Reason::PushOffCadence, message).with("step", step))
    }

    fn published(&self, start: &PushStart) -> Result<Option<WeightsVersion>> {
        match self.book.borrow().at(start.step, start.generation) {
            Some((id, published, _)) if id == start.push_id => Ok(Some(published.version.clone())),
            Some((id, ..)) => Err(conflict(start.step, id)),
            None => Ok(None),
        }
    }

    /// Returns whether a push was published but its file is lost, although steps may still need it.
    /// The push is then accepted once more, to restore the file.
    async fn is_lost(&self, start: &PushStart) -> bool {
        let snapshot = self
            .book
            .borrow()
            .at(start.step, start.generation)
            .map(|(_, _, snapshot)| snapshot.clone());
        match snapshot {
            Some(Snapshot::Missing) => true,
            // If the store cannot be reached, the file does not count as lost.
            Some(Snapshot::Kept(key)) => self.run.head(&key).await.is_ok_and(|meta| meta.is_none()),
            Some(Snapshot::Retired) | None => false,
        }
    }

    /// Gives all streams of a push their answer, and removes the push.
    pub fn answer(&self, staging: &mut Staging, at: At, answer: Result<WeightsVersion>) {
        if let Err(e) = &answer {
            count_failure(e.reason());
            let run = &self.spec.run_id;
            tracing::warn!(
                run,
                generation = at.0,
                step = at.1,
                error = e.chain(),
                "weights refused"
            );
        }
        let Some(push) = staging.pushes.remove(&at) else {
            return;
        };
        self.publish_traffic(staging, Some((at, &answer)));
        push.answer.send_replace(Some(answer.map_err(Status::from)));
    }
}

impl Push {
    fn new(start: &PushStart, shape: Arc<ModelShape>, bytes_max: u64) -> Self {
        Self {
            id: start.push_id.clone(),
            staged: Some(Staged::new(shape, start.expected_parts, bytes_max)),
            streams: BTreeMap::new(),
            started: Instant::now(),
            answer: watch::Sender::new(None),
        }
    }

    /// Adds a stream. An older stream of the same rank counts as broken: a client sends a rank once
    /// at a time. Its connection may be dead without a sign, and its parts would overlap the new
    /// ones.
    fn join(&mut self, stream: u64, start: &PushStart) -> Result<CancellationToken> {
        if self.id != start.push_id {
            return Err(conflict(start.step, &self.id));
        }
        if let Some(staged) = &mut self.staged {
            // A trainer that came back with another world size cuts its weights into other parts,
            // while ranks of the one before may still hold streams. Those can never make the push
            // whole: a rank of theirs is gone. So the newest cut is taken, and they are told.
            if staged.expected() != start.expected_parts {
                staged.begin_again(start.expected_parts);
                for old in std::mem::take(&mut self.streams).into_values() {
                    old.superseded.cancel();
                }
            }
            if start.expected_parts == 0
                && self.streams.values().any(|other| other.rank != start.rank)
            {
                let message = "expected_parts is 0, so one stream brings all parts, and another \
                rank sends it already";
                return Err(Error::new(Reason::PushConflict, message).with("rank", start.rank));
            }
            let older = self
                .streams
                .extract_if(.., |_, other| other.rank == start.rank);
            for (stream, old) in older {
                staged.drop_stream(stream);
                old.superseded.cancel();
            }
        }
        let superseded = CancellationToken::new();
        let rank = Rank {
            rank: start.rank,
            ended: self.staged.is_none(),
            superseded: superseded.clone(),
        };
        self.streams.insert(stream, rank);
        Ok(superseded)
    }
}
