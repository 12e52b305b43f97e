//! Rows of a decided step that are read again: a step that is served from its receipt, and rows
//! that no process holds any more.
use super::maker::{changed, form};
use crate::{
    blocking::blocking,
    coordinator::{
        plan::{
            candidate::{Candidate, SuperBatch},
            cut, planner,
        },
        runs::run::Run,
        score::{
            fetch::{fetch_rows, keep_rows},
            kept::{self, Data, Kept},
            scored::Rows,
            super_batch,
            table::Table,
        },
        serve::ready::Ready,
        workers::{failover::Failover, replies::unsound},
    },
    error::{Error, Result},
};
use futures::future::try_join_all;
use superbatch_proto::v1::{FetchRowsRequest, Receipt, RowsForm};

/// Makes a committed step ready again, with the rows of its receipt.
///
/// # Errors
/// `RowChanged` names the first row whose content differs.
pub(super) async fn recalled(run: &Run, receipt: Receipt) -> Result<Ready> {
    let data = match form(&run.spec()) {
        RowsForm::Kept => match kept_again(run, &receipt).await? {
            Data::OnWorkers(rows) => Data::OnWorkers(rows),
            _ => Data::Here(run.rows_again(&receipt).await?),
        },
        _ => Data::Here(run.rows_again(&receipt).await?),
    };
    Ok(run.deps.ready.hold(receipt, data))
}

/// Reads rows that workers could not hold, before their receipt is written: the chosen bytes are in
/// hand when a step is committed.
///
/// # Errors
/// `RowChanged` if a row is not the one that was scored.
pub(super) async fn in_hand(
    run: &Run,
    super_batch: &SuperBatch,
    drawn: &[u32],
    rows: Rows,
) -> Result<Rows> {
    let Data::Nowhere = rows.data else {
        return Ok(rows);
    };
    let candidate = |index: &u32| super_batch.candidates[*index as usize];
    let candidates: Vec<Candidate> = drawn.iter().map(candidate).collect();
    let (table, hashes) = read(run, &candidates).await?;
    let known: Vec<&[u8]> = rows.hashes.iter().map(Vec::as_slice).collect();
    if let Some(n) = other(&known, &hashes)? {
        return Err(changed(&planner::row_id(&run.manifest, &candidates[n]).0));
    }
    Ok(Rows {
        data: Data::Here(table),
        hashes,
    })
}

impl Run {
    /// Reads the rows of a receipt again, as they are sent through this process.
    ///
    /// # Errors
    /// `RowChanged` names the first row whose content differs.
    pub async fn rows_again(&self, receipt: &Receipt) -> Result<Table> {
        let (table, hashes) = read(self, &located(self, receipt)?).await?;
        check(receipt, &hashes)?;
        Ok(table)
    }
}

fn located(run: &Run, receipt: &Receipt) -> Result<Vec<Candidate>> {
    let chosen = receipt.chosen.iter();
    chosen
        .map(|row| planner::locate(&run.manifest, row))
        .collect()
}

/// Has the rows of a receipt held on the workers, each of which reads a part.
async fn kept_again(run: &Run, receipt: &Receipt) -> Result<Data> {
    let (pool, candidates) = (&run.deps.pool, located(run, receipt)?);
    let live = pool.wait_live().await?;
    if candidates.is_empty() || live.iter().any(|worker| worker.ticket_key.is_none()) {
        return Ok(Data::Nowhere);
    }
    let (parts, places) = shared(&candidates, live.len());
    let summary = receipt.summary.clone().unwrap_or_default();
    let parts = parts.into_iter().enumerate().map(|(part, rows)| {
        let request = FetchRowsRequest {
            form: RowsForm::Kept.into(),
            run_id: run.id.clone(),
            generation: summary.generation,
            step: summary.step,
            ..request(run, &rows)
        };
        let turn = part + summary.step as usize;
        keep_rows(pool, request, Failover::new(pool).from_turn(turn))
    });
    let kept: Option<Vec<Kept>> = try_join_all(parts).await?.into_iter().collect();
    let Some(kept) = kept else {
        return Ok(Data::Nowhere);
    };
    let (data, hashes) = kept::joined(kept, &places);
    check(receipt, &hashes)?;
    Ok(data)
}

/// Shares rows out to workers. Returns the rows of each, and the place of each row among those of
/// all workers, one after the other. In the order of storage each block is read by one worker, or
/// two.
fn shared(rows: &[Candidate], workers: usize) -> (Vec<Vec<Candidate>>, Vec<u32>) {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_unstable_by_key(|n| {
        let Candidate {
            source,
            shard,
            block,
            row,
            ..
        } = rows[*n];
        (source, shard, block, row)
    });
    let mut places = vec![0; order.len()];
    for (place, n) in order.iter().enumerate() {
        places[*n] = place as u32;
    }
    let each = order.len().div_ceil(workers.max(1)).max(1);
    let parts = order.chunks(each);
    let parts = parts.map(|numbers| numbers.iter().map(|n| rows[*n]).collect());
    (parts.collect(), places)
}

fn request(run: &Run, rows: &[Candidate]) -> FetchRowsRequest {
    FetchRowsRequest {
        dataset_manifest: run.manifest_digest.clone(),
        blocks: cut::block_rows(rows),
        columns: run.spec().columns.clone(),
        ..Default::default()
    }
}

/// Reads rows through this process, shared out to all workers.
async fn read(run: &Run, rows: &[Candidate]) -> Result<(Table, Vec<Vec<u8>>)> {
    let form = match form(&run.spec()) {
        RowsForm::Located => RowsForm::Located,
        _ => RowsForm::Whole,
    };
    let pool = &run.deps.pool;
    let (parts, places) = shared(rows, pool.wait_live().await?.len());
    let turn = pool.next_turn();
    let answers = parts.into_iter().enumerate().map(|(part, rows)| {
        let request = FetchRowsRequest {
            form: form.into(),
            ..request(run, &rows)
        };
        fetch_rows(pool, request, Failover::new(pool).from_turn(turn + part))
    });
    let tables = try_join_all(answers).await?;
    let join = move || {
        let Rows { data, hashes } = super_batch::joined(tables, &places)?;
        match data {
            Data::Here(table) => Ok((table, hashes)),
            Data::OnWorkers(_) | Data::Nowhere => Err(Error::internal("rows are not in hand")),
        }
    };
    blocking("joining rows", join).await
}

fn check(receipt: &Receipt, hashes: &[Vec<u8>]) -> Result<()> {
    let known = receipt.chosen.iter().map(|row| row.content_hash.as_ref());
    match other(&known.collect::<Vec<_>>(), hashes)? {
        Some(n) => Err(changed(&receipt.chosen[n].id)),
        None => Ok(()),
    }
}

/// Returns the first row whose content differs.
///
/// # Errors
/// `Internal` if there are more or fewer rows than are known: rows of which some are missing would
/// be served under others' ids.
fn other(known: &[&[u8]], found: &[Vec<u8>]) -> Result<Option<usize>> {
    if known.len() != found.len() {
        let (found, known) = (found.len(), known.len());
        return Err(unsound(format_args!("{found} of {known} rows")));
    }
    let mut pairs = known.iter().zip(found);
    Ok(pairs.position(|(known, found)| *known != found.as_slice()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::Reason;

    #[test]
    fn a_row_too_few_or_too_many_is_refused() {
        let known: [&[u8]; 2] = [&[1], &[2]];
        let found = |hashes: &[u8]| {
            let hashes: Vec<Vec<u8>> = hashes.iter().map(|hash| vec![*hash]).collect();
            other(&known, &hashes).map_err(|error| error.reason())
        };
        assert_eq!(found(&[1, 2]), Ok(None));
        assert_eq!(found(&[1, 3]), Ok(Some(1)));
        for wrong in [&[1][..], &[], &[1, 2, 3]] {
            assert_eq!(found(wrong), Err(Reason::Internal), "{wrong:?}");
        }
    }

    #[test]
    fn all_workers_read_a_part_in_the_order_of_storage() {
        let row = |row: u32| Candidate {
            source: 0,
            shard: 0,
            block: 0,
            row,
            position: 0,
        };
        let rows = [4, 1, 3, 0, 2].map(row);
        let (parts, places) = shared(&rows, 2);
        let numbers = |rows: &Vec<Candidate>| rows.iter().map(|row| row.row).collect();
        let parts: Vec<Vec<u32>> = parts.iter().map(numbers).collect();
        assert_eq!(parts, [vec![0, 1, 2], vec![3, 4]]);
        assert_eq!(places, [4, 1, 3, 0, 2]);
        assert_eq!(shared(&rows, 9).0.len(), 5, "no worker reads nothing");
        assert!(shared(&[], 2).0.is_empty());
    }
}
