//! The dataset manifest: the result of indexing, named by its own digest.
use super::{mask::Mask, parts::Parts};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    storage::Location,
};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{io::BufReader, sync::Arc};
use superbatch_proto::v1::Reason;

/// Bytes of a manifest that are read at once.
const PART_BYTES: u64 = 8 << 20;

/// Consecutive rows that are read together: a Parquet row group, or consecutive samples of a tar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Rows that may be candidates.
    pub rows: u32,
    /// Number of the first row in its shard.
    pub first_row: u64,
    /// The block's bytes in the shard: [start, end).
    pub bytes: (u64, u64),
    /// Which of the stored rows those are, where some are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Mask>,
}

impl Block {
    /// Returns the rows that are stored, of a block that has candidates.
    pub fn stored_rows(&self) -> u32 {
        self.mask.as_ref().map_or(self.rows, Mask::stored)
    }

    /// Returns the number in the shard of the block's `row`-th row.
    pub fn row_in_shard(&self, row: u32) -> u64 {
        let stored = self.mask.as_ref().map_or(row, |mask| mask.stored_row(row));
        self.first_row + u64::from(stored)
    }

    /// Returns the number among the block's rows of a row of the shard; `None` if it is none of
    /// them.
    pub fn row_of(&self, in_shard: u64) -> Option<u32> {
        let stored = u32::try_from(in_shard.checked_sub(self.first_row)?).ok()?;
        match &self.mask {
            Some(mask) => mask.kept_row(stored),
            None => (stored < self.rows).then_some(stored),
        }
    }

    /// Keeps these of its rows.
    pub(super) fn keep(&mut self, kept: &[bool]) {
        self.rows = kept.iter().filter(|kept| **kept).count() as u32;
        self.mask = Mask::new(kept);
    }
}

/// One file as it was when it was indexed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Path below the source's `root_uri`. It is part of every row's id.
    pub path: String,
    pub size: u64,
    pub etag: Option<String>,
    #[serde(deserialize_with = "without_spare_room")]
    pub blocks: Vec<Block>,
    /// Samples of a tar that lack image or caption. They are no rows.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: u64,
    /// Rows whose image is null, by a Parquet file's statistics: img2dataset keeps rows of failed
    /// downloads. They are candidates that cannot be chosen.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub without_image: u64,
    /// Rows that the source's `where` or `allow` leaves out: they are no candidates.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub outside: u64,
    /// Rows that img2dataset could not download, by their `status`: they are no candidates.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_downloaded: u64,
    /// What is wrong with a tar of which only the beginning is read. It decides no row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flaw: Option<String>,
}

/// One source: its shards in the order of their paths, and the columns of image and caption.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceManifest {
    /// The URI in the run's spec.
    pub uri: String,
    /// The location that shard paths are relative to.
    pub root_uri: String,
    pub weight: f64,
    pub layout: Layout,
    /// All columns of the files, by name.
    pub columns: Vec<Column>,
    pub shards: Vec<Shard>,
    /// The predicate and the list of ids that rows were kept by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_by: Option<KeptBy>,
    /// Files of ids and numbers in which score columns are looked up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<ScoreFiles>,
}

impl SourceManifest {
    /// Returns BLAKE3, in hex, of all that its rows' images and captions depend on. Its weight,
    /// which only decides how often they take their turn, is left out, and so is the manifest's
    /// order of sources: what was computed of the rows serves all runs that read them.
    pub fn rows_digest(&self) -> String {
        #[derive(Serialize)]
        struct Rows<'a> {
            root_uri: &'a str,
            layout: &'a Layout,
            #[serde(serialize_with = "without_flaws")]
            shards: &'a [Shard],
            kept_by: &'a Option<KeptBy>,
        }
        let rows = Rows {
            root_uri: &self.root_uri,
            layout: &self.layout,
            shards: &self.shards,
            kept_by: &self.kept_by,
        };
        let mut hasher = blake3::Hasher::new();
        serde_json::to_writer(&mut hasher, &rows).expect("plain data encodes");
        hasher.finalize().to_hex().to_string()
    }
}

/// Parquet files beside a source, as they were when it was indexed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreFiles {
    pub uri: String,
    pub id_column: String,
    /// BLAKE3 of their names, sizes and ETags, in hex.
    pub digest: String,
}

/// What leaves rows of a source out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptBy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicate: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<AllowedIds>,
}

/// A list of ids, as it was when the source was indexed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedIds {
    pub uri: String,
    /// The column of the data whose values are looked up.
    pub id_column: String,
    /// Different ids in it.
    pub ids: u64,
    /// BLAKE3 of the sorted ids, in hex.
    pub digest: String,
}

/// One column of a source's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    /// In the text form of Arrow's `DataType`: `Int64`, `List(Float32)`.
    pub data_type: String,
    /// The first shard that lacks it or has it with another type: such a column cannot be
    /// delivered.
    pub differs_in: Option<String>,
}

/// How to find image and caption in a shard's columns, or in a sample's members: `jpg;png`,
/// `json[caption]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "LayoutForm", into = "LayoutForm")]
pub struct Layout {
    pub image_column: String,
    /// The image is the `bytes` field of a struct column (Hugging Face); otherwise the column is
    /// binary.
    pub image_in_struct: bool,
    /// The column (of a struct its field `path`) holds paths below this URI, and the images lie
    /// there. `None`: the images are in the file.
    pub image_root: Option<String>,
    pub caption_column: String,
    /// By which one caption of a row's list is drawn. `None`: a row has one caption.
    pub caption_seed: Option<u64>,
    pub format: Format,
}

impl Layout {
    /// Returns whether a leaf of a Parquet file, named by its parts, is read for the image.
    pub fn reads_for_image(&self, leaf: &[String]) -> bool {
        let field = match leaf.get(1).map(String::as_str) {
            _ if !self.image_in_struct => true,
            Some("bytes") => true,
            Some("path") => self.image_root.is_some(),
            _ => false,
        };
        field && leaf.first() == Some(&self.image_column)
    }
}

/// A layout as the manifest has it.
#[derive(Serialize, Deserialize)]
struct LayoutForm {
    image_column: ImageForm,
    image_in_struct: bool,
    caption_column: CaptionForm,
    #[serde(default, skip_serializing_if = "Format::is_parquet")]
    format: Format,
}

/// Builds that know nothing of paths expect a string, and refuse a manifest with a root: without
/// it, all rows would be without an image.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum ImageForm {
    Stored(String),
    Below { path: String, root: String },
}

/// Builds that know nothing of lists expect a string. They refuse a manifest with a list; a field
/// of its own for the seed they would ignore, and take the list's JSON for the caption.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum CaptionForm {
    One(String),
    OneOf { list: String, seed: u64 },
}

impl From<LayoutForm> for Layout {
    fn from(form: LayoutForm) -> Self {
        let (caption_column, caption_seed) = match form.caption_column {
            CaptionForm::One(column) => (column, None),
            CaptionForm::OneOf { list, seed } => (list, Some(seed)),
        };
        let (image_column, image_root) = match form.image_column {
            ImageForm::Stored(column) => (column, None),
            ImageForm::Below { path, root } => (path, Some(root)),
        };
        Self {
            image_column,
            image_in_struct: form.image_in_struct,
            image_root,
            caption_column,
            caption_seed,
            format: form.format,
        }
    }
}

impl From<Layout> for LayoutForm {
    fn from(layout: Layout) -> Self {
        let (path, list) = (layout.image_column, layout.caption_column);
        Self {
            image_column: match layout.image_root {
                Some(root) => ImageForm::Below { path, root },
                None => ImageForm::Stored(path),
            },
            image_in_struct: layout.image_in_struct,
            caption_column: match layout.caption_seed {
                Some(seed) => CaptionForm::OneOf { list, seed },
                None => CaptionForm::One(list),
            },
            format: layout.format,
        }
    }
}

/// How the files of a source are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    #[default]
    Parquet,
    /// WebDataset tars: a row is a sample, a column the members with one ending.
    Tar,
}

impl Format {
    fn is_parquet(&self) -> bool {
        *self == Self::Parquet
    }
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// All sources of a run. Immutable; named by the BLAKE3 of its JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    pub sources: Vec<SourceManifest>,
}

impl Manifest {
    pub const VERSION: u32 = 1;

    pub fn rows(&self) -> u64 {
        self.sources.iter().map(SourceManifest::rows).sum()
    }

    /// Returns BLAKE3 of its JSON, in hex: its name in the state.
    pub fn digest(&self) -> String {
        self.encode().1
    }

    /// Returns its JSON, and BLAKE3 of it, in hex.
    fn encode(&self) -> (Bytes, String) {
        let encoded: Bytes = serde_json::to_vec(self).expect("plain data encodes").into();
        let digest = blake3::hash(&encoded).to_hex().to_string();
        (encoded, digest)
    }

    /// Writes the manifest under its digest, and returns the digest.
    pub async fn save(self: &Arc<Self>, state: &Location) -> Result<String> {
        // Encoded once, and off the async threads: at billions of rows it is hundreds of megabytes
        // of JSON.
        let manifest = self.clone();
        let encode = move || Ok(manifest.encode());
        let (encoded, digest) = blocking("encoding a manifest", encode).await?;
        state.create(&key(&digest), encoded).await?;
        Ok(digest)
    }

    /// Reads the manifest named `digest`.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` if its bytes do not have that digest.
    pub async fn load(state: &Location, digest: &str) -> Result<Self> {
        let parts = state.get_in_parts(&key(digest), PART_BYTES).await?;
        // Parsed off the async threads: at billions of rows it is hundreds of megabytes of JSON.
        let read = move || {
            let mut hasher = blake3::Hasher::new();
            for part in &parts {
                hasher.update(part);
            }
            let parts = BufReader::new(Parts::new(parts));
            Ok((hasher.finalize().to_hex(), serde_json::from_reader(parts)))
        };
        let (found, manifest) = blocking("reading a manifest", read).await?;
        if found.as_str() != digest {
            let message = format!(
                "{} is damaged; remove it and index the data again",
                state.uri_of(&key(digest))
            );
            return Err(Error::new(Reason::Internal, message));
        }
        manifest.map_err(|e| {
            Error::internal(format!(
                "manifest {digest} is of another version of Superbatch"
            ))
            .because(e)
        })
    }
}

impl SourceManifest {
    pub fn rows(&self) -> u64 {
        self.blocks()
            .map(|(_, _, block)| u64::from(block.rows))
            .sum()
    }

    /// Returns (shard number, block number in the shard, block), in the order of the manifest. A
    /// block's place in this order is its number in the source.
    pub fn blocks(&self) -> impl Iterator<Item = (u32, u32, &Block)> {
        self.shards.iter().enumerate().flat_map(|(s, shard)| {
            shard
                .blocks
                .iter()
                .enumerate()
                .map(move |(b, block)| (s as u32, b as u32, block))
        })
    }
}

/// Vectors grow in steps, from one element to room for four. Most shards have few blocks, so the
/// room that is left would take most of a large manifest's memory.
fn without_spare_room<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Block>, D::Error> {
    let mut blocks = Vec::deserialize(from)?;
    blocks.shrink_to_fit();
    Ok(blocks)
}

fn without_flaws<S: Serializer>(shards: &&[Shard], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(shards.iter().cloned().map(|shard| Shard {
        flaw: None,
        ..shard
    }))
}

fn key(digest: &str) -> String {
    format!("manifests/{digest}.json")
}

#[cfg(test)]
mod tests;
