//! Draws follow the exact law: pairs of six candidates over many seeds, by Pearson's chi-square
//! test.
use crate::{
    oracle::Oracle,
    support::{World, settings},
};
use superbatch_kernels::{Backend, Criterion, Loss, Noise, Policy, Tuning};

const COUNT: usize = 6;

/// P(i, then j): p ~ exp(logit), the second from what the first leaves.
fn ordered_pair(oracle: &Oracle, world: &World, i: usize, j: usize) -> f64 {
    let share = |x: usize, drawn: &[u32]| {
        let before = if oracle.goes_by_chunks() { drawn } else { &[] };
        let left = (0..COUNT).filter(|y| !drawn.contains(&(*y as u32)));
        oracle.logit(world, x, before).exp()
            / left
                .map(|y| oracle.logit(world, y, before).exp())
                .sum::<f64>()
    };
    share(i, &[]) * share(j, &[i as u32])
}

#[test]
fn pairs_are_drawn_with_their_exact_probabilities() {
    let world = World::new(77, COUNT, [8, 8], 6.0, -3.0, 0);
    let keys: Vec<u64> = (0..COUNT as u64).collect();
    let laws = [
        (
            Policy::Joint,
            Loss::Sigmoid,
            Criterion::Learnability,
            1.0,
            200_000,
        ),
        (
            Policy::Joint,
            Loss::Softmax,
            Criterion::Learnability,
            1.0,
            50_000,
        ),
        (
            Policy::Independent,
            Loss::Sigmoid,
            Criterion::Learnability,
            1.0,
            50_000,
        ),
        (
            Policy::Uniform,
            Loss::Sigmoid,
            Criterion::Learnability,
            1.0,
            50_000,
        ),
        (
            Policy::Independent,
            Loss::Sigmoid,
            Criterion::Learnability,
            2.0,
            50_000,
        ),
        (Policy::Rank, Loss::Sigmoid, Criterion::Hard, 1.0, 50_000),
        (
            Policy::Proportional,
            Loss::Sigmoid,
            Criterion::Hard,
            1.0,
            50_000,
        ),
    ];
    let mut expectations = Vec::new();
    for (policy, loss, criterion, temperature, seeds) in laws {
        let settings = settings(policy, loss, criterion, 2, 2);
        let tuning = Tuning {
            temperature,
            pressure: 20.0,
            ..Tuning::default()
        };
        let mut oracle = Oracle::new(&world, &settings);
        oracle.tuning = tuning.clone();
        let mut seen = [[0u32; COUNT]; COUNT];
        for seed in 0..seeds {
            let noise = Noise::Seeded {
                seed,
                generation: 0,
                step: 9,
                keys: &keys,
            };
            let ours = Backend::Native
                .select_tuned(&world.candidates(), &settings, &tuning, &noise)
                .expect("valid");
            let (i, j) = (ours.indices[0] as usize, ours.indices[1] as usize);
            seen[i.min(j)][i.max(j)] += 1;
        }
        let (mut chi_square, mut expected) = (0.0, Vec::new());
        for (i, j) in (0..COUNT).flat_map(|i| (i + 1..COUNT).map(move |j| (i, j))) {
            let share = ordered_pair(&oracle, &world, i, j) + ordered_pair(&oracle, &world, j, i);
            let count = share * seeds as f64;
            assert!(
                count > 5.0,
                "{policy} {loss}: a pair too rare for the test, {count}"
            );
            chi_square += (f64::from(seen[i][j]) - count).powi(2) / count;
            expected.push(share);
        }
        assert!((expected.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        // 14 degrees of freedom: a right sampler exceeds 36.1 once in a thousand worlds, and this
        // world never changes.
        assert!(
            chi_square < 36.1,
            "{policy} {loss}: chi-square {chi_square}"
        );
        expectations.push(expected);
    }
    // The laws differ enough for the test to tell them apart.
    let apart = |a: usize, b: usize| {
        expectations[a]
            .iter()
            .zip(&expectations[b])
            .map(|(a, b)| (a - b).abs())
            .sum::<f64>()
    };
    for (a, b) in [(0, 2), (2, 3), (2, 4), (3, 4), (3, 5), (3, 6), (5, 6)] {
        assert!(apart(a, b) > 0.02, "laws {a} and {b}: {expectations:?}");
    }
}
