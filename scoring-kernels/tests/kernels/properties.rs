//! What holds of every draw, whatever the candidates.
use crate::{
    oracle::Oracle,
    support::{Dice, World, assert_close, backends, chunk_sets, gumbels, settings},
};
use proptest::prelude::*;
use superbatch_kernels::{Backend, Criterion, Loss, Noise, Policy, Settings};

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    count: usize,
    dims: [usize; 2],
    scale: f64,
    bias: f64,
    holes: Vec<u32>,
    settings: Settings,
}

impl Case {
    fn world(&self) -> World {
        let rows = self.settings.n_chunks.min(self.settings.sub_batch_size);
        let mut world = World::new(
            self.seed, self.count, self.dims, self.scale, self.bias, rows,
        );
        world.holes = self.holes.clone();
        world
    }
}

prop_compose! {
    fn cases()(
        seed in any::<u64>(),
        count in 2usize..160,
        dims in [3usize..40, 3usize..40],
        scale in 1.0..120.0,
        bias in -20.0..0.0,
        words in (0..Policy::ALL.len(), 0..Loss::ALL.len(), 0..Criterion::ALL.len()),
        (holes, fill) in (0.0..0.5f64, 0.0..1.0f64),
        n_chunks in 1usize..40,
    ) -> Case {
        let shuffled = Dice::new(seed).shuffled(count);
        let holes = &shuffled[..(holes * count as f64) as usize];
        let holes: Vec<u32> = holes.iter().map(|&x| x as u32).collect();
        let b = 1 + (fill * (count - holes.len() - 1) as f64).round() as usize;
        let policy = Policy::ALL[words.0];
        // Proportional refuses easy scores.
        let criterion = match policy {
            Policy::Proportional => Criterion::Hard,
            _ => Criterion::ALL[words.2],
        };
        let settings = settings(policy, Loss::ALL[words.1], criterion, b, n_chunks);
        Case { seed, count, dims, scale, bias, holes, settings }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn exactly_b_of_the_offered_are_chosen_once_each(case in cases()) {
        let world = case.world();
        for backend in backends() {
            let ours = backend.select(&world.candidates(), &case.settings, &world.given());
            let ours = ours.expect("valid");
            let mut chosen = ours.indices.clone();
            chosen.sort_unstable();
            chosen.dedup();
            prop_assert_eq!(chosen.len(), case.settings.sub_batch_size);
            let offered = |x: &u32| (*x as usize) < case.count && !case.holes.contains(x);
            prop_assert!(chosen.iter().all(offered));
            prop_assert_eq!(ours.chunks.iter().sum::<u32>() as usize, chosen.len());
            prop_assert_eq!((ours.scores.len(), ours.weights.len()), (chosen.len(), chosen.len()));
            let [most, least] = [ours.chunks[0], ours.chunks[ours.chunks.len() - 1]];
            prop_assert!(most - least <= 1 && ours.chunks.is_sorted_by(|a, b| a >= b));
        }
    }

    #[test]
    fn conditional_scores_are_those_of_float64(case in cases()) {
        let settings = Settings { policy: Policy::Joint, ..case.settings.clone() };
        let world = case.world();
        let oracle = Oracle::new(&world, &settings);
        for backend in backends() {
            let ours = backend.select(&world.candidates(), &settings, &world.given());
            let ours = ours.expect("valid");
            let mut start = 0;
            for size in ours.chunks.iter().map(|size| *size as usize) {
                for k in start..start + size {
                    let exact = oracle.score(ours.indices[k] as usize, &ours.indices[..start]);
                    assert_close(ours.scores[k], exact, &format!("{backend:?} {case:?}"));
                }
                start += size;
            }
        }
    }

    #[test]
    fn a_seed_fixes_the_draw_and_permuting_rows_with_their_keys_permutes_it(case in cases()) {
        let world = case.world();
        let order = Dice::new(!case.seed).shuffled(case.count);
        let mut place = vec![0u32; case.count];
        order.iter().enumerate().for_each(|(to, &from)| place[from] = to as u32);
        let mut moved = World {
            learner: world.learner.permuted(&order),
            reference: world.reference.permuted(&order),
            ..world.clone()
        };
        moved.holes.iter_mut().for_each(|hole| *hole = place[*hole as usize]);
        let keys: Vec<u64> = (0..case.count as u64).map(|key| key * 3 + (1 << 48)).collect();
        let moved_keys: Vec<u64> = order.iter().map(|&from| keys[from]).collect();
        let seeded = |keys| Noise::Seeded { seed: case.seed, generation: 2, step: 41, keys };
        let draw = |world: &World, keys| {
            let noise = seeded(keys);
            let drawn = Backend::Native.select(&world.candidates(), &case.settings, &noise);
            drawn.expect("valid")
        };
        let ours = draw(&world, &keys);
        prop_assert_eq!(&ours, &draw(&world, &keys));
        let there: Vec<u32> = ours.indices.iter().map(|&x| place[x as usize]).collect();
        prop_assert_eq!(draw(&moved, &moved_keys).indices, there);
    }

    #[test]
    fn the_number_of_threads_changes_nothing(case in cases()) {
        let world = case.world();
        let draw = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let select =
                || Backend::Native.select(&world.candidates(), &case.settings, &world.given());
            pool.expect("threads").install(select).expect("valid")
        };
        let one = draw(1);
        prop_assert_eq!(&one, &draw(2));
        prop_assert_eq!(&one, &draw(5));
    }

    #[test]
    fn what_is_in_a_hole_does_not_matter(case in cases()) {
        let world = case.world();
        let mut spoilt = world.clone();
        for hole in case.holes.iter().map(|&hole| hole as usize) {
            spoilt.learner.image[hole * case.dims[0]..][..case.dims[0]].fill(f32::NAN);
            spoilt.reference.text[hole * case.dims[1]..][..case.dims[1]].fill(f32::INFINITY);
        }
        for backend in backends() {
            let draw = |world: &World| {
                let noise = world.given();
                let drawn = backend.select(&world.candidates(), &case.settings, &noise);
                drawn.expect("valid")
            };
            prop_assert_eq!(draw(&world), draw(&spoilt));
        }
    }

    #[test]
    fn keeping_everything_keeps_everything(case in cases()) {
        let mut world = case.world();
        world.holes.clear();
        let settings = Settings { sub_batch_size: case.count, ..case.settings.clone() };
        world.noise = gumbels(&mut Dice::new(1), case.count * settings.n_chunks);
        let mut batch_scores = Vec::new();
        for backend in backends() {
            let ours = backend.select(&world.candidates(), &settings, &world.given());
            let ours = ours.expect("valid");
            let all: Vec<Vec<u32>> = vec![(0..case.count as u32).collect()];
            prop_assert_eq!(chunk_sets(&ours.indices, &[case.count as u32]), all);
            batch_scores.push(ours.batch_score.expect("given embeddings"));
        }
        // All there is has one score, whatever order it was drawn in.
        batch_scores.iter().for_each(|score| assert_close(*score, batch_scores[0], "batch score"));
    }
}
