//! One suite for every backend: it draws what the oracle draws, with the oracle's scores.
use crate::{
    oracle::{Oracle, distance},
    support::{
        Model, World, assert_close, backends, backends_and_emulated, chunk_sets, halves, settings,
    },
};
use safetensors::{SafeTensors, tensor::TensorView};
use std::{collections::HashMap, path::Path};
use superbatch_kernels::{Criterion, Loss, ModelEmbeddings, Policy, Rows, Settings};

/// (B, dims of learner and reference, b, n_chunks): even, uneven, more chunks than b, one, all,
/// nothing a multiple of a tile.
const SHAPES: [(usize, [usize; 2], usize, usize); 6] = [
    (96, [16, 16], 24, 4),
    (131, [24, 40], 29, 6),
    (60, [8, 12], 7, 16),
    (49, [9, 300], 1, 16),
    (50, [16, 16], 50, 8),
    (310, [33, 65], 301, 1),
];

fn every_case() -> impl Iterator<Item = (World, Settings)> {
    let words = Loss::ALL.iter().flat_map(|&loss| {
        Criterion::ALL
            .iter()
            .map(move |&criterion| (loss, criterion))
    });
    let words = words.flat_map(|(loss, criterion)| {
        Policy::ALL
            .iter()
            .map(move |&policy| (policy, loss, criterion))
    });
    let cases = words.flat_map(|(policy, loss, criterion)| {
        SHAPES
            .into_iter()
            .enumerate()
            .map(move |(k, (count, dims, b, n_chunks))| {
                let mut world = World::new(k as u64, count, dims, 25.0, -10.0, n_chunks);
                world.holes = if b + 3 <= count {
                    vec![2, 0, 17]
                } else {
                    Vec::new()
                };
                (world, settings(policy, loss, criterion, b, n_chunks))
            })
    });
    // Easy scores are never positive, and are refused.
    cases.filter(|(_, settings)| {
        (settings.policy, settings.criterion) != (Policy::Proportional, Criterion::Easy)
    })
}

#[test]
fn every_backend_draws_what_the_oracle_draws() {
    for (world, settings) in every_case() {
        let expected = Oracle::new(&world, &settings).draw(&world);
        for backend in backends() {
            let what = format!("{backend:?} {settings:?} B {}", world.count);
            let ours = backend
                .select(&world.candidates(), &settings, &world.given())
                .expect(&what);
            assert_eq!(ours.chunks, expected.chunks, "{what}");
            if expected.margin > 1e-3 {
                let sets = chunk_sets(&ours.indices, &ours.chunks);
                assert_eq!(
                    sets,
                    chunk_sets(&expected.indices, &expected.chunks),
                    "{what}"
                );
                assert_close(
                    ours.batch_score.expect("given embeddings"),
                    expected.batch_score,
                    &what,
                );
            }
            assert!(ours.flops > 0.0, "{what}");
            assert!(
                settings.policy == Policy::Proportional || ours.weights.iter().all(|w| *w == 1.0),
                "{what}"
            );
        }
    }
}

#[test]
fn scores_and_means_are_those_of_the_definition() {
    for (world, settings) in every_case() {
        let oracle = Oracle::new(&world, &settings);
        let survivors: Vec<u32> = (0..world.count as u32)
            .filter(|x| !world.holes.contains(x))
            .collect();
        let mean = |of: &[u32]| {
            of.iter()
                .map(|&x| oracle.score(x as usize, &[]))
                .sum::<f64>()
                / of.len() as f64
        };
        for backend in backends() {
            let what = format!("{backend:?} {settings:?} B {}", world.count);
            let ours = backend
                .select(&world.candidates(), &settings, &world.given())
                .expect(&what);
            let mut start = 0;
            for &size in &ours.chunks {
                for k in start..start + size as usize {
                    let (x, before) = (ours.indices[k] as usize, &ours.indices[..start]);
                    let exact = match settings.policy {
                        Policy::Uniform => 0.0,
                        Policy::KCenter => distance(&world.reference, x, before),
                        _ => oracle.score(x, before),
                    };
                    assert_close(ours.scores[k], exact, &what);
                }
                start += size as usize;
            }
            assert_close(
                ours.batch_score.expect("given embeddings"),
                oracle.batch_score(&ours.indices),
                &what,
            );
            assert_close(
                ours.mean_score_chosen.expect("given embeddings"),
                mean(&ours.indices),
                &what,
            );
            assert_close(
                ours.mean_score_candidates.expect("given embeddings"),
                mean(&survivors),
                &what,
            );
        }
    }
}

#[test]
fn scores_stay_precise_over_all_scales_and_biases() {
    for (k, (scale, bias)) in [
        (1.0, 0.0),
        (1.0, -20.0),
        (30.0, -10.0),
        (75.0, -5.0),
        (120.0, 0.0),
        (120.0, -20.0),
    ]
    .into_iter()
    .enumerate()
    {
        let world = World::new(900 + k as u64, 320, [64, 192], scale, bias, 4);
        for (loss, criterion) in Loss::ALL
            .iter()
            .flat_map(|&loss| Criterion::ALL.iter().map(move |&c| (loss, c)))
        {
            let settings = settings(Policy::Joint, loss, criterion, 240, 4);
            let oracle = Oracle::new(&world, &settings);
            for backend in backends() {
                let ours = backend
                    .select(&world.candidates(), &settings, &world.given())
                    .expect("valid");
                for (k, (&index, &score)) in ours.indices.iter().zip(&ours.scores).enumerate() {
                    let exact = oracle.score(index as usize, &ours.indices[..k / 60 * 60]);
                    assert_close(
                        score,
                        exact,
                        &format!("{backend:?} {loss} {criterion} scale {scale} bias {bias}"),
                    );
                }
            }
        }
    }
}

#[test]
fn the_gain_multiplies_softmax_scores_and_leaves_sigmoid_alone() {
    let world = World::new(5, 80, [16, 16], 20.0, -10.0, 4);
    for (loss, factor) in [(Loss::Softmax, 3.0), (Loss::Sigmoid, 1.0)] {
        let settings = Settings {
            gain: 3.0,
            ..settings(Policy::Joint, loss, Criterion::Learnability, 20, 4)
        };
        let plain = Oracle::new(
            &world,
            &Settings {
                gain: 1.0,
                ..settings.clone()
            },
        );
        for backend in backends_and_emulated() {
            let ours = backend
                .select(&world.candidates(), &settings, &world.given())
                .expect("valid");
            for (k, (&index, &score)) in ours.indices.iter().zip(&ours.scores).enumerate() {
                assert_close(
                    score,
                    factor * plain.score(index as usize, &ours.indices[..k / 5 * 5]),
                    "score",
                );
            }
            assert_close(
                ours.batch_score.expect("given embeddings"),
                plain.batch_score(&ours.indices),
                "no gain in it",
            );
        }
    }
}

#[test]
fn f16_embeddings_draw_what_their_f32_values_draw() {
    let world = World::new(6, 130, [24, 40], 30.0, -10.0, 5);
    let rounded = world.rounded([true, true]);
    let towers = [
        &world.learner.image,
        &world.learner.text,
        &world.reference.image,
        &world.reference.text,
    ]
    .map(|rows| halves(rows));
    let view = |model: &Model, k: usize| ModelEmbeddings {
        image: Rows::F16(&towers[k]),
        text: Rows::F16(&towers[k + 1]),
        ..model.view()
    };
    let mut halved = world.candidates();
    (halved.learner, halved.reference) = (
        Some(view(&world.learner, 0)),
        Some(view(&world.reference, 2)),
    );
    for (backend, &loss) in backends_and_emulated()
        .into_iter()
        .flat_map(|backend| Loss::ALL.iter().map(move |loss| (backend, loss)))
    {
        let settings = settings(Policy::Joint, loss, Criterion::Learnability, 31, 5);
        let ours = backend
            .select(&halved, &settings, &world.given())
            .expect("valid");
        assert_eq!(
            ours,
            backend
                .select(&rounded.candidates(), &settings, &world.given())
                .expect("valid")
        );
    }
}

#[test]
fn every_backend_draws_the_golden_cases() {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")];
    // A folder with more of them (they are large), made by the same generator.
    folders.extend(std::env::var_os("SUPERBATCH_GOLDEN").map(Into::into));
    let files = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).expect("a folder of golden cases"));
    let files: Vec<_> = files
        .map(|file| file.expect("a readable folder").path())
        .collect();
    assert!(files.len() >= 7, "golden cases are missing");
    for file in files {
        let bytes = std::fs::read(&file).expect("a readable case");
        let case = Golden::read(&bytes);
        for backend in backends_and_emulated() {
            let what = format!("{backend:?} {}", file.display());
            let ours = backend
                .select(
                    &case.world.candidates(),
                    &case.settings,
                    &case.world.given(),
                )
                .expect(&what);
            assert_eq!(
                chunk_sets(&ours.indices, &ours.chunks),
                chunk_sets(&case.expected, &ours.chunks),
                "{what}"
            );
            if let Some(exact) = case.batch_score {
                assert_close(ours.batch_score.expect("given embeddings"), exact, &what);
            }
        }
    }
}

/// A draw computed by NumPy in float64.
struct Golden {
    world: World,
    settings: Settings,
    expected: Vec<u32>,
    batch_score: Option<f64>,
}

impl Golden {
    fn read(bytes: &[u8]) -> Self {
        let (_, header) = SafeTensors::read_metadata(bytes).expect("safetensors");
        let words: HashMap<String, String> = header.metadata().clone().expect("metadata");
        let number = |key: &str| words[key].parse::<f64>().expect(key);
        let tensors = SafeTensors::deserialize(bytes).expect("safetensors");
        let tensor = |name: &str| tensors.tensor(name).expect("all tensors");
        let floats = |view: TensorView<'_>| -> Vec<f32> {
            view.data()
                .chunks_exact(4)
                .map(|value| f32::from_le_bytes(value.try_into().expect("four bytes")))
                .collect()
        };
        let model = |name: &str| Model {
            image: floats(tensor(&format!("{name}_img"))),
            text: floats(tensor(&format!("{name}_txt"))),
            dim: tensor(&format!("{name}_img")).shape()[1],
            scale: number(&format!("{name}_scale")),
            bias: number(&format!("{name}_bias")),
        };
        let expected = tensor("expected")
            .data()
            .chunks_exact(8)
            .map(|value| i64::from_le_bytes(value.try_into().expect("eight bytes")) as u32)
            .collect();
        let world = World {
            count: tensor("learner_img").shape()[0],
            learner: model("learner"),
            reference: model("reference"),
            holes: Vec::new(),
            noise: floats(tensor("noise")),
        };
        let settings = Settings {
            policy: words["policy"].parse().expect("a policy"),
            loss: words["loss"].parse().expect("a loss"),
            criterion: words["criterion"].parse().expect("a criterion"),
            sub_batch_size: number("b") as usize,
            n_chunks: number("n_chunks") as usize,
            gain: number("gain"),
        };
        Self {
            world,
            settings,
            expected,
            batch_score: words
                .get("batch_score")
                .map(|value| value.parse().expect("a number")),
        }
    }
}
