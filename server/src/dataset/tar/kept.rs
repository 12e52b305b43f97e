//! Keeps surveys of tars in the state: a shard of the same size and ETag is walked only once,
//! although every worker needs its survey.
//!
//! Each survey is a Parquet file with one row for each member: sample, key, field, offset and
//! length.
use super::{
    entries::End,
    samples::{Member, Sample},
    survey::{Survey, survey},
};
use crate::{
    caught::caught,
    dataset::file::ShardFile,
    error::{Error, Result},
    storage::Location,
};
use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, UInt64Array},
    datatypes::UInt64Type,
    error::ArrowError,
};
use bytes::Bytes;
use parquet::{
    arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
};
use std::sync::Arc;

/// Part of the key, so that surveys of older versions are not read.
const VERSION: &str = "2";
const END: &str = "superbatch.tar.end";
/// Folder of the surveys, in the state.
pub(in crate::dataset) const INDEXES: &str = "tar-indexes";

/// Returns the key of a tar's survey in the state. `None` without an ETag: a replaced file could
/// not be recognised, so nothing is kept then.
pub(in crate::dataset) fn kept_key(file: &ShardFile) -> Option<String> {
    let parts = [VERSION, file.uri(), &file.size().to_string(), file.etag()?].join("\0");
    let hash = blake3::hash(parts.as_bytes());
    Some(format!("{INDEXES}/{}.parquet", hash.to_hex()))
}

/// Returns whether these are the bytes of a survey.
///
/// # Errors
/// `Internal` if reading them panicked.
pub(in crate::dataset) async fn is_whole(bytes: Bytes) -> Result<bool> {
    in_background(move || read(bytes).is_ok()).await
}

/// Returns the survey of `file`: the kept one, or a new one, which is then kept.
///
/// # Errors
/// Those of [`survey`] and of the state.
pub async fn survey_kept(state: Option<&Location>, file: &ShardFile) -> Result<Survey> {
    let (Some(state), Some(key)) = (state, kept_key(file)) else {
        return survey(file).await;
    };
    if let Some(bytes) = state.find(&key).await? {
        match in_background(move || read(bytes)).await? {
            Ok(survey) => return Ok(survey),
            Err(cause) => {
                let uri = state.uri_of(&key);
                tracing::warn!(%uri, %cause, "a tar's index is damaged and made anew");
            }
        }
    }
    let found = survey(file).await?;
    let (found, bytes) = in_background(move || {
        let bytes = encode(&found);
        (found, bytes)
    })
    .await?;
    let bytes = bytes.map_err(|e| Error::internal("cannot encode a tar's index").because(e))?;
    state.put(&key, bytes).await?;
    Ok(found)
}

async fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let panicked = |e| Error::internal("the index of a tar panicked").because(e);
    tokio::task::spawn_blocking(work).await.map_err(panicked)
}

fn encode(survey: &Survey) -> Result<Bytes, ParquetError> {
    let members = || {
        let numbered = survey.samples.iter().zip(0_u64..);
        numbered.flat_map(|(sample, n)| sample.members.iter().map(move |m| (n, sample, m)))
    };
    let u64s = |of: fn((u64, &Sample, &Member)) -> u64| {
        Arc::new(UInt64Array::from_iter_values(members().map(of))) as ArrayRef
    };
    let texts = |of: for<'a> fn((u64, &'a Sample, &'a Member)) -> &'a str| {
        Arc::new(StringArray::from_iter_values(members().map(of))) as ArrayRef
    };
    let batch = RecordBatch::try_from_iter([
        ("sample", u64s(|(n, _, _)| n)),
        ("key", texts(|(_, sample, _)| &sample.key)),
        ("field", texts(|(_, _, member)| &member.field)),
        ("start", u64s(|(_, sample, _)| sample.start)),
        ("end", u64s(|(_, sample, _)| sample.end)),
        ("offset", u64s(|(_, _, member)| member.offset)),
        ("length", u64s(|(_, _, member)| member.length)),
    ])?;
    let end = match survey.end {
        End::Whole => "whole".to_owned(),
        End::Unmarked(at) => format!("unmarked {at}"),
        End::Cut(at) => format!("cut {at}"),
        End::Damaged(at) => format!("damaged {at}"),
    };
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_key_value_metadata(Some(vec![KeyValue::new(END.into(), end)]))
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties))?;
    writer.write(&batch)?;
    writer.into_inner().map(Bytes::from)
}

fn read(bytes: Bytes) -> Result<Survey, ArrowError> {
    caught(ArrowError::ParquetError, || decode(bytes))
}

fn decode(bytes: Bytes) -> Result<Survey, ArrowError> {
    let bad = |what: &str| ArrowError::ParseError(format!("no {what}"));
    let builder = ParquetRecordBatchReaderBuilder::try_new(bytes)?;
    let file = builder.metadata().file_metadata().key_value_metadata();
    let end = file.and_then(|all| all.iter().find(|one| one.key == END)?.value.clone());
    let end = end.and_then(|text| end_of(&text)).ok_or_else(|| bad(END))?;
    let mut samples: Vec<Sample> = Vec::new();
    let mut last = None;
    for batch in builder.build()? {
        let batch = batch?;
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| bad(name));
        let u64s = |name| {
            let found = column(name)?.as_primitive_opt::<UInt64Type>();
            found
                .filter(|array| array.null_count() == 0)
                .ok_or_else(|| bad(name))
        };
        let texts = |name| {
            column(name)?
                .as_string_opt::<i32>()
                .ok_or_else(|| bad(name))
        };
        let (numbers, keys, fields) = (u64s("sample")?, texts("key")?, texts("field")?);
        let (starts, ends) = (u64s("start")?, u64s("end")?);
        let (offsets, lengths) = (u64s("offset")?, u64s("length")?);
        for row in 0..batch.num_rows() {
            if last.replace(numbers.value(row)) != Some(numbers.value(row)) {
                samples.push(Sample {
                    key: keys.value(row).to_owned(),
                    start: starts.value(row),
                    end: ends.value(row),
                    members: Vec::new(),
                });
            }
            let member = Member {
                field: fields.value(row).to_owned(),
                offset: offsets.value(row),
                length: lengths.value(row),
            };
            samples
                .last_mut()
                .ok_or_else(|| bad("sample"))?
                .members
                .push(member);
        }
    }
    Ok(Survey { samples, end })
}

fn end_of(text: &str) -> Option<End> {
    match text.split_once(' ') {
        None if text == "whole" => Some(End::Whole),
        Some(("unmarked", at)) => Some(End::Unmarked(at.parse().ok()?)),
        Some(("cut", at)) => Some(End::Cut(at.parse().ok()?)),
        Some(("damaged", at)) => Some(End::Damaged(at.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survey_is_read_as_it_was_written() {
        let member = |field: &str, offset| Member {
            field: field.to_owned(),
            offset,
            length: 7,
        };
        // Keys repeat, so that samples are identified by their numbers.
        let sample = |start: u64| Sample {
            key: "0001".to_owned(),
            start,
            end: start + 2048,
            members: vec![member("jpg", start + 512), member("txt", start + 1536)],
        };
        let cut = [End::Unmarked(4096), End::Cut(4096), End::Damaged(1 << 40)];
        for end in [End::Whole].into_iter().chain(cut) {
            let samples = vec![sample(0), sample(2048)];
            let survey = Survey { samples, end };
            assert_eq!(decode(encode(&survey).unwrap()).unwrap(), survey);
        }
        assert!(decode(Bytes::from_static(b"PAR1 nothing PAR1")).is_err());
    }
}
