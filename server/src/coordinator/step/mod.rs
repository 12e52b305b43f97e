//! One step, from the first request to its batch, in reading order:
//!
//! 1. [`admission`]: a rank asks; the task of its step starts, and those of steps ahead.
//! 2. [`decide`]: recalls the receipt of a decided step, else plans, scores, selects and commits.
//! 3. [`maker`] is shared by all policies; [`uniform`] draws without models, [`scored`] with them.
//! 4. [`learner`] waits for the step's weights; [`draw`] calls the selector.
//! 5. [`fidelity`] decides which rows are trained at the phase's approximation.
//! 6. [`decided`] gathers the facts, [`receipt`] makes a receipt of them, [`commit`] makes it
//!    durable.
//!
//! The caller serves the batch (`serve`).
pub mod admission;
pub mod columns;
pub mod commit;
mod decide;
pub mod decided;
pub mod draw;
pub mod fidelity;
pub mod learner;
pub mod maker;
pub mod probe;
pub mod receipt;
pub mod scored;
pub mod uniform;
