//! Super-batches to measure on: clustered captions, three in ten of them mismatched. The reference
//! tells members of a cluster apart where the learner mostly sees the cluster. Every value is a
//! pure function of its place, so all sizes are quick to make and the same everywhere.
use half::f16;
use rayon::prelude::*;
use superbatch_kernels::{Candidates, ModelEmbeddings, Rows};

/// Candidates that share a cluster's direction.
const CLUSTER: usize = 128;

/// Both models' towers (learner's image and text, reference's image and text), `[B, dim]` each.
pub(crate) struct World<T> {
    pub count: usize,
    pub dim: usize,
    pub towers: [Vec<T>; 4],
}

pub(crate) const SCALES: [f64; 2] = [24.0, 30.0];
pub(crate) const BIAS: f64 = -10.0;

/// A value of about unit variance for a place.
fn noise(stream: u64, row: usize, column: usize) -> f32 {
    // SplitMix64 (Steele et al. 2014), and the sum of four uniform numbers.
    let mut z =
        (stream << 56 ^ (row as u64) << 20 ^ column as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let sum: u64 = (0..4).map(|k| z >> (16 * k) & 0xffff).sum();
    (sum as f32 / 65_536.0 - 2.0) * 1.732
}

/// The row that candidate `row`'s text describes.
fn described(row: usize, count: usize) -> usize {
    if noise(9, row, 0) > 0.52 {
        (row * 7_919 + 13) % count
    } else {
        row
    }
}

fn tower<T: Send>(
    count: usize,
    dim: usize,
    tower: usize,
    make: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    let [cluster, own, blur] = if tower < 2 {
        [0.7, 0.7, 0.7]
    } else {
        [0.4, 1.0, 0.4]
    };
    let row = |row: usize| {
        let shown = if tower % 2 == 1 {
            described(row, count)
        } else {
            row
        };
        let value = |p| {
            let truth = cluster * noise(1, shown / CLUSTER, p) + own * noise(2, shown, p);
            truth + blur * noise(3 + tower as u64, row, p)
        };
        let values: Vec<f32> = (0..dim).map(value).collect();
        let norm = values.iter().map(|value| value * value).sum::<f32>().sqrt();
        values
            .into_iter()
            .map(|value| make(value / norm))
            .collect::<Vec<T>>()
    };
    (0..count).into_par_iter().flat_map_iter(row).collect()
}

impl World<f32> {
    pub(crate) fn f32(count: usize, dim: usize) -> Self {
        Self {
            count,
            dim,
            towers: std::array::from_fn(|k| tower(count, dim, k, |value| value)),
        }
    }

    pub(crate) fn candidates(&self) -> Candidates<'_> {
        candidates(
            self.count,
            self.dim,
            std::array::from_fn(|k| Rows::F32(&self.towers[k])),
        )
    }
}

impl World<f16> {
    pub(crate) fn f16(count: usize, dim: usize) -> Self {
        Self {
            count,
            dim,
            towers: std::array::from_fn(|k| tower(count, dim, k, f16::from_f32)),
        }
    }

    pub(crate) fn candidates(&self) -> Candidates<'_> {
        candidates(
            self.count,
            self.dim,
            std::array::from_fn(|k| Rows::F16(&self.towers[k])),
        )
    }
}

fn candidates(count: usize, dim: usize, [li, lt, ri, rt]: [Rows<'_>; 4]) -> Candidates<'_> {
    let model = |image, text, scale| {
        Some(ModelEmbeddings {
            image,
            text,
            dim,
            scale,
            bias: BIAS,
        })
    };
    Candidates {
        count,
        learner: model(li, lt, SCALES[0]),
        reference: model(ri, rt, SCALES[1]),
        holes: &[],
    }
}
