//! Small worlds to select from, and the backends that this machine has.
use crate::emulation;
use half::f16;
use superbatch_kernels::{
    Backend, Candidates, Criterion, CudaDevice, CudaLibraries, Loss, ModelEmbeddings, Noise,
    Policy, Rows, Settings, noise,
};

/// A counter-based generator, so that every test sees the same data everywhere.
pub(crate) struct Dice {
    key: [u32; 2],
    count: u32,
}

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            count: 0,
        }
    }

    pub(crate) fn uniform(&mut self) -> f64 {
        self.count += 1;
        let block = noise::philox([self.count, 0, 0, 0xD1CE], self.key);
        (f64::from(block[0]) + 0.5) / 4_294_967_296.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn direction(&mut self, dim: usize) -> Vec<f64> {
        unit((0..dim).map(|_| self.normal()).collect())
    }

    pub(crate) fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        (1..n).rev().for_each(|k| order.swap(k, self.below(k + 1)));
        order
    }
}

fn unit(mut row: Vec<f64>) -> Vec<f64> {
    let norm = row.iter().map(|value| value * value).sum::<f64>().sqrt();
    row.iter_mut().for_each(|value| *value /= norm);
    row
}

/// One model's embeddings, owned.
#[derive(Clone)]
pub(crate) struct Model {
    pub image: Vec<f32>,
    pub text: Vec<f32>,
    pub dim: usize,
    pub scale: f64,
    pub bias: f64,
}

impl Model {
    pub(crate) fn view(&self) -> ModelEmbeddings<'_> {
        let (image, text) = (Rows::F32(&self.image), Rows::F32(&self.text));
        ModelEmbeddings {
            image,
            text,
            dim: self.dim,
            scale: self.scale,
            bias: self.bias,
        }
    }

    /// Row i of the result is row `order[i]`.
    pub(crate) fn permuted(&self, order: &[usize]) -> Self {
        let permute = |rows: &[f32]| {
            order
                .iter()
                .flat_map(|&i| rows[i * self.dim..][..self.dim].to_vec())
                .collect()
        };
        Self {
            image: permute(&self.image),
            text: permute(&self.text),
            ..self.clone()
        }
    }
}

/// A super-batch with its noise.
#[derive(Clone)]
pub(crate) struct World {
    pub count: usize,
    pub learner: Model,
    pub reference: Model,
    pub holes: Vec<u32>,
    /// `[rows, B]`.
    pub noise: Vec<f32>,
}

impl World {
    /// Clustered captions, three in ten of them mismatched, seen by a sharp reference and a
    /// blurred, narrower learner: without clusters joint and independent draws coincide.
    pub(crate) fn new(
        seed: u64,
        count: usize,
        dims: [usize; 2],
        scale: f64,
        bias: f64,
        noise_rows: usize,
    ) -> Self {
        let mut dice = Dice::new(seed);
        let wide = dims[0].max(dims[1]);
        let clusters: Vec<_> = (0..count.div_ceil(16).max(2))
            .map(|_| dice.direction(wide))
            .collect();
        let images: Vec<_> = (0..count)
            .map(|_| clusters[dice.below(clusters.len())].clone())
            .collect();
        let images: Vec<_> = images
            .into_iter()
            .map(|image| blur(&mut dice, &image, 0.6, wide))
            .collect();
        let texts: Vec<_> = (0..count)
            .map(|i| {
                if dice.uniform() < 0.3 {
                    dice.below(count)
                } else {
                    i
                }
            })
            .collect();
        let texts: Vec<_> = texts.into_iter().map(|i| images[i].clone()).collect();
        let mut encode = |rows: &[Vec<f64>], noise: f64, dim: usize| -> Vec<f32> {
            rows.iter()
                .flat_map(|row| blur(&mut dice, row, noise, dim))
                .map(|value| value as f32)
                .collect()
        };
        let mut model = |noise, dim, scale| {
            let (image, text) = (encode(&images, noise, dim), encode(&texts, noise, dim));
            Model {
                image,
                text,
                dim,
                scale,
                bias,
            }
        };
        let (learner, reference) = (model(1.2, dims[0], 0.8 * scale), model(0.4, dims[1], scale));
        let noise = gumbels(&mut dice, noise_rows * count);
        Self {
            count,
            learner,
            reference,
            holes: Vec::new(),
            noise,
        }
    }

    /// With images, and texts, rounded to f16.
    pub(crate) fn rounded(&self, [image, text]: [bool; 2]) -> Self {
        let tower = |rounds: bool, rows: &[f32]| -> Vec<f32> {
            if rounds {
                halves(rows).into_iter().map(f32::from).collect()
            } else {
                rows.to_vec()
            }
        };
        let model = |model: &Model| Model {
            image: tower(image, &model.image),
            text: tower(text, &model.text),
            ..model.clone()
        };
        Self {
            learner: model(&self.learner),
            reference: model(&self.reference),
            ..self.clone()
        }
    }

    pub(crate) fn candidates(&self) -> Candidates<'_> {
        let (learner, reference) = (Some(self.learner.view()), Some(self.reference.view()));
        Candidates {
            count: self.count,
            learner,
            reference,
            holes: &self.holes,
        }
    }

    pub(crate) fn given(&self) -> Noise<'_> {
        Noise::Given(&self.noise)
    }
}

pub(crate) fn halves(rows: &[f32]) -> Vec<f16> {
    rows.iter().map(|value| f16::from_f32(*value)).collect()
}

pub(crate) fn gumbels(dice: &mut Dice, n: usize) -> Vec<f32> {
    (0..n)
        .map(|_| -(-dice.uniform().ln()).ln() as f32)
        .collect()
}

/// The first `dim` coordinates of a row with noise added, on the unit sphere.
fn blur(dice: &mut Dice, row: &[f64], noise: f64, dim: usize) -> Vec<f64> {
    let step = noise / (dim as f64).sqrt();
    unit(
        row[..dim]
            .iter()
            .map(|value| value + step * dice.normal())
            .collect(),
    )
}

pub(crate) fn settings(
    policy: Policy,
    loss: Loss,
    criterion: Criterion,
    sub_batch_size: usize,
    n_chunks: usize,
) -> Settings {
    Settings {
        policy,
        loss,
        criterion,
        sub_batch_size,
        n_chunks,
        gain: 1.0,
    }
}

/// The GPU of this machine, if `SUPERBATCH_TEST_DEVICE=cuda` says that it has one: then its
/// kernels must be usable.
pub(crate) fn named_device() -> Option<CudaDevice> {
    let named =
        std::env::var("SUPERBATCH_TEST_DEVICE").is_ok_and(|device| device.starts_with("cuda"));
    let open = || {
        CudaDevice::open(&CudaLibraries::default(), 0)
            .expect("a CUDA device whose kernels pass their check")
    };
    named.then(open)
}

/// The backends of this machine.
pub(crate) fn backends() -> Vec<Backend> {
    let mut all = vec![Backend::Native];
    all.extend(named_device().map(Backend::Cuda));
    #[cfg(feature = "torch")]
    {
        all.push(Backend::Torch(tch::Device::Cpu));
        if tch::Cuda::is_available() {
            all.push(Backend::Torch(tch::Device::Cuda(0)));
        }
    }
    all
}

/// [`backends`], and the emulated CUDA device, which is slow.
pub(crate) fn backends_and_emulated() -> Vec<Backend> {
    backends()
        .into_iter()
        .chain(emulation::device(3).map(Backend::Cuda))
        .collect()
}

/// The chosen of each chunk, sorted: rounding may turn the order inside a chunk.
pub(crate) fn chunk_sets(indices: &[u32], chunks: &[u32]) -> Vec<Vec<u32>> {
    let mut rest = indices;
    let take = |&size: &u32| {
        let (chunk, after) = rest.split_at(size as usize);
        rest = after;
        let mut chunk = chunk.to_vec();
        chunk.sort_unstable();
        chunk
    };
    chunks.iter().map(take).collect()
}

/// The promise on scores: within 5e-4 plus a millionth of the float64 value.
pub(crate) fn assert_close(ours: f64, exact: f64, what: &str) {
    assert!(
        (ours - exact).abs() <= 5e-4 + 1e-6 * exact.abs(),
        "{what}: {ours} against {exact}"
    );
}
