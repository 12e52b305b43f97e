//! Images that lie outside the shards: a column holds their paths, which begin below the source's
//! `image_root`.
use super::{
    layout::mismatch,
    manifest::{Block, Layout},
};
use crate::error::Result;
use parquet::file::{
    metadata::{ColumnChunkMetaData, RowGroupMetaData},
    statistics::Statistics,
};
use std::borrow::Cow;

mod probe;

pub(super) use probe::probe;

/// Rows of a block, as many as a tar's block has members. A row group may have 100,000, and here
/// each row of a block costs a request, since the reference embeds a block as a whole.
const BLOCK_ROWS_MAX: u32 = 1024;
/// Bytes of a path. No object store has longer keys.
const PATH_BYTES_MAX: usize = 1024;
/// Characters of a path that are quoted.
const QUOTED_CHARS_MAX: usize = 200;
/// What to do about URLs.
const URLS: &str = "URLs are not fetched; download them with img2dataset";

/// Returns the key below `image_root` of the image at `path`. A path is a name as it is stored: it
/// is not decoded, and its `.` segments are passed over.
///
/// # Errors
/// Why it is no path below the root. It quotes the path.
pub fn image_key(path: &str) -> Result<Cow<'_, str>, String> {
    let key = key(path);
    key.map_err(|why| format!("the image's path {} {why}", quoted(path)))
}

/// Returns a path for people: escaped, and cut if it is long.
pub fn quoted(path: &str) -> String {
    match path.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{:?}…", &path[..end]),
        None => format!("{path:?}"),
    }
}

fn key(path: &str) -> Result<Cow<'_, str>, &'static str> {
    let has_drive = matches!(path.as_bytes(), [drive, b':', rest @ ..]
        if drive.is_ascii_alphabetic() && matches!(rest, [] | [b'/' | b'\\', ..]));
    let wrong = match path {
        "" => Some("is empty"),
        _ if is_url(path) => Some("is a URL, which is not fetched: download it with img2dataset"),
        _ if path.len() > PATH_BYTES_MAX => Some("is longer than 1,024 bytes"),
        _ if path.starts_with('/') || has_drive => Some("is absolute, and not below image_root"),
        _ if path.contains('\\') => Some("has a backslash; folders are separated by /"),
        _ if path.contains(char::is_control) => Some("has a sign of control"),
        _ => None,
    };
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    let mut segments = path.split('/');
    match segments.find(|segment| matches!(*segment, "" | "..")) {
        Some("..") => return Err("leads out of image_root by .."),
        Some(_) => return Err("has an empty part"),
        None => {}
    }
    if path.split('/').all(|segment| segment != ".") {
        return Ok(Cow::Borrowed(path));
    }
    let named: Vec<&str> = path.split('/').filter(|segment| *segment != ".").collect();
    if named.is_empty() {
        return Err("names no file");
    }
    Ok(Cow::Owned(named.join("/")))
}

/// Returns whether a text is a URL: of a web server, of a store, or one that holds its data.
fn is_url(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once(':') else {
        return false;
    };
    let mut known = ["data", "file", "http", "https"].iter();
    if known.any(|known| scheme.eq_ignore_ascii_case(known)) {
        return true;
    }
    let is_scheme = |c: char| c.is_ascii_alphanumeric() || ['+', '.', '-'].contains(&c);
    let begins = scheme.starts_with(|c: char| c.is_ascii_alphabetic());
    begins && scheme.chars().all(is_scheme) && rest.starts_with("//")
}

/// Cuts row groups into blocks of a size whose images can be read together.
pub(super) fn cut(groups: Vec<Block>) -> Vec<Block> {
    groups.into_iter().flat_map(pieces).collect()
}

fn pieces(group: Block) -> Vec<Block> {
    let stored = group.stored_rows();
    if stored <= BLOCK_ROWS_MAX {
        return vec![group];
    }
    let kept: Option<Vec<bool>> = group.mask.as_ref().map(|mask| mask.rows().collect());
    let piece = |first: u32| {
        let rows = BLOCK_ROWS_MAX.min(stored - first);
        let mut piece = Block {
            rows,
            first_row: group.first_row + u64::from(first),
            mask: None,
            ..group.clone()
        };
        if let Some(kept) = &kept {
            piece.keep(&kept[first as usize..(first + rows) as usize]);
        }
        piece
    };
    (0..stored)
        .step_by(BLOCK_ROWS_MAX as usize)
        .map(piece)
        .collect()
}

/// Returns how many rows of a row group have no image, by its statistics. Of images that are bytes
/// or paths it is the least number: which rows have neither is not known.
pub(super) fn without_image(layout: &Layout, group: &RowGroupMetaData) -> u64 {
    let (mut leaves, mut sum) = (0_u64, 0);
    for leaf in image_leaves(layout, group) {
        leaves += 1;
        sum += nulls(leaf).unwrap_or_default();
    }
    let rows = u64::try_from(group.num_rows()).unwrap_or_default();
    sum.saturating_sub(rows * leaves.saturating_sub(1))
}

/// Refuses row groups by what their statistics tell of the images: that all are paths and no root
/// is named, or that they are URLs. `is_first` says whether they are the source's first.
///
/// # Errors
/// `SchemaMismatch`.
pub(super) fn check(
    layout: &Layout,
    (source, shard): (&str, &str),
    groups: &[RowGroupMetaData],
    is_first: bool,
) -> Result<()> {
    let column = &layout.image_column;
    let refused = |what: String| mismatch(what, source, column).with("shard", shard);
    if layout.image_root.is_some() && groups.iter().any(|group| holds_urls(layout, group)) {
        let message = format!("the images in column '{column}' of {shard} are URLs; {URLS}");
        return Err(refused(message));
    }
    let has_only_paths = |group: &RowGroupMetaData| {
        let field = |name: &str| {
            let mut leaves = group.columns().iter();
            let leaf = leaves.find(|leaf| leaf.column_path().parts() == [column.as_str(), name]);
            leaf.and_then(nulls)
        };
        let rows = u64::try_from(group.num_rows()).unwrap_or_default();
        field("bytes") == Some(rows) && field("path").is_some_and(|nulls| nulls < rows)
    };
    let is_struct = layout.image_in_struct && layout.image_root.is_none();
    let mut groups = groups
        .iter()
        .filter(|group| group.num_rows() > 0)
        .peekable();
    if is_first && is_struct && groups.peek().is_some() && groups.all(has_only_paths) {
        let message = format!(
            "the images in column '{column}' of {shard} are paths, and all bytes are null; name \
             the folder that they begin in with image_root (as a flag --image-root)"
        );
        return Err(refused(message));
    }
    Ok(())
}

/// Returns the row group that holds a block, and the number in it of the block's first row; `None`
/// if the groups are others than those of which the block was made.
pub fn row_group_of(groups: &[RowGroupMetaData], block: &Block) -> Option<(usize, usize)> {
    let mut first = 0;
    for (number, group) in groups.iter().enumerate() {
        let rows = u64::try_from(group.num_rows()).ok()?;
        if block.first_row < first + rows {
            let skipped = block.first_row.checked_sub(first)?;
            let fits = skipped + u64::from(block.stored_rows()) <= rows;
            return fits.then_some((number, usize::try_from(skipped).ok()?));
        }
        first += rows;
    }
    None
}

fn image_leaves<'a>(
    layout: &'a Layout,
    group: &'a RowGroupMetaData,
) -> impl Iterator<Item = &'a ColumnChunkMetaData> {
    let leaves = group.columns().iter();
    leaves.filter(move |leaf| layout.reads_for_image(leaf.column_path().parts()))
}

fn nulls(leaf: &ColumnChunkMetaData) -> Option<u64> {
    leaf.statistics().and_then(Statistics::null_count_opt)
}

/// Returns whether the least and the largest of a row group's texts are URLs.
fn holds_urls(layout: &Layout, group: &RowGroupMetaData) -> bool {
    let is_url = |text: Option<&[u8]>| {
        text.is_some_and(|text| text.starts_with(b"http://") || text.starts_with(b"https://"))
    };
    let both = |statistics: &Statistics| {
        is_url(statistics.min_bytes_opt()) && is_url(statistics.max_bytes_opt())
    };
    image_leaves(layout, group).any(|leaf| leaf.statistics().is_some_and(both))
}

#[cfg(test)]
mod tests;
