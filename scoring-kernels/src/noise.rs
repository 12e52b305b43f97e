//! Gumbel noise from a counter-based generator, identical on every machine.
//!
//! Adding standard Gumbel noise to scores and taking the c largest is a draw of c without
//! replacement with p ~ exp(score), whatever the range of the scores (exp() would overflow:
//! conditional scores are spread over hundreds).
use crate::error::{Error, Result};

/// The source of a selection's noise.
#[derive(Clone, Copy, Debug)]
pub enum Noise<'a> {
    /// [`gumbel`] of these numbers, the chunk's and each candidate's key.
    Seeded {
        /// The run's.
        seed: u64,
        /// A rewound run draws anew in each generation.
        generation: u32,
        /// The step for which is drawn.
        step: u64,
        /// One key for each candidate: its position in the epoch's order. The noise belongs to the
        /// example and not to its place in the array, so permuting candidates with their keys
        /// permutes the draw.
        keys: &'a [u64],
    },
    /// Standard Gumbel noise, row-major `[draws or more, B]`: row k serves chunk k.
    Given(&'a [f32]),
}

impl Noise<'_> {
    pub(crate) fn check(&self, draws: usize, candidates: usize) -> Result<()> {
        let (found, expected) = match self {
            Self::Seeded { keys, .. } => (keys.len(), candidates),
            Self::Given(values) => (values.len(), draws * candidates),
        };
        let fits = match self {
            Self::Seeded { .. } => found == expected,
            Self::Given(_) => found >= expected && found.is_multiple_of(candidates),
        };
        if fits {
            Ok(())
        } else {
            Err(Error::NoiseShape {
                found,
                draws,
                candidates,
                expected,
            })
        }
    }

    /// Returns the noise of one chunk, by candidate index.
    pub(crate) fn chunk(&self, chunk: usize, candidates: usize) -> ChunkNoise<'_> {
        match self {
            Self::Seeded {
                seed,
                generation,
                step,
                keys,
            } => ChunkNoise::Seeded(Stream::new(*seed, *generation, *step, chunk as u32), keys),
            Self::Given(values) => {
                ChunkNoise::Given(&values[chunk * candidates..(chunk + 1) * candidates])
            }
        }
    }
}

pub(crate) enum ChunkNoise<'a> {
    Seeded(Stream, &'a [u64]),
    Given(&'a [f32]),
}

impl ChunkNoise<'_> {
    pub(crate) fn of(&self, candidate: u32) -> f64 {
        match self {
            Self::Seeded(stream, keys) => stream.gumbel(keys[candidate as usize]),
            Self::Given(values) => f64::from(values[candidate as usize]),
        }
    }
}

/// Returns standard Gumbel noise as a pure function of its place: the same number on every machine,
/// thread and backend.
pub fn gumbel(seed: u64, generation: u32, step: u64, chunk: u32, position: u64) -> f64 {
    Stream::new(seed, generation, step, chunk).gumbel(position)
}

/// All noise of one chunk: the numbers of [`gumbel`], with the part that does not depend on the
/// position computed once.
#[derive(Clone, Copy, Debug)]
pub struct Stream([u32; 4]);

impl Stream {
    /// Returns the noise of one chunk of a step.
    pub fn new(seed: u64, generation: u32, step: u64, chunk: u32) -> Self {
        let [step_low, step_high] = halves(step);
        Self(philox(
            [step_low, step_high, generation, chunk],
            halves(seed),
        ))
    }

    /// Returns [`gumbel`] of the chunk at `position`.
    pub fn gumbel(&self, position: u64) -> f64 {
        let [low, high] = halves(position);
        let Self([k0, k1, c2, c3]) = *self;
        let block = philox([low, high, c2, c3], [k0, k1]);
        let bits = (u64::from(block[1]) << 32 | u64::from(block[0])) >> 12;
        // The middle of one of 2^52 equal parts of (0, 1). It is exact in f64, and never 0 or 1,
        // where the logarithms below would be infinite.
        let uniform = (bits as f64 + 0.5) * (1.0 / (1u64 << 52) as f64);
        -ln(-ln(uniform))
    }
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Applies Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a
/// counter and a key to 128 random bits.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [
                key[0].wrapping_add(0x9E37_79B9),
                key[1].wrapping_add(0xBB67_AE85),
            ];
        }
        let [low0, high0] = halves(0xD251_1F53 * u64::from(counter[0]));
        let [low1, high1] = halves(0xCD9E_8D57 * u64::from(counter[2]));
        counter = [
            high1 ^ counter[1] ^ key[0],
            low1,
            high0 ^ counter[3] ^ key[1],
            low0,
        ];
    }
    counter
}

/// Returns the natural logarithm of a positive normal number, from +, -, x and / only. The
/// platform's `ln` differs in the last bit between C libraries, so two machines would draw
/// different batches from the same seed. IEEE 754 fixes the result of these four.
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as f64 - 1023.0;
    let mut mantissa = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 1f64.to_bits());
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    // ln m = 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...); |s| < 0.172, so eleven terms reach the
    // last bit.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let tail = (1..=11)
        .rev()
        .fold(0.0, |tail, k| square * (1.0 / f64::from(2 * k + 1) + tail));
    exponent * std::f64::consts::LN_2 + 2.0 * s * (1.0 + tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        assert_eq!(
            philox(pi, [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn our_logarithm_agrees_with_the_platforms() {
        let near_one = (1..60).flat_map(|k| [1.0 - 0.5f64.powi(k), 1.0 + 0.5f64.powi(k)]);
        let spread = (0..2000).map(|k| 1e-16 * 1.05f64.powi(k));
        for x in near_one.chain(spread).filter(|x| *x != 1.0) {
            let (ours, theirs) = (ln(x), x.ln());
            assert!(
                (ours - theirs).abs() <= 4e-16 * theirs.abs(),
                "ln({x}): {ours} against {theirs}"
            );
        }
    }

    #[test]
    fn every_coordinate_changes_the_noise_and_none_is_random() {
        let place = (7, 1, 12, 3, 99);
        let of = |(seed, generation, step, chunk, position)| {
            gumbel(seed, generation, step, chunk, position)
        };
        assert_eq!(of(place), of(place));
        let others = [
            (8, 1, 12, 3, 99),
            (7, 2, 12, 3, 99),
            (7, 1, 13, 3, 99),
            (7, 1, 12, 4, 99),
            (7, 1, 12, 3, 98),
        ];
        let high = [
            (7 + (1 << 32), 1, 12, 3, 99),
            (7, 1, 12 + (1 << 32), 3, 99),
            (7, 1, 12, 3, 99 + (1 << 48)),
        ];
        for other in others.into_iter().chain(high) {
            assert_ne!(of(place), of(other), "{other:?}");
        }
    }

    #[test]
    fn noise_has_the_mean_and_variance_of_a_standard_gumbel() {
        let n = 200_000;
        let stream = Stream::new(3, 0, 0, 0);
        let values: Vec<f64> = (0..n).map(|position| stream.gumbel(position)).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f64>()
            / n as f64;
        assert!((mean - 0.577_215_664_9).abs() < 0.012, "mean {mean}");
        assert!(
            (variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 0.035,
            "variance {variance}"
        );
    }
}
