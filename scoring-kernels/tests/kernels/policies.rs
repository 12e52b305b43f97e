//! What the policies beyond the paper's promise, and what may be left out before any of them.
use crate::{
    oracle::Oracle,
    support::{World, assert_close, backends, backends_and_emulated, halves, settings},
};
use superbatch_kernels::{
    Backend, Candidates, Criterion, Error, LeftOut, Loss, ModelEmbeddings, Policy, Rows, Selection,
    Settings, Tuning,
};

fn world() -> World {
    World::new(40, 90, [16, 24], 20.0, -8.0, 6)
}

fn hard(policy: Policy) -> Settings {
    settings(policy, Loss::Sigmoid, Criterion::Hard, 30, 6)
}

fn tuned(world: &World, settings: &Settings, tuning: &Tuning) -> Selection {
    Backend::Native
        .select_tuned(&world.candidates(), settings, tuning, &world.given())
        .expect("valid")
}

fn plain(world: &World, settings: &Settings) -> Selection {
    tuned(world, settings, &Tuning::default())
}

#[test]
fn top_k_needs_no_noise_and_takes_the_largest_in_order() {
    let world = World {
        noise: Vec::new(),
        ..world()
    };
    let ours = plain(&world, &hard(Policy::TopK));
    let oracle = Oracle::new(&world, &hard(Policy::TopK));
    let mut order: Vec<u32> = (0..90).collect();
    order.sort_by(|&a, &b| {
        oracle
            .score(b as usize, &[])
            .total_cmp(&oracle.score(a as usize, &[]))
    });
    assert_eq!(ours.indices, order[..30]);
    assert_eq!(plain(&world, &hard(Policy::JointTopK)).chunks, [5; 6]);
}

#[test]
fn temperature_leads_from_the_largest_to_uniform() {
    let world = world();
    let at = |temperature| {
        let tuning = Tuning {
            temperature,
            ..Tuning::default()
        };
        tuned(&world, &hard(Policy::Independent), &tuning).indices
    };
    assert_eq!(at(1e-9), plain(&world, &hard(Policy::TopK)).indices);
    assert_eq!(at(1e9), plain(&world, &hard(Policy::Uniform)).indices);
    assert_eq!(at(1.0), plain(&world, &hard(Policy::Independent)).indices);
    assert_ne!(at(1.0), at(1e9));
}

#[test]
fn importance_weights_undo_the_priorities() {
    let world = world();
    let tuning = Tuning {
        weight_exponent: 1.0,
        ..Tuning::default()
    };
    let ours = tuned(&world, &hard(Policy::Proportional), &tuning);
    let chance = |score: f64| (score.max(0.0) + 1e-6).powf(0.6);
    let least = ours
        .scores
        .iter()
        .map(|score| chance(*score))
        .fold(f64::INFINITY, f64::min);
    for (score, weight) in ours.scores.iter().zip(&ours.weights) {
        assert!((weight - least / chance(*score)).abs() < 1e-9);
    }
    assert!(ours.weights.contains(&1.0) && ours.weights.iter().any(|weight| *weight < 0.9));
    let none = Tuning {
        weight_exponent: 0.0,
        ..tuning
    };
    assert_eq!(
        tuned(&world, &hard(Policy::Proportional), &none).weights,
        [1.0; 30]
    );
}

#[test]
fn k_center_with_chunks_of_one_is_the_greedy_rule_and_covers_better_than_chance() {
    let world = World {
        noise: vec![0.0; 90],
        ..world()
    };
    let radius = |chosen: &[u32]| {
        let far = (0..90).map(|x| crate::oracle::distance(&world.reference, x, chosen));
        far.fold(0.0, f64::max)
    };
    let settings = Settings {
        n_chunks: 30,
        ..hard(Policy::KCenter)
    };
    let bare = Candidates {
        learner: None,
        ..world.candidates()
    };
    for backend in backends_and_emulated() {
        let ours = backend
            .select(&bare, &settings, &world.given())
            .expect("needs the reference alone");
        assert_eq!(
            (ours.indices[0], ours.batch_score),
            (0, None),
            "{backend:?}"
        );
        for k in 1..30 {
            let far = |x: usize| crate::oracle::distance(&world.reference, x, &ours.indices[..k]);
            let farthest = (0..90).map(far).fold(0.0, f64::max);
            assert!(
                far(ours.indices[k] as usize) > farthest - 1e-5,
                "{backend:?}"
            );
            assert!(
                (ours.scores[k] - far(ours.indices[k] as usize)).abs() < 1e-5,
                "{backend:?}"
            );
        }
        assert!(
            radius(&ours.indices) < radius(&(0..30).collect::<Vec<_>>()),
            "{backend:?}"
        );
    }
}

#[test]
fn k_center_of_f16_and_over_several_tiles_is_that_of_the_values_in_f32() {
    let world = World::new(42, 300, [8, 70], 20.0, -8.0, 3).rounded([true, true]);
    let settings = Settings {
        sub_batch_size: 290,
        n_chunks: 2,
        ..hard(Policy::KCenter)
    };
    let (image, text) = (
        halves(&world.reference.image),
        halves(&world.reference.text),
    );
    let narrow = ModelEmbeddings {
        image: Rows::F16(&image),
        text: Rows::F16(&text),
        ..world.reference.view()
    };
    for backend in backends_and_emulated() {
        let select = |reference| {
            let bare = Candidates {
                learner: None,
                reference: Some(reference),
                ..world.candidates()
            };
            backend
                .select(&bare, &settings, &world.given())
                .expect("valid")
        };
        let ours = select(narrow);
        assert_eq!(
            ours.indices,
            select(world.reference.view()).indices,
            "{backend:?}"
        );
        for (index, score) in ours.indices.iter().zip(&ours.scores).skip(145) {
            let exact =
                crate::oracle::distance(&world.reference, *index as usize, &ours.indices[..145]);
            assert!((score - exact).abs() < 1e-5, "{backend:?}");
        }
    }
}

#[test]
fn of_near_duplicates_one_is_left() {
    let mut world = world();
    let dim = world.reference.dim;
    // Candidates 60..90 show what 0..30 show, almost.
    for x in 0..30 * dim {
        world.reference.image[60 * dim + x] = world.reference.image[x] * 1.000_01;
    }
    let tuning = Tuning {
        duplicates_above: Some(0.999),
        ..Tuning::default()
    };
    for policy in Policy::ALL {
        let ours = tuned(
            &world,
            &Settings {
                sub_batch_size: 55,
                ..hard(*policy)
            },
            &tuning,
        );
        assert_eq!(
            ours.left_out,
            LeftOut {
                duplicates_above: 30,
                ..LeftOut::default()
            },
            "{policy}"
        );
        for x in ours.indices.iter().filter(|x| **x < 30) {
            assert!(!ours.indices.contains(&(x + 60)), "{policy}: {x} twice");
        }
    }
    let settings = Settings {
        sub_batch_size: 61,
        ..hard(Policy::Joint)
    };
    let refused =
        Backend::Native.select_tuned(&world.candidates(), &settings, &tuning, &world.given());
    assert!(matches!(
        refused,
        Err(Error::TooManyLeftOut { sub_batch_size: 61, candidates: 90, holes: 0, left_out })
            if left_out.total() == 30
    ));
}

#[test]
fn duplicates_are_found_in_large_super_batches_and_among_many_copies() {
    let base = World::new(41, 3_000, [8, 32], 20.0, -8.0, 1);
    let mut world = base.clone();
    // Every other candidate shows what the one before it shows; the last 600 all show the same.
    for x in 0..3_000 {
        let shown = if x >= 2_400 { 0 } else { x / 2 * 2 };
        world.reference.image[x * 32..][..32]
            .copy_from_slice(&base.reference.image[shown * 32..][..32]);
    }
    let tuning = Tuning {
        duplicates_above: Some(0.999_99),
        ..Tuning::default()
    };
    let ours = tuned(
        &world,
        &Settings {
            sub_batch_size: 1_200,
            ..hard(Policy::Uniform)
        },
        &tuning,
    );
    assert_eq!(ours.left_out.duplicates_above, 1_800);
    assert!(
        ours.indices
            .iter()
            .filter(|x| **x >= 2_400 || **x < 2)
            .count()
            <= 1
    );
}

#[test]
fn pairs_below_a_clip_score_are_left_out() {
    let world = world();
    let (model, tuning) = (
        &world.reference,
        Tuning {
            clip_score_at_least: Some(1.5),
            ..Tuning::default()
        },
    );
    let score = |x: usize| -> f64 {
        let rows = model.image[x * 24..][..24]
            .iter()
            .zip(&model.text[x * 24..][..24]);
        2.5 * rows.map(|(a, b)| f64::from(a * b)).sum::<f64>().max(0.0)
    };
    let fit = (0..90).filter(|x| score(*x) >= 1.5).count();
    assert!((10..90).contains(&fit));
    let ours = tuned(
        &world,
        &Settings {
            sub_batch_size: fit,
            ..hard(Policy::Joint)
        },
        &tuning,
    );
    assert_eq!(ours.left_out.clip_score_at_least, 90 - fit);
    assert!(ours.indices.iter().all(|x| score(*x as usize) >= 1.499_999));
}

#[test]
fn the_share_of_the_best_neg_clip_loss_is_kept() {
    let world = world();
    let (model, tuning) = (
        &world.reference,
        Tuning {
            neg_clip_loss_keep: Some(0.4),
            ..Tuning::default()
        },
    );
    let logit = |i: usize, j: usize| -> f64 {
        let rows = model.image[i * 24..][..24]
            .iter()
            .zip(&model.text[j * 24..][..24]);
        model.scale
            * rows
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum::<f64>()
    };
    let log_sum = |of: &dyn Fn(usize) -> f64| (0..90).map(|k| of(k).exp()).sum::<f64>().ln();
    let score =
        |x: usize| logit(x, x) - 0.5 * (log_sum(&|k| logit(x, k)) + log_sum(&|k| logit(k, x)));
    let mut best: Vec<u32> = (0..90).collect();
    best.sort_by(|&a, &b| score(b as usize).total_cmp(&score(a as usize)));
    let ours = tuned(
        &world,
        &Settings {
            sub_batch_size: 36,
            ..hard(Policy::Joint)
        },
        &tuning,
    );
    assert_eq!(ours.left_out.neg_clip_loss_keep, 54);
    let mut chosen = ours.indices;
    chosen.sort_unstable();
    best[..36].sort_unstable();
    assert_eq!(chosen, best[..36]);
    let bare = Candidates {
        learner: None,
        ..world.candidates()
    };
    let settings = Settings {
        sub_batch_size: 36,
        ..hard(Policy::Uniform)
    };
    let ours = Backend::Native
        .select_tuned(&bare, &settings, &tuning, &world.given())
        .expect("needs the reference alone");
    assert_eq!(ours.flops, 4.0 * 90.0 * 90.0 * 24.0, "what the rule costs");
}

#[test]
fn the_easy_criterion_by_top_k_is_the_order_of_clip_scores() {
    let world = world();
    for &loss in Loss::ALL {
        let ours = plain(
            &world,
            &settings(Policy::TopK, loss, Criterion::Easy, 30, 1),
        );
        let cosine = |x: &u32| -> f64 {
            let range = *x as usize * 24..(*x as usize + 1) * 24;
            let rows = world.reference.image[range.clone()]
                .iter()
                .zip(&world.reference.text[range]);
            rows.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        assert!(
            ours.indices.iter().map(cosine).is_sorted_by(|a, b| a >= b),
            "{loss}"
        );
    }
}

#[test]
fn tunings_out_of_range_are_named() {
    let world = world();
    let plain = Tuning::default();
    let bad = [
        (
            Tuning {
                temperature: 0.0,
                ..plain.clone()
            },
            "temperature",
        ),
        (
            Tuning {
                pressure: -1.0,
                ..plain.clone()
            },
            "pressure",
        ),
        (
            Tuning {
                priority_exponent: f64::NAN,
                ..plain.clone()
            },
            "priority_exponent",
        ),
        (
            Tuning {
                weight_exponent: f64::INFINITY,
                ..plain.clone()
            },
            "weight_exponent",
        ),
        (
            Tuning {
                duplicates_above: Some(f64::NAN),
                ..plain.clone()
            },
            "duplicates_above",
        ),
        (
            Tuning {
                neg_clip_loss_keep: Some(0.0),
                ..plain.clone()
            },
            "neg_clip_loss_keep",
        ),
    ];
    for (tuning, name) in bad {
        let refused = Backend::Native.select_tuned(
            &world.candidates(),
            &hard(Policy::Joint),
            &tuning,
            &world.given(),
        );
        assert!(
            matches!(refused, Err(Error::SettingInvalid { setting, .. }) if setting == name),
            "{name}"
        );
    }
    let easy = Settings {
        criterion: Criterion::Easy,
        ..hard(Policy::Proportional)
    };
    let refused = Backend::Native.select(&world.candidates(), &easy, &world.given());
    assert!(matches!(
        refused,
        Err(Error::SettingInvalid {
            setting: "criterion",
            ..
        })
    ));
}

#[test]
fn every_backend_leaves_out_the_same() {
    let world = world();
    let tuning = Tuning {
        duplicates_above: Some(0.8),
        clip_score_at_least: Some(0.5),
        ..Tuning::default()
    };
    let settings = Settings {
        sub_batch_size: 5,
        ..hard(Policy::TopK)
    };
    let ours = plain_and_left_out(&world, &settings, &tuning);
    for (left_out, scores) in &ours {
        assert_eq!(*left_out, ours[0].0);
        scores
            .iter()
            .zip(&ours[0].1)
            .for_each(|(a, b)| assert_close(*a, *b, "score"));
    }
    assert!(ours[0].0 > 0);
}

fn plain_and_left_out(
    world: &World,
    settings: &Settings,
    tuning: &Tuning,
) -> Vec<(usize, Vec<f64>)> {
    let select = |backend: Backend| {
        backend.select_tuned(&world.candidates(), settings, tuning, &world.given())
    };
    let both = backends()
        .into_iter()
        .map(|backend| select(backend).expect("valid"));
    both.map(|selection| (selection.left_out.total(), selection.scores))
        .collect()
}
