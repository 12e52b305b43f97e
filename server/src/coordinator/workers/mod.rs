//! Scoring workers: who is there, and who takes over where one cannot.
pub mod failover;
pub mod pool;
pub mod prepare;
pub mod replies;
pub mod worker;
