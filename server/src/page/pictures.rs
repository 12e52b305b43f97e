//! Shows a row: its picture and its caption. Neither is trusted. So the picture is decoded, reduced
//! and encoded again: the browser never gets the stored bytes, whose format the data set's author
//! chose.
use super::{
    Known, Page,
    answer::{Answer, Failed, Json, number, text},
};
use crate::{
    coordinator::plan::rows::locate,
    error::{Error, Result},
};
use arrow::array::{Array, AsArray, RecordBatch};
use axum::{
    extract::{Path, RawQuery, State},
    http::{StatusCode, header},
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
        let (batch, row) = block(&page, &known, place(key)?, false).await?;
        let caption = batch
            .column(1)
            .as_string_opt::<i32>()
            .filter(|captions| captions.is_valid(row));
        let caption = caption.map(|captions| {
            captions
                .value(row)
                .chars()
                .take(CAPTION_CHARS)
                .collect::<String>()
        });
        found.insert(key.to_owned(), json!(caption));
    }
    Ok(Json(json!({ "captions": found })))
}

/// Answers `GET /api/runs/{run}/pictures/0.0.17?size=128`: a JPEG, or 404 if the row has no picture
/// that can be decoded.
pub(super) async fn picture(
    State(page): State<Arc<Page>>,
    Path((id, key)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, Failed> {
    let side = number(query.as_deref(), "size")?
        .unwrap_or(128)
        .clamp(*SIDES.start(), *SIDES.end()) as u32;
    let known = page.find_or_load(&id).await?;
    let (batch, row) = block(&page, &known, place(&key)?, true).await?;
    let _permit = page.permit(&page.block_reads).await?;
    let drawn = tokio::task::spawn_blocking(move || {
        let images = batch
            .column(0)
            .as_binary_opt::<i32>()
            .filter(|images| images.is_valid(row))?;
        thumbnail(images.value(row), &LIMITS, side).ok()
    });
    let drawn = drawn
        .await
        .map_err(|e| Error::internal("a thumbnail panicked").because(e))?;
    Ok(match drawn {
        // Receipts pin a row's content, so it never changes within a run.
        Some(jpeg) => (
            [
                (header::CONTENT_TYPE, "image/jpeg"),
                (header::CACHE_CONTROL, "private, max-age=86400, immutable"),
            ],
            jpeg,
        )
            .into_response(),
        None => (
            StatusCode::NOT_FOUND,
            "the row has no picture that can be decoded",
        )
            .into_response(),
    })
}

/// Reads the block that holds a row, and the row's picture if that lies elsewhere and is wanted.
/// Returns the block with the row's number in it.
async fn block(
    page: &Page,
    known: &Known,
    place: Place,
    picture: bool,
) -> Result<(Arc<RecordBatch>, usize)> {
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
    let _permit = page.permit(&page.block_reads).await?;
    let picture = picture.then_some(candidate.row);
    let batch = page
        .blocks
        .block(&manifest, source, shard, candidate.block, picture)
        .await?;
    Ok((batch, candidate.row as usize))
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
}
