//! One step, from the first request to its batch, in reading order:
//!
//! 1. [`admission`]: a rank asks; the task of its step starts, and those of steps ahead.
//! 2. [`decide`]: recalls the receipt of a decided step, else plans, scores, selects and commits.
//! 3. [`maker`] is shared by all policies; [`uniform`] draws without models, [`scored`] with them.
//! 4. [`learner`] waits for the step's weights, [`own`] for those of a self-reference; [`draw`]
//!    calls the selector.
//! 5. [`fidelity`] decides which rows are trained at the phase's approximation.
//! 6. [`decided`] gathers what is known, [`receipt`] makes a receipt of it, [`commit`] makes it
//!    durable.
//! 7. [`recall`] reads rows of a decided step again.
//! 8. [`batch`] makes a rank's batch of its share (`serve`).
pub(super) mod admission;
pub(super) mod batch;
pub(super) mod columns;
pub(super) mod commit;
mod decide;
pub(super) mod decided;
pub(super) mod draw;
pub(super) mod fidelity;
pub(super) mod learner;
pub(super) mod maker;
mod own;
pub(super) mod probe;
mod recall;
pub(super) mod receipt;
pub(super) mod scored;
#[cfg(test)]
mod tests;
pub(super) mod uniform;
