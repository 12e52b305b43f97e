//! Whether what a run has written down agrees with itself.
use crate::{
    coordinator::{
        facts::{incarnations::Incarnations, run::RunFacts, trail::Trail},
        receipts::{compact, store::Receipts},
        weights::{Due, Fact, digest_of, due, stored::Stored},
    },
    dataset::Manifest,
    error::Result,
    storage::Location,
};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::Receipt;

/// Receipts that are read at the same time.
const READS_AT_ONCE: usize = 16;

/// Problems that are kept to be listed, the first ones in order.
const LISTED_MAX: usize = 100;

/// What was looked at, and what is wrong with it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct CheckResult {
    pub receipts: usize,
    /// How many receipts each pack has.
    pub packs: Vec<u64>,
    pub pushes: usize,
    pub weights: usize,
    /// Whether the manifest could be read. If not, that is one of the problems.
    pub has_manifest: bool,
    pub problems: Problems,
}

/// What is wrong. A damaged run of a million steps has a million problems: only the first ones are
/// kept.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Problems {
    pub first: BTreeSet<String>,
    pub count: usize,
}

impl Problems {
    pub(super) fn push(&mut self, problem: String) {
        self.count += 1;
        self.first.insert(problem);
        if self.first.len() > LISTED_MAX {
            self.first.pop_last();
        }
    }

    fn extend(&mut self, problems: impl IntoIterator<Item = String>) {
        problems.into_iter().for_each(|problem| self.push(problem));
    }
}

/// The weights that receipts name, each with the first receipt that does and their number. A run
/// has far fewer pushes than steps, so this is what is remembered of the receipts that were read.
#[derive(Debug, Default)]
struct Used(BTreeMap<(u64, i64, u32, String), (String, u64)>);

impl Used {
    fn collect_used(&mut self, receipt: &Receipt, at: &str) {
        let used = receipt.summary.as_ref().and_then(|s| s.learner.as_ref());
        // Version 0 is the initial learner, which is no push.
        if let Some(used) = used.filter(|used| used.version > 0) {
            let key = (
                used.version,
                used.step,
                used.generation,
                used.digest.clone(),
            );
            let (_, count) = self.0.entry(key).or_insert_with(|| (at.to_owned(), 0));
            *count += 1;
        }
    }

    /// Problems of receipts whose weights are in no fact.
    fn unpublished(self, facts: &[Fact]) -> impl Iterator<Item = String> {
        let published: BTreeSet<_> = facts
            .iter()
            .map(|fact| {
                (
                    fact.version,
                    fact.step,
                    fact.generation,
                    fact.digest.clone(),
                )
            })
            .collect();
        let unknown = move |(key, _): &(_, _)| !published.contains(key);
        self.0.into_iter().filter(unknown).map(|(_, (at, count))| {
            let others = match count - 1 {
                0 => String::new(),
                others => format!(" (nor those of {others} more receipts, the same)"),
            };
            format!("{at}: the weights that it names were not published{others}")
        })
    }
}

/// # Errors
/// `StorageUnreachable`. What can be read and is wrong is a problem, no error.
pub(super) async fn check(
    state: &Location,
    run: &Location,
    id: &str,
    facts: &RunFacts,
) -> Result<CheckResult> {
    let mut found = CheckResult::default();
    match Manifest::load(state, &facts.run.manifest).await {
        Ok(_) => found.has_manifest = true,
        Err(error) => found.problems.push(error.chain()),
    }
    if let Err(error) = Incarnations::load(run).await {
        found.problems.push(error.chain());
    }
    let receipts = Receipts::new(run.clone());
    // Before the receipts: a summary is written after all that it speaks of, and the run may go on.
    let summarised = receipts.summarised(&facts.chain).await?;
    // A fork's steps before its own are another run's.
    let own = |step: u64| step.min(facts.chain.kept_of(0));
    let from = facts.run.fork.as_ref().map_or(0, |fork| own(fork.step));
    let (mut trail, mut used) = (Trail::beyond(from, []), Used::default());
    // Folder by folder, so that neither the names nor the receipts of the whole run are in memory.
    for number in receipts.folders().await? {
        let committed = receipts.committed_in(number).await?;
        found.receipts += committed.len();
        for (step, generation) in &committed {
            let holding = facts.chain.candidates(*step, facts.chain.current());
            if holding.contains(generation) {
                trail.insert(*step);
            }
        }
        let read = stream::iter(committed).map(|at| read_one(&receipts, at));
        let mut read = read.buffer_unordered(READS_AT_ONCE);
        while let Some(((step, generation), receipt)) = read.next().await {
            let at = at(step, generation);
            match receipt {
                Ok(Some(receipt)) => {
                    used.collect_used(&receipt, &at);
                    let wrong = wrong(&receipt, (step, generation), id, facts).into_iter();
                    let problems = wrong.map(|what| format!("{at}: {what}"));
                    found.problems.extend(problems);
                }
                Ok(None) => found.problems.push(format!("{at} is gone")),
                Err(error) => found.problems.push(error.chain()),
            }
        }
    }
    // After the receipts: packs only become more, and what was found in one is looked at whole.
    let (packs, damaged) = compact::problems(&receipts).await?;
    found.packs = packs;
    found.problems.extend(damaged);
    found.problems.extend(gap(&trail, facts.spec.max_ahead));
    found.problems.extend(lost(&trail, summarised));
    // After the receipts: the weights that a receipt names were published before it.
    let stored = Stored::read(run).await?;
    found.pushes = stored.facts.len();
    found.problems.extend(used.unpublished(&stored.facts));
    found.problems.extend(lacks(&stored, &trail, facts));
    for key in stored.files() {
        found.weights += 1;
        found.problems.extend(damage(run, &key).await?);
    }
    Ok(found)
}

async fn read_one(
    receipts: &Receipts,
    (step, generation): (u64, u32),
) -> ((u64, u32), Result<Option<Receipt>>) {
    ((step, generation), receipts.find(step, generation).await)
}

fn at(step: u64, generation: u32) -> String {
    format!("receipt of step {step} in generation {generation}")
}

/// Names a step that is not committed though later ones are, by more than may be decided out of
/// order.
fn gap(trail: &Trail, max_ahead: u32) -> Option<String> {
    let (next, newest) = (trail.next(), trail.newest()?);
    (newest > next.saturating_add(u64::from(max_ahead)))
        .then(|| format!("step {next} has no receipt, and step {newest} has one"))
}

/// Names a step without a receipt, although a summary of the run says that there was one.
fn lost(trail: &Trail, summarised: u64) -> Option<String> {
    let next = trail.next();
    (summarised > next).then(|| {
        format!(
            "step {next} has no receipt, and a summary (trail-summaries) says that all steps \
            before {summarised} were committed: receipts were deleted"
        )
    })
}

/// Names what a receipt says that is not so.
fn wrong(
    receipt: &Receipt,
    (step, generation): (u64, u32),
    id: &str,
    facts: &RunFacts,
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
    ];
    let failed = checks.into_iter().filter(|(holds, _)| !holds);
    failed.map(|(_, what)| what.to_owned()).collect()
}

/// Names published weights that the next step is scored with and that are not there.
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

/// Returns whether a weights file has other bytes than its name says.
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
    use superbatch_proto::v1::{RunSpec, WeightsVersion};

    fn facts() -> RunFacts {
        let spec = RunSpec {
            max_ahead: 2,
            ..Default::default()
        };
        RunFacts {
            run: RunFact::new(&spec, "m".into(), None, None, None),
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
        let of = |receipt: &Receipt| wrong(receipt, (3, 0), "run", &facts());
        let found = |change: fn(&mut Receipt)| of(&receipt(change));
        assert_eq!(found(|_| {}), [""; 0]);
        assert_eq!(
            wrong(&receipt(|_| {}), (4, 0), "run", &facts()),
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
    }

    #[test]
    fn weights_of_receipts_must_have_been_published() {
        let of = |version| {
            receipt(|receipt| {
                receipt.summary.get_or_insert_default().learner = Some(WeightsVersion {
                    version,
                    ..Default::default()
                });
            })
        };
        let mut used = Used::default();
        for (version, at) in [(0, "a"), (1, "b"), (1, "c"), (2, "d")] {
            used.collect_used(&of(version), at);
        }
        let told: Vec<String> = used.unpublished(&[]).collect();
        assert_eq!(
            told,
            [
                "b: the weights that it names were not published (nor those of 1 more receipts, \
                the same)",
                "d: the weights that it names were not published"
            ]
        );
    }

    #[test]
    fn a_step_that_a_summary_knows_must_have_its_receipt() {
        assert_eq!(lost(&Trail::new(0..2000), 2000), None);
        assert_eq!(lost(&Trail::new([]), 0), None);
        let told = lost(&Trail::new(0..1500), 2000).unwrap();
        assert!(
            told.contains("step 1500") && told.contains("2000"),
            "{told}"
        );
    }

    #[tokio::test]
    async fn a_run_whose_newest_receipts_were_deleted_is_told_by_its_summary() {
        let state = Stores::new(StorageConfig::default())
            .open("memory:///state")
            .unwrap();
        let run = state.below("runs/r");
        let check = async || check(&state, &run, "r", &facts()).await.unwrap();
        let before = check().await.problems;
        run.put("trail-summaries/000000001000-0.json", "{}".into())
            .await
            .unwrap();
        let after = check().await.problems;
        assert_eq!(after.count, before.count + 1);
        assert!(
            after.first.iter().any(|p| p.contains("trail-summaries")),
            "{after:?}"
        );
    }

    #[test]
    fn many_problems_are_counted_and_the_first_ones_kept() {
        let mut problems = Problems::default();
        problems.extend((0..250).rev().map(|n| format!("{n:03}")));
        assert_eq!((problems.count, problems.first.len()), (250, LISTED_MAX));
        assert_eq!(problems.first.last().unwrap(), "099");
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
