//! Draws follow the exact law: pairs of six candidates over many seeds, by Pearson's chi-square test.
use crate::{
    oracle::Oracle,
    support::{World, settings},
};
use superbatch_kernels::{Backend, Criterion, Loss, Noise, Policy, Settings};

const SEEDS: u64 = 200_000;
const COUNT: usize = 6;

/// P(i, then j): p ~ exp(score), the second from what the first leaves.
fn ordered_pair(oracle: &Oracle, settings: &Settings, i: usize, j: usize) -> f64 {
    let score = |x: usize, drawn: &[u32]| match settings.policy {
        Policy::Uniform => 0.0,
        Policy::Independent => oracle.score(x, &[]),
        Policy::Joint => oracle.score(x, drawn),
    };
    let share = |x: usize, drawn: &[u32]| {
        let left = (0..COUNT).filter(|y| !drawn.contains(&(*y as u32)));
        score(x, drawn).exp() / left.map(|y| score(y, drawn).exp()).sum::<f64>()
    };
    share(i, &[]) * share(j, &[i as u32])
}

#[test]
fn pairs_are_drawn_with_their_exact_probabilities() {
    let world = World::new(77, COUNT, [8, 8], 6.0, -3.0, 0);
    let keys: Vec<u64> = (0..COUNT as u64).collect();
    let laws = [(Policy::Joint, Loss::Sigmoid), (Policy::Joint, Loss::Softmax), (Policy::Independent, Loss::Sigmoid), (Policy::Uniform, Loss::Sigmoid)];
    let mut expectations = Vec::new();
    for (policy, loss) in laws {
        let settings = settings(policy, loss, Criterion::Learnability, 2, 2);
        let oracle = Oracle::new(&world, &settings);
        let mut seen = [[0u32; COUNT]; COUNT];
        for seed in 0..SEEDS {
            let noise = Noise::Seeded { seed, generation: 0, step: 9, keys: &keys };
            let ours = Backend::Native.select(&world.candidates(), &settings, &noise).expect("valid");
            let (i, j) = (ours.indices[0] as usize, ours.indices[1] as usize);
            seen[i.min(j)][i.max(j)] += 1;
        }
        let (mut chi_square, mut expected) = (0.0, Vec::new());
        for (i, j) in (0..COUNT).flat_map(|i| (i + 1..COUNT).map(move |j| (i, j))) {
            let share = ordered_pair(&oracle, &settings, i, j) + ordered_pair(&oracle, &settings, j, i);
            let count = share * SEEDS as f64;
            assert!(count > 5.0, "a pair too rare for the test");
            chi_square += (f64::from(seen[i][j]) - count).powi(2) / count;
            expected.push(share);
        }
        assert!((expected.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        // 14 degrees of freedom: a right sampler exceeds 36.1 once in a thousand worlds, and this world never changes.
        assert!(chi_square < 36.1, "{policy} {loss}: chi-square {chi_square}");
        expectations.push(expected);
    }
    // The laws differ enough for the test to tell them apart.
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>();
    assert!(apart(&expectations[0], &expectations[2]) > 0.02, "{expectations:?}");
    assert!(apart(&expectations[2], &expectations[3]) > 0.02, "{expectations:?}");
}
