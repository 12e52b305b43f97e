//! How far a run is committed, written down now and then, so that opening it does not list every
//! receipt: a million of them are a thousand requests to S3.
//!
//! A summary says that all steps before one were committed in the trajectory of a generation. That
//! stays true, since no receipt is lost: packs have those whose objects are deleted. A rewind with
//! reselect since takes steps away from the trajectory, which the chain of rewinds tells. A run
//! without a summary, such as an older build left behind, is listed whole once. All its information
//! is in its key, so summaries are listed and never read.
use crate::{coordinator::facts::chain::Chain, error::Result, storage::Location};

/// Summaries, below the run.
const SUMMARIES: &str = "trail-summaries";

/// Returns the step before which all are committed, of the trajectory that `chain` describes, as
/// far as summaries know.
///
/// # Errors
/// `StorageUnreachable`.
pub(super) async fn known(run: &Location, chain: &Chain) -> Result<u64> {
    let listed = run.list(SUMMARIES).await?;
    let known = listed.iter().filter_map(|(key, _)| parse(key));
    Ok(known
        .map(|(next, generation)| next.min(chain.kept_of(generation)))
        .max()
        .unwrap_or(0))
}

/// Writes a summary. Best effort: without it more receipts are listed.
pub(super) async fn write(run: &Location, next: u64, generation: u32) {
    let key = format!("{SUMMARIES}/{next:012}-{generation}.json");
    // Its name holds all, so two writers of one write the same.
    if let Err(error) = run.create(&key, "{}".into()).await {
        tracing::warn!(
            key,
            error = error.chain(),
            "a run's progress is not summarised for now"
        );
    }
}

fn parse(key: &str) -> Option<(u64, u32)> {
    let name = key.strip_prefix(SUMMARIES)?.strip_prefix('/')?;
    let (next, generation) = name.strip_suffix(".json")?.split_once('-')?;
    Some((next.parse().ok()?, generation.parse().ok()?))
}
