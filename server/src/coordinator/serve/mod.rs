//! Stage 4, serve: makes each rank's Arrow stream of the chosen rows.
pub mod answer;
pub mod body;
pub mod located;
pub mod output;
pub mod ready;
pub mod share;
pub mod tickets;
