//! `superbatch state compact`: receipts of old steps, a thousand to a file.
use super::{GcArgs, load};
use crate::{
    admin::progress::Progress,
    app,
    config::Config,
    coordinator::{
        facts::{
            allow_packs,
            owner::{Identity, check_reads_packs, keep_out_older},
            run::{self, RunFacts},
        },
        receipts::{
            compact::{Compacted, Compaction, Settings},
            packs::RECEIPTS_MAX,
            store::Receipts,
        },
        runs::fork,
    },
    dataset::counted,
    error::{Error, Result},
    storage::{Location, nonce},
};
use clap::Args;
use std::collections::BTreeMap;
use superbatch_proto::v1::Reason;

#[derive(Args)]
pub(super) struct CompactArgs {
    #[command(flatten)]
    of: GcArgs,
    /// The newest steps of a run that goes on, whose receipts stay as they are: at least twice as
    /// many as its `max_ahead`. Those of a run that was closed, or failed, are all packed
    #[arg(long, value_name = "N", default_value_t = 1000)]
    keep_last: u64,
    /// Steps whose receipts lie in one file. Fewer files, or less to read for one receipt
    #[arg(long, value_name = "N", default_value_t = RECEIPTS_MAX,
        value_parser = clap::value_parser!(u64).range(2..=RECEIPTS_MAX))]
    pack: u64,
}

impl CompactArgs {
    pub(super) fn common(&self) -> &GcArgs {
        &self.of
    }
}

/// # Errors
/// `RunNotFound`; `Unimplemented` if a coordinator of an older build serves the run or a fork of
/// it; `InvalidArgument` if receipts could not be packed, with what was done and which; those of
/// storage.
pub(super) async fn run(config: &Config, state: &Location, args: &CompactArgs) -> Result<String> {
    let (id, dry_run) = (args.of.of.run.as_str(), args.of.dry_run);
    let (location, facts) = load(state, id).await?;
    let receipts = fork::receipts(state, id, &facts).await?;
    let settings = Settings {
        pack: args.pack,
        generation: facts.chain.current(),
        before: before(&receipts, &facts, args).await?,
        dry_run: true,
    };
    let numbers = receipts.folders().await?;
    let nobody = || async { Ok::<(), Error>(()) };
    let plan = Compaction::new(&receipts, settings, nobody);
    let plan = plan.run(numbers.clone(), |_| {}).await?;
    // What was interrupted may have left no receipt to pack, and folders to remove.
    let is_packed = !receipts.packs().known().all().is_empty();
    if dry_run || (plan.deleted == 0 && !is_packed) {
        return report(&plan, dry_run);
    }
    let identity = identity(config)?;
    for reader in readers_of(state, id).await? {
        check_reads_packs(&reader, &identity).await?;
    }
    // From here on older builds load neither the run nor its forks. One that had loaded them before
    // is kept out next, and looked for before each deletion.
    allow_packs(&location).await?;
    // Listed again: a fork may have been made meanwhile.
    let readers = readers_of(state, id).await?;
    let may_delete = || keep_out_all_older(&readers, &identity);
    may_delete().await?;
    let settings = Settings {
        dry_run: false,
        ..settings
    };
    let mut progress = Progress::begin(plan.deleted);
    let work = Compaction::new(&receipts, settings, may_delete);
    let done = work.run(numbers, |done| tell(&mut progress, done)).await?;
    report(&done, false)
}

/// Returns the step before which receipts are packed: all of them in a run that is over, and whole
/// packs far behind the first step that is missing in one that goes on.
async fn before(receipts: &Receipts, facts: &RunFacts, args: &CompactArgs) -> Result<u64> {
    if facts.closed || facts.failure.is_some() {
        return Ok(u64::MAX);
    }
    let max_ahead = facts.spec.max_ahead;
    let (trail, _) = receipts.opened(&facts.chain, max_ahead).await?;
    let kept = kept(args.keep_last, max_ahead);
    Ok(trail.next().saturating_sub(kept) / args.pack * args.pack)
}

/// Returns how many of the newest steps of a run that goes on are not packed, whatever is asked.
///
/// A former owner may create the receipt of a step after the new owner listed the run. The new
/// owner does not know that step as committed, and looks for its object alone: if that is packed
/// and deleted, it decides the step again. No rank has such a step, so ranks ask for at most
/// `max_ahead` steps from there on, or, if the trainer starts anew, from the newest step that the
/// former owner committed ahead, which is as far from there again.
fn kept(keep_last: u64, max_ahead: u32) -> u64 {
    keep_last.max(2 * u64::from(max_ahead.max(1)))
}

/// Returns this process for others that look who owns a run. Nobody answers at its address, so a
/// coordinator that wants the run takes it.
fn identity(config: &Config) -> Result<Identity> {
    Ok(Identity {
        address: "superbatch state compact".to_owned(),
        instance: nonce(),
        dialer: app::dialer(&config.tls)?,
    })
}

/// Returns the runs whose owners read the receipts of the run `id`: itself, and its forks.
async fn readers_of(state: &Location, id: &str) -> Result<Vec<Location>> {
    let forks = forks_of(state, id).await?;
    let ids = std::iter::once(id).chain(forks.iter().map(String::as_str));
    Ok(ids.map(|id| state.below(&format!("runs/{id}"))).collect())
}

/// # Errors
/// As [`keep_out_older`].
async fn keep_out_all_older(runs: &[Location], identity: &Identity) -> Result<()> {
    for run in runs {
        keep_out_older(run, identity).await?;
    }
    Ok(())
}

/// Returns the ids of the runs that are forks of the run `id`, or of its forks: they read its
/// receipts. A run that a newer build wrote is served by builds that know packs.
async fn forks_of(state: &Location, id: &str) -> Result<Vec<String>> {
    let mut parents = BTreeMap::new();
    for other in state.folders("runs").await? {
        let location = state.below(&format!("runs/{other}"));
        match run::fork_of(&location).await {
            Ok(None) => {}
            Ok(Some(fork)) => drop(parents.insert(other, fork.run_id)),
            Err(error) if error.reason() == Reason::Unimplemented => {}
            Err(error) => return Err(error),
        }
    }
    let comes_from = |other: &String| {
        let above = std::iter::successors(parents.get(other), |parent| parents.get(*parent));
        // No chain is longer than there are runs, unless it is a circle.
        above.take(parents.len()).any(|parent| parent == id)
    };
    Ok(parents
        .keys()
        .filter(|other| comes_from(other))
        .cloned()
        .collect())
}

fn tell(progress: &mut Progress, done: &Compacted) {
    if let Some(pace) = progress.due(done.deleted) {
        tracing::info!(
            receipts = done.deleted,
            of = progress.total,
            packs = done.packs,
            receipts_a_second = pace.per_second.round(),
            seconds_left = pace.seconds_left,
            "packing"
        );
    }
}

fn report(done: &Compacted, dry_run: bool) -> Result<String> {
    let files = |count: u64| counted(count as usize, "file");
    let receipts = |count: u64| counted(count as usize, "receipt");
    let verbs = if dry_run {
        ["would pack", "would delete"]
    } else {
        ["packed", "deleted"]
    };
    let into = if dry_run {
        format!("at least {}", files(done.packs))
    } else {
        format!("{} of {} bytes", files(done.packs), done.packs_bytes)
    };
    let text = format!(
        "{} {} of {} bytes into {into}\n{} {}, {} bytes; not packed: {}\n",
        verbs[0],
        receipts(done.packed),
        done.packed_bytes,
        verbs[1],
        counted(done.deleted as usize, "object"),
        done.deleted_bytes,
        receipts(done.stay),
    );
    if done.problems.is_empty() {
        return Ok(text);
    }
    let problems: Vec<&str> = done.problems.iter().map(String::as_str).collect();
    let message = format!("{text}{}", problems.join("\n"));
    Err(Error::new(Reason::InvalidArgument, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::{ConfigArgs, state::OfRun},
        bounds::MAX_AHEAD_MAX,
        coordinator::{receipts::parquet::tests::sample, trainer::ranks::last_allowed},
        storage::{Budget, StorageConfig, Stores},
    };
    use superbatch_proto::v1::RunSpec;

    fn opened() -> Location {
        let stores = Stores::new(StorageConfig::default());
        stores.open("memory:///state").unwrap()
    }

    async fn create(state: &Location, id: &str, of: Option<&str>) -> Location {
        let fork = of.map(|of| run::ForkFact {
            run_id: of.into(),
            step: 4,
            chain: Default::default(),
            weights: Default::default(),
        });
        let fact = run::RunFact::new(&RunSpec::default(), "m".into(), None, None, fork);
        let location = state.below(&format!("runs/{id}"));
        run::create_run(&location, fact).await.unwrap();
        location
    }

    /// Step `late` is the first that a former owner created unseen, and all are committed that a
    /// trainer may then have asked the new owner for, without it.
    #[test]
    fn a_step_that_its_owner_may_not_know_is_not_packed() {
        let late = 5000;
        for max_ahead in [1, 2, 7, MAX_AHEAD_MAX] {
            let by_former = last_allowed(Some(late - 1), max_ahead);
            let newest = last_allowed(Some(by_former), max_ahead);
            for pack in [2, RECEIPTS_MAX] {
                let kept = kept(0, max_ahead);
                let before = (newest + 1).saturating_sub(kept) / pack * pack;
                assert!(before <= late, "max_ahead {max_ahead}: {before}");
            }
        }
        assert_eq!(kept(1000, 2), 1000);
    }

    #[tokio::test]
    async fn a_fork_is_taken_from_an_older_build_that_does_not_answer() {
        let state = opened();
        let first = create(&state, "first", None).await;
        let fork = create(&state, "fork", Some("first")).await;
        let receipts = Receipts::new(first.clone());
        for step in 0..4 {
            let (receipt, budget) = (sample(step, 0, "n"), Budget::default());
            receipts.commit(&receipt, &budget).await.unwrap();
        }
        run::close(&first).await.unwrap();
        // As older builds write it. Should it only hang, it has the parent's receipts in memory.
        let older = r#"{"address": "http://127.0.0.1:1", "instance": "o", "nonce": "n"}"#;
        fork.create("owner/1.json", older.into()).await.unwrap();
        let of = OfRun {
            run: "first".into(),
            settings: ConfigArgs::default(),
        };
        let args = CompactArgs {
            of: GcArgs { of, dry_run: false },
            keep_last: 0,
            pack: 4,
        };
        let said = run(&Config::default(), &state, &args).await.unwrap();
        assert!(said.starts_with("packed 4 receipts"), "{said}");
        let owners = fork.list("owner").await.unwrap();
        assert_eq!(owners.len(), 2, "its next look at the owner says so");
        assert!(first.list("owner").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn forks_of_forks_read_the_receipts_too_and_a_circle_ends() {
        let state = opened();
        for (id, of) in [
            ("first", None),
            ("fork", Some("first")),
            ("second", Some("fork")),
            ("other", None),
            ("theirs", Some("other")),
            ("a", Some("b")),
            ("b", Some("a")),
        ] {
            create(&state, id, of).await;
        }
        let newer = r#"{"format": 99}"#.into();
        state.put("runs/newer/run.json", newer).await.unwrap();
        let of = async |id| forks_of(&state, id).await.unwrap();
        assert_eq!(of("first").await, ["fork", "second"]);
        assert_eq!(of("fork").await, ["second"]);
        assert_eq!(of("theirs").await, [""; 0]);
        assert_eq!(of("a").await, ["a", "b"]);
    }
}
