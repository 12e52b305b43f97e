//! Receipts against a store in memory and on a disk.
use super::*;
use crate::{
    coordinator::{facts::chain::Rewound, receipts::parquet::tests::sample},
    storage::{StorageConfig, Stores},
};

/// The same test on a store in memory and on a disk.
async fn on_each_store<F: Future<Output = ()>>(test: impl Fn(Receipts, Location) -> F) {
    let folder = tempfile::tempdir().unwrap();
    for uri in [
        "memory:///state".to_owned(),
        format!("file://{}", folder.path().display()),
    ] {
        let run = Stores::new(StorageConfig::default())
            .open(&uri)
            .unwrap()
            .below("runs/r");
        test(Receipts::new(run.clone()), run).await;
    }
}

#[tokio::test]
async fn the_first_writer_decides_a_step_and_a_repeat_is_still_its_own() {
    on_each_store(|receipts, run| async move {
        let (a, b) = (sample(1234, 2, "a"), sample(1234, 2, "b"));
        assert_eq!(receipts.find(1234, 2).await.unwrap(), None);
        assert_eq!(
            receipts.commit(&a, &Budget::default()).await.unwrap(),
            Committed::Ours
        );
        assert_eq!(
            receipts.commit(&a, &Budget::default()).await.unwrap(),
            Committed::Ours
        );
        assert_eq!(
            receipts.commit(&b, &Budget::default()).await.unwrap(),
            Committed::Theirs(Box::new(a.clone()))
        );
        assert_eq!(receipts.find(1234, 2).await.unwrap(), Some(a));
        assert!(
            run.find("receipts/1/1234/2.parquet")
                .await
                .unwrap()
                .is_some(),
            "the documented key"
        );
        assert!(
            receipts
                .commit(&sample(1, 0, ""), &Budget::default())
                .await
                .is_err(),
            "no nonce"
        );
    })
    .await;
}

#[tokio::test]
async fn totals_are_those_of_the_newest_commit_whatever_its_step() {
    on_each_store(|receipts, _| async move {
        for (step, scanned) in [(0, 10), (2, 20), (1, 30)] {
            let mut receipt = sample(step, 0, "a");
            let summary = receipt.summary.get_or_insert_default();
            summary
                .run_totals
                .get_or_insert_default()
                .candidates_scanned = scanned;
            receipts.commit(&receipt, &Budget::default()).await.unwrap();
        }
        let listed = receipts.committed().await.unwrap();
        let totals = receipts.totals(listed, 2).await.unwrap();
        assert_eq!(totals.candidates_scanned, 30);
        assert_eq!(
            receipts.totals(Vec::new(), 2).await.unwrap(),
            Accounts::default()
        );
    })
    .await;
}

/// What a summary knows is not looked at again: there it may even be gone.
#[tokio::test]
async fn a_run_is_opened_from_a_summary_of_what_is_behind_it() {
    on_each_store(|receipts, run| async move {
        for step in (0..2).chain(999..1003) {
            let mut receipt = sample(step, 0, "a");
            let summary = receipt.summary.get_or_insert_default();
            let totals = summary.run_totals.get_or_insert_default();
            totals.candidates_scanned = step + 1;
            let committed = receipts.commit(&receipt, &Budget::default()).await;
            committed.unwrap();
        }
        let chain = Chain::default();
        let (trail, totals) = receipts.opened(&chain, 2).await.unwrap();
        assert_eq!((trail.next(), trail.newest()), (2, Some(1002)));
        assert_eq!(totals.candidates_scanned, 1003);
        receipts.summarise(1002, 0).await;
        let (trail, totals) = receipts.opened(&chain, 2).await.unwrap();
        assert_eq!((trail.next(), trail.newest()), (1003, Some(1002)));
        assert_eq!(totals.candidates_scanned, 1003);
        // Old state has none, and a rewind takes steps back.
        let rewound = |to_step, replay| {
            let generation = 1;
            Chain::new(vec![Rewound {
                generation,
                to_step,
                replay,
            }])
        };
        for (chain, next) in [(rewound(1, false), 1), (rewound(1, true), 1003)] {
            let (trail, totals) = receipts.opened(&chain, 2).await.unwrap();
            assert_eq!((trail.next(), totals.candidates_scanned), (next, 1003));
        }
        assert_eq!(run.list("trail-summaries").await.unwrap().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn of_two_writers_at_once_exactly_one_wins() {
    on_each_store(|receipts, _| async move {
        for step in 0..20 {
            let (a, b) = (sample(step, 0, "a"), sample(step, 0, "b"));
            let (first, second) = (receipts.clone(), receipts.clone());
            let (a2, b2) = (a.clone(), b.clone());
            let race = (
                tokio::spawn(async move { first.commit(&a2, &Budget::default()).await.unwrap() }),
                tokio::spawn(async move { second.commit(&b2, &Budget::default()).await.unwrap() }),
            );
            let outcome = (race.0.await.unwrap(), race.1.await.unwrap());
            let winner = receipts.find(step, 0).await.unwrap().unwrap();
            let expected = if winner == a {
                (Committed::Ours, Committed::Theirs(Box::new(a)))
            } else {
                (Committed::Theirs(Box::new(b)), Committed::Ours)
            };
            assert_eq!(outcome, expected);
        }
    })
    .await;
}

#[tokio::test]
async fn steps_are_found_by_generation() {
    on_each_store(|receipts, run| async move {
        assert_eq!(receipts.committed().await.unwrap(), []);
        assert_eq!(receipts.newest(&Chain::default()).await.unwrap(), None);
        for (step, generation) in [
            (8, 0),
            (9, 0),
            (999, 0),
            (1000, 0),
            (10_000, 0),
            (9, 2),
            (12, 2),
        ] {
            receipts
                .commit(&sample(step, generation, "n"), &Budget::default())
                .await
                .unwrap();
        }
        run.put("receipts/0/8/notes.txt", "not ours".into())
            .await
            .unwrap();
        let all = [
            (8, 0),
            (9, 0),
            (9, 2),
            (12, 2),
            (999, 0),
            (1000, 0),
            (10_000, 0),
        ];
        assert_eq!(receipts.committed().await.unwrap(), all);
        let reselected = |generation, to_step| Rewound {
            generation,
            to_step,
            replay: false,
        };
        let chain = Chain::new(vec![reselected(1, 10), reselected(2, 9)]);
        assert_eq!(
            receipts.newest(&Chain::default()).await.unwrap(),
            Some(10_000)
        );
        assert_eq!(
            receipts.newest(&chain).await.unwrap(),
            Some(12),
            "in an older folder"
        );
        let whole = receipts.find(12, 2).await.unwrap().unwrap();
        assert_eq!(receipts.summary(12, 2).await.unwrap(), whole.summary);
        assert_eq!(receipts.summary(12, 1).await.unwrap(), None);
    })
    .await;
}
