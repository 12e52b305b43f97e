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
