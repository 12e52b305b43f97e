//! Which streams may join a push, and what a stream that joins has to do.
use super::{Inner, Weights, book::Snapshot, lag, member::Member, publish::conflict, push::Push};
use crate::{
    bounds::{LABEL_BYTES_MAX, PARTS_MAX, check_bytes, check_count},
    error::{Error, Result},
};
use superbatch_proto::v1::{PushStart, Reason, WeightsVersion, lag::Bound};

/// Most pushes of one run that are staged at the same time; each may take `push_bytes_max` of
/// memory.
const PUSHES_AT_ONCE_MAX: usize = 4;

/// What there is to do for a stream that joined.
pub(super) enum Joined {
    Published(WeightsVersion),
    Sending(Member),
    /// The push is whole already, and only its answer is awaited.
    Waiting(Member),
    /// The rank has sent it again since.
    Late(Error),
}

impl Weights {
    /// Has a stream join the push that `start` names, the first one of it or a further one.
    ///
    /// # Errors
    /// `Overloaded` if too many pushes are staged, and those of [`Push::join`].
    pub(super) async fn join(&self, start: &PushStart, known: &[String]) -> Result<Joined> {
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
        let begin = || Push::new(start, known, shape, self.0.spec.push_bytes_max);
        let push = staging
            .pushes
            .entry(at)
            .or_insert_with(|| self.0.begin_ahead(begin()));
        if let Err(late) = push.check_late(start) {
            return Ok(Joined::Late(late));
        }
        let superseded = push.join(stream, start, known)?;
        let (answer, whole) = (push.answer.subscribe(), push.staged.is_none());
        self.0.publish_traffic(&staging, None);
        let member = Member {
            inner: self.0.clone(),
            at,
            stream,
            answer,
            superseded,
            reads: (!start.snapshot_uri.is_empty()).then(|| start.snapshot_uri.clone()),
        };
        Ok(if whole {
            Joined::Waiting(member)
        } else {
            Joined::Sending(member)
        })
    }
}

impl Inner {
    /// Checks that such a push may come at all.
    pub(super) fn admit(&self, generation: u32, start: &PushStart) -> Result<()> {
        self.check_due(generation, start.generation, start.step)?;
        if let Some(base) = start.base_version {
            self.check_base(base)?;
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
}
