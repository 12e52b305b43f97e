//! Which weights the service may expect of this process.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A push by generation and step.
type Named = (u32, i64);

/// Pushes that were begun or queued, by all handles of a run.
#[derive(Debug, Default)]
pub(crate) struct Pushes(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Queued or under way. Several ranks of one process may push the same step.
    on_their_way: Vec<Named>,
    /// The newest one that is published.
    published: Option<Named>,
}

impl Pushes {
    /// The newest step of a generation whose weights were begun, queued or published.
    pub fn newest(&self, generation: u32) -> Option<i64> {
        let known = self.lock();
        let all = known.on_their_way.iter().chain(&known.published);
        all.filter(|(of, _)| *of == generation)
            .map(|(_, step)| *step)
            .max()
    }

    /// Whether a push of this step or of a later one was published by this process already.
    pub fn has_published(&self, generation: u32, step: i64) -> bool {
        self.lock()
            .published
            .is_some_and(|(of, newest)| of == generation && newest >= step)
    }

    /// Lets later requests of the run say that the weights of `step` are on their way.
    pub fn announce(self: &Arc<Self>, generation: u32, step: i64) -> Announced {
        self.lock().on_their_way.push((generation, step));
        Announced {
            pushes: self.clone(),
            push: (generation, step),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An announced push. Dropping it takes the announcement back, unless the push was published:
/// nobody should wait for weights that were refused, given up or abandoned.
pub(crate) struct Announced {
    pushes: Arc<Pushes>,
    push: Named,
}

impl Announced {
    pub fn generation(&self) -> u32 {
        self.push.0
    }

    pub fn published(self) {
        let mut known = self.pushes.lock();
        known.published = known.published.max(Some(self.push));
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let mut known = self.pushes.lock();
        if let Some(at) = known
            .on_their_way
            .iter()
            .position(|push| *push == self.push)
        {
            known.on_their_way.swap_remove(at);
        }
    }
}
