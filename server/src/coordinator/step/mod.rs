//! One step from the first request to its batch, in reading order:
//!
//! 1. [`admission`]: a rank asks; the step's task starts, and steps ahead with it.
//! 2. [`decide`]: recalls the receipt of a decided step, else plans, scores, selects and commits.
//! 3. [`maker`]: what all policies share; [`uniform`] draws without models, [`scored`] with them.
//! 4. [`learner`]: which weights the step waits for; [`draw`]: what the selector is told.
//! 5. [`fidelity`]: which rows are trained at the phase's approximation.
//! 6. [`probe`]: now and then, what the other fidelity would have chosen.
//! 7. [`decided`] gathers what is known, [`receipt`] writes it down, [`commit`] makes it durable.
//!
//! Serving is the caller's (`serve`).
pub mod admission;
pub mod commit;
pub mod decide;
pub mod decided;
pub mod draw;
pub mod fidelity;
pub mod learner;
pub mod maker;
pub mod probe;
pub mod receipt;
pub mod scored;
pub mod uniform;
