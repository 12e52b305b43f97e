//! The durable knowledge about a run: facts in object storage, and what follows from them.
pub mod chain;
mod format;
pub mod incarnations;
mod numbered;
pub mod owner;
pub mod run;
pub mod trail;

pub use format::allow_packs;
