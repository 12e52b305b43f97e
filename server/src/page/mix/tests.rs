use super::{
    shares::{by_source, lift, shares, sum},
    step::{Counts, OfStep},
    *,
};
use crate::{
    error::Error,
    page::{
        Blocks,
        tests::{Gated, commit, json, manifest, page, plan, receipt, spec},
    },
};
use arrow::array::RecordBatch;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use superbatch_proto::v1::{LeftOut, Mode, PassedRow, ScoreColumn};

#[test]
fn lift_is_a_share_over_a_share() {
    assert_eq!(lift([50, 20], [100, 40]), Some(1.0));
    assert_eq!(lift([50, 40], [100, 40]), Some(2.0));
    assert_eq!(lift([50, 0], [100, 40]), Some(0.0));
    assert_eq!(lift([0, 0], [100, 40]), None);
    let counts = Counts::from([((0, 0), [3, 1]), ((0, 1), [4, 0]), ((1, 0), [5, 2])]);
    assert_eq!(by_source(&counts, 3), [[7, 1], [5, 2], [0, 0]]);
    assert_eq!(sum(counts.values()), [12, 3]);
}

#[test]
fn steps_that_were_looked_at_stay_while_a_run_grows() {
    assert_eq!(sampled(None), (1, vec![]));
    assert_eq!(sampled(Some(0)), (1, vec![0]));
    assert_eq!(sampled(Some(47)), (1, (0..48).collect()));
    let (stride, steps) = sampled(Some(99_999));
    assert_eq!((stride, steps.len()), (4096, 25));
    assert_eq!(sampled(Some(110_000)).1[..25], steps[..]);
}

/// Steps 0 to 2 of two sources, of three shards and of one.
fn counted(changed: impl Fn(&mut Receipt)) -> (Arc<Manifest>, Vec<Arc<OfStep>>) {
    let manifest = manifest(&[3, 1]);
    let plan = plan(&manifest);
    let steps = (0..3).map(|step| {
        let mut receipt = receipt(&plan, step);
        changed(&mut receipt);
        let counted = OfStep::of(&plan, &spec().phases, &receipt).unwrap();
        Arc::new(counted.unwrap())
    });
    let steps = steps.collect();
    (manifest, steps)
}

#[test]
fn shares_are_of_the_pool_of_the_scanned_and_of_the_chosen() {
    let (manifest, steps) = counted(|_| {});
    let found = shares(&manifest, 1, &steps);
    assert_eq!(
        (&found["scanned"], &found["chosen"]),
        (&json!(48), &json!(12))
    );
    assert_eq!(found["pool"], 64);
    let [first, second] = [&found["sources"][0], &found["sources"][1]];
    assert_eq!(
        (&first["pool_share"], &second["pool_share"]),
        (&json!(0.75), &json!(0.25))
    );
    assert_eq!((&first["rows"], &second["rows"]), (&json!(48), &json!(16)));
    // Both have the same weight, so half of each super-batch is of the smaller one.
    assert_eq!(
        (&first["scanned"], &second["scanned"]),
        (&json!(24), &json!(24))
    );
    // The first candidates are those of the first source.
    assert_eq!(
        (&first["chosen"], &second["chosen"]),
        (&json!(12), &json!(0))
    );
    assert_eq!(
        (&first["lift"], &second["lift"]),
        (&json!(2.0), &json!(0.0))
    );
    assert_eq!(found["lift"][0], json!([2.0, 2.0, 2.0]));
    let shards = found["shards"].as_array().unwrap();
    let sums = |of: &str| {
        shards
            .iter()
            .map(|shard| shard[of].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!([sums("scanned"), sums("chosen")], [48, 12]);
    assert_eq!(shards[0]["pool_share"], 0.25, "16 of 64 rows");
}

#[test]
fn shards_of_which_no_row_was_chosen_are_named() {
    let (manifest, steps) = counted(|_| {});
    let found = shares(&manifest, 1, &steps);
    let never = found["never"].as_array().unwrap();
    assert_eq!(found["shards_never"], never.len());
    assert!(
        never.contains(&json!({ "name": "1:0.parquet", "scanned": 24 })),
        "{never:?}"
    );
    let shards = found["shards"].as_array().unwrap();
    let unchosen = shards.iter().filter(|shard| shard["chosen"] == 0).count();
    assert_eq!(unchosen, never.len());
    assert_eq!(found["shards_pool"], 4);
}

#[test]
fn lifts_of_shards_are_told_over_the_run() {
    let (manifest, steps) = counted(|_| {});
    let found = shares(&manifest, 1, &steps);
    assert_eq!(found["parts"]["step"], json!([0, 1, 2]));
    for shard in found["parts"]["shards"].as_array().unwrap() {
        let lifts = shard["lift"].as_array().unwrap();
        assert_eq!(lifts.len(), 3);
        let alone = shard["name"] == "1:0.parquet";
        assert!(!alone || lifts.iter().all(|lift| *lift == 0.0), "{shard}");
    }
}

#[test]
fn what_receipts_hold_of_rows_is_told_by_step() {
    let (manifest, steps) = counted(|receipt| {
        for (row, n) in receipt.chosen.iter_mut().zip(1_u8..) {
            row.reference_loss = Some(f64::from(n));
            row.column_values = vec![f64::from(n), f64::NAN];
            // The last two rows are copies of one.
            row.content_hash = vec![n.min(3); 16].into();
        }
        let passed = |sampled, loss| PassedRow {
            sampled,
            reference_loss: Some(loss),
            column_values: vec![10.0],
            ..PassedRow::default()
        };
        receipt.passed_over = vec![passed(true, 8.0), passed(false, 90.0)];
        let summary = receipt.summary.as_mut().unwrap();
        let column = |name: &str| ScoreColumn {
            name: name.into(),
            ..ScoreColumn::default()
        };
        summary.score_columns = vec![column("width"), column("none")];
    });
    let found = shares(&manifest, 1, &steps);
    let losses = &found["losses"];
    assert_eq!(losses["reference_chosen"], json!([2.5, 2.5, 2.5]));
    assert_eq!(
        losses["reference_passed"],
        json!([8.0, 8.0, 8.0]),
        "the sample alone"
    );
    assert_eq!(losses["learner_chosen"], json!([null, null, null]));
    let columns = json!([
        { "name": "none", "chosen": null, "passed": null },
        { "name": "width", "chosen": 2.5, "passed": 10.0 },
    ]);
    assert_eq!(found["columns"], columns);
    // Three steps of twelve different rows, of three contents.
    assert_eq!(
        found["contents"],
        json!({ "chosen": 12, "again": 0, "copies": 9 })
    );
    let left_out = &found["left_out"];
    assert_eq!(left_out["duplicates_above"], 15);
    assert_eq!(left_out["duplicates_rule"], 0.95);
}

#[test]
fn what_receipts_do_not_hold_is_null() {
    let (manifest, steps) = counted(|receipt| {
        receipt.summary.as_mut().unwrap().left_out = None::<LeftOut>;
        receipt.passed_over.clear();
    });
    let found = shares(&manifest, 1, &steps);
    assert_eq!(found["left_out"], Value::Null);
    assert_eq!(found["contents"], Value::Null);
    assert_eq!(found["columns"], json!([]));
    let nothing = shares(&manifest, 1, &[]);
    assert_eq!(
        (&nothing["scanned"], &nothing["shards"]),
        (&json!(0), &json!([]))
    );
}

#[test]
fn a_step_without_scores_is_not_counted() {
    let plan = plan(&manifest(&[3]));
    let mut receipt = receipt(&plan, 0);
    receipt.summary.as_mut().unwrap().mode = Mode::Uniform.into();
    let counted = OfStep::of(&plan, &spec().phases, &receipt).unwrap();
    assert!(counted.is_none());
}

#[test]
fn numbers_are_cut_into_bins_of_scanned_rows() {
    let numbers = (0..10).map(|n| (n, n >= 8)).collect();
    let found = rows::binned(numbers);
    assert_eq!(
        (&found["median_scanned"], &found["median_chosen"]),
        (&json!(5), &json!(9))
    );
    let bins = found["bins"].as_array().unwrap();
    assert_eq!(bins.len(), 5);
    let last = &bins[4];
    assert_eq!((&last["least"], &last["most"]), (&json!(8), &json!(9)));
    assert_eq!(
        (&last["scanned_share"], &last["lift"]),
        (&json!(0.2), &json!(5.0))
    );
    assert_eq!(bins[0]["lift"], 0.0);
    let alike = rows::binned(vec![(7, true), (7, false), (7, false)]);
    assert_eq!(
        alike["bins"].as_array().unwrap().len(),
        1,
        "rows of one number are of one bin"
    );
    assert_eq!(rows::binned(Vec::new()), Value::Null);
}

#[test]
fn rows_are_picked_from_few_blocks() {
    let plan = plan(&manifest(&[3]));
    let receipt = receipt(&plan, 0);
    let picked = rows::pick(&plan, &spec().phases, 0, &receipt).unwrap();
    let rows: Vec<_> = picked.iter().flat_map(|block| &block.rows).collect();
    assert_eq!(
        rows.len(),
        16,
        "all candidates, since they are of few blocks"
    );
    assert_eq!(rows.iter().filter(|(_, chosen)| *chosen).count(), 4);
}

/// One receipt at a time is in memory, and none twice.
#[tokio::test]
async fn what_one_reader_counted_the_next_ones_find() {
    let manifest = manifest(&[3]);
    let page = page(&manifest, Gated::open(true), 3).await;
    let read = async || json(mix(State(page.clone()), Path("r".into())).await).await;
    let first = read().await;
    assert_eq!(
        (&first["steps"], &first["chosen"]),
        (&json!([0, 1, 2]), &json!(12))
    );
    assert_eq!(read().await, first);
    // Without the objects only what is kept can be told.
    let objects = page.state.list("runs/r/receipts").await.unwrap();
    commit(&page, &manifest, 3).await;
    let keys: Vec<String> = objects.into_iter().map(|(key, _)| key).collect();
    page.state.delete_all(&keys).await.unwrap();
    let later = read().await;
    assert_eq!(
        (&later["steps"], &later["chosen"]),
        (&json!([0, 1, 2, 3]), &json!(16))
    );
}

#[tokio::test]
async fn rows_are_measured_where_receipts_hold_nothing() {
    let page = page(&manifest(&[3]), Gated::open(true), 2).await;
    let found = json(super::rows(State(page), Path("r".into())).await).await;
    assert_eq!(
        (&found["scanned"], &found["chosen"]),
        (&json!(32), &json!(8))
    );
    let captions = &found["caption_chars"];
    assert_eq!(captions["bins"][0]["least"], 0);
    assert_eq!(captions["bins"][4]["most"], 7);
    // One row of each block has no image.
    let scanned = |of: &Value| {
        let bins = of["bins"].as_array().unwrap().iter();
        bins.map(|bin| bin["scanned"].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(scanned(captions), 32);
    assert!((24..32).contains(&scanned(&found["image_bytes"])));
}

/// Steps are committed out of order: one may come after a later one.
#[tokio::test]
async fn a_mix_that_lacks_a_step_is_not_kept() {
    let manifest = manifest(&[3]);
    let page = page(&manifest, Gated::open(true), 1).await;
    let steps = async || {
        let found = json(mix(State(page.clone()), Path("r".into())).await).await;
        found["steps"].clone()
    };
    commit(&page, &manifest, 2).await;
    assert_eq!(steps().await, json!([0, 2]));
    commit(&page, &manifest, 1).await;
    assert_eq!(steps().await, json!([0, 1, 2]));
}

/// Of its blocks the first that is asked for cannot be read, or none.
struct Damaged {
    blocks: Gated,
    is_first: AtomicBool,
    all: bool,
}

#[async_trait]
impl Blocks for Damaged {
    async fn block(
        &self,
        manifest: &Manifest,
        source: u32,
        shard: u32,
        block: u32,
        picture: Option<u32>,
    ) -> Result<Arc<RecordBatch>> {
        if self.is_first.swap(false, Ordering::SeqCst) || self.all {
            return Err(Error::internal("damaged"));
        }
        let read = self.blocks.block(manifest, source, shard, block, picture);
        read.await
    }
}

#[tokio::test]
async fn a_block_that_cannot_be_read_is_passed_over_and_told() {
    let damaged = |all| Damaged {
        blocks: Gated::open(true),
        is_first: AtomicBool::new(true),
        all,
    };
    let page_of = async |all| page(&manifest(&[3]), damaged(all), 2).await;
    let one = page_of(false).await;
    let read = async || json(super::rows(State(one.clone()), Path("r".into())).await).await;
    let found = read().await;
    assert_eq!(found["unread"], 1);
    let scanned = found["scanned"].as_u64().unwrap();
    assert!((1..32).contains(&scanned), "{scanned}");
    let found = read().await;
    let counted = (&found["unread"], &found["scanned"]);
    assert_eq!(
        counted,
        (&json!(0), &json!(32)),
        "what lacked one is not kept"
    );
    let none = super::rows(State(page_of(true).await), Path("r".into())).await;
    assert!(none.is_err());
}
