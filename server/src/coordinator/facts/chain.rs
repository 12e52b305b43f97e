//! Generations: which generation's choice is in force for a step. Pure.
use serde::{Deserialize, Serialize};

/// The step at which a generation of the run began, by a rewind (or at 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Began {
    pub generation: u32,
    pub step: u64,
}

/// A rewind: steps from `to_step` on are of `generation`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewound {
    pub generation: u32,
    pub to_step: u64,
    /// Whether older choices are served again, if there are any.
    pub replay: bool,
}

/// All rewinds of a run, by generation. Generation 0 is the first trajectory and has no rewind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain(Vec<Rewound>);

impl Chain {
    pub fn new(mut rewinds: Vec<Rewound>) -> Self {
        rewinds.sort_by_key(|r| r.generation);
        Self(rewinds)
    }

    pub fn push(&mut self, rewound: Rewound) {
        self.0.push(rewound);
    }

    /// Returns the newest generation.
    pub fn current(&self) -> u32 {
        self.0.last().map_or(0, |r| r.generation)
    }

    /// Returns where each generation began, oldest first: generation 0 at step 0.
    pub fn began(&self) -> Vec<Began> {
        let rewinds = self.0.iter().map(|r| Began {
            generation: r.generation,
            step: r.to_step,
        });
        std::iter::once(Began {
            generation: 0,
            step: 0,
        })
        .chain(rewinds)
        .collect()
    }

    /// Returns the step before which `generation`'s trajectory is still the newest one's: the least
    /// that a rewind with reselect has gone back to since.
    pub fn kept_of(&self, generation: u32) -> u64 {
        let since = self
            .0
            .iter()
            .filter(|r| r.generation > generation && !r.replay);
        since.map(|r| r.to_step).min().unwrap_or(u64::MAX)
    }

    /// Returns the generations whose receipt for `step` would be in force in `generation`, best
    /// first: its own, then older ones that a rewind kept (steps before it) or replays.
    pub fn candidates(&self, step: u64, generation: u32) -> Vec<u32> {
        // The walk goes back through the rewinds and ends at the first one that discards this step.
        // Going on past it would bring back a choice that the trainer has asked to forget. Example:
        // generation 1 rewound to step 10 with reselect. Step 9 is still of generation 0; step 10
        // is of generation 1 alone, although generation 0 has a receipt for it.
        let mut found = vec![generation];
        for rewound in self
            .0
            .iter()
            .rev()
            .filter(|rewound| rewound.generation <= generation)
        {
            if step >= rewound.to_step && !rewound.replay {
                break;
            }
            found.push(rewound.generation - 1);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(rewinds: &[(u64, bool)]) -> Chain {
        let with_number = |(i, (to_step, replay)): (usize, &(u64, bool))| Rewound {
            generation: i as u32 + 1,
            to_step: *to_step,
            replay: *replay,
        };
        Chain::new(rewinds.iter().enumerate().map(with_number).collect())
    }

    #[test]
    fn a_rewind_keeps_what_lies_before_it() {
        let chain = chain(&[(9, false), (2, true), (5, false)]);
        assert_eq!([0, 1, 2, 3].map(|g| chain.kept_of(g)), [5, 5, 5, u64::MAX]);
    }

    #[test]
    fn a_step_before_a_rewind_is_the_old_generations() {
        assert_eq!(chain(&[(5, false)]).candidates(4, 1), [1, 0]);
        assert_eq!(chain(&[(5, false)]).candidates(5, 1), [1]);
        assert_eq!(
            chain(&[(5, false)]).candidates(5, 0),
            [0],
            "an older generation is looked at as it was"
        );
    }

    #[test]
    fn replay_serves_old_choices_and_reselect_does_not() {
        assert_eq!(chain(&[(5, true)]).candidates(9, 1), [1, 0]);
        assert_eq!(chain(&[(5, false), (8, true)]).candidates(9, 2), [2, 1]);
        assert_eq!(chain(&[(5, true), (8, false)]).candidates(9, 2), [2]);
        assert_eq!(chain(&[(5, true), (8, false)]).candidates(6, 2), [2, 1, 0]);
    }
}
