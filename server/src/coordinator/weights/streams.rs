//! The streams of a push: what they send, and the one answer that all of them get.
use super::{
    Inner, Weights, admission::Joined, count_failure, member::Fault, push::Push, staging::Staged,
};
use crate::{error::Result, metrics};
use futures::Stream;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::MutexGuard,
};
use superbatch_proto::v1::{PushStart, PushWeightsRequest, WeightsVersion};
use tokio::time::timeout;
use tonic::Status;

/// Most refusals that are remembered.
const REFUSALS_KEPT: usize = 64;

pub(super) type At = (u32, i64);
/// The answer of a push; `None` until there is one. It holds a `Status` since errors cannot be
/// cloned and every stream gets the answer.
pub(super) type Answer = Option<Result<WeightsVersion, Status>>;

/// The pushes of a run that are under way, by generation and step.
#[derive(Default)]
pub struct Staging {
    pub pushes: BTreeMap<At, Push>,
    pub(super) next_stream: u64,
}

impl Weights {
    /// Takes one stream of a push (its messages after the start), and answers when the whole push
    /// is published or refused. `generation` is the run's current one, and `known` are the starts
    /// of the trainer that have asked for a step, in their order.
    ///
    /// Dropping the future, or an error in `messages`, removes this stream's parts. The stream may
    /// be sent again under the same `push_id`. A push that is published already gets the same
    /// answer again.
    ///
    /// # Errors
    /// `GenerationStale`, `PushOffCadence`, `PushConflict`, `Overloaded`, `WeightsMissing` of a
    /// base, `InvalidArgument` for what cannot be pushed; `WeightsRefused` and `MessageTooLarge`,
    /// naming the first bad tensor; and the errors of the verifier and of storage.
    pub async fn push<S>(
        &self,
        generation: u32,
        known: &[String],
        start: PushStart,
        messages: S,
    ) -> Result<WeightsVersion>
    where
        S: Stream<Item = Result<PushWeightsRequest, Status>> + Send + Unpin,
    {
        let joined = match self.0.admit(generation, &start) {
            Ok(()) => self.join(&start, known).await,
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
            Joined::Late(error) => {
                // No refusal that an operator has to look at: the newer stream goes on.
                metrics::weight_push_failures("BROKEN").increment(1);
                return Err(error);
            }
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
            Err(Fault::Refused(e)) => member.refuse(|_, _| e),
        }
        if let Ok(answer) = timeout(self.0.spec.push_deadline, member.wait_for_answer()).await {
            return answer;
        }
        member.refuse(Staged::incomplete);
        member.wait_for_answer().await
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
            for kept in [&mut traffic.refused, &mut traffic.failed] {
                while kept.len() > REFUSALS_KEPT {
                    kept.pop_first();
                }
            }
            traffic.staging = staged;
            *traffic != old
        });
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
