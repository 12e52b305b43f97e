//! Operations of decisions that came to nothing: failed, rewound, or decided by another coordinator
//! first. They are charged to the next step that is committed.
use std::sync::{Arc, Mutex};

/// Floating-point operations that no committed step has been charged with yet.
#[derive(Debug, Clone, Default)]
pub struct Wasted(Arc<Mutex<f64>>);

/// Operations whose use is not certain. Dropped before they are settled, they are wasted.
#[derive(Debug)]
pub struct Spent {
    wasted: Wasted,
    flops: f64,
}

impl Wasted {
    /// Nothing spent yet.
    pub fn spend(&self) -> Spent {
        Spent {
            wasted: self.clone(),
            flops: 0.0,
        }
    }

    /// All that was wasted so far, to be charged.
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

    /// They are in a committed receipt.
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
    }
}
