//! Reports that wait to be written: all that came while another was written become one object.
use super::{Example, Loss};
use crate::error::{Error, Result};
use std::collections::{HashMap, HashSet, VecDeque};
use superbatch_proto::v1::Reason;
use tokio::sync::oneshot;

/// Losses that wait at most. Without it, a store that stands still would fill the memory.
const WAITING_MAX: usize = 1 << 21;
/// Losses of one object at most, if they are of several reports.
const TOGETHER_MAX: usize = 1 << 18;

/// One report, and the call that waits for it.
#[derive(Debug)]
pub(super) struct Report {
    pub losses: Vec<Loss>,
    pub answer: oneshot::Sender<Result<()>>,
}

/// Reports in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    reports: VecDeque<Report>,
    losses: usize,
}

impl Waiting {
    /// Adds a report, and returns where its answer will come.
    ///
    /// # Errors
    /// `Overloaded` if too many wait.
    pub(super) fn add(&mut self, losses: Vec<Loss>) -> Result<oneshot::Receiver<Result<()>>> {
        if self.losses + losses.len() > WAITING_MAX {
            let waiting = self.losses;
            let message = format!(
                "{waiting} reported losses wait to be written, and at most {WAITING_MAX} may; \
                the state's storage is too slow for them: report fewer at a time, or later"
            );
            return Err(Error::new(Reason::Overloaded, message));
        }
        let (answer, answered) = oneshot::channel();
        self.losses += losses.len();
        self.reports.push_back(Report { losses, answer });
        Ok(answered)
    }

    /// Takes the reports that are written next, together.
    pub(super) fn take(&mut self) -> Vec<Report> {
        let mut taken = 0;
        let fits = |report: &Report| {
            let is_first = taken == 0;
            taken += report.losses.len();
            is_first || taken <= TOGETHER_MAX
        };
        let count = self.reports.iter().map(fits).take_while(|fits| *fits);
        let count = count.count();
        let reports: Vec<_> = self.reports.drain(..count).collect();
        self.losses -= reports.iter().map(|r| r.losses.len()).sum::<usize>();
        reports
    }
}

/// Returns the losses of all reports which fit into a table of `max` examples, in their order, and
/// for each report whether it fits.
pub(super) fn fitting(
    known: &HashMap<Example, f32>,
    reports: &[Vec<Loss>],
    max: usize,
) -> (Vec<Loss>, Vec<bool>) {
    let mut new: HashSet<Example> = HashSet::new();
    let mut all = Vec::with_capacity(reports.iter().map(Vec::len).sum());
    let mut fits = Vec::with_capacity(reports.len());
    for report in reports {
        let unknown = report.iter().map(|(example, _)| *example);
        let unknown: HashSet<Example> = unknown
            .filter(|at| !known.contains_key(at) && !new.contains(at))
            .collect();
        let has_room = known.len() + new.len() + unknown.len() <= max;
        if has_room {
            new.extend(unknown);
            all.extend_from_slice(report);
        }
        fits.push(has_room);
    }
    (all, fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(rows: std::ops::Range<u64>) -> Vec<Loss> {
        rows.map(|row| ((0, 0, row), row as f32)).collect()
    }

    #[test]
    fn what_waits_is_written_together_within_bounds() {
        let mut waiting = Waiting::default();
        let large = losses(0..TOGETHER_MAX as u64 - 5);
        for report in [losses(0..2), losses(2..5), large, losses(0..1)] {
            waiting.add(report).unwrap();
        }
        let lengths = |waiting: &mut Waiting| -> Vec<usize> {
            let taken = waiting.take();
            taken.iter().map(|report| report.losses.len()).collect()
        };
        assert_eq!(lengths(&mut waiting), [2, 3, TOGETHER_MAX - 5]);
        assert_eq!(lengths(&mut waiting), [1]);
        assert_eq!(lengths(&mut waiting), [0; 0]);
        // One that is larger goes alone.
        waiting.add(losses(0..TOGETHER_MAX as u64 + 1)).unwrap();
        waiting.add(losses(0..1)).unwrap();
        assert_eq!(lengths(&mut waiting), [TOGETHER_MAX + 1]);
        assert_eq!(lengths(&mut waiting), [1]);
    }

    #[test]
    fn too_many_that_wait_are_refused() {
        let mut waiting = Waiting::default();
        waiting.add(losses(0..WAITING_MAX as u64)).unwrap();
        let error = waiting.add(losses(0..1)).unwrap_err();
        assert_eq!(error.reason(), Reason::Overloaded);
        waiting.take();
        waiting.add(losses(0..1)).unwrap();
    }

    #[test]
    fn reports_of_known_examples_fit_into_a_full_table() {
        let known: HashMap<_, _> = losses(0..3).into_iter().collect();
        let reports = [
            losses(0..3),
            losses(2..5),
            losses(3..4),
            [losses(3..4), losses(3..4)].concat(),
            losses(9..10),
        ];
        let (all, fits) = fitting(&known, &reports, 4);
        assert_eq!(fits, [true, false, true, true, false]);
        assert_eq!(all.len(), 3 + 1 + 2);
    }
}
