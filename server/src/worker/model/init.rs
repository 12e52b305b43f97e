//! The service's own initial weights, for a learner that has pushed none yet.
//!
//! Every tensor is drawn from a stream of its own, BLAKE3's extendable output over (seed, name):
//! the order in which tensors are made does not matter, and adding one changes no other. The
//! distributions are those of transformers' `_init_weights` (see `siglip::parameters` and
//! `clip::parameters`); the numbers are not, so no trainer starts from the same weights.
use super::{
    parameters::{Init, Parameters},
    snapshot,
};
use crate::error::Result;
use bytes::Bytes;
use safetensors::Dtype;
use std::f64::consts::TAU;

/// Change it whenever the numbers drawn for a seed change: the weights' digest is made from it.
const VERSION: &str = "superbatch initial weights 1";

/// Returns the digest of the weights of `seed` (of any model) in hex, without drawing them.
pub fn digest(seed: u64) -> String {
    keyed(seed, "").finalize().to_hex().to_string()
}

/// Draws all tensors in f32, as a safetensors file.
pub fn random(parameters: &Parameters, seed: u64) -> Result<Bytes> {
    let data: Vec<(&str, &[usize], Vec<u8>)> = parameters
        .iter()
        .filter(|(_, parameter)| !parameter.optional)
        .map(|(name, parameter)| {
            let count = parameter.shape.iter().product();
            (
                name,
                parameter.shape.as_slice(),
                draw(parameter.init, count, &mut Stream::new(seed, name)),
            )
        })
        .collect();
    snapshot::write(
        data.iter()
            .map(|(name, shape, bytes)| (*name, Dtype::F32, *shape, bytes.as_slice())),
    )
}

fn draw(init: Init, count: usize, stream: &mut Stream) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * 4);
    let mut push = |value: f64| bytes.extend_from_slice(&(value as f32).to_le_bytes());
    match init {
        Init::Constant(value) => (0..count).for_each(|_| push(f64::from(value))),
        Init::Uniform(bound) => (0..count).for_each(|_| push((2.0 * stream.unit() - 1.0) * bound)),
        // Box and Muller (1958): two uniform numbers make two normal ones.
        Init::Normal(std) => (0..count.div_ceil(2)).for_each(|pair| {
            let (radius, angle) = (
                (-2.0 * stream.unit().ln()).sqrt() * std,
                TAU * stream.unit(),
            );
            push(radius * angle.cos());
            if 2 * pair + 1 < count {
                push(radius * angle.sin());
            }
        }),
    }
    bytes
}

fn keyed(seed: u64, name: &str) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new_derive_key(VERSION);
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    hasher
}

struct Stream {
    reader: blake3::OutputReader,
    block: [u8; 4096],
    used: usize,
}

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        Self {
            reader: keyed(seed, name).finalize_xof(),
            block: [0; 4096],
            used: 4096,
        }
    }

    /// Returns a uniform number in (0, 1): never 0, so that its logarithm is finite.
    fn unit(&mut self) -> f64 {
        if self.used == self.block.len() {
            self.reader.fill(&mut self.block);
            self.used = 0;
        }
        let mut word = [0; 4];
        word.copy_from_slice(&self.block[self.used..self.used + 4]);
        self.used += 4;
        (f64::from(u32::from_le_bytes(word)) + 0.5) / (f64::from(u32::MAX) + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(parameters: &Parameters, seed: u64, name: &str) -> Vec<f32> {
        let file = random(parameters, seed).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        file.tensor(name)
            .unwrap()
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn a_tensor_depends_on_its_name_and_the_seed_alone() {
        let mut few = Parameters::default();
        few.add("b", &[3, 333], Init::Normal(0.5));
        let mut more = few.clone();
        more.add("a", &[7], Init::Uniform(1.0));
        more.add("c", &[3, 333], Init::Normal(0.5));
        assert_eq!(
            floats(&few, 1, "b"),
            floats(&more, 1, "b"),
            "in whatever company"
        );
        assert_ne!(floats(&more, 1, "b"), floats(&more, 1, "c"));
        assert_ne!(floats(&few, 1, "b"), floats(&few, 2, "b"));
        assert_ne!(digest(1), digest(2));
    }

    #[test]
    fn distributions_are_what_they_say() {
        let mut parameters = Parameters::default();
        parameters.add("n", &[100, 101], Init::Normal(0.02));
        parameters.add("u", &[100, 101], Init::Uniform(0.3));
        let moments = |name| {
            let x = floats(&parameters, 3, name);
            let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / x.len() as f64;
            let deviation = x
                .iter()
                .map(|x| (f64::from(*x) - mean).powi(2))
                .sum::<f64>()
                / x.len() as f64;
            assert_eq!(x.len(), 10_100);
            (
                mean,
                deviation.sqrt(),
                x.iter().fold(0.0f32, |max, x| max.max(x.abs())),
            )
        };
        let (mean, std, max) = moments("n");
        assert!(
            mean.abs() < 0.001 && (std - 0.02).abs() < 0.001 && max < 0.02 * 6.0,
            "{mean} {std} {max}"
        );
        let (mean, std, max) = moments("u");
        assert!(
            mean.abs() < 0.01 && (std - 0.3 / 3f64.sqrt()).abs() < 0.01 && max <= 0.3,
            "{mean} {std} {max}"
        );
    }
}
