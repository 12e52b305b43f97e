//! Receipts: each step's choice and its reasons, as Parquet files in the state.
pub mod accounts;
pub mod before;
pub mod compact;
pub mod doubt;
pub mod json;
pub mod masks;
pub mod packs;
pub mod page;
pub mod parquet;
mod passed;
pub mod store;
mod summaries;
pub mod wasted;
