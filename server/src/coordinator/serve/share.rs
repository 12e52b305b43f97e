//! Which of the drawn rows each rank gets.
use crate::{
    coordinator::plan::order::Permutation,
    error::{Error, Result},
};
use superbatch_proto::v1::Reason;

const PURPOSE: &str = "superbatch ranks v1";

/// The part of a step's sub-batch that `rank` of `world_size` gets, as indices into the draw order.
///
/// One seeded shuffle of the draws is cut into `world_size` equal slices, each of `micro_batches`
/// equal parts in a row: in draw order, rank 0 would get the easy early chunks. The shuffle does
/// not know the world size, so the slices of any two world sizes put together are the same
/// sequence.
///
/// # Errors
/// `WorldSizeInvalid` unless `world_size * micro_batches` divides `sub_batch_size`;
/// `RankOutOfRange`.
pub fn slice(
    seed: u64,
    step: u64,
    sub_batch_size: usize,
    world_size: u32,
    micro_batches: u32,
    rank: u32,
) -> Result<Vec<usize>> {
    let parts = u64::from(world_size) * u64::from(micro_batches);
    let rows = sub_batch_size as u64;
    if parts == 0 || !rows.is_multiple_of(parts) {
        let message = format!(
            "sub_batch_size {rows} cannot be cut into world_size {world_size} x micro_batches \
            {micro_batches} equal parts; use a \
             world size that divides it"
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
    let shuffle = Permutation::new(PURPOSE, &[seed, step], rows);
    let each = rows / u64::from(world_size);
    let first = each * u64::from(rank);
    Ok((first..first + each)
        .map(|i| shuffle.forward(i) as usize)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(seed: u64, step: u64, rows: usize, world: u32, micro: u32) -> Vec<usize> {
        (0..world)
            .flat_map(|rank| slice(seed, step, rows, world, micro, rank).unwrap())
            .collect()
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
            let error = slice(0, 0, 64, world, micro, 0).unwrap_err();
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
        let error = slice(0, 0, 64, 4, 2, 4).unwrap_err();
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

    proptest! {
        #[test]
        fn ranks_share_everything_once(seed: u64, step: u64, world in 1_u32..9, micro in 1_u32..5, each in 1_u32..20) {
            let rows = (world * micro * each) as usize;
            let union = all(seed, step, rows, world, micro);
            prop_assert_eq!(&union, &all(seed, step, rows, 1, 1), "world 1 is the concatenation \
            of the slices");
            let mut sorted = union;
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..rows));
        }
    }
}
