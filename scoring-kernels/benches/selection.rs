//! Joint selection of 1,638 of 8,192 candidates at dim 512, by each backend, and the ratio of their
//! times.
use criterion::Criterion as Bench;
use std::{
    cell::RefCell,
    time::{Duration, Instant},
};
use superbatch_kernels::{
    Backend, Candidates, Loss, ModelEmbeddings, Noise, Rows, Settings, noise,
};

const COUNT: usize = 8_192;
const DIM: usize = 512;

/// Unit rows, each near one of 64 centres.
fn rows(seed: u64) -> Vec<f32> {
    let centres = noise::Stream::new(1, 0, 0, 0);
    let stream = noise::Stream::new(seed, 0, 0, 0);
    let row = |i: usize| {
        let value = |p: usize| {
            centres.gumbel((i % 64 * DIM + p) as u64) - 0.58 + stream.gumbel((i * DIM + p) as u64)
                - 0.58
        };
        let values: Vec<f64> = (0..DIM).map(value).collect();
        let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
        values.into_iter().map(move |value| (value / norm) as f32)
    };
    (0..COUNT).flat_map(row).collect()
}

fn main() {
    let towers: Vec<Vec<f32>> = (2..6).map(rows).collect();
    let model = |k: usize, scale| ModelEmbeddings {
        image: Rows::F32(&towers[k]),
        text: Rows::F32(&towers[k + 1]),
        dim: DIM,
        scale,
        bias: -10.0,
    };
    let candidates = Candidates {
        count: COUNT,
        learner: Some(model(0, 24.0)),
        reference: Some(model(2, 30.0)),
        holes: &[],
    };
    let keys: Vec<u64> = (0..COUNT as u64).collect();
    let seeded = Noise::Seeded {
        seed: 1,
        generation: 0,
        step: 0,
        keys: &keys,
    };
    let backends = [
        ("native", Backend::Native),
        #[cfg(feature = "torch")]
        ("torch", Backend::Torch(tch::Device::Cpu)),
    ];

    let mut bench = Bench::default().sample_size(10).configure_from_args();
    for loss in Loss::ALL {
        let settings = Settings {
            loss: *loss,
            sub_batch_size: 1_638,
            ..Settings::default()
        };
        let best = RefCell::new(Vec::new());
        for (name, backend) in &backends {
            let fastest = RefCell::new((Duration::MAX, 0.0));
            bench.bench_function(&format!("{loss} {name}"), |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut total = Duration::ZERO;
                    for _ in 0..iterations {
                        let start = Instant::now();
                        let selection = backend
                            .select(&candidates, &settings, &seeded)
                            .expect("valid inputs");
                        let took = start.elapsed();
                        let mut fastest = fastest.borrow_mut();
                        *fastest = (fastest.0.min(took), selection.flops);
                        total += took;
                    }
                    total
                });
            });
            best.borrow_mut().push((*name, fastest.into_inner()));
        }
        let best = best.into_inner();
        for (name, (time, flops)) in &best {
            let rate = flops / time.as_secs_f64() / 1e9;
            println!(
                "{loss} {name}: best {:.3} s, {rate:.1} GFLOP/s",
                time.as_secs_f64()
            );
        }
        if let [(_, (native, _)), (_, (torch, _))] = best[..] {
            println!(
                "{loss}: torch takes {:.2} x native's time",
                torch.as_secs_f64() / native.as_secs_f64()
            );
        }
    }
}
