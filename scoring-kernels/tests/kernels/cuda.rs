//! The CUDA kernels, on the GPU that the tests were given, else on an emulated device.
use crate::{
    emulation::{self, Alone, Fault},
    oracle::Oracle,
    support::{Dice, World, assert_close, halves, named_device, settings},
};
use half::f16;
use superbatch_kernels::{
    Backend, Candidates, Criterion, CudaDevice, CudaError, CudaLibraries, Loss, ModelEmbeddings,
    Policy, Rows, Settings,
};

/// (B, dims of learner and reference, b, n_chunks): tiles that are full, that have one row or
/// column, and several of each.
const SHAPES: [(usize, [usize; 2], usize, usize); 6] = [
    (300, [64, 96], 270, 2),
    (129, [512, 65], 128, 1),
    (256, [128, 64], 40, 5),
    (131, [24, 40], 29, 6),
    (40, [65, 200], 39, 39),
    (40, [1, 3], 7, 16),
];

/// (scale, bias)
const LOGITS: [(f64, f64); 5] = [
    (1.0, 0.0),
    (1.0, -20.0),
    (25.0, -10.0),
    (120.0, 0.0),
    (120.0, -20.0),
];

/// The GPU, else an emulated one with room for so many slabs.
fn device(stages: u32) -> Option<CudaDevice> {
    named_device().or_else(|| emulation::device(stages))
}

/// f32, and in turns f16, and models with one tower of each.
const HALVED: [[bool; 2]; 3] = [[true, true], [true, false], [false, true]];

#[test]
fn the_kernels_give_the_scores_of_float64() {
    for (k, (count, dims, b, n_chunks)) in SHAPES.into_iter().enumerate() {
        let Some(device) = device(2 + k as u32 % 2) else {
            return;
        };
        let (scale, bias) = LOGITS[k % LOGITS.len()];
        let mut world = World::new(300 + k as u64, count, dims, scale, bias, n_chunks);
        world.holes = if b + 3 <= count {
            vec![2, 0, 17]
        } else {
            Vec::new()
        };
        let words = Loss::ALL.iter().flat_map(|&loss| {
            Criterion::ALL
                .iter()
                .map(move |&criterion| (loss, criterion))
        });
        for (i, (loss, criterion)) in words.enumerate() {
            let settings = settings(Policy::Joint, loss, criterion, b, n_chunks);
            for halved in [[false, false], HALVED[(i + k) % HALVED.len()]] {
                compare(device, &world, halved, &settings);
            }
        }
    }
}

/// Compares a selection with the oracle's scores, images and texts as f16 if `halved` says so.
fn compare(device: CudaDevice, world: &World, halved: [bool; 2], settings: &Settings) {
    let world = &world.rounded(halved);
    let models = [&world.learner, &world.reference];
    let halves = models.map(|model| [halves(&model.image), halves(&model.text)]);
    let view = |k: usize| {
        let (view, [image, text]) = (models[k].view(), &halves[k]);
        let image = if halved[0] {
            Rows::F16(image)
        } else {
            view.image
        };
        Some(ModelEmbeddings {
            image,
            text: if halved[1] {
                Rows::F16(text)
            } else {
                view.text
            },
            ..view
        })
    };
    let candidates = Candidates {
        learner: view(0),
        reference: view(1),
        ..world.candidates()
    };
    let what = format!(
        "{device:?} {settings:?} B {} f16 {halved:?} bias {}",
        world.count, world.reference.bias
    );
    let select = || {
        Backend::Cuda(device)
            .select(&candidates, settings, &world.given())
            .expect(&what)
    };
    let (oracle, ours) = (Oracle::new(world, settings), select());
    let mut start = 0;
    for &size in &ours.chunks {
        for k in start..start + size as usize {
            let exact = oracle.score(ours.indices[k] as usize, &ours.indices[..start]);
            assert_close(ours.scores[k], exact, &what);
        }
        start += size as usize;
    }
    assert_close(
        ours.batch_score.expect("given embeddings"),
        oracle.batch_score(&ours.indices),
        &what,
    );
    assert_eq!(ours, select(), "{what}");
}

/// Tensor cores cut sums off: over rows so long, and logits so alike, that would show if sums
/// stayed in them for too long.
#[test]
fn long_rows_are_not_pulled_towards_zero() {
    let (count, dim, b) = (131, 1152, 120);
    let mut world = World::new(77, count, [dim, 8], 150.0, 0.0, 2);
    let mut dice = Dice::new(78);
    let base: Vec<f64> = (0..dim).map(|_| dice.uniform() - 0.5).collect();
    let mut alike = || -> Vec<f32> {
        let row: Vec<f64> = base
            .iter()
            .map(|value| value + 0.3 * (dice.uniform() - 0.5))
            .collect();
        let norm = row.iter().map(|value| value * value).sum::<f64>().sqrt();
        row.into_iter()
            .map(|value| f16::from_f64(value / norm).to_f32())
            .collect()
    };
    world.learner.image = (0..count).flat_map(|_| alike()).collect();
    world.learner.text = (0..count).flat_map(|_| alike()).collect();
    let settings = settings(Policy::Joint, Loss::Sigmoid, Criterion::Hard, b, 2);
    let oracle = Oracle::new(&world, &settings);
    let Some(device) = device(3) else { return };
    let ours = Backend::Cuda(device)
        .select(&world.candidates(), &settings, &world.given())
        .expect("valid");
    for k in b / 2..b {
        let exact = oracle.score(ours.indices[k] as usize, &ours.indices[..b / 2]);
        assert!(exact > 10_000.0);
        assert_close(ours.scores[k], exact, "long rows");
    }
}

#[test]
fn a_device_that_fails_or_errs_is_refused_with_the_reason() {
    let refused = |fault| {
        let driver = Alone::with(fault)?;
        let error = CudaDevice::open(&driver.libraries, 0).expect_err("refused");
        let (now, _, contexts) = driver.used();
        assert_eq!(
            (now, contexts),
            (0, [0, 0]),
            "{fault:?}: a device that is refused keeps nothing"
        );
        Some(error)
    };
    let calls = [
        (Fault::NoDevice, 100),
        (Fault::Memory, 2),
        (Fault::Launch, 700),
        (Fault::BadImage, 200),
        (Fault::Unavailable, 46),
    ];
    for (fault, code) in calls {
        let Some(error) = refused(fault) else { return };
        assert!(
            matches!(error, CudaError::Call { code: found, .. } if found == code),
            "{fault:?}: {error}"
        );
        assert_eq!(error.is_out_of_memory(), fault == Fault::Memory, "{error}");
    }
    assert!(matches!(
        refused(Fault::OldDevice),
        Some(CudaError::TooOld { major: 7, .. })
    ));
    assert!(matches!(
        refused(Fault::WrongSum),
        Some(CudaError::WrongResult { .. })
    ));
}

#[test]
fn a_selection_takes_what_was_counted_and_gives_all_of_it_back() {
    let Some(driver) = Alone::new("memory") else {
        return;
    };
    let backend = Backend::Cuda(
        CudaDevice::open(&driver.libraries, 0).expect("a device that passes its check"),
    );
    let (now, _, contexts) = driver.used();
    assert_eq!(
        (now, contexts),
        (0, [0, 1]),
        "a context of its own, and not the current one"
    );
    let (count, dim) = (210, 70);
    let world = World::new(1, count, [dim, dim], 20.0, -10.0, 3);
    let towers = [
        &world.learner.image,
        &world.learner.text,
        &world.reference.image,
        &world.reference.text,
    ];
    let towers = towers.map(|rows| halves(rows));
    let model = |k: usize| ModelEmbeddings {
        image: Rows::F16(&towers[k]),
        text: Rows::F16(&towers[k + 1]),
        dim,
        scale: 20.0,
        bias: -10.0,
    };
    let candidates = Candidates {
        count,
        learner: Some(model(0)),
        reference: Some(model(2)),
        holes: &[],
    };
    let settings = settings(Policy::Joint, Loss::Softmax, Criterion::Learnability, 60, 3);
    backend
        .select(&candidates, &settings, &world.given())
        .expect("valid");
    // Four towers with rows of 128 halves; two sets of two sums in four slots, scores, two lists.
    let counted = count * (4 * 128 * 2 + 2 * 2 * 4 * 8 + 8 + 2 * 4);
    assert_eq!(driver.used(), (0, counted, [0, 1]));
    let bare = Candidates {
        learner: None,
        ..candidates
    };
    backend
        .select(
            &bare,
            &Settings {
                policy: Policy::KCenter,
                ..settings
            },
            &world.given(),
        )
        .expect("valid");
    // One tower; cosines and whether they are known, two lists.
    assert_eq!(
        driver.used(),
        (0, count * (128 * 2 + 2 * 8 + 2 * 4), [0, 1])
    );
}

#[test]
fn a_machine_without_the_libraries_is_told_so() {
    let nowhere = CudaLibraries {
        driver: "libnowhere.so.1".into(),
        nvrtc: Vec::new(),
    };
    assert!(matches!(
        CudaDevice::open(&nowhere, 0),
        Err(CudaError::Library {
            library: "the CUDA driver",
            ..
        })
    ));
}
