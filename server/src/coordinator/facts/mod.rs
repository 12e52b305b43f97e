//! What is known of a run for good: facts in object storage, and what they say together.
pub mod chain;
pub mod incarnations;
pub mod owner;
pub mod run;
pub mod trail;
