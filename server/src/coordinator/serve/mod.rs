//! Stage 4, serve: chosen rows become each rank's Arrow stream.
pub mod output;
pub mod ready;
pub mod share;
