//! WebDataset tars, read in place: `entries` walks headers, `samples` groups members into rows,
//! `survey` walks one shard in storage, `kept` keeps what was found, `layout` says which member is
//! what, and `block` makes a record batch of a block's bytes.
mod block;
mod build;
mod entries;
#[cfg(test)]
pub(crate) mod fixtures;
mod json;
mod kept;
mod layout;
mod samples;
mod survey;
#[cfg(test)]
mod tests;

pub use block::TarBlock;
pub(super) use build::index_shards;
pub(super) use json::entries;
pub use kept::survey_kept;
pub(super) use kept::{INDEXES, is_whole, kept_key};
pub(super) use layout::member_type;
pub use survey::Survey;
