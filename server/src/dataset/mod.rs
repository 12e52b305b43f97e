//! Data sets as the service sees them: an immutable manifest of shards and blocks, written once by indexing.
mod index;
mod layout;
mod manifest;
mod pattern;
mod schema;

pub use manifest::{Block, Layout, Manifest, Shard, SourceManifest};
