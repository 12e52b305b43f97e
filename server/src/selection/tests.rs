use super::*;

fn begin(policy: v1::Policy) -> SelectBegin {
    SelectBegin {
        policy: policy.into(),
        criterion: v1::Criterion::Learnability.into(),
        loss: v1::Loss::Sigmoid.into(),
        sub_batch_size: 2,
        n_chunks: 2,
        gain: 1.5,
        seed: 3,
        positions: (0..6).collect(),
        learner_scale: 20.0,
        reference_scale: 10.0,
        ..Default::default()
    }
}

/// Six candidates in the plane; 3 shows the same image as 0.
fn model(turn: f32) -> Embedded {
    let angles = [0.1f32, 1.0, 2.0, 0.1, 4.0, 5.0];
    let rows = |by: f32| {
        angles
            .iter()
            .flat_map(|angle| [(by * angle).cos(), (by * angle).sin()])
            .collect()
    };
    Embedded {
        image: Values::F32(rows(1.0)),
        text: Values::F32(rows(turn)),
        dim: 2,
    }
}

fn drawn(begin: &SelectBegin) -> Result<Selection> {
    draw(Backend::Native, begin, Some(&model(1.4)), Some(&model(1.1)))
}

/// Known values of an enum of the protocol, without the unset one.
fn known<E: TryFrom<i32>>() -> impl Iterator<Item = E> {
    (1..).map_while(|number| E::try_from(number).ok())
}

#[test]
fn every_policy_of_the_kernels_is_one_of_the_protocol_under_the_same_word() {
    let ours: Vec<(String, Policy)> = known::<v1::Policy>()
        .map(|wire| {
            let word = wire
                .as_str_name()
                .trim_start_matches("POLICY_")
                .to_lowercase();
            (word, policy(wire).expect("it is set"))
        })
        .collect();
    assert_eq!(ours.len(), Policy::ALL.len());
    assert!(
        ours.iter().all(|(word, policy)| word == policy.as_str()),
        "{ours:?}"
    );
    assert_eq!(policy(v1::Policy::Unspecified), None);
}

#[test]
fn settings_are_what_the_wire_says() {
    for wire in known::<v1::Policy>() {
        let settings = settings(&begin(wire)).unwrap();
        let expected = Settings {
            policy: policy(wire).unwrap(),
            loss: Loss::Sigmoid,
            criterion: Criterion::Learnability,
            sub_batch_size: 2,
            n_chunks: 2,
            gain: 1.5,
        };
        assert_eq!(settings, expected);
    }
    for (field, unset) in [
        (
            "policy",
            SelectBegin {
                policy: 0,
                ..begin(v1::Policy::Joint)
            },
        ),
        (
            "loss",
            SelectBegin {
                loss: 0,
                ..begin(v1::Policy::Joint)
            },
        ),
        (
            "criterion",
            SelectBegin {
                criterion: 0,
                ..begin(v1::Policy::Joint)
            },
        ),
    ] {
        assert_eq!(settings(&unset).unwrap_err().value("field"), Some(field));
    }
}

#[test]
fn tuning_is_what_the_wire_says_and_the_kernels_defaults_else() {
    assert_eq!(tuning(None), Tuning::default());
    let given = v1::Tuning {
        temperature: Some(2.0),
        pressure: Some(3.0),
        priority_exponent: Some(0.5),
        weight_exponent: Some(1.0),
        clip_score_at_least: Some(0.6),
        neg_clip_loss_keep: Some(0.7),
        duplicates_above: Some(0.8),
    };
    let expected = Tuning {
        temperature: 2.0,
        pressure: 3.0,
        priority_exponent: 0.5,
        weight_exponent: 1.0,
        clip_score_at_least: Some(0.6),
        neg_clip_loss_keep: Some(0.7),
        duplicates_above: Some(0.8),
    };
    assert_eq!(tuning(Some(&given)), expected);
}

#[test]
fn tuning_reaches_the_draw() {
    let weighted = drawn(&begin(v1::Policy::Proportional)).unwrap();
    assert!(
        weighted.weights.iter().any(|weight| *weight < 1.0),
        "{weighted:?}"
    );
    let even = v1::Tuning {
        weight_exponent: Some(0.0),
        ..Default::default()
    };
    let even = drawn(&SelectBegin {
        tuning: Some(even),
        ..begin(v1::Policy::Proportional)
    })
    .unwrap();
    assert_eq!(
        (even.indices, even.weights),
        (weighted.indices, vec![1.0; 2])
    );
    let apart = SelectBegin {
        tuning: Some(v1::Tuning {
            duplicates_above: Some(0.999),
            ..Default::default()
        }),
        sub_batch_size: 5,
        ..begin(v1::Policy::Joint)
    };
    let answer = response(drawn(&apart).unwrap());
    assert_eq!(
        answer.left_out,
        Some(v1::LeftOut {
            duplicates_above: 1,
            ..Default::default()
        })
    );
    assert!(!(answer.indices.contains(&0) && answer.indices.contains(&3)));
}

#[test]
fn too_many_holes_and_too_many_left_out_are_told_apart() {
    let many = SelectBegin {
        holes: vec![1, 2],
        sub_batch_size: 5,
        ..begin(v1::Policy::Joint)
    };
    assert_eq!(drawn(&many).unwrap_err().reason(), Reason::TooManyBadRows);
    let tuning = Some(v1::Tuning {
        duplicates_above: Some(0.999),
        ..Default::default()
    });
    let error = drawn(&SelectBegin {
        sub_batch_size: 4,
        tuning,
        ..many
    })
    .unwrap_err();
    assert_eq!(error.reason(), Reason::TooFewCandidates);
    let told = ["candidates", "holes", "left_out"].map(|key| error.value(key).unwrap());
    assert_eq!(told, ["6", "2", "1"], "{error}");
}

/// A model that gives losses, as a worker sends them.
fn losses(of: &[f32]) -> Embedded {
    Embedded {
        image: Values::F32(of.iter().flat_map(|loss| [*loss, 1.0]).collect()),
        text: Values::F32([1.0, 0.0].repeat(of.len())),
        dim: 2,
    }
}

fn per_example(policy: v1::Policy, criterion: v1::Criterion) -> SelectBegin {
    SelectBegin {
        criterion: criterion.into(),
        loss: v1::Loss::PerExample.into(),
        learner_scale: 1.0,
        reference_scale: 1.0,
        holes: vec![1],
        ..begin(policy)
    }
}

const LEARNER: [f32; 6] = [0.5, 9.0, 2.5, 3.0, 0.25, 1.0];
const REFERENCE: [f32; 6] = [0.75, 0.0, 0.5, 2.75, 0.125, 3.0];

#[test]
fn losses_that_are_given_are_the_scores() {
    use v1::Criterion as C;
    let (learner, reference) = (losses(&LEARNER), losses(&REFERENCE));
    // Reducible losses: -0.25, a hole, 2, 0.25, 0.125, -2.
    for (criterion, indices, scores) in [
        (C::Learnability, [2, 3], [2.0, 0.25]),
        (C::Hard, [3, 2], [3.0, 2.5]),
        (C::Easy, [4, 2], [-0.125, -0.5]),
    ] {
        // Gain belongs to softmax, and does nothing here.
        let begin = SelectBegin {
            gain: 7.0,
            ..per_example(v1::Policy::TopK, criterion)
        };
        let drawn = draw(Backend::Native, &begin, Some(&learner), Some(&reference)).unwrap();
        assert_eq!(
            (drawn.indices, drawn.scores),
            (indices.to_vec(), scores.to_vec()),
            "{criterion:?}"
        );
        let mean = (scores[0] + scores[1]) / 2.0;
        assert_eq!(
            drawn.batch_score,
            Some(mean),
            "without pairs it is the mean"
        );
        let judged = judged::judge(&begin, Some(&learner), Some(&reference)).unwrap();
        assert!(judged.own[1].is_nan());
        let of_all: f64 = judged.own.iter().filter(|own| own.is_finite()).sum();
        assert_eq!(judged.uniform_score, Some(of_all / 5.0));
        assert_eq!(drawn.mean_score_candidates, judged.uniform_score);
        let [of_learner, of_reference] = &judged.losses;
        assert_eq!(
            of_learner.as_ref().map(|l| l[2]),
            (criterion != C::Easy).then_some(2.5)
        );
        assert_eq!(
            of_reference.as_ref().map(|l| l[2]),
            (criterion != C::Hard).then_some(0.5)
        );
        let pair = [Some(&learner), Some(&reference)];
        let (score, _) = probed::score_of(&begin, pair, &indices).unwrap();
        assert_eq!(score, mean, "another sub-batch is measured alike");
    }
}

#[test]
fn losses_of_tokens_change_no_score() {
    let with_tokens = |of: &[f32]| Embedded {
        image: Values::F32(of.iter().flat_map(|loss| [*loss, 1.0, 7.0]).collect()),
        text: Values::F32([1.0, 0.0, 1.0].repeat(of.len())),
        dim: 3,
    };
    let begin = per_example(v1::Policy::TopK, v1::Criterion::Learnability);
    let drawn = |learner: Embedded, reference: Embedded| {
        draw(Backend::Native, &begin, Some(&learner), Some(&reference)).unwrap()
    };
    let bare = drawn(losses(&LEARNER), losses(&REFERENCE));
    let with = drawn(with_tokens(&LEARNER), with_tokens(&REFERENCE));
    assert_eq!((with.indices, with.scores), (bare.indices, bare.scores));
}

#[test]
fn a_term_is_added_to_a_given_loss_and_other_policies_draw_by_it() {
    let (learner, reference) = (losses(&LEARNER), losses(&REFERENCE));
    let begin = SelectBegin {
        terms: vec![10.0, 10.0, 0.0, 0.0, 0.0, 0.0],
        ..per_example(v1::Policy::TopK, v1::Criterion::Learnability)
    };
    let drawn = draw(Backend::Native, &begin, Some(&learner), Some(&reference)).unwrap();
    assert_eq!((drawn.indices, drawn.scores), (vec![0, 2], vec![9.75, 2.0]));
    for policy in [
        v1::Policy::Independent,
        v1::Policy::Rank,
        v1::Policy::Proportional,
    ] {
        let begin = per_example(policy, v1::Criterion::Learnability);
        let drawn = draw(Backend::Native, &begin, Some(&learner), Some(&reference)).unwrap();
        for (index, score) in drawn.indices.iter().zip(&drawn.scores) {
            let n = *index as usize;
            assert_eq!(*score, f64::from(LEARNER[n] - REFERENCE[n]), "{policy:?}");
        }
        assert!(!drawn.indices.contains(&1));
        let repeated = draw(Backend::Native, &begin, Some(&learner), Some(&reference)).unwrap();
        assert_eq!(repeated, drawn);
    }
    let uniform = per_example(v1::Policy::Uniform, v1::Criterion::Learnability);
    let drawn = draw(Backend::Native, &uniform, None, None).unwrap();
    assert_eq!(drawn.batch_score, None);
}

#[test]
fn a_draw_by_losses_needs_those_of_every_model_that_it_asks() {
    let learner = losses(&LEARNER);
    let begin = per_example(v1::Policy::TopK, v1::Criterion::Learnability);
    let error = draw(Backend::Native, &begin, Some(&learner), None).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument);
    assert_eq!(error.value("field"), Some("embedding"));
}
