//! Scoring workers: which are live, and which one takes over if one fails.
pub mod failover;
pub mod pool;
pub mod prepare;
pub mod replies;
pub mod worker;
