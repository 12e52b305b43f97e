//! FLOPs of decisions that came to nothing: they failed, were rewound, or another coordinator
//! decided first. They are charged to the next committed step, so that the accounts show what was
//! really spent.
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

/// FLOPs that are not charged to a committed step yet.
#[derive(Debug, Clone, Default)]
pub struct Wasted(Arc<Mutex<f64>>);

/// Those of all runs, by id: also of runs that are not in memory, which their next commit charges.
#[derive(Debug, Default)]
pub struct WastedByRun(Mutex<HashMap<String, Wasted>>);

impl WastedByRun {
    /// Returns those of the run `id`, including what it wasted before it left memory.
    pub fn of(&self, id: &str) -> Wasted {
        let mut all = self.0.lock().expect("no panic while held");
        all.retain(|_, wasted| wasted.is_wanted());
        all.entry(id.to_owned()).or_default().clone()
    }
}

/// FLOPs whose use is not certain. A guard: if it is dropped before [`Spent::settle`] (by an error,
/// a panic or a cancelled task), they count as wasted.
#[derive(Debug)]
pub struct Spent {
    wasted: Wasted,
    flops: f64,
}

impl Wasted {
    /// Returns whether a run uses it, or there is something to charge.
    pub fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.0) > 1 || *self.0.lock().expect("no panic while held") != 0.0
    }

    /// Returns a guard with nothing spent yet.
    pub fn spend(&self) -> Spent {
        Spent {
            wasted: self.clone(),
            flops: 0.0,
        }
    }

    /// Takes all FLOPs wasted so far, to charge them.
    pub fn take(&self) -> Spent {
        let flops = std::mem::take(&mut *self.0.lock().expect("no panic while held"));
        Spent {
            wasted: self.clone(),
            flops,
        }
    }
}

impl Spent {
    pub fn add(&mut self, flops: f64) {
        self.flops += flops;
    }

    pub fn flops(&self) -> f64 {
        self.flops
    }

    /// Notes that they are in a committed receipt.
    pub fn settle(&mut self) {
        self.flops = 0.0;
    }
}

impl Drop for Spent {
    fn drop(&mut self) {
        *self.wasted.0.lock().expect("no panic while held") += self.flops;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_wasted_outlives_its_time_in_memory() {
        let runs = WastedByRun::default();
        for id in ["sleeps", "frugal"] {
            let run = runs.of(id);
            let mut decision = run.spend();
            decision.add(2.0);
            if id == "frugal" {
                decision.settle();
            }
        }
        drop(runs.of("other"));
        assert_eq!(
            runs.0.lock().unwrap().len(),
            2,
            "nothing is owed by `frugal`"
        );
        let mut charged = runs.of("sleeps").take();
        assert_eq!(charged.flops(), 2.0);
        charged.settle();
        drop(charged);
        assert_eq!(runs.of("frugal").take().flops(), 0.0);
        assert_eq!(runs.0.lock().unwrap().len(), 1, "all is settled");
    }

    #[test]
    fn what_is_not_settled_is_charged_later() {
        let wasted = Wasted::default();
        let mut failed = wasted.spend();
        failed.add(2.0);
        drop(failed);
        let mut committed = wasted.spend();
        committed.add(5.0);
        committed.settle();
        drop(committed);
        drop(wasted.take());
        let mut charged = wasted.take();
        assert_eq!(charged.flops(), 2.0, "a commit that failed gives it back");
        charged.settle();
        drop(charged);
        assert_eq!(wasted.take().flops(), 0.0);
        assert!(!wasted.is_wanted());
        let of_a_step = wasted.clone();
        assert!(wasted.is_wanted());
        drop(of_a_step);
    }
}
