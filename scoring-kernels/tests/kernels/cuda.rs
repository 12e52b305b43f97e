//! The CUDA kernels, on an emulated device.
use crate::{
    emulation::{self, Fault},
    oracle::Oracle,
    support::{World, assert_close, settings},
};
use superbatch_kernels::{Backend, Criterion, CudaDevice, CudaError, CudaLibraries, Loss, Policy};

/// (B, dims of learner and reference, b, n_chunks): tiles that are full, that have one row or column, and several of each.
const SHAPES: [(usize, [usize; 2], usize, usize); 6] = [
    (300, [64, 96], 270, 2),
    (129, [512, 65], 128, 1),
    (256, [128, 64], 40, 5),
    (131, [24, 40], 29, 6),
    (40, [65, 200], 39, 39),
    (40, [1, 3], 7, 16),
];

/// (scale, bias)
const LOGITS: [(f64, f64); 5] = [(1.0, 0.0), (1.0, -20.0), (25.0, -10.0), (120.0, 0.0), (120.0, -20.0)];

#[test]
fn emulated_kernels_give_the_scores_of_float64() {
    for (k, (count, dims, b, n_chunks)) in SHAPES.into_iter().enumerate() {
        let (scale, bias) = LOGITS[k % LOGITS.len()];
        let mut world = World::new(300 + k as u64, count, dims, scale, bias, n_chunks);
        world.holes = if b + 3 <= count { vec![2, 0, 17] } else { Vec::new() };
        for (loss, criterion) in Loss::ALL.iter().flat_map(|&loss| Criterion::ALL.iter().map(move |&c| (loss, c))) {
            let settings = settings(Policy::Joint, loss, criterion, b, n_chunks);
            let oracle = Oracle::new(&world, &settings);
            if let Some(device) = emulation::device(2 + k as u32 % 2) {
                let what = format!("{device:?} {settings:?} B {count} scale {scale} bias {bias}");
                let select = || Backend::Cuda(device).select(&world.candidates(), &settings, &world.given());
                let ours = select().expect(&what);
                let mut start = 0;
                for &size in &ours.chunks {
                    for k in start..start + size as usize {
                        let exact = oracle.score(ours.indices[k] as usize, &ours.indices[..start]);
                        assert_close(ours.scores[k], exact, &what);
                    }
                    start += size as usize;
                }
                assert_close(ours.batch_score.expect("given embeddings"), oracle.batch_score(&ours.indices), &what);
                assert_eq!(ours, select().expect(&what), "{what}");
            }
        }
    }
}

#[test]
fn a_device_that_fails_or_errs_is_refused_with_the_reason() {
    let refused = |fault| Some(CudaDevice::open(&emulation::faulty(fault)?, 0).expect_err("refused"));
    for (fault, code) in [(Fault::NoDevice, 100), (Fault::Memory, 2), (Fault::Launch, 700), (Fault::BadImage, 200)] {
        let Some(error) = refused(fault) else { return };
        assert!(matches!(error, CudaError::Call { code: found, .. } if found == code), "{fault:?}: {error}");
    }
    assert!(matches!(refused(Fault::OldDevice), Some(CudaError::TooOld { major: 7, .. })));
    assert!(matches!(refused(Fault::WrongSum), Some(CudaError::WrongResult { .. })));
}

#[test]
fn a_machine_without_the_libraries_is_told_so() {
    let nowhere = CudaLibraries { driver: "libnowhere.so.1".into(), nvrtc: Vec::new() };
    assert!(matches!(CudaDevice::open(&nowhere, 0), Err(CudaError::Library { library: "the CUDA driver", .. })));
}
