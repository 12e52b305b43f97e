//! How losses are stored: reports, numbered in the order in which they came, and summaries.
use super::Example;
use crate::{
    blocking::blocking,
    error::{Error, Result},
    storage::{Location, nonce},
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::HashMap;

const REPORTS: &str = "losses";
const SUMMARIES: &str = "loss-summaries";

/// Reports that are read at the same time.
const READS_AT_ONCE: usize = 32;
/// Summaries that are kept: another coordinator may be reading the one before the newest.
const SUMMARIES_KEPT: usize = 2;

/// What such an object begins with, then a nonce of 32 hexadecimal digits, then 20 bytes an
/// example.
const MAGIC: &[u8; 4] = b"SBL1";
const HEAD_BYTES: usize = 4 + 32;
const EXAMPLE_BYTES: usize = 4 + 4 + 8 + 4;

/// What is stored of a run's losses.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub losses: HashMap<Example, f32>,
    /// The number of the next report.
    pub next: u64,
    /// Examples of the newest summary.
    pub summarised: usize,
    /// Reports after the newest summary, and their losses.
    pub reports_since: u64,
    pub losses_since: usize,
}

/// Reads the newest summary and the reports after it.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if one cannot be read.
pub(super) async fn read(run: &Location) -> Result<Stored> {
    let mut stored = Stored::default();
    if let Some((next, key)) = summaries(run).await?.pop() {
        let (bytes, uri) = (run.get_large(&key).await?, run.uri_of(&key));
        let all = move || Ok(decoded(&bytes, &uri)?.into_iter().collect());
        stored.losses = blocking("reading a summary of losses", all).await?;
        stored.summarised = stored.losses.len();
        stored.next = next;
    }
    let reports = run.list(REPORTS).await?.into_iter();
    let new = reports.filter_map(|(key, _)| numbered(REPORTS, key));
    let mut new: Vec<_> = new.filter(|(number, _)| *number >= stored.next).collect();
    new.sort_unstable();
    stored.next = new.last().map_or(stored.next, |(number, _)| number + 1);
    let reads: Vec<_> = new
        .into_iter()
        .map(|(_, key)| async move { Ok::<_, Error>((run.get(&key).await?, key)) })
        .collect();
    // In their order: of an example the last one counts.
    let mut reads = stream::iter(reads).buffered(READS_AT_ONCE);
    while let Some((bytes, key)) = reads.try_next().await? {
        let losses = decoded(&bytes, &run.uri_of(&key))?;
        stored.reports_since += 1;
        stored.losses_since += losses.len();
        stored.losses.extend(losses);
    }
    Ok(stored)
}

/// Writes all losses that are known of the reports before `next`, or of more, and deletes older
/// summaries.
///
/// # Errors
/// `StorageUnreachable`.
pub(super) async fn summarise(run: &Location, next: u64, all: Bytes) -> Result<()> {
    run.put(&format!("{SUMMARIES}/{next:012}.bin"), all).await?;
    let mut older = summaries(run).await?;
    older.retain(|(number, _)| *number <= next);
    let surplus = older.len().saturating_sub(SUMMARIES_KEPT);
    for (_, key) in older.into_iter().take(surplus) {
        run.delete(&key).await?;
    }
    Ok(())
}

/// Returns the keys of all summaries, the newest last, each with the number of the report that
/// comes next.
async fn summaries(run: &Location) -> Result<Vec<(u64, String)>> {
    let listed = run.list(SUMMARIES).await?.into_iter();
    let mut all: Vec<_> = listed
        .filter_map(|(key, _)| numbered(SUMMARIES, key))
        .collect();
    all.sort_unstable();
    Ok(all)
}

pub(super) fn report_key(number: u64) -> String {
    format!("{REPORTS}/{number:012}.bin")
}

/// Returns the number in a key, with the key.
fn numbered(folder: &str, key: String) -> Option<(u64, String)> {
    let name = key.strip_prefix(folder)?.strip_prefix('/')?;
    let number = name.strip_suffix(".bin")?.parse().ok()?;
    Some((number, key))
}

pub(super) fn encoded(losses: impl Iterator<Item = (Example, f32)>) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEAD_BYTES + losses.size_hint().0 * EXAMPLE_BYTES);
    bytes.put_slice(MAGIC);
    bytes.put_slice(nonce().as_bytes());
    for ((source, shard, row), loss) in losses {
        bytes.put_u32_le(source);
        bytes.put_u32_le(shard);
        bytes.put_u64_le(row);
        bytes.put_f32_le(loss);
    }
    bytes.freeze()
}

/// # Errors
/// `Internal` for other bytes.
pub(super) fn decoded(bytes: &[u8], uri: &str) -> Result<Vec<(Example, f32)>> {
    let examples = bytes
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.get(HEAD_BYTES - MAGIC.len()..))
        .filter(|examples| examples.len().is_multiple_of(EXAMPLE_BYTES));
    let Some(examples) = examples else {
        return Err(Error::internal(format!("{uri} is no report of losses")));
    };
    let one = |mut example: &[u8]| {
        let at = (
            example.get_u32_le(),
            example.get_u32_le(),
            example.get_u64_le(),
        );
        (at, example.get_f32_le())
    };
    Ok(examples.chunks_exact(EXAMPLE_BYTES).map(one).collect())
}
