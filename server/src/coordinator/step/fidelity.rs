//! Decides which of the chosen rows are trained at the phase's approximation.
use crate::coordinator::spec::low_rows;
use superbatch_proto::v1::{Fidelity, MultiResolution};

const PURPOSE: &str = "superbatch fidelity of rows v1";

/// Returns the fidelity of each chosen row, by its source and position. The rows of the lowest
/// hashes are low, as many as the share says: ranks need equal numbers, which an independent draw
/// for each row would not give. A row has another position in another epoch, so it is decided anew
/// there.
pub(crate) fn fidelities(
    seed: u64,
    step: u64,
    asked: Option<&MultiResolution>,
    rows: &[(u32, u64)],
) -> Vec<Fidelity> {
    if let Some(asked) = asked.filter(|asked| asked.whole_step) {
        let all = if share_of(hash(&[seed, step])) < asked.share {
            Fidelity::Approximate
        } else {
            Fidelity::Full
        };
        return vec![all; rows.len()];
    }
    let mut by_hash: Vec<(u64, usize)> = rows
        .iter()
        .enumerate()
        .map(|(n, (source, position))| (hash(&[seed, u64::from(*source), *position]), n))
        .collect();
    by_hash.sort_unstable();
    let mut fidelities = vec![Fidelity::Full; rows.len()];
    for (_, n) in by_hash.iter().take(low_rows(asked, rows.len())) {
        fidelities[*n] = Fidelity::Approximate;
    }
    fidelities
}

fn hash(keys: &[u64]) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key(PURPOSE);
    for key in keys {
        hasher.update(&key.to_le_bytes());
    }
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word)
}

/// Returns the share of all hashes that are below this one.
fn share_of(hash: u64) -> f64 {
    hash as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn low(fidelities: &[Fidelity]) -> usize {
        let is_low = |f: &&Fidelity| **f == Fidelity::Approximate;
        fidelities.iter().filter(is_low).count()
    }

    fn asked(share: f64, whole_step: bool) -> MultiResolution {
        MultiResolution { share, whole_step }
    }

    #[test]
    fn as_many_are_low_as_the_share_says_whatever_their_order() {
        let rows: Vec<(u32, u64)> = (0..96).map(|n| (n % 2, u64::from(n) * 7)).collect();
        let found = fidelities(5, 9, Some(&asked(0.25, false)), &rows);
        assert_eq!(low(&found), 24);
        let reversed: Vec<_> = rows.iter().rev().copied().collect();
        let mut again = fidelities(5, 10, Some(&asked(0.25, false)), &reversed);
        again.reverse();
        assert_eq!(again, found, "neither order nor step decides");
        assert_ne!(fidelities(6, 9, Some(&asked(0.25, false)), &rows), found);
        assert_eq!(low(&fidelities(5, 9, None, &rows)), 0);
    }

    #[test]
    fn whole_steps_are_low_as_often_as_the_share_says() {
        let rows = [(0, 1), (0, 2)];
        let steps = 4000;
        let mut low_steps = 0;
        for step in 0..steps {
            let found = fidelities(5, step, Some(&asked(0.25, true)), &rows);
            assert!(low(&found) == 0 || low(&found) == 2);
            low_steps += low(&found) / 2;
        }
        let share = low_steps as f64 / steps as f64;
        assert!((share - 0.25).abs() < 0.03, "{share}");
    }
}
