//! Terms that are added to scores, beside what the definition makes of them.
use crate::{
    oracle::Oracle,
    support::{World, assert_close, backends_and_emulated, settings},
};
use superbatch_kernels::{
    Backend, Candidates, Criterion, Error, Loss, Noise, Policy, Selection, Settings, Tuning,
};

const NOTHING: Noise<'static> = Noise::Given(&[]);

fn world() -> World {
    World::new(41, 80, [16, 24], 20.0, -8.0, 0)
}

/// Some that matter and some that do not.
fn terms() -> Vec<f64> {
    (0..80)
        .map(|n| f64::from(n * 37 % 80) / 20.0 - 2.0)
        .collect()
}

fn select(
    backend: Backend,
    candidates: &Candidates<'_>,
    settings: &Settings,
    terms: &[f64],
) -> Result<Selection, Error> {
    let tuning = Tuning::default();
    backend.select_with_terms(candidates, settings, &tuning, Some(terms), &NOTHING)
}

#[test]
fn joint_selection_with_terms_takes_the_largest_sum_each_time() {
    let (world, terms) = (world(), terms());
    for (loss, criterion) in [
        (Loss::Sigmoid, Criterion::Learnability),
        (Loss::Sigmoid, Criterion::Hard),
        (Loss::Softmax, Criterion::Learnability),
    ] {
        let settings = settings(Policy::JointTopK, loss, criterion, 20, 20);
        let oracle = Oracle::new(&world, &settings);
        for backend in backends_and_emulated() {
            let ours = select(backend, &world.candidates(), &settings, &terms).unwrap();
            for k in 0..20 {
                let before = &ours.indices[..k];
                let sum = |x: usize| oracle.score(x, before) + terms[x];
                let left = (0..80).filter(|x| !before.contains(&(*x as u32)));
                let best = left.map(sum).fold(f64::NEG_INFINITY, f64::max);
                assert!(sum(ours.indices[k] as usize) > best - 1e-3, "{backend:?}");
                let drawn = sum(ours.indices[k] as usize);
                assert_close(ours.scores[k], drawn, &format!("{backend:?}"));
            }
            let of = |chosen: &[u32]| {
                let sum: f64 = chosen.iter().map(|n| terms[*n as usize]).sum();
                sum / chosen.len() as f64
            };
            let batch = oracle.batch_score(&ours.indices) + of(&ours.indices);
            assert_close(ours.batch_score.unwrap(), batch, &format!("{backend:?}"));
        }
    }
}

#[test]
fn terms_alone_are_the_scores() {
    let terms = terms();
    let bare = Candidates {
        count: 80,
        learner: None,
        reference: None,
        holes: &[13],
    };
    let settings = settings(Policy::TopK, Loss::Sigmoid, Criterion::Learnability, 5, 1);
    let ours = select(Backend::Native, &bare, &settings, &terms).unwrap();
    let mut order: Vec<u32> = (0..80).filter(|n| *n != 13).collect();
    order.sort_by(|&a, &b| terms[b as usize].total_cmp(&terms[a as usize]));
    assert_eq!(ours.indices, order[..5]);
    let mean: f64 = ours.scores.iter().sum::<f64>() / 5.0;
    assert_eq!(ours.batch_score, Some(mean));
    for bad in [&terms[1..], &vec![f64::NAN; 80]] {
        assert!(matches!(
            select(Backend::Native, &bare, &settings, bad),
            Err(Error::SettingInvalid {
                setting: "terms",
                ..
            })
        ));
    }
}
