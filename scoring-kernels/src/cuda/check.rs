//! The check that a device must pass before it selects: a built-in case, compared with the CPU. A
//! driver, a compiler or a GPU that computes something slightly else would draw other batches
//! without an error.
use super::{
    device::Device,
    engine::CudaEngine,
    error::{CudaError, Result},
    spread::CudaSpread,
};
use crate::{
    engine::{Engine, Spread},
    error::Error,
    native::{NativeEngine, NativeSpread},
    noise::philox,
    problem::Problem,
    types::{Candidates, Criterion, Loss, ModelEmbeddings, Policy, Rows, Settings, Tuning},
};
use half::f16;

/// Sizes that fill no tile: two tiles of candidates, two of drawn examples, several slabs of a row.
const COUNT: usize = 301;
const DIMS: [usize; 2] = [72, 200];
const CHUNKS: [usize; 2] = [143, 5];
/// Absolute and relative tolerance. Twice what a backend may differ from the exact score by, since
/// both sides of the comparison may differ.
const TOLERANCE: [f64; 2] = [1e-3, 2e-6];

/// Makes four towers of unit rows. Texts resemble their images, and images each other, so that
/// logits are both large and small.
fn towers() -> [Vec<f32>; 4] {
    std::array::from_fn(|tower| {
        let dim = DIMS[tower / 2];
        let row = |row: usize| {
            let noise = |stream: usize, row: usize, column: usize| {
                let block = philox([row as u32, column as u32, stream as u32, 0], [7, 11]);
                block[0] as f32 / 2f32.powi(31) - 1.0
            };
            let value = |p| {
                noise(0, row % 5, p) + noise(1 + tower / 2, row, p) + 0.5 * noise(3 + tower, row, p)
            };
            let values: Vec<f32> = (0..dim).map(value).collect();
            let norm = values.iter().map(|value| value * value).sum::<f32>().sqrt();
            values.into_iter().map(move |value| value / norm)
        };
        (0..COUNT).flat_map(row).collect()
    })
}

/// Checks both losses with both types.
pub(super) fn run(device: &Device) -> Result<()> {
    let wide = towers();
    let narrow = wide.each_ref().map(|rows| {
        rows.iter()
            .map(|value| f16::from_f32(*value))
            .collect::<Vec<_>>()
    });
    for loss in Loss::ALL {
        compare(
            device,
            *loss,
            std::array::from_fn(|k| Rows::F16(&narrow[k])),
        )?;
        compare(device, *loss, std::array::from_fn(|k| Rows::F32(&wide[k])))?;
    }
    compare_spread(device, Rows::F16(&narrow[2]))?;
    compare_spread(device, Rows::F32(&wide[2]))
}

/// Checks k-center's cosines.
fn compare_spread(device: &Device, rows: Rows<'_>) -> Result<()> {
    let embeddings = ModelEmbeddings {
        image: rows,
        text: rows,
        dim: DIMS[1],
        scale: 1.0,
        bias: 0.0,
    };
    let (mut ours, mut native) = (
        CudaSpread::new(&embeddings, COUNT, device)?,
        NativeSpread::new(&embeddings, COUNT),
    );
    let mut left: Vec<u32> = (0..COUNT as u32).collect();
    for size in CHUNKS {
        let chunk: Vec<u32> = left.iter().rev().step_by(2).take(size).copied().collect();
        left.retain(|index| !chunk.contains(index));
        let (found, expected) = (
            cuda_error_of(ours.absorb(&chunk, &left))?,
            cpu(native.absorb(&chunk, &left)),
        );
        for ((index, found), expected) in left.iter().zip(found).zip(expected) {
            let what = format!(
                "candidate {index}'s cosine with the nearest of the chosen, of {}",
                dtype(&rows)
            );
            differs(device, what, f64::from(found), f64::from(expected))?;
        }
    }
    Ok(())
}

fn differs(device: &Device, what: String, found: f64, expected: f64) -> Result<()> {
    // Written so that NaN fails: every comparison with it is false.
    let fits = (found - expected).abs() <= TOLERANCE[0] + TOLERANCE[1] * expected.abs();
    let wrong = CudaError::WrongResult {
        device: device.name.clone(),
        what,
        found,
        expected,
    };
    if fits { Ok(()) } else { Err(wrong) }
}

fn dtype(rows: &Rows<'_>) -> &'static str {
    if matches!(rows, Rows::F16(_)) {
        "f16"
    } else {
        "f32"
    }
}

fn compare(
    device: &Device,
    loss: Loss,
    [learner_image, learner_text, image, text]: [Rows<'_>; 4],
) -> Result<()> {
    let learner = ModelEmbeddings {
        image: learner_image,
        text: learner_text,
        dim: DIMS[0],
        scale: 25.0,
        bias: -11.0,
    };
    let reference = ModelEmbeddings {
        image,
        text,
        dim: DIMS[1],
        scale: 60.0,
        bias: -14.0,
    };
    let candidates = Candidates {
        count: COUNT,
        learner: Some(learner),
        reference: Some(reference),
        holes: &[0, 100, 300],
    };
    let settings = Settings {
        policy: Policy::JointTopK,
        loss,
        criterion: Criterion::Learnability,
        sub_batch_size: CHUNKS.iter().sum(),
        n_chunks: CHUNKS.len(),
        gain: 1.5,
    };
    let noise = crate::noise::Noise::Given(&[]);
    let problem = Problem::new(&candidates, &settings, &Tuning::default(), None, &noise)
        .expect("a valid case");
    let (mut ours, mut native) = (
        CudaEngine::new(&problem, device)?,
        NativeEngine::new(&problem),
    );
    let (mut left, dtype) = (problem.offered.clone(), dtype(&image));
    for size in CHUNKS {
        let chunk: Vec<u32> = left.iter().rev().step_by(2).take(size).copied().collect();
        left.retain(|index| !chunk.contains(index));
        let (found, expected) = (
            cuda_error_of(ours.inner(&chunk))? / size as f64,
            cpu(native.inner(&chunk)) / size as f64,
        );
        differs(
            device,
            format!("the batch score under the {loss} loss of {dtype}"),
            found,
            expected,
        )?;
        cuda_error_of(ours.absorb(&chunk))?;
        cpu(native.absorb(&chunk));
        let (found, expected) = (cuda_error_of(ours.scores())?, cpu(native.scores()));
        for index in left.iter().map(|&index| index as usize) {
            let what = format!("the score of candidate {index} under the {loss} loss of {dtype}");
            differs(device, what, found[index], expected[index])?;
        }
    }
    Ok(())
}

/// Unwraps the answer of the device's engine, which fails only with CUDA's errors.
fn cuda_error_of<T>(answer: crate::error::Result<T>) -> Result<T> {
    answer.map_err(|error| match error {
        Error::Cuda(error) => error,
        other => unreachable!("the engine says nothing else: {other}"),
    })
}

fn cpu<T>(answer: crate::error::Result<T>) -> T {
    answer.expect("the CPU computes a valid case")
}
