//! Chosen rows that trainers fetch with tickets, within a budget of bytes and of time.
//!
//! Room is asked for before rows are copied. Bytes are counted until the last call that sends the
//! rows has freed them, and not until the step is over: a trainer that reads slowly keeps them
//! in memory, whatever the map of held rows says.
use crate::{
    error::{Error, Result},
    worker::inputs::row::Row,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use superbatch_proto::v1::{Reason, TicketClaims};
use tokio_util::sync::CancellationToken;

/// The step whose rows are held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HeldFor {
    pub run_id: String,
    pub generation: u32,
    pub step: u64,
}

/// All rows that this worker holds, by the number that tickets name.
pub(crate) struct Holder(Arc<Inner>);

struct Inner {
    bytes_max: usize,
    /// Bytes of all rows that are held or still sent.
    used: Arc<AtomicUsize>,
    /// How long rows are held at most.
    held_max: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: u64,
    held: BTreeMap<u64, Entry>,
}

struct Entry {
    held_for: HeldFor,
    /// No rows while they are being copied.
    held: Arc<Held>,
}

/// Rows, each with its content hash as last column, and their share of the budget.
struct Held {
    rows: Vec<Row>,
    bytes: usize,
    used: Arc<AtomicUsize>,
}

impl Held {
    /// Takes the bytes of the budget, which the caller has found free.
    fn new(rows: Vec<Row>, bytes: usize, used: &Arc<AtomicUsize>) -> Arc<Self> {
        used.fetch_add(bytes, Ordering::Relaxed);
        let used = used.clone();
        Arc::new(Self { rows, bytes, used })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Room for rows, and then the rows, for as long as this lives.
pub(crate) struct Hold {
    pub id: u64,
    inner: Arc<Inner>,
}

/// The rows of a ticket, in its order. They are counted for as long as this lives.
pub(crate) struct Lent {
    pub rows: Vec<Row>,
    _held: Arc<Held>,
}

impl Holder {
    pub(crate) fn new(bytes_max: usize, held_max: Duration) -> Self {
        Self(Arc::new(Inner {
            bytes_max,
            used: Arc::default(),
            held_max,
            state: Mutex::default(),
        }))
    }

    /// Makes room for rows of `bytes`. Returns `None` if there is no room, also
    /// without rows of newer steps of the same run.
    pub(crate) fn reserve(&self, held_for: HeldFor, bytes: usize) -> Option<Hold> {
        let mut state = self.0.state();
        self.0.make_room(&mut state, &held_for, bytes)?;
        state.last += 1;
        let id = state.last;
        let held = Held::new(Vec::new(), bytes, &self.0.used);
        state.held.insert(id, Entry { held_for, held });
        let inner = self.0.clone();
        Some(Hold { id, inner })
    }

    /// Returns the rows of a ticket.
    ///
    /// # Errors
    /// `RowsNotKept` if they are not held any more.
    pub(crate) fn rows(&self, claims: &TicketClaims) -> Result<Lent> {
        let state = self.0.state();
        let entry = state.held.get(&claims.kept).filter(|entry| {
            let of = &entry.held_for;
            (&of.run_id, of.generation, of.step) == (&claims.run_id, claims.generation, claims.step)
        });
        let held = entry.map(|entry| entry.held.clone());
        drop(state);
        let lent = held.and_then(|held| {
            let row = |row: &u32| held.rows.get(*row as usize).cloned();
            let rows = claims.rows.iter().map(row).collect::<Option<_>>()?;
            Some(Lent { rows, _held: held })
        });
        lent.ok_or_else(|| {
            let message = format!(
                "the rows of step {} of run '{}' are not held here any more; the coordinator \
                serves them",
                claims.step, claims.run_id
            );
            Error::new(Reason::RowsNotKept, message)
        })
    }

    /// Returns how long rows are held, and so sent, at most.
    pub(crate) fn held_max(&self) -> Duration {
        self.0.held_max
    }

    /// Returns the bytes of rows that are held or still sent.
    pub(crate) fn bytes(&self) -> usize {
        self.0.used()
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Lets rows go until `bytes` fit in. Returns `None`, and lets nothing go, if they do not.
    fn make_room(&self, state: &mut State, held_for: &HeldFor, bytes: usize) -> Option<()> {
        let missing = (self.used().saturating_add(bytes)).saturating_sub(self.bytes_max);
        let held = state.held.iter().map(|(id, entry)| {
            // Rows that are being sent stay in memory anyway.
            let is_lent = Arc::strong_count(&entry.held) > 1;
            let frees = if is_lent { 0 } else { entry.held.bytes };
            (*id, &entry.held_for, frees)
        });
        for id in let_go(held, held_for, missing)? {
            state.held.remove(&id);
        }
        Some(())
    }
}

/// Returns which rows go so that `missing` bytes come free for `wanted`, or `None` if those that
/// may go are too few. Only newer steps of the same run may go, newest first: its oldest step is
/// served next, so a trainer waits for it. Steps of two runs say nothing about which one is due
/// first.
fn let_go<'a>(
    held: impl Iterator<Item = (u64, &'a HeldFor, usize)>,
    wanted: &HeldFor,
    missing: usize,
) -> Option<Vec<u64>> {
    let may_go = |of: &HeldFor| of.run_id == wanted.run_id && of.step > wanted.step;
    let mut newer: Vec<(u64, u64, usize)> = held
        .filter(|(_, of, frees)| may_go(of) && *frees > 0)
        .map(|(id, of, frees)| (of.step, id, frees))
        .collect();
    newer.sort_unstable();
    let (mut removed, mut free) = (Vec::new(), 0);
    while free < missing {
        let (_, id, frees) = newer.pop()?;
        removed.push(id);
        free += frees;
    }
    Some(removed)
}

impl Hold {
    /// Puts rows of `bytes` into the room. Returns `false`, and holds nothing, if the room was
    /// given to an older step meanwhile, or is too small for them.
    pub(crate) fn fill(&self, rows: Vec<Row>, bytes: usize) -> bool {
        let mut state = self.inner.state();
        let Some(Entry { held_for, held }) = state.held.remove(&self.id) else {
            return false;
        };
        drop(held);
        if self.inner.make_room(&mut state, &held_for, bytes).is_none() {
            return false;
        }
        let held = Held::new(rows, bytes, &self.inner.used);
        state.held.insert(self.id, Entry { held_for, held });
        true
    }

    /// Holds the rows until the time is over or the worker stops. The caller drops this when the
    /// coordinator goes away.
    pub(crate) async fn until(self, stopping: &CancellationToken) {
        tokio::select! {
            () = tokio::time::sleep(self.inner.held_max) => {}
            () = stopping.cancelled() => {}
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let removed = self.inner.state().held.remove(&self.id);
        drop(removed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::{
        array::{ArrayRef, UInt32Array},
        record_batch::RecordBatch,
    };

    fn held_for(run_id: &str, step: u64) -> HeldFor {
        HeldFor {
            run_id: run_id.into(),
            generation: 0,
            step,
        }
    }

    fn rows() -> Vec<Row> {
        let numbers: ArrayRef = Arc::new(UInt32Array::from(vec![10, 11, 12]));
        let batch = Arc::new(RecordBatch::try_from_iter([("n", numbers)]).unwrap());
        let row = |row| Row {
            batch: batch.clone(),
            row,
        };
        (0..3).map(row).collect()
    }

    fn filled(holder: &Holder, step: u64, bytes: usize) -> Option<Hold> {
        let hold = holder.reserve(held_for("run", step), bytes)?;
        assert!(hold.fill(rows(), bytes));
        Some(hold)
    }

    fn claims(kept: u64, step: u64, rows: &[u32]) -> TicketClaims {
        TicketClaims {
            run_id: "run".into(),
            step,
            kept,
            rows: rows.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn rows_are_held_for_their_step_and_no_other() {
        let holder = Holder::new(100, Duration::from_secs(9));
        let hold = filled(&holder, 4, 60).unwrap();
        let rows = holder.rows(&claims(hold.id, 4, &[2, 0])).unwrap().rows;
        assert_eq!(rows.iter().map(|row| row.row).collect::<Vec<_>>(), [2, 0]);
        let other_run = TicketClaims {
            run_id: "other".into(),
            ..claims(hold.id, 4, &[0])
        };
        for wrong in [
            claims(hold.id, 5, &[0]),
            claims(hold.id, 4, &[3]),
            claims(hold.id + 1, 4, &[0]),
            other_run,
        ] {
            let refused = holder.rows(&wrong).err().map(|error| error.reason());
            assert_eq!(refused, Some(Reason::RowsNotKept), "{wrong:?}");
        }
        drop(hold);
        assert_eq!(holder.bytes(), 0);
        assert!(holder.rows(&claims(1, 4, &[0])).is_err());
    }

    #[test]
    fn the_oldest_step_is_held_if_there_is_no_room_for_all() {
        let holder = Holder::new(100, Duration::from_secs(9));
        let newer = filled(&holder, 5, 60).unwrap();
        assert!(filled(&holder, 6, 60).is_none());
        let older = filled(&holder, 4, 60).unwrap();
        assert!(holder.rows(&claims(newer.id, 5, &[0])).is_err(), "dropped");
        assert!(holder.rows(&claims(older.id, 4, &[0])).is_ok());
        drop(newer);
        assert_eq!(holder.bytes(), 60);
    }

    #[test]
    fn no_run_makes_room_by_another_ones_rows() {
        let [a5, b5, b6, b7] =
            [("a", 5), ("b", 5), ("b", 6), ("b", 7)].map(|(run, step)| held_for(run, step));
        let held = || [(1, &b6, 40), (2, &a5, 40), (3, &b7, 40), (4, &b7, 0)].into_iter();
        assert_eq!(let_go(held(), &b5, 0), Some(vec![]));
        assert_eq!(let_go(held(), &b5, 40), Some(vec![3]), "the newest first");
        assert_eq!(let_go(held(), &b5, 41), Some(vec![3, 1]));
        assert_eq!(let_go(held(), &b5, 81), None, "the other run's stay");
        assert_eq!(let_go(held(), &b6, 40), Some(vec![3]));
        assert_eq!(let_go(held(), &b7, 1), None);
        assert_eq!(let_go(held(), &held_for("a", 0), 41), None);
    }

    #[test]
    fn rows_count_until_the_last_reader_lets_go() {
        let holder = Holder::new(100, Duration::from_secs(9));
        let newer = filled(&holder, 5, 60).unwrap();
        let lent = holder.rows(&claims(newer.id, 5, &[0])).ok().unwrap();
        assert!(filled(&holder, 4, 60).is_none(), "they would not come free");
        assert!(holder.rows(&claims(newer.id, 5, &[0])).is_ok());
        drop(newer);
        assert_eq!(holder.bytes(), 60, "they are sent still");
        assert!(filled(&holder, 4, 60).is_none());
        drop(lent);
        assert_eq!(holder.bytes(), 0);
        assert!(filled(&holder, 4, 60).is_some());
    }

    #[test]
    fn room_is_taken_before_there_are_rows() {
        let holder = Holder::new(100, Duration::from_secs(9));
        let room = holder.reserve(held_for("run", 5), 60).unwrap();
        assert!(holder.reserve(held_for("other", 5), 60).is_none());
        assert!(holder.rows(&claims(room.id, 5, &[0])).is_err(), "not yet");
        assert!(!room.fill(rows(), 101), "they are larger than they seemed");
        assert_eq!(holder.bytes(), 0);
        let room = holder.reserve(held_for("run", 5), 60).unwrap();
        let older = filled(&holder, 4, 60).unwrap();
        assert!(!room.fill(rows(), 60), "the room went to an older step");
        assert_eq!((holder.bytes(), older.id), (60, 3));
    }

    #[tokio::test]
    async fn rows_are_not_held_for_ever() {
        let holder = Holder::new(100, Duration::from_millis(1));
        let hold = filled(&holder, 4, 60).unwrap();
        hold.until(&CancellationToken::new()).await;
        assert_eq!(holder.bytes(), 0);
        let holder = Holder::new(100, Duration::MAX);
        let hold = filled(&holder, 4, 60).unwrap();
        let stopping = CancellationToken::new();
        stopping.cancel();
        hold.until(&stopping).await;
        assert_eq!(holder.bytes(), 0);
    }
}
