//! FLOPs of decisions that came to nothing: they failed, were rewound, or another coordinator
//! decided first. They are charged to the next committed step, so that the accounts show what was
//! really spent.
use std::sync::{Arc, Mutex};

/// FLOPs that are not charged to a committed step yet.
#[derive(Debug, Clone, Default)]
pub struct Wasted(Arc<Mutex<f64>>);

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
