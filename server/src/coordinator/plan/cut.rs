//! Cuts a super-batch into slices at micro-batch boundaries.
use super::candidate::Candidate;
use std::ops::Range;
use superbatch_proto::v1::BlockRows;

/// Cuts a super-batch of `candidates` into at most `workers` even slices, at multiples of
/// `micro_batch_rows`. So each row is in the same micro-batch, and its embedding is the same, for
/// any number of workers. No slice is empty.
pub fn slices(candidates: usize, workers: usize, micro_batch_rows: usize) -> Vec<Range<usize>> {
    let micro_batch_rows = micro_batch_rows.max(1);
    let micro_batches = candidates.div_ceil(micro_batch_rows);
    let workers = workers.clamp(1, micro_batches.max(1));
    let cut = |worker: usize| (worker * micro_batches / workers * micro_batch_rows).min(candidates);
    (0..workers)
        .map(|worker| cut(worker)..cut(worker + 1))
        .filter(|slice| !slice.is_empty())
        .collect()
}

/// Returns for each slice the candidates whose blocks begin in it, so that a block that is cut
/// belongs to one slice as a whole. The ranges follow each other without gaps, as the slices do. A
/// slice that lies inside one block has none.
pub fn whole_blocks(candidates: &[Candidate], slices: &[Range<usize>]) -> Vec<Range<usize>> {
    let block = |at: usize| {
        (
            candidates[at].source,
            candidates[at].shard,
            candidates[at].block,
        )
    };
    let is_begin = |at: &usize| *at == 0 || block(*at) != block(at - 1);
    let next_begin = |at: usize| {
        (at..candidates.len())
            .find(is_begin)
            .unwrap_or(candidates.len())
    };
    slices
        .iter()
        .map(|slice| next_begin(slice.start)..next_begin(slice.end))
        .collect()
}

/// Returns candidates in the form of the protocol: one entry for each run of rows in the same
/// block, in the same order.
pub fn block_rows(candidates: &[Candidate]) -> Vec<BlockRows> {
    candidates
        .chunk_by(|a, b| (a.source, a.shard, a.block) == (b.source, b.shard, b.block))
        .map(|run| BlockRows {
            source: run[0].source,
            shard: run[0].shard,
            block: run[0].block,
            rows: run.iter().map(|candidate| candidate.row).collect(),
        })
        .collect()
}
