//! Joins of scores beside the data with its rows, in memory.
use crate::error::{Error, Result};
use std::{collections::VecDeque, sync::Arc};
use tokio::sync::OnceCell;

/// Bytes of a row of the joins that are kept in memory. A join is needed for the shards that are
/// scored for the first time only, so the one that was used longest ago goes if they take more than
/// the operator gives.
pub(super) const ROW_BYTES: u64 = size_of::<(Id, f64)>() as u64;

/// An id's hash, most significant byte first. Bytes and not a number: a pair of u128 and f64 takes
/// 32 bytes, of which 8 are padding.
pub(super) type Id = [u8; 16];
/// Ids, sorted, with their values.
pub(super) type Joined = Arc<Vec<(Id, f64)>>;
/// URI, column of ids, column of values.
pub(super) type JoinKey = [String; 3];
/// Joins, the one used last at the end.
pub(super) type Joins = VecDeque<(JoinKey, Arc<OnceCell<Joined>>)>;

/// Returns the place of a join, now the one used last.
pub(super) fn used(joins: &mut Joins, key: JoinKey) -> Arc<OnceCell<Joined>> {
    let known = joins.iter().position(|(known, _)| *known == key);
    let join = known.and_then(|at| joins.remove(at));
    let join = join.unwrap_or_else(|| (key, Arc::default()));
    joins.push_back(join.clone());
    join.1
}

/// Forgets joins until those that are left have `most` rows together, or only the last is left.
pub(super) fn forget_oldest(joins: &mut Joins, most: usize) {
    let rows = |(_, cell): &(JoinKey, Arc<OnceCell<Joined>>)| cell.get().map_or(0, |j| j.len());
    while joins.len() > 1 && joins.iter().map(rows).sum::<usize>() > most {
        joins.pop_front();
    }
}

/// Sorts rows by id. Rows that repeat are one.
///
/// # Errors
/// `InvalidArgument` if an id has several values.
pub(super) fn sorted(mut all: Vec<(Id, f64)>, uri: &str, column: &str) -> Result<Vec<(Id, f64)>> {
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let rows = all.len();
    all.dedup_by(|a, b| a.0 == b.0 && a.1.to_bits() == b.1.to_bits());
    let ids = all.chunk_by(|a, b| a.0 == b.0).count();
    if ids == all.len() {
        return Ok(all);
    }
    let message =
        format!("{uri} has several values of '{column}' for one id: {rows} rows, {ids} ids");
    Err(Error::invalid("sources.scores", message).with("uri", uri))
}

/// Checks the number of rows before they are kept, so that files of any size cannot fill the
/// memory.
pub(super) fn check_rows(rows: usize, most: usize, uri: &str) -> Result<()> {
    if rows <= most {
        return Ok(());
    }
    let bytes = |rows: usize| (rows as u64).saturating_mul(ROW_BYTES);
    let message = format!(
        "{uri} holds {rows} rows or more, and a source's scores are joined in memory: they take {} \
        bytes, and storage.ids_bytes_max leaves {}; raise it where there is memory for that, give \
        the scores as a column of the data, or cut the source and its scores into several",
        bytes(rows),
        bytes(most),
    );
    Err(Error::invalid("sources.scores", message).with("uri", uri))
}
