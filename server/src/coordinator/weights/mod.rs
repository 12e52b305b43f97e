//! Learner weights: parts from one or several ranks are staged, verified, published, and found again by the lag.
mod assemble;
mod book;
mod lag;
mod staging;
