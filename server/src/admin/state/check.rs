//! Whether what a run has written down agrees with itself.
use crate::{
    coordinator::{
        facts::{incarnations::Incarnations, run::RunFacts, trail::Trail},
        receipts::store::Receipts,
        weights::{Due, Fact, digest_of, due, stored::Stored},
    },
    dataset::Manifest,
    error::Result,
    storage::Location,
};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::{Receipt, WeightsVersion};

/// Receipts that are read at the same time.
const READS_AT_ONCE: usize = 16;

/// What was looked at, and what is wrong with it.
#[derive(Debug, Default, PartialEq)]
pub struct Found {
    pub receipts: usize,
    pub pushes: usize,
    pub weights: usize,
    pub problems: Vec<String>,
}

/// # Errors
/// `StorageUnreachable`. What can be read and is wrong is a problem, no error.
pub async fn check(state: &Location, run: &Location, id: &str, facts: &RunFacts) -> Result<Found> {
    let mut found = Found::default();
    if let Err(error) = Manifest::load(state, &facts.run.manifest).await {
        found.problems.push(error.chain());
    }
    if let Err(error) = Incarnations::load(run).await {
        found.problems.push(error.chain());
    }
    let receipts = Receipts::new(run.clone());
    let committed = receipts.committed().await?;
    let steps = committed.iter().filter(|(step, generation)| {
        let holding = facts.chain.candidates(*step, facts.chain.current());
        holding.contains(generation)
    });
    let trail = Trail::new(steps.map(|(step, _)| *step));
    found.problems.extend(gap(&trail, facts.spec.max_ahead));
    found.receipts = committed.len();
    let mut read = stream::iter(committed)
        .map(|(step, generation)| {
            let receipts = &receipts;
            async move { (step, generation, receipts.find(step, generation).await) }
        })
        .buffer_unordered(READS_AT_ONCE);
    let mut whole = Vec::new();
    while let Some((step, generation, receipt)) = read.next().await {
        match receipt {
            Ok(Some(receipt)) => whole.push((step, generation, receipt)),
            Ok(None) => found
                .problems
                .push(format!("{} is gone", at(step, generation))),
            Err(error) => found.problems.push(error.chain()),
        }
    }
    drop(read);
    // After the receipts: the weights that a receipt names were published before it.
    let stored = Stored::read(run).await?;
    found.pushes = stored.facts.len();
    let versions = stored
        .facts
        .iter()
        .map(|fact| (fact.version, fact))
        .collect();
    for (step, generation, receipt) in &whole {
        let wrong = wrong(receipt, (*step, *generation), id, facts, &versions);
        let told = wrong
            .into_iter()
            .map(|what| format!("{}: {what}", at(*step, *generation)));
        found.problems.extend(told);
    }
    found.problems.extend(lacks(&stored, &trail, facts));
    for key in stored.files() {
        found.weights += 1;
        found.problems.extend(damage(run, &key).await?);
    }
    found.problems.sort();
    Ok(found)
}

fn at(step: u64, generation: u32) -> String {
    format!("receipt of step {step} in generation {generation}")
}

/// A step that is not committed though later ones are, by more than may be decided out of order.
fn gap(trail: &Trail, max_ahead: u32) -> Option<String> {
    let (next, newest) = (trail.next(), trail.newest()?);
    (newest > next.saturating_add(u64::from(max_ahead)))
        .then(|| format!("step {next} has no receipt, and step {newest} has one"))
}

/// What a receipt says that is not so.
fn wrong(
    receipt: &Receipt,
    (step, generation): (u64, u32),
    id: &str,
    facts: &RunFacts,
    versions: &BTreeMap<u64, &Fact>,
) -> Vec<String> {
    let Some(summary) = &receipt.summary else {
        return vec!["it has no summary".to_owned()];
    };
    let reference = facts
        .run
        .reference
        .as_ref()
        .map(|model| model.digest.as_str());
    let ids: BTreeSet<&str> = receipt.chosen.iter().map(|row| row.id.as_str()).collect();
    let checks = [
        (summary.run_id == id, "it is another run's"),
        (
            (summary.step, summary.chosen_in_generation) == (step, generation),
            "it is another step's",
        ),
        (
            summary.dataset_manifest == facts.run.manifest,
            "it names another data set",
        ),
        (
            summary.reference_digest.is_empty()
                || reference == Some(summary.reference_digest.as_str()),
            "it names another reference",
        ),
        (
            receipt.chosen.len() == summary.sub_batch_size as usize,
            "it has more or fewer rows than its sub-batch",
        ),
        (ids.len() == receipt.chosen.len(), "it has a row twice"),
        (
            summary
                .learner
                .as_ref()
                .is_none_or(|used| is_published(used, versions)),
            "the weights that it names were not published",
        ),
    ];
    let failed = checks.into_iter().filter(|(holds, _)| !holds);
    failed.map(|(_, what)| what.to_owned()).collect()
}

/// Version 0 is the initial learner, which is no push.
fn is_published(used: &WeightsVersion, versions: &BTreeMap<u64, &Fact>) -> bool {
    let same = |fact: &&Fact| {
        (fact.step, fact.generation, &fact.digest) == (used.step, used.generation, &used.digest)
    };
    used.version == 0 || versions.get(&used.version).is_some_and(same)
}

/// Published weights that the next step is scored with and that are not there.
fn lacks(stored: &Stored, trail: &Trail, facts: &RunFacts) -> Option<String> {
    let lag = facts.spec.lag.unwrap_or_default();
    let Due::Exactly(step) = due(trail.next(), &lag, facts.spec.push_every_steps) else {
        return None;
    };
    let step = i64::try_from(step).ok()?;
    let is_pushed = stored.facts.iter().any(|fact| fact.step == step);
    (!facts.closed && is_pushed && !stored.holds(step)).then(|| {
        format!(
            "the weights pushed after step {step}, with which step {} is scored, are gone; push \
            them again",
            trail.next()
        )
    })
}

/// Whether a weights file has other bytes than its name says.
async fn damage(run: &Location, key: &str) -> Result<Option<String>> {
    let Some(digest) = digest_of(key) else {
        return Ok(None);
    };
    // As pieces: weights may not fit into this machine's memory.
    let opened = run
        .store()
        .get_opts(&run.path(key), Default::default())
        .await;
    let opened = match opened {
        Ok(opened) => opened,
        // The run goes on meanwhile, and lets go of old ones.
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(cause) => return Err(run.error("read", key, cause)),
    };
    let mut hash = blake3::Hasher::new();
    let mut pieces = opened.into_stream();
    while let Some(piece) = pieces
        .try_next()
        .await
        .map_err(|e| run.error("read", key, e))?
    {
        hash.update(&piece);
    }
    let is_whole = hash.finalize().to_hex().as_str() == digest;
    Ok((!is_whole).then(|| {
        format!(
            "{} is damaged: its bytes do not have that digest",
            run.uri_of(key)
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coordinator::{
            facts::{chain::Chain, run::RunFact},
            receipts::parquet::tests::sample,
        },
        storage::{StorageConfig, Stores},
    };
    use superbatch_proto::v1::RunSpec;

    fn facts() -> RunFacts {
        let spec = RunSpec {
            max_ahead: 2,
            ..Default::default()
        };
        RunFacts {
            run: RunFact::new(&spec, "m".into(), None, None),
            spec,
            appended: 0,
            chain: Chain::default(),
            closed: false,
            failure: None,
        }
    }

    fn receipt(change: impl FnOnce(&mut Receipt)) -> Receipt {
        let mut receipt = sample(3, 0, "n");
        let summary = receipt.summary.get_or_insert_default();
        summary.dataset_manifest = "m".into();
        summary.reference_digest.clear();
        summary.learner = None;
        change(&mut receipt);
        receipt
    }

    #[test]
    fn what_a_receipt_says_must_be_so() {
        let of = |receipt: &Receipt| wrong(receipt, (3, 0), "run", &facts(), &BTreeMap::new());
        let found = |change: fn(&mut Receipt)| of(&receipt(change));
        assert_eq!(found(|_| {}), [""; 0]);
        assert_eq!(
            wrong(&receipt(|_| {}), (4, 0), "run", &facts(), &BTreeMap::new()),
            ["it is another step's"]
        );
        assert_eq!(
            found(|receipt| receipt.chosen[1] = receipt.chosen[0].clone()),
            ["it has a row twice"]
        );
        assert_eq!(
            found(|receipt| drop(receipt.chosen.pop())),
            ["it has more or fewer rows than its sub-batch"]
        );
        assert_eq!(
            found(|receipt| {
                let used = WeightsVersion {
                    version: 1,
                    ..Default::default()
                };
                receipt.summary.get_or_insert_default().learner = Some(used);
            }),
            ["the weights that it names were not published"]
        );
    }

    #[test]
    fn steps_ahead_leave_no_gap_and_lost_ones_do() {
        assert_eq!(gap(&Trail::new([]), 2), None);
        assert_eq!(gap(&Trail::new([0, 1, 2, 4]), 2), None);
        assert_eq!(
            gap(&Trail::new([0, 1, 2, 7]), 2).as_deref(),
            Some("step 3 has no receipt, and step 7 has one")
        );
    }

    #[tokio::test]
    async fn weights_must_have_the_bytes_that_they_are_named_by() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///state/runs/r")
            .unwrap();
        let key = |bytes: &[u8]| format!("snapshots/{}.n.safetensors", blake3::hash(bytes));
        let (good, bad) = (key(b"good"), key(b"other"));
        run.put(&good, "good".into()).await.unwrap();
        run.put(&bad, "bad".into()).await.unwrap();
        assert_eq!(damage(&run, &good).await.unwrap(), None);
        let told = damage(&run, &bad).await.unwrap().unwrap();
        assert!(told.contains(&bad) && told.contains("damaged"), "{told}");
        assert_eq!(damage(&run, &key(b"gone")).await.unwrap(), None);
    }
}
