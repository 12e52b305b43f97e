//! Joint selection on a CUDA device against its floor, the f16 matrix product, and against PyTorch,
//! in one run, as ratios: `cargo bench -p superbatch-kernels --bench device`, with
//! SUPERBATCH_PYTHON for the peers and the torch feature for LibTorch's form.
//!
//! Arguments: none (the paper's scale), or `B b d`. Without a usable device it says why, and ends.
#[allow(dead_code)] // other benches use the rest
mod common;

use common::World;
use half::f16;
use std::{path::Path, process::Command, time::Instant};
use superbatch_kernels::{
    Backend, Candidates, CudaDevice, CudaLibraries, Loss, Noise, Selection, Settings,
};

const N_CHUNKS: usize = 16;
/// Each is measured so often, and its best time counts.
const ROUNDS: usize = 5;

#[expect(clippy::too_many_lines, reason = "one table of measurements")]
fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let sizes: Vec<usize> = words
        .iter()
        .map(|word| word.parse().expect("a size"))
        .collect();
    let [count, sub_batch_size, dim] = *sizes.first_chunk().unwrap_or(&[163_840, 32_768, 768]);
    let device = match CudaDevice::open(&CudaLibraries::default(), 0) {
        Ok(device) => device,
        Err(error) => return println!("device: nothing measured. {error}"),
    };
    agree(device);
    println!(
        "B={count} b={sub_batch_size} d={dim} chunks={N_CHUNKS} f16, learnability, {}, best of \
        {ROUNDS}",
        device.name()
    );
    let gemm = peers(&["gemm"]);
    let rate = gemm.first().map(|seconds| 1.0 / seconds);
    if let Some(rate) = rate {
        println!("f16 matrix product with f32 sums: {rate:.0} TFLOP/s");
    }
    let world = World::f16(count, dim);
    for loss in Loss::ALL {
        let settings = Settings {
            loss: *loss,
            sub_batch_size,
            n_chunks: N_CHUNKS,
            ..Settings::default()
        };
        let (ours, selection) = best(Backend::Cuda(device), &world.candidates(), &settings);
        // What there is beside the loop: checks, own pairs, the way to the device.
        let (begun, _) = best(
            Backend::Cuda(device),
            &world.candidates(),
            &Settings {
                sub_batch_size: 1,
                ..settings.clone()
            },
        );
        println!("{loss}, our kernels: {ours:.3} s, of which {begun:.3} s before the first draw");
        let work = selection.flops / 1e12;
        if let Some(rate) = rate {
            let floor = work / rate;
            println!(
                "{loss}, the floor: {floor:.3} s for {work:.1} TFLOP; the loop takes {:.2} times \
                that",
                (ours - begun) / floor
            );
        }
        #[cfg(feature = "torch")]
        {
            let (theirs, other) = best(
                Backend::Torch(tch::Device::Cuda(0)),
                &world.candidates(),
                &settings,
            );
            println!(
                "{loss}, LibTorch's form: {theirs:.3} s, {:.1} times; {}",
                theirs / ours,
                same(&selection, &other)
            );
        }
        let shape = [count, sub_batch_size, dim, N_CHUNKS].map(|size| size.to_string());
        let [count, sub_batch_size, dim, n_chunks] = shape.each_ref().map(String::as_str);
        let asked = [
            "selection",
            loss.as_str(),
            count,
            sub_batch_size,
            dim,
            n_chunks,
        ];
        for (name, seconds) in ["matrix-free PyTorch", "the same, compiled"]
            .iter()
            .zip(peers(&asked))
        {
            println!(
                "{loss}, {name}: {seconds:.3} s from the device's memory, {:.1} times the loop",
                seconds / (ours - begun)
            );
        }
    }
}

/// Draws by the device and by the CPU of a super-batch that the CPU is quick with.
fn agree(device: CudaDevice) {
    let world: World<f16> = World::f16(8_192, 512);
    for loss in Loss::ALL {
        let settings = Settings {
            loss: *loss,
            sub_batch_size: 1_638,
            n_chunks: N_CHUNKS,
            ..Settings::default()
        };
        let [ours, native] = [Backend::Cuda(device), Backend::Native]
            .map(|backend| select(backend, &world.candidates(), &settings).1);
        println!("{loss}, B=8,192, against the CPU: {}", same(&ours, &native));
    }
}

fn same(ours: &Selection, theirs: &Selection) -> String {
    let mut sorted = theirs.indices.clone();
    sorted.sort_unstable();
    let both = ours
        .indices
        .iter()
        .filter(|index| sorted.binary_search(index).is_ok())
        .count();
    format!("{both} of {} rows drawn by both", sorted.len())
}

fn select(backend: Backend, candidates: &Candidates<'_>, settings: &Settings) -> (f64, Selection) {
    let keys: Vec<u64> = (0..candidates.count as u64).collect();
    let noise = Noise::Seeded {
        seed: 1,
        generation: 0,
        step: 0,
        keys: &keys,
    };
    let begun = Instant::now();
    let selection = backend
        .select(candidates, settings, &noise)
        .expect("valid inputs");
    (begun.elapsed().as_secs_f64(), selection)
}

fn best(backend: Backend, candidates: &Candidates<'_>, settings: &Settings) -> (f64, Selection) {
    let rounds = (0..ROUNDS).map(|_| select(backend, candidates, settings));
    rounds
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .expect("at least one round")
}

/// What benches/device.py answers, or nothing if no Python was named.
fn peers(question: &[&str]) -> Vec<f64> {
    let Some(python) = std::env::var_os("SUPERBATCH_PYTHON") else {
        return Vec::new();
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/device.py");
    let answer = Command::new(python)
        .arg(script)
        .args(question)
        .output()
        .expect("a Python to run");
    assert!(
        answer.status.success(),
        "{}",
        String::from_utf8_lossy(&answer.stderr)
    );
    let words = String::from_utf8_lossy(&answer.stdout);
    words
        .split_whitespace()
        .map(|word| word.parse().expect("seconds"))
        .collect()
}
