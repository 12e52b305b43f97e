//! The threads that decode, and the watch over them.
//!
//! A thread cannot be ended from outside. If a decoder does not come back within the deadline, its
//! row is a bad one, and a fresh thread takes its seat; the old thread ends if it ever comes back.
//! Without that, as many such images as there are threads would end all decoding on this worker.
//! The watch is a thread and not part of the calls: a call may go away (a rewind, a lost
//! connection) while its decoder hangs, and the seat must still become free.
use crate::{
    error::{Error, Result},
    worker::inputs::{
        preprocess::RowFault,
        row::{PreparedRow, Row},
    },
};
use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use superbatch_proto::v1::BadRowReason;
use tokio::sync::Notify;

/// The watch looks at the seats so many times within one deadline.
const LOOKS: u32 = 8;

type One = dyn Fn(&Row) -> PreparedRow + Send + Sync;

/// Rows to prepare, and their results.
pub(super) struct Call {
    rows: Vec<Row>,
    one: Box<One>,
    prepared: Vec<OnceLock<PreparedRow>>,
    missing: AtomicUsize,
    whole: Notify,
    has_ended: AtomicBool,
}

/// Ends its call if it is dropped: rows that no thread has begun are skipped.
pub(super) struct EndedOnDrop(Arc<Call>);

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::Relaxed);
    }
}

impl Call {
    pub(super) fn new(
        rows: Vec<Row>,
        one: impl Fn(&Row) -> PreparedRow + Send + Sync + 'static,
    ) -> Self {
        Self {
            prepared: rows.iter().map(|_| OnceLock::new()).collect(),
            missing: AtomicUsize::new(rows.len()),
            rows,
            one: Box::new(one),
            whole: Notify::new(),
            has_ended: AtomicBool::new(false),
        }
    }

    pub(super) fn ended_on_drop(self: Arc<Self>) -> EndedOnDrop {
        EndedOnDrop(self)
    }

    /// Waits until every row has its result.
    pub(super) async fn wait(&self) -> Result<Vec<PreparedRow>> {
        while self.missing.load(Ordering::Acquire) > 0 {
            self.whole.notified().await;
        }
        self.prepared
            .iter()
            .map(|place| {
                let prepared = place.get().cloned();
                prepared.ok_or_else(|| Error::internal("a row was neither decoded nor given up"))
            })
            .collect()
    }

    /// Prepares a row. Decoders are foreign code that reads untrusted bytes: a panic may cost the
    /// row, never the process.
    fn prepare(&self, n: usize) {
        let prepared = catch_unwind(AssertUnwindSafe(|| (self.one)(&self.rows[n])));
        self.fill(
            n,
            prepared.unwrap_or_else(|_| {
                let reason = BadRowReason::ImageUndecodable;
                Err(RowFault::new(reason, "the decoder panicked"))
            }),
        );
    }

    /// Fills a place unless it is filled: a row that comes back after it was given up stays bad.
    fn fill(&self, n: usize, prepared: PreparedRow) {
        if self.prepared[n].set(prepared).is_ok()
            && self.missing.fetch_sub(1, Ordering::AcqRel) == 1
        {
            self.whole.notify_one();
        }
    }
}

/// A call in the queue.
struct Queued {
    call: Arc<Call>,
    /// The next row to begin.
    next: usize,
}

/// The place of one thread.
#[derive(Default)]
struct Seat {
    /// The thread that holds it; `None` if none could be started.
    thread: Option<u64>,
    work: Option<Work>,
}

/// The row that a thread is at.
struct Work {
    call: Arc<Call>,
    row: usize,
    /// On the watch's clock.
    begun: Duration,
}

/// A clock that stands still while the process does. A process that was stopped (a suspended
/// machine, a paused container, a debugger) finds minutes gone when it goes on, in which no decoder
/// could run. By the wall clock all rows under way would be given up at once, as if each of them
/// hung; each look therefore counts two periods at most.
struct Clock {
    looked: Instant,
    counted: Duration,
}

impl Clock {
    fn advance(&mut self, now: Instant, period: Duration) -> Duration {
        let passed = now.saturating_duration_since(self.looked);
        self.looked = now;
        self.counted += passed.min(2 * period);
        self.counted
    }
}

struct State {
    queue: VecDeque<Queued>,
    seats: Vec<Seat>,
    clock: Clock,
    threads_started: u64,
    is_closed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Work has come, or the end.
    work: Condvar,
    end: Condvar,
    deadline: Duration,
}

/// A handle to the threads, which end when it is dropped.
pub(super) struct Threads(Arc<Shared>);

impl Threads {
    pub(super) fn start(count: usize, deadline: Duration) -> Result<Self> {
        let threads = Self(Arc::new(Shared::new(count, deadline)));
        let failed =
            |e| Error::internal("cannot start the decode threads; lower worker.threads").because(e);
        for seat in 0..count {
            let mut state = threads.0.lock();
            threads.0.seat_thread(&mut state, seat).map_err(failed)?;
        }
        let shared = threads.0.clone();
        let watch = thread::Builder::new().name("decode-watch".into());
        watch.spawn(move || shared.watch()).map_err(failed)?;
        Ok(threads)
    }

    pub(super) fn add(&self, call: Arc<Call>) {
        self.0.lock().queue.push_back(Queued { call, next: 0 });
        self.0.work.notify_all();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.work.notify_all();
        self.0.end.notify_all();
    }
}

impl Shared {
    fn new(seats: usize, deadline: Duration) -> Self {
        Self {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                seats: (0..seats).map(|_| Seat::default()).collect(),
                clock: Clock {
                    looked: Instant::now(),
                    counted: Duration::ZERO,
                },
                threads_started: 0,
                is_closed: false,
            }),
            work: Condvar::new(),
            end: Condvar::new(),
            deadline,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn period(&self) -> Duration {
        self.deadline / LOOKS
    }

    /// Starts a thread for a seat.
    fn seat_thread(self: &Arc<Self>, state: &mut State, seat: usize) -> std::io::Result<()> {
        state.threads_started += 1;
        let (shared, id) = (self.clone(), state.threads_started);
        state.seats[seat] = Seat::default();
        thread::Builder::new()
            .name(format!("decode-{seat}"))
            .spawn(move || {
                while let Some((call, row)) = shared.next(seat, id) {
                    call.prepare(row);
                }
            })?;
        state.seats[seat].thread = Some(id);
        Ok(())
    }

    /// Waits for the next row of the thread `id`. `None`: the thread is to end, since its seat was
    /// given to another or the decode pool is dropped.
    fn next(&self, seat: usize, id: u64) -> Option<(Arc<Call>, usize)> {
        let mut state = self.lock();
        loop {
            let State {
                seats,
                queue,
                clock,
                ..
            } = &mut *state;
            let own = &mut seats[seat];
            if own.thread != Some(id) {
                return None;
            }
            own.work = None;
            while let Some(first) = queue.front_mut() {
                let (call, row) = (first.call.clone(), first.next);
                first.next += 1;
                if row + 1 >= call.rows.len() || call.has_ended.load(Ordering::Relaxed) {
                    queue.pop_front();
                }
                if row < call.rows.len() && !call.has_ended.load(Ordering::Relaxed) {
                    own.work = Some(Work {
                        call: call.clone(),
                        row,
                        begun: clock.counted,
                    });
                    return Some((call, row));
                }
            }
            if state.is_closed {
                return None;
            }
            state = self.work.wait(state).expect("no panic while held");
        }
    }

    /// Looks at the seats until the decode pool is dropped.
    fn watch(self: Arc<Self>) {
        let mut state = self.lock();
        while !state.is_closed {
            let waited = self.end.wait_timeout(state, self.period());
            state = waited.expect("no panic while held").0;
            self.look(&mut state, Instant::now());
        }
    }

    /// Gives up the rows whose decoders took longer than the deadline, and fills their seats.
    fn look(self: &Arc<Self>, state: &mut State, now: Instant) {
        let counted = state.clock.advance(now, self.period());
        for seat in 0..state.seats.len() {
            let own = &mut state.seats[seat];
            let is_late = |work: &mut Work| counted - work.begun >= self.deadline;
            let late = own.work.take_if(is_late);
            if let Some(work) = &late {
                work.call.fill(work.row, Err(endless(self.deadline)));
                tracing::warn!("a decoder did not come back; its row is left out");
            }
            // Tried again at each look if no thread can be started now.
            if (late.is_some() || own.thread.is_none())
                && let Err(error) = self.seat_thread(state, seat)
            {
                tracing::error!(%error, "cannot start a decode thread");
            }
        }
    }
}

fn endless(deadline: Duration) -> RowFault {
    RowFault::passing(
        BadRowReason::ImageUndecodable,
        format!(
            "decoding did not end within {} s (worker.decode_deadline_seconds)",
            deadline.as_secs_f64()
        ),
    )
}

#[cfg(test)]
mod tests;
