use super::*;
use crate::coordinator::plan::cut::{block_rows, slices, whole_blocks};
use crate::dataset::{Block, Layout, Shard, SourceManifest};
use proptest::prelude::*;
use std::{collections::HashSet, time::Duration};
use superbatch_proto::v1::{BlockRows, ChosenRow};

/// A source whose shards hold blocks of these sizes.
fn source(name: &str, weight: f64, shards: &[&[u32]]) -> SourceManifest {
    let shard = |(i, blocks): (usize, &&[u32])| {
        let mut first_row = 0;
        let blocks = blocks.iter().map(|rows| {
            let block = Block {
                rows: *rows,
                first_row,
                bytes: (0, 1),
                mask: None,
            };
            first_row += u64::from(*rows);
            block
        });
        Shard {
            path: format!("{i:05}.parquet"),
            size: 1,
            blocks: blocks.collect(),
            ..Shard::default()
        }
    };
    SourceManifest {
        uri: format!("memory:///{name}"),
        root_uri: format!("memory:///{name}"),
        weight,
        layout: Layout {
            image_column: "jpg".into(),
            caption_column: "caption".into(),
            ..Layout::default()
        },
        shards: shards.iter().enumerate().map(shard).collect(),
        ..SourceManifest::default()
    }
}

fn plan(sources: Vec<SourceManifest>, seed: u64, epochs: u32, window_blocks: u32) -> Plan {
    Plan::new(
        Arc::new(Manifest {
            version: Manifest::VERSION,
            sources,
        }),
        seed,
        epochs,
        window_blocks,
    )
    .unwrap()
}

/// Two shards, 100 rows, blocks of uneven sizes (one empty).
fn small(seed: u64, epochs: u32) -> Plan {
    plan(
        vec![source("a", 1.0, &[&[10, 0, 25, 5], &[20, 1, 39]])],
        seed,
        epochs,
        2,
    )
}

fn phases(sizes: &[(u64, u32)]) -> Vec<Phase> {
    sizes
        .iter()
        .map(|(from_step, size)| Phase {
            from_step: *from_step,
            super_batch_size: *size,
            ..Default::default()
        })
        .collect()
}

type Row = (u32, u32, u32, u32);

fn rows(batch: &SuperBatch) -> Vec<Row> {
    batch
        .candidates
        .iter()
        .map(|c| (c.source, c.shard, c.block, c.row))
        .collect()
}

#[test]
fn every_row_comes_once_an_epoch() {
    let (plan, phases) = (small(7, 3), phases(&[(0, 10)]));
    assert_eq!(plan.steps_total(&phases), Some(30));
    for epoch in 0..3 {
        let seen: Vec<Row> = (0..10)
            .flat_map(|i| rows(&plan.step(&phases, epoch * 10 + i).unwrap()))
            .collect();
        assert_eq!(seen.len(), 100);
        assert_eq!(seen.into_iter().collect::<HashSet<_>>().len(), 100);
    }
}

#[test]
fn the_order_is_fixed_by_seed_and_differs_by_seed_and_epoch() {
    let phases = phases(&[(0, 50)]);
    let step = |seed, step| rows(&small(seed, 0).step(&phases, step).unwrap());
    assert_eq!(step(1, 0), step(1, 0));
    assert_ne!(step(1, 0), step(2, 0));
    assert_ne!(step(1, 0), step(1, 2), "another epoch is another order");
    // PLAN_VERSION 1: an order that changes without it reshuffles runs in silence.
    let first: Vec<Row> = rows(&small(1, 0).step(&self::phases(&[(0, 4)]), 0).unwrap());
    assert_eq!(first, PINNED);
}

const PINNED: [Row; 4] = [(0, 1, 2, 3), (0, 1, 2, 6), (0, 1, 2, 12), (0, 1, 2, 29)];

#[test]
fn candidates_are_in_canonical_order_and_carry_their_positions() {
    let (plan, phases) = (small(3, 0), phases(&[(0, 30)]));
    let mut positions = HashSet::new();
    for step in 0..7 {
        let batch = plan.step(&phases, step).unwrap();
        let blocks = block_rows(&batch.candidates);
        let distinct: HashSet<_> = blocks
            .iter()
            .map(|b| (b.source, b.shard, b.block))
            .collect();
        assert_eq!(distinct.len(), blocks.len(), "a block's rows are together");
        assert!(
            blocks
                .iter()
                .all(|block| block.rows.is_sorted_by(|a, b| a < b))
        );
        let first_position = |b: &BlockRows| {
            let own = batch
                .candidates
                .iter()
                .filter(|c| (c.shard, c.block) == (b.shard, b.block));
            own.map(|c| c.position).min().unwrap()
        };
        assert!(
            blocks.iter().map(first_position).is_sorted(),
            "blocks by first appearance"
        );
        let span = &batch.spans[0];
        let expected = (span.start..span.start + span.count).map(|place| span.epoch * 100 + place);
        let here: HashSet<u64> = batch.candidates.iter().map(|c| c.position).collect();
        assert_eq!(here, expected.collect());
        positions.extend(here);
    }
    assert_eq!(positions.len(), 7 * 30, "a position never comes twice");
}

#[test]
fn the_tail_sits_the_epoch_out_and_is_counted() {
    let (plan, phases) = (small(3, 2), phases(&[(0, 30)]));
    assert_eq!(plan.tail_rows(&phases), 10);
    assert_eq!(plan.steps_total(&phases), Some(6));
    let span = &plan.step(&phases, 3).unwrap().spans[0];
    assert_eq!((span.epoch, span.start, span.count), (1, 0, 30));
    let error = plan.step(&phases, 6).unwrap_err();
    assert_eq!(error.reason(), Reason::EndOfData);
    assert_eq!(error.value("step"), Some("6"));
}

#[test]
fn phases_of_other_sizes_go_on_where_the_last_ended() {
    let (plan, phases) = (small(3, 0), phases(&[(0, 30), (2, 7), (7, 50)]));
    let spans: Vec<_> = (0..9)
        .map(|s| plan.step(&phases, s).unwrap().spans[0])
        .map(|s| (s.epoch, s.start, s.count))
        .collect();
    let expected = [
        (0, 0, 30),
        (0, 30, 30),
        (0, 60, 7),
        (0, 67, 7),
        (0, 74, 7),
        (0, 81, 7),
        (0, 88, 7),
        (1, 0, 50),
        (1, 50, 50),
    ];
    assert_eq!(spans, expected);
}

#[test]
fn sources_take_fixed_shares_each_with_its_own_epoch() {
    let sources = vec![
        source("a", 2.0, &[&[16, 16, 16]]),
        source("b", 1.0, &[&[9, 9]]),
        source("c", 1.0, &[&[30]]),
    ];
    let (plan, phases) = (plan(sources, 1, 2, 16), phases(&[(0, 10)]));
    // 10 by 2:1:1 is 5, 2.5, 2.5; the first of equal remainders takes the odd row.
    let mut last_epoch = [0; 3];
    for step in 0..12 {
        let batch = plan.step(&phases, step).unwrap();
        assert_eq!(
            batch.spans.iter().map(|s| s.count).collect::<Vec<_>>(),
            [5, 3, 2]
        );
        assert_eq!(
            rows(&batch).into_iter().collect::<HashSet<_>>().len(),
            10,
            "no row twice in a super-batch"
        );
        for span in &batch.spans {
            last_epoch[span.source as usize] = span.epoch;
        }
    }
    assert_eq!(last_epoch, [1, 1, 0]);
    assert_eq!(
        plan.steps_total(&phases),
        Some(12),
        "the second source ends first: two epochs of six steps"
    );
    assert_eq!(
        plan.step(&phases, 12).unwrap_err().value("source"),
        Some("1")
    );
}

#[test]
fn what_cannot_be_filled_is_refused_by_name() {
    let error = small(0, 0)
        .check(&phases(&[(0, 10), (5, 101)]))
        .unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetTooSmall);
    assert_eq!(
        (error.value("rows"), error.value("needed")),
        (Some("100"), Some("101"))
    );
    let uneven = plan(
        vec![source("a", 1e6, &[&[50]]), source("b", 1.0, &[&[50]])],
        0,
        0,
        16,
    );
    let error = uneven.check(&phases(&[(0, 8)])).unwrap_err();
    assert_eq!(
        (error.reason(), error.value("field")),
        (Reason::RunSpecImpossible, Some("sources[1].weight"))
    );
    for sources in [
        vec![],
        vec![source("a", 1.0, &[&[5]]), source("b", 1.0, &[&[0]])],
    ] {
        let manifest = Arc::new(Manifest {
            version: Manifest::VERSION,
            sources,
        });
        assert_eq!(
            Plan::new(manifest, 0, 0, 16).unwrap_err().reason(),
            Reason::DatasetEmpty
        );
    }
}

#[test]
fn a_step_far_out_is_found_without_walking_there() {
    let (plan, phases) = (small(1, 0), phases(&[(0, 30)]));
    let span = &plan.step(&phases, 3_000_000_001).unwrap().spans[0];
    assert_eq!((span.epoch, span.start), (1_000_000_000, 30));
    assert_eq!(plan.steps_total(&phases), None);
    assert_eq!(
        plan.step(&phases, u64::MAX).unwrap_err().reason(),
        Reason::EndOfData
    );
}

#[test]
fn a_hundred_thousand_blocks_are_ordered_quickly() {
    let shards: Vec<Vec<u32>> = vec![vec![100; 100]; 1000];
    let shards: Vec<&[u32]> = shards.iter().map(Vec::as_slice).collect();
    let plan = plan(vec![source("a", 1.0, &shards)], 1, 0, 16);
    let start = std::time::Instant::now();
    assert_eq!(
        plan.step(&phases(&[(0, 1000)]), 0)
            .unwrap()
            .candidates
            .len(),
        1000
    );
    // 50 ms is the aim; the machine that runs the tests may be busy.
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
}

/// The cursor of a step, found by taking every step before it.
fn walked(rows: u64, shares: &[u64]) -> Vec<(u64, u64)> {
    let (mut epoch, mut place) = (0, 0);
    let step = |share: &u64| {
        if rows - place < *share {
            (epoch, place) = (epoch + 1, 0);
        }
        let here = (epoch, place);
        place += share;
        here
    };
    shares.iter().map(step).collect()
}

#[test]
fn a_receipts_row_leads_back_to_its_candidate() {
    for sources in [1, 2] {
        let sources = vec![source("a", 1.0, &[&[10, 0, 25, 5], &[20, 1, 39]]); sources];
        let plan = plan(sources, 3, 0, 2);
        let manifest = plan.manifest();
        let mut ids = HashSet::new();
        let batch = plan.step(&phases(&[(0, 100)]), 0).unwrap();
        for candidate in batch.candidates {
            let (id, row) = row_id(manifest, &candidate);
            let Candidate {
                source,
                shard,
                position,
                ..
            } = candidate;
            assert!(id.ends_with(&format!("{shard:05}.parquet#{row}")), "{id}");
            assert_eq!(id.contains(':'), manifest.sources.len() > 1, "{id}");
            let chosen = ChosenRow {
                id: id.clone(),
                source,
                shard,
                row,
                position,
                ..Default::default()
            };
            assert_eq!(locate(manifest, &chosen).unwrap(), candidate);
            assert!(ids.insert(id));
        }
        for (source, shard, row) in [(9, 0, 0), (0, 2, 0), (0, 0, 40)] {
            assert!(
                locate(
                    manifest,
                    &ChosenRow {
                        source,
                        shard,
                        row,
                        ..Default::default()
                    }
                )
                .is_err()
            );
        }
    }
}

proptest! {
    #[test]
    fn arithmetic_agrees_with_walking(
        rows in 1_u64..60,
        sizes in prop::collection::vec((1_u64..60, 1_u64..12), 1..5),
        epochs in 0_u32..4,
    ) {
        let plan = plan(vec![source("a", 1.0, &[&[rows as u32]])], 1, epochs, 16);
        let (mut from, mut each, mut list) = (0, vec![], vec![]);
        for (size, length) in sizes {
            let size = size.min(rows);
            list.push((from, size as u32));
            each.extend(std::iter::repeat_n(size, length as usize));
            from += length;
        }
        let phases = phases(&list);
        let expected = walked(rows, &each);
        let total = plan.steps_total(&phases);
        for (step, cursor) in expected.into_iter().enumerate() {
            let over = epochs > 0 && cursor.0 >= u64::from(epochs);
            prop_assert_eq!(total.is_some_and(|total| step as u64 >= total), over);
            match plan.step(&phases, step as u64) {
                Ok(batch) => prop_assert_eq!((batch.spans[0].epoch, batch.spans[0].start), cursor),
                Err(error) => {
                    prop_assert!(over);
                    prop_assert_eq!(error.reason(), Reason::EndOfData);
                }
            }
        }
    }

    #[test]
    fn shares_add_up(
        weights in prop::collection::vec(0.01_f64..100.0, 1..8),
        size in 1_u32..100_000,
    ) {
        let shares = shares(&weights, size);
        prop_assert_eq!(shares.iter().sum::<u64>(), u64::from(size));
        let total: f64 = weights.iter().sum();
        for (share, weight) in shares.iter().zip(&weights) {
            prop_assert!((*share as f64 - f64::from(size) * weight / total).abs() < 1.0);
        }
    }

    #[test]
    fn slices_cover_everything_at_micro_batch_cuts(
        candidates in 0_usize..5000,
        workers in 0_usize..40,
        micro in 1_usize..200,
    ) {
        let slices = slices(candidates, workers, micro);
        prop_assert!(slices.len() <= workers.max(1));
        let mut next = 0;
        for slice in &slices {
            prop_assert_eq!(slice.start, next);
            prop_assert!(slice.start % micro == 0 && !slice.is_empty());
            next = slice.end;
        }
        prop_assert_eq!(next, candidates);
        let sizes: Vec<usize> = slices.iter().map(|slice| slice.len().div_ceil(micro)).collect();
        let spread = sizes.iter().max().unwrap_or(&0) - sizes.iter().min().unwrap_or(&0);
        prop_assert!(spread <= 1, "even to a micro-batch");
    }

    #[test]
    fn each_block_belongs_to_the_slice_in_which_it_begins(
        blocks in prop::collection::vec(1_usize..40, 1..30),
        workers in 1_usize..8,
    ) {
        let block = |(block, rows): (usize, &usize)| {
            let block = block as u32;
            let candidate = Candidate { source: 0, shard: 0, block, row: 0, position: 0 };
            vec![candidate; *rows]
        };
        let candidates: Vec<Candidate> = blocks.iter().enumerate().flat_map(block).collect();
        let slices = slices(candidates.len(), workers, 8);
        let whole = whole_blocks(&candidates, &slices);
        prop_assert_eq!(whole.len(), slices.len());
        prop_assert_eq!((whole[0].start, whole[whole.len() - 1].end), (0, candidates.len()));
        prop_assert!(whole.windows(2).all(|two| two[0].end == two[1].start));
        for (slice, whole) in slices.iter().zip(&whole) {
            let begins = |at: &usize| *at == 0 || candidates[*at].block != candidates[at - 1].block;
            let start = Some(whole.start).filter(|_| !whole.is_empty());
            prop_assert_eq!(slice.clone().find(begins), start);
            prop_assert!(whole.end == candidates.len() || begins(&whole.end));
        }
    }
}
