use super::*;
use superbatch_proto::v1;

const DIM: usize = 4;

/// `count` candidates whose embeddings are waves of their number: any that differ do.
fn embedded(count: usize, phase: f64) -> Embedded {
    let tower = |shift: f64| {
        let rows = (0..count).flat_map(|n| {
            let row: Vec<f64> = (0..DIM)
                .map(|d| ((n * (d + 2)) as f64 * 0.37 + phase + shift * d as f64).sin())
                .collect();
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.into_iter().map(move |x| (x / norm) as f32)
        });
        Values::F32(rows.collect())
    };
    Embedded {
        image: tower(0.0),
        text: tower(0.3),
        dim: DIM,
    }
}

fn begin(count: u64, sub_batch_size: u32, loss: v1::Loss, criterion: v1::Criterion) -> SelectBegin {
    SelectBegin {
        policy: v1::Policy::Joint.into(),
        criterion: criterion.into(),
        loss: loss.into(),
        sub_batch_size,
        n_chunks: 4,
        gain: 2.0,
        positions: (0..count).collect(),
        learner_scale: 8.0,
        learner_bias: -3.0,
        reference_scale: 12.0,
        reference_bias: -4.0,
        ..Default::default()
    }
}

#[test]
fn own_scores_are_those_that_the_draw_begins_with() {
    for loss in [v1::Loss::Sigmoid, v1::Loss::Softmax] {
        for criterion in [
            v1::Criterion::Learnability,
            v1::Criterion::Hard,
            v1::Criterion::Easy,
        ] {
            let mut begin = SelectBegin {
                holes: vec![3],
                ..begin(60, 20, loss, criterion)
            };
            begin.policy = v1::Policy::Independent.into();
            let (learner, reference) = (embedded(60, 0.1), embedded(60, 0.4));
            let judged = judge(&begin, Some(&learner), Some(&reference)).unwrap();
            let drawn =
                crate::selection::draw(Backend::Native, &begin, Some(&learner), Some(&reference))
                    .unwrap();
            for (index, score) in drawn.indices.iter().zip(&drawn.scores) {
                assert!(
                    (judged.own[*index as usize] - score).abs() < 1e-5,
                    "{loss:?} {criterion:?}"
                );
            }
            assert!(judged.own[3].is_nan() && judged.flops > 0.0);
            assert_eq!(judged.losses[0].is_some(), criterion != v1::Criterion::Easy);
            assert_eq!(judged.losses[1].is_some(), criterion != v1::Criterion::Hard);
        }
    }
}

#[test]
fn a_uniform_draw_scores_what_is_expected_of_it() {
    let (learner, reference) = (embedded(2_000, 0.1), embedded(2_000, 0.4));
    for loss in [v1::Loss::Sigmoid, v1::Loss::Softmax] {
        for (criterion, size) in [
            (v1::Criterion::Learnability, 64),
            (v1::Criterion::Hard, 600),
            (v1::Criterion::Easy, 600),
        ] {
            let begin = begin(2_000, size, loss, criterion);
            let expected = judge(&begin, Some(&learner), Some(&reference))
                .unwrap()
                .uniform_score
                .unwrap();
            let uniform = |step| SelectBegin {
                policy: v1::Policy::Uniform.into(),
                step,
                ..begin.clone()
            };
            let draws = (0..20).map(|step| {
                crate::selection::draw(
                    Backend::Native,
                    &uniform(step),
                    Some(&learner),
                    Some(&reference),
                )
                .unwrap()
                .batch_score
                .unwrap()
            });
            let mean = draws.sum::<f64>() / 20.0;
            assert!(
                (expected - mean).abs() < 0.05 * mean.abs().max(1.0),
                "{loss:?} {criterion:?}: {expected} and {mean}"
            );
        }
    }
}

#[test]
fn a_draw_without_scores_is_not_judged() {
    let (learner, reference) = (embedded(10, 0.1), embedded(10, 0.4));
    let uniform = SelectBegin {
        policy: v1::Policy::Uniform.into(),
        ..begin(10, 4, v1::Loss::Sigmoid, v1::Criterion::Hard)
    };
    assert_eq!(judge(&uniform, Some(&learner), Some(&reference)), None);
    let joint = begin(10, 4, v1::Loss::Sigmoid, v1::Criterion::Learnability);
    assert_eq!(judge(&joint, Some(&learner), None), None);
}

#[test]
fn the_best_of_those_passed_over_are_named_and_a_sample_of_the_rest() {
    let own = [0.9, 0.1, 0.8, f64::NAN, 0.3, 0.7, 0.2, 0.5, 0.5, 0.0];
    let named = |most| {
        passed_over(&own, &[0, 5], most)
            .iter()
            .map(|p| (p.candidate, p.sampled))
            .collect::<Vec<_>>()
    };
    assert_eq!(named(4), [(2, false), (7, false), (1, true), (6, true)]);
    assert_eq!(named(3), [(2, false), (7, false), (1, true)]);
    assert_eq!(named(0), []);
    let mut all: Vec<u32> = named(100).iter().map(|(candidate, _)| *candidate).collect();
    all.sort_unstable();
    assert_eq!(
        all,
        [1, 2, 4, 6, 7, 8, 9],
        "each once: no hole, and nobody who was drawn"
    );
}
