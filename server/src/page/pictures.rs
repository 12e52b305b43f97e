//! Shows a row: its picture and its caption. Neither is trusted. So the picture is decoded, reduced
//! and encoded again: the browser never gets the stored bytes, whose format the data set's author
//! chose.
use super::{
    Known, Page,
    answer::{Answer, Failed, number, text},
    shares::Taken,
};
use crate::{
    coordinator::plan::rows::locate,
    dataset::Manifest,
    error::{Error, Result},
};
use arrow::array::{Array, AsArray, RecordBatch};
use axum::{
    extract::{Path, RawQuery, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Map, json};
use std::sync::Arc;
use superbatch_images::{ImageLimits, thumbnail};
use superbatch_proto::v1::ChosenRow;

/// Most captions of one call.
const CAPTIONS: usize = 64;
/// Characters of a caption that are sent.
const CAPTION_CHARS: usize = 2_000;
/// Pixels of a picture's longer side.
const SIDES: std::ops::RangeInclusive<u64> = 32..=512;
const LIMITS: ImageLimits = ImageLimits {
    pixels_max: 89_478_485,
    bytes_max: 64 << 20,
};

/// The place of a row in a run's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub source: u32,
    pub shard: u32,
    pub row: u64,
}

/// Parses a key such as `0.1.17`, the form of [`super::steps::key`].
pub(super) fn place(key: &str) -> Result<Place> {
    let parsed = || {
        let mut parts = key.split('.');
        let place = Place {
            source: parts.next()?.parse().ok()?,
            shard: parts.next()?.parse().ok()?,
            row: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(place)
    };
    parsed().ok_or_else(|| {
        Error::invalid(
            "row",
            format!("'{key}' is no row; give SOURCE.SHARD.ROW, such as 0.0.17"),
        )
    })
}

/// Answers `GET /api/runs/{run}/captions?rows=0.0.17,0.0.18`.
pub(super) async fn captions(
    State(page): State<Arc<Page>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let known = page.find_or_load(&id).await?;
    let rows = text(query.as_deref(), "rows").unwrap_or_default();
    let keys: Vec<&str> = rows.split(',').filter(|key| !key.is_empty()).collect();
    if keys.len() > CAPTIONS {
        return Err(Error::invalid(
            "rows",
            format!(
                "{} rows are asked for, at most {CAPTIONS} at a time",
                keys.len()
            ),
        )
        .into());
    }
    let mut found = Map::new();
    for key in keys {
        let read = read(&page, &known, place(key)?, false).await?;
        let caption = caption(&read.batch, read.row);
        let caption = caption.map(|text| text.chars().take(CAPTION_CHARS).collect::<String>());
        found.insert(key.to_owned(), json!(caption));
    }
    Ok(json!({ "captions": found }).into())
}

/// Returns the caption of a row of a block.
pub(super) fn caption(batch: &RecordBatch, row: usize) -> Option<&str> {
    let captions = batch.column(1).as_string_opt::<i32>()?;
    captions.is_valid(row).then(|| captions.value(row))
}

/// Returns the image of a row of a block as it is stored, if it was read.
pub(super) fn image(batch: &RecordBatch, row: usize) -> Option<&[u8]> {
    let images = batch.column(0).as_binary_opt::<i32>()?;
    images.is_valid(row).then(|| images.value(row))
}

/// Answers `GET /api/runs/{run}/pictures/0.0.17?size=128&data=DIGEST`: a JPEG, or 404 if the row
/// has no picture that can be decoded. `data` is that of the run's facts: with it the address names
/// the picture itself, and browsers keep it without asking again.
pub(super) async fn picture(
    State(page): State<Arc<Page>>,
    Path((id, key)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Failed> {
    let query = query.as_deref();
    let side = number(query, "size")?
        .unwrap_or(128)
        .clamp(*SIDES.start(), *SIDES.end()) as u32;
    let known = page.find_or_load(&id).await?;
    let read = read(&page, &known, place(&key)?, true).await?;
    let caching = caching(read.is_pinned, known.data(), text(query, "data").as_deref());
    let drawn = page.work("a thumbnail", move || {
        let image = image(&read.batch, read.row);
        let jpeg = image.and_then(|image| thumbnail(image, &LIMITS, side).ok());
        let tagged = jpeg.map(|jpeg| (tag(&jpeg), jpeg));
        // The block is let go first, and then its place.
        drop(read);
        Ok(tagged)
    });
    let Some((tag, jpeg)) = drawn.await? else {
        let none = "the row has no picture that can be decoded";
        return Ok((StatusCode::NOT_FOUND, none).into_response());
    };
    let is_known = headers
        .get(header::IF_NONE_MATCH)
        .is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let kept = [
        (header::ETAG, tag),
        (header::CACHE_CONTROL, caching.to_owned()),
    ];
    if is_known {
        return Ok((StatusCode::NOT_MODIFIED, kept).into_response());
    }
    Ok((kept, [(header::CONTENT_TYPE, "image/jpeg")], jpeg).into_response())
}

/// Returns how long a browser may keep a picture. Run ids and addresses are used again, for other
/// data: only an address that names the data has one picture for ever.
fn caching(is_pinned: bool, data: &str, asked: Option<&str>) -> &'static str {
    if is_pinned && asked == Some(data) {
        "private, max-age=86400, immutable"
    } else {
        "private, no-cache"
    }
}

fn tag(jpeg: &[u8]) -> String {
    format!("\"{}\"", &blake3::hash(jpeg).to_hex()[..16])
}

/// A row in its block.
struct Read {
    batch: Arc<RecordBatch>,
    row: usize,
    /// Whether the manifest pins the row's image: with a shard of another content it is refused.
    is_pinned: bool,
    _held: Taken,
}

/// Reads the block that holds a row, and the row's picture if that lies elsewhere and is wanted.
async fn read(page: &Page, known: &Known, place: Place, picture: bool) -> Result<Read> {
    let manifest = page.manifest(&known.facts.run.manifest).await?;
    let Place { source, shard, row } = place;
    let wanted = ChosenRow {
        source,
        shard,
        row,
        ..Default::default()
    };
    let candidate = locate(&manifest, &wanted).map_err(|_| {
        Error::invalid(
            "row",
            format!("the run's data has no row {row} in shard {shard} of source {source}"),
        )
    })?;
    let held = page.blocks_held.take().await?;
    let picture = picture.then_some(candidate.row);
    let batch = page
        .blocks
        .block(&manifest, source, shard, candidate.block, picture)
        .await?;
    Ok(Read {
        batch,
        row: candidate.row as usize,
        is_pinned: is_pinned(&manifest, source, shard),
        _held: held,
    })
}

/// Returns whether a shard's rows can only be those that were indexed. Images that lie beside the
/// shards may be written anew, and a store without ETags tells no file from another of its size.
fn is_pinned(manifest: &Manifest, source: u32, shard: u32) -> bool {
    let source = manifest.sources.get(source as usize);
    let inside = source.filter(|source| source.layout.image_root.is_none());
    let shard = inside.and_then(|source| source.shards.get(shard as usize));
    shard.is_some_and(|shard| shard.etag.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_named_by_three_numbers() {
        assert_eq!(
            place("1.20.300").unwrap(),
            Place {
                source: 1,
                shard: 20,
                row: 300
            }
        );
        for key in [
            "",
            "1.2",
            "1.2.3.4",
            "a.0.0",
            "-1.0.0",
            "0.0.99999999999999999999",
            "../../x",
        ] {
            assert_eq!(place(key).unwrap_err().value("field"), Some("row"), "{key}");
        }
    }
    #[test]
    fn only_an_address_that_names_the_data_has_one_picture_for_ever() {
        let forever = |is_pinned, asked| caching(is_pinned, "0a1b", asked).contains("immutable");
        assert!(forever(true, Some("0a1b")));
        assert!(
            !forever(true, Some("0a1c")),
            "of the data that was there before"
        );
        assert!(!forever(true, None));
        assert!(
            !forever(false, Some("0a1b")),
            "images that lie beside the shards"
        );
        assert!(caching(true, "0a1b", None).contains("no-cache"));
    }
}
