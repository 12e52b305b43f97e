//! Compaction that ends at any request, beside readers and beside another one.
mod between;

use super::*;
use crate::{
    coordinator::{
        facts::chain::{Chain, Rewound},
        receipts::{
            packs::tests::rewritten,
            parquet::{SUMMARY_PROTOBUF, tests::sample},
        },
    },
    storage::{Budget, StorageConfig, Stores},
};
use between::opened_twice;
use futures::FutureExt;
use std::sync::{Arc, Mutex};
use superbatch_proto::v1::{Reason, Receipt};

/// Steps of generation 0, and of generation 1, which begins at step 5.
const RECEIPTS: [(u64, u32); 14] = [
    (0, 0),
    (1, 0),
    (2, 0),
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (5, 1),
    (6, 1),
    (7, 1),
    (8, 1),
];

fn chain() -> Chain {
    Chain::new(vec![Rewound {
        generation: 1,
        to_step: 5,
        replay: false,
    }])
}

fn settings(pack: u64) -> Settings {
    Settings {
        pack,
        before: 8,
        generation: 1,
        dry_run: false,
    }
}

fn receipt((step, generation): (u64, u32)) -> Receipt {
    let mut receipt = sample(step, generation, "n");
    // Not equal to itself, and kept by its bits.
    receipt.chosen[0].score = f64::from_bits(0x7ff8_0000_0000_0000 + step);
    receipt
}

async fn commit_all(run: &Location) {
    let receipts = Receipts::new(run.clone());
    for at in RECEIPTS {
        let (receipt, budget) = (receipt(at), Budget::default());
        receipts.commit(&receipt, &budget).await.unwrap();
    }
}

async fn compact(run: &Location, settings: Settings) -> Result<Compacted> {
    let receipts = Receipts::new(run.clone());
    let numbers = receipts.folders().await?;
    let work = Compaction::new(&receipts, settings, || async { Ok::<(), Error>(()) });
    work.run(numbers, |_| {}).await
}

/// Objects of receipts, and packs.
async fn objects(run: &Location) -> (usize, usize) {
    let listed = run.list("receipts").await.unwrap();
    let packs = listed.iter().filter(|(key, _)| key.contains("packed"));
    (listed.len() - packs.clone().count(), packs.count())
}

/// Reads all that there is to read, and compares it with what was committed.
async fn assert_whole(receipts: &Receipts) {
    let chain = chain();
    for at in RECEIPTS {
        let (step, generation) = at;
        let found = receipts.find(step, generation).await.unwrap();
        let found = found.unwrap_or_else(|| panic!("{at:?} is gone"));
        assert_eq!(objects::content(&found), objects::content(&receipt(at)));
        let summary = receipts.summary(step, generation).await.unwrap();
        assert_eq!(summary, found.summary, "{at:?}");
    }
    for step in 0..9 {
        let found = receipts.find_of(&chain, step, 1).await.unwrap();
        let generation = found.and_then(|found| found.summary).map(|s| s.generation);
        assert_eq!(generation, Some(u32::from(step >= 5)), "step {step}");
    }
    assert_eq!(receipts.find_of(&chain, 9, 1).await.unwrap(), None);
    let (trail, _) = receipts.opened(&chain, 2).await.unwrap();
    assert_eq!((trail.next(), trail.newest()), (9, Some(8)));
    assert_eq!(receipts.newest(&chain).await.unwrap(), Some(8));
    let mut all = RECEIPTS;
    all.sort_unstable();
    assert_eq!(receipts.committed().await.unwrap(), all);
}

#[tokio::test]
async fn receipts_go_into_packs_and_come_back_as_they_were() {
    let (run, ..) = opened_twice();
    commit_all(&run).await;
    let (before, dry) = (
        objects(&run).await,
        Settings {
            dry_run: true,
            ..settings(4)
        },
    );
    let planned = compact(&run, dry).await.unwrap();
    assert_eq!((planned.packed, planned.packs, planned.stay), (11, 3, 3));
    assert_eq!(objects(&run).await, before, "it looked only");
    let long_lived = Receipts::new(run.clone());
    assert_whole(&long_lived).await;
    let done = compact(&run, settings(4)).await.unwrap();
    assert_eq!((done.packed, done.packs, done.stay), (11, 3, 3));
    assert_eq!(done.deleted_bytes, planned.deleted_bytes);
    assert!(done.problems.is_empty(), "{done:?}");
    assert_eq!(objects(&run).await, (3, 3));
    assert_whole(&long_lived).await;
    assert_whole(&Receipts::new(run.clone())).await;
    let again = compact(&run, settings(4)).await.unwrap();
    assert_eq!((again.packed, again.deleted), (0, 0));
    let (counts, problems) = verify::problems(&long_lived).await.unwrap();
    assert_eq!((counts, problems), (vec![4, 4, 3], Vec::new()));
}

#[tokio::test]
async fn wherever_it_ends_nothing_is_lost_and_the_next_one_finishes() {
    for end in 1.. {
        let (run, between, control) = opened_twice();
        commit_all(&run).await;
        control.ends_at(end);
        let ended = compact(&between, settings(4)).await;
        assert_whole(&Receipts::new(run.clone())).await;
        let finished = compact(&run, settings(4)).await.unwrap();
        assert!(finished.problems.is_empty(), "{end}: {finished:?}");
        assert_eq!(objects(&run).await, (3, 3), "{end}");
        assert_whole(&Receipts::new(run.clone())).await;
        match ended {
            Err(error) => assert_eq!(error.reason(), Reason::StorageUnreachable),
            Ok(_) => return assert!(end > 11 + 11, "it was never ended"),
        }
    }
}

#[tokio::test]
async fn a_reader_in_whose_midst_all_is_packed_misses_nothing() {
    for request in 1.. {
        let (run, between, control) = opened_twice();
        commit_all(&run).await;
        let readers = Receipts::new(between);
        let other = run.clone();
        control.before(request, async move {
            compact(&other, settings(4)).await.unwrap();
        });
        assert_whole(&readers).await;
        if !control.has_happened() {
            return assert!(request > 2 * RECEIPTS.len());
        }
        assert_whole(&readers).await;
    }
}

#[tokio::test]
async fn a_list_ends_although_packs_come_all_the_time() {
    let (run, between, control) = opened_twice();
    commit_all(&run).await;
    control.before_each(move |request| {
        let run = run.clone();
        let put = async move {
            assert!(request < 50, "it is listed again and again");
            let first = 1000 * request as u64;
            let pack = Pack {
                first,
                last: first + 1,
                generation: 0,
                digest: "ab".into(),
                bytes: 0,
            };
            run.put(&pack.key(), "".into()).await.unwrap();
        };
        put.boxed()
    });
    let receipts = Receipts::new(between);
    let listed = receipts.committed().await.unwrap();
    for at in RECEIPTS.iter().chain(&[(1000, 0), (1001, 0)]) {
        assert!(listed.contains(at), "{at:?}");
    }
    let newest = receipts.newest(&Chain::default()).await.unwrap();
    assert!(newest > listed.last().map(|(step, _)| *step), "{newest:?}");
    let numbers = receipts.folders().await.unwrap();
    assert!(numbers.starts_with(&[0, 1, 2]), "{numbers:?}");
    let of_first = receipts.committed_in(1).await.unwrap();
    assert_eq!(of_first, [(1000, 0), (1001, 0)]);
}

#[tokio::test]
async fn a_compaction_in_whose_midst_all_is_read_hides_nothing() {
    for request in 1.. {
        let (run, between, control) = opened_twice();
        commit_all(&run).await;
        let readers = Receipts::new(run.clone());
        control.before(request, async move { assert_whole(&readers).await });
        compact(&between, settings(4)).await.unwrap();
        if !control.has_happened() {
            return assert!(request > 11 + 11);
        }
    }
}

#[tokio::test]
async fn two_at_once_lose_nothing_and_finish() {
    // The other one packs as this one does, or into smaller packs.
    for (other_pack, packs_most) in [(4, 3), (2, 8)] {
        for request in 1.. {
            let (run, between, control) = opened_twice();
            commit_all(&run).await;
            let other = run.clone();
            control.before(request, async move {
                compact(&other, settings(other_pack)).await.unwrap();
            });
            let done = compact(&between, settings(4)).await.unwrap();
            assert!(done.problems.is_empty(), "{request}: {done:?}");
            assert_whole(&Receipts::new(run.clone())).await;
            let (singles, packs) = objects(&run).await;
            if !control.has_happened() {
                break;
            }
            // Step 7 of generation 1 stands alone where steps go two by two.
            assert!(singles <= 4 && packs <= packs_most, "{singles} {packs}");
        }
    }
}

#[tokio::test]
async fn a_pack_that_is_read_back_as_another_one_is_not_deleted() {
    for request in 1.. {
        let (run, between, control) = opened_twice();
        commit_all(&run).await;
        let (other, keys) = (run.clone(), Arc::new(Mutex::new(Vec::new())));
        let theirs = keys.clone();
        control.before(request, async move {
            compact(&other, settings(4)).await.unwrap();
            for (key, _) in other.list("receipts/packed").await.unwrap() {
                other.put(&key, "damaged".into()).await.unwrap();
                theirs.lock().unwrap().push(key);
            }
        });
        let ended = compact(&between, settings(4)).await;
        if !control.has_happened() {
            return ended.map(drop).unwrap();
        }
        let keys = std::mem::take(&mut *keys.lock().unwrap());
        assert_eq!(keys.len(), 3);
        for key in keys {
            let found = run.find(&key).await.unwrap();
            assert!(found.is_some_and(|bytes| bytes == "damaged"), "{request}");
        }
    }
}

#[tokio::test]
async fn a_damaged_pack_on_which_nothing_rests_hides_no_receipt() {
    let (run, ..) = opened_twice();
    commit_all(&run).await;
    let mut files = Vec::new();
    for (key, _) in run.list("receipts").await.unwrap() {
        let file = run.get(&key).await.unwrap();
        files.push((key, file));
    }
    compact(&run, settings(4)).await.unwrap();
    for (key, _) in run.list("receipts/packed").await.unwrap() {
        run.put(&key, "damaged".into()).await.unwrap();
    }
    for (key, file) in files {
        run.put(&key, file).await.unwrap();
    }
    let receipts = Receipts::new(run.clone());
    receipts.packs().look().await.unwrap();
    assert_whole(&receipts).await;
    // If an object of the pack is gone, the others may be of a former owner.
    run.delete("receipts/0/1/0.parquet").await.unwrap();
    for error in [
        receipts.find(2, 0).await.map(drop).unwrap_err(),
        receipts.summary(2, 0).await.map(drop).unwrap_err(),
    ] {
        let said = error.chain();
        assert!(said.contains("packed/000000000000-000000000003"), "{said}");
    }
}

#[tokio::test]
async fn what_may_not_be_deleted_stays() {
    let (run, ..) = opened_twice();
    commit_all(&run).await;
    let receipts = Receipts::new(run.clone());
    let refuse = || async { Err(Error::internal("an older build owns the run")) };
    let work = Compaction::new(&receipts, settings(4), refuse);
    work.run(vec![0], |_| {}).await.unwrap_err();
    assert_eq!(objects(&run).await.0, RECEIPTS.len());
    assert_whole(&receipts).await;
}

#[tokio::test]
async fn a_receipt_that_comes_after_its_pack_changes_nothing_and_is_told() {
    let (run, ..) = opened_twice();
    commit_all(&run).await;
    compact(&run, settings(4)).await.unwrap();
    // As of a process that slept through all of it.
    let late = Receipts::new(run.clone());
    let other = sample(2, 0, "late");
    late.commit(&other, &Budget::default()).await.unwrap();
    let receipts = Receipts::new(run.clone());
    receipts.packs().look().await.unwrap();
    assert_whole(&receipts).await;
    let key = "receipts/0/2/0.parquet";
    let (_, problems) = verify::problems(&receipts).await.unwrap();
    assert!(
        problems.len() == 1 && problems[0].contains(key),
        "{problems:?}"
    );
    let done = compact(&run, settings(4)).await.unwrap();
    assert_eq!((done.deleted, done.problems.len()), (0, 1));
    assert!(run.find(key).await.unwrap().is_some(), "it is not deleted");
}

#[tokio::test]
async fn a_damaged_pack_is_named_and_nothing_is_deleted_for_it() {
    let (run, ..) = opened_twice();
    commit_all(&run).await;
    let file = run.get("receipts/0/1/0.parquet").await.unwrap();
    compact(&run, settings(4)).await.unwrap();
    let receipts = Receipts::new(run.clone());
    let pack = receipts.packs().look().await.unwrap().all()[0].clone();
    let mut bytes = run.get(&pack.key()).await.unwrap().to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    run.put(&pack.key(), bytes.into()).await.unwrap();
    run.put("receipts/0/1/0.parquet", file).await.unwrap();
    let (_, problems) = verify::problems(&receipts).await.unwrap();
    assert!(
        problems.len() == 1 && problems[0].contains(&pack.key()),
        "{problems:?}"
    );
    let done = compact(&run, settings(4)).await.unwrap();
    assert_eq!((done.deleted, done.problems.len()), (0, 1));
    for left in ["cut", ""] {
        run.put(&pack.key(), left.into()).await.unwrap();
        let error = Receipts::new(run.clone()).find(2, 0).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Internal, "nobody tries again");
        assert!(error.chain().contains(&pack.key()), "{}", error.chain());
    }
}

#[tokio::test]
async fn a_receipt_that_cannot_be_read_stays_and_the_others_go() {
    let (run, ..) = opened_twice();
    commit_all(&run).await;
    let key = "receipts/0/5/0.parquet";
    run.put(key, "damaged".into()).await.unwrap();
    let done = compact(&run, settings(4)).await.unwrap();
    // Step 4 is alone then; 6 and 7 are two.
    assert_eq!((done.packed, done.packs, done.stay), (9, 3, 5));
    let problems: Vec<&String> = done.problems.iter().collect();
    assert!(
        problems.len() == 1 && problems[0].contains(key),
        "{problems:?}"
    );
    assert!(run.find(key).await.unwrap().is_some());
}

#[tokio::test]
async fn a_receipt_that_packs_as_another_one_stays_with_its_group_and_the_others_go() {
    let (run, ..) = opened_twice();
    commit_all(&run).await;
    let key = "receipts/0/5/0.parquet";
    // Said twice, and the first holds: a pack would have the last.
    let file = rewritten(run.get(key).await.unwrap(), |_, entries| {
        entries.push((SUMMARY_PROTOBUF.into(), String::new()));
    });
    run.put(key, file).await.unwrap();
    let done = compact(&run, settings(4)).await.unwrap();
    // Steps 4 to 7 stay, and three that are not old.
    assert_eq!((done.packed, done.packs, done.stay), (7, 2, 4 + 3));
    let problems: Vec<&String> = done.problems.iter().collect();
    let expected = "receipts/0/4/0.parquet and the 3 after it stay";
    assert!(
        problems.len() == 1 && problems[0].contains(expected),
        "{problems:?}"
    );
    assert_whole(&Receipts::new(run.clone())).await;
}

#[tokio::test]
async fn on_a_disk_no_empty_folders_are_left() {
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("file://{}", folder.path().display());
    let run = Stores::new(StorageConfig::default()).open(&uri).unwrap();
    commit_all(&run).await;
    let all = Settings {
        before: u64::MAX,
        ..settings(1000)
    };
    let done = compact(&run, all).await.unwrap();
    assert_eq!((done.packs, done.stay), (2, 0));
    assert_whole(&Receipts::new(run)).await;
    let left = std::fs::read_dir(folder.path().join("receipts")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["packed"]);
}
