//! Divides the drawn rows among the ranks.
use crate::{
    coordinator::plan::order::Permutation,
    error::{Error, Result},
};
use superbatch_proto::v1::{ChosenRow, Fidelity, Reason};

const PURPOSE: &str = "superbatch ranks v1";

/// Returns the part of a step's sub-batch for `rank` of `world_size`, as indices into the draw
/// order.
///
/// `groups` are the rows of which every rank and micro-batch gets the same number: all rows, or the
/// full ones and then those that are trained low. One seeded shuffle of each group is cut into
/// `world_size * micro_batches` equal parts: in draw order, rank 0 would get the easy early chunks.
/// A micro-batch consists of its part of each group, one after the other. The shuffle does not
/// depend on the world size. So with one group, the joined shares are the same sequence for every
/// world size.
///
/// # Errors
/// As [`check`].
pub fn slice(
    seed: u64,
    step: u64,
    groups: &[Vec<usize>],
    world_size: u32,
    micro_batches: u32,
    rank: u32,
) -> Result<Vec<usize>> {
    let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
    check(&sizes, world_size, micro_batches, rank)?;
    let parts = u64::from(world_size) * u64::from(micro_batches);
    let first = u64::from(rank) * u64::from(micro_batches);
    let mut rows = Vec::new();
    for part in first..first + u64::from(micro_batches) {
        for group in groups {
            let count = group.len() as u64;
            let (shuffle, each) = (
                Permutation::new(PURPOSE, &[seed, step], count),
                count / parts,
            );
            let places = part * each..(part + 1) * each;
            rows.extend(places.map(|place| group[shuffle.forward(place) as usize]));
        }
    }
    Ok(rows)
}

/// Returns the place of each of `rows` drawn rows in the joined shares of all ranks, if they are
/// one group. Rows that lie in memory in this order need not be gathered for their ranks.
pub fn places(seed: u64, step: u64, rows: usize) -> Vec<usize> {
    let count = rows as u64;
    let shuffle = Permutation::new(PURPOSE, &[seed, step], count);
    (0..count)
        .map(|row| shuffle.inverse(row) as usize)
        .collect()
}

/// Checks that groups of these sizes can be cut for so many ranks and micro-batches.
///
/// # Errors
/// `WorldSizeInvalid` unless `world_size * micro_batches` divides each; `RankOutOfRange`.
pub fn check(sizes: &[usize], world_size: u32, micro_batches: u32, rank: u32) -> Result<()> {
    let parts = u64::from(world_size) * u64::from(micro_batches);
    let rows: usize = sizes.iter().sum();
    if parts == 0
        || sizes
            .iter()
            .any(|size| !(*size as u64).is_multiple_of(parts))
    {
        let each = match sizes {
            [full, low] => format!(" ({full} full rows and {low} approximate ones, cut alike)"),
            _ => String::new(),
        };
        let message = format!(
            "sub_batch_size {rows}{each} cannot be cut into world_size {world_size} x \
             micro_batches {micro_batches} equal parts; use a world size that divides it"
        );
        return Err(Error::new(Reason::WorldSizeInvalid, message)
            .with("sub_batch_size", rows)
            .with("world_size", world_size)
            .with("micro_batches", micro_batches));
    }
    if rank >= world_size {
        let message =
            format!("rank {rank} is not below world_size {world_size}; ranks count from 0");
        return Err(Error::new(Reason::RankOutOfRange, message)
            .with("rank", rank)
            .with("world_size", world_size));
    }
    Ok(())
}

/// Returns the groups of a receipt's rows: the full ones, then those that are trained low. Empty
/// groups are left out.
pub fn groups(chosen: &[ChosenRow]) -> Vec<Vec<usize>> {
    let is_low = |row: &usize| chosen[*row].fidelity() == Fidelity::Approximate;
    let (low, full): (Vec<usize>, Vec<usize>) = (0..chosen.len()).partition(is_low);
    [full, low]
        .into_iter()
        .filter(|group| !group.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(seed: u64, step: u64, rows: usize, world: u32, micro: u32) -> Vec<usize> {
        (0..world)
            .flat_map(|rank| slice(seed, step, &[(0..rows).collect()], world, micro, rank).unwrap())
            .collect()
    }

    #[test]
    fn places_are_those_of_the_joined_shares() {
        for rows in [0, 1, 24, 600] {
            let shares = all(5, 9, rows, 1, 1);
            let places = places(5, 9, rows);
            assert_eq!(places.len(), rows);
            assert!((0..rows).all(|row| shares[places[row]] == row));
        }
        let (shares, places) = (all(5, 9, 24, 4, 2), places(5, 9, 24));
        assert!((0..24).all(|row| shares[places[row]] == row));
    }

    #[test]
    fn what_does_not_divide_is_refused_with_its_numbers() {
        for (world, micro) in [
            (3, 1),
            (2, 3),
            (0, 1),
            (1, 0),
            (128, 1),
            (u32::MAX, u32::MAX),
        ] {
            let error = check(&[64], world, micro, 0).unwrap_err();
            assert_eq!(
                error.reason(),
                Reason::WorldSizeInvalid,
                "{world} x {micro}"
            );
            assert_eq!(error.value("sub_batch_size"), Some("64"));
            assert_eq!(error.value("world_size"), Some(world.to_string().as_str()));
            assert_eq!(
                error.value("micro_batches"),
                Some(micro.to_string().as_str())
            );
        }
        let error = check(&[64], 4, 2, 4).unwrap_err();
        assert_eq!(error.reason(), Reason::RankOutOfRange);
        assert_eq!(error.value("rank"), Some("4"));
    }

    #[test]
    fn the_shuffle_differs_by_seed_and_step() {
        let base = all(1, 1, 64, 1, 1);
        assert_ne!(
            base,
            (0..64).collect::<Vec<_>>(),
            "draw order would give rank 0 the easy chunks"
        );
        assert_ne!(base, all(2, 1, 64, 1, 1));
        assert_ne!(base, all(1, 2, 64, 1, 1));
    }

    #[test]
    fn every_micro_batch_gets_as_many_low_rows_after_its_full_ones() {
        let chosen: Vec<ChosenRow> = (0..48)
            .map(|n| ChosenRow {
                fidelity: if n % 3 == 0 {
                    Fidelity::Approximate
                } else {
                    Fidelity::Full
                } as i32,
                ..Default::default()
            })
            .collect();
        let groups = groups(&chosen);
        let mut all = Vec::new();
        for rank in 0..2 {
            let rows = slice(7, 3, &groups, 2, 4, rank).unwrap();
            for micro_batch in rows.chunks(6) {
                let low: Vec<bool> = micro_batch.iter().map(|row| row % 3 == 0).collect();
                assert_eq!(low, [false, false, false, false, true, true]);
            }
            all.extend(rows);
        }
        all.sort_unstable();
        assert!(all.into_iter().eq(0..48));
        let error = slice(7, 3, &groups, 3, 1, 0).unwrap_err();
        assert_eq!(error.reason(), Reason::WorldSizeInvalid);
        assert!(error.to_string().contains("16 approximate"), "{error}");
    }

    proptest! {
        #[test]
        fn ranks_share_everything_once(
            seed: u64,
            step: u64,
            world in 1_u32..9,
            micro in 1_u32..5,
            each in 1_u32..20,
        ) {
            let rows = (world * micro * each) as usize;
            let union = all(seed, step, rows, world, micro);
            prop_assert_eq!(&union, &all(seed, step, rows, 1, 1), "world 1 is the concatenation \
            of the shares");
            let mut sorted = union;
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..rows));
        }
    }
}
