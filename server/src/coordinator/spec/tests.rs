use super::*;
use superbatch_proto::v1::{
    EmbeddingDtype, Fork, LearnerSpec, Policy, ReferenceSpec, Source, Tuning, learner_spec::Initial,
};

fn phase(from_step: u64, policy: Policy) -> Phase {
    Phase {
        from_step,
        policy: policy.into(),
        super_batch_size: 64,
        sub_batch_size: 16,
        ..Default::default()
    }
}

/// The least that a joint run says.
fn spec() -> RunSpec {
    RunSpec {
        sources: vec![Source {
            uri: "memory:///data".into(),
            ..Default::default()
        }],
        learner: Some(LearnerSpec {
            model_uri: "memory:///learner".into(),
            initial: Some(Initial::RandomSeed(0)),
            ..Default::default()
        }),
        reference: Some(ReferenceSpec {
            model_uri: "memory:///reference".into(),
            logit_bias: None,
        }),
        phases: vec![phase(0, Policy::Uniform), phase(10, Policy::Joint)],
        ..Default::default()
    }
}

#[test]
fn the_documented_defaults_are_filled_and_stay() {
    let full = complete(spec(), 60.0).unwrap();
    assert_eq!(full.sources[0].weight, 1.0);
    let phase = full.phases[1].clone();
    assert_eq!(
        (phase.criterion(), phase.fidelity()),
        (Criterion::Learnability, Fidelity::Full)
    );
    assert_eq!((phase.n_chunks, phase.gain), (16, 1.0));
    assert_eq!(
        (full.loss(), full.fallback()),
        (Loss::Sigmoid, Fallback::Wait)
    );
    assert_eq!(
        full.lag,
        Some(Lag {
            bound: Some(Bound::Exact(1))
        })
    );
    assert_eq!(
        (full.push_every_steps, full.micro_batches, full.max_ahead),
        (1, 1, 2)
    );
    assert_eq!((full.window_blocks, full.epochs), (16, 0));
    assert_eq!(full.embedding_dtype(), EmbeddingDtype::F16);
    assert_eq!(
        (full.max_bad_row_share, full.need_deadline_seconds),
        (0.1, 60.0)
    );
    assert_eq!(full.compute_dtype, 0, "the device's");
    assert_eq!(full.micro_batch_rows, 0, "the device's");
    assert_eq!(micro_batch_rows_on("cpu"), 64);
    assert_eq!(micro_batch_rows_on("cuda:1"), 256);
    assert_eq!(complete(full.clone(), 60.0).unwrap(), full);
    let mut exact = spec();
    exact.lag = Some(Lag {
        bound: Some(Bound::Exact(0)),
    });
    assert_eq!(
        complete(exact.clone(), 60.0).unwrap().lag,
        exact.lag,
        "exact(0) is not the default"
    );
}

type Edit = fn(&mut RunSpec);

#[test]
fn what_can_never_be_met_is_refused_by_field() {
    let cases: &[(&str, Edit)] = &[
        ("sources", |s| s.sources.clear()),
        ("sources[0].uri", |s| s.sources[0].uri.clear()),
        ("sources[0].weight", |s| s.sources[0].weight = -1.0),
        ("sources[0].weight", |s| s.sources[0].weight = f64::NAN),
        ("sources[0].caption_column", |s| {
            s.sources[0].image_column = "x".into();
            s.sources[0].caption_column = "x".into();
        }),
        ("learner", |s| s.learner = None),
        ("learner.model_uri", |s| {
            s.learner.as_mut().unwrap().model_uri.clear()
        }),
        ("learner.initial", |s| {
            s.learner.as_mut().unwrap().initial = None
        }),
        ("learner.initial", |s| {
            s.learner.as_mut().unwrap().initial = Some(Initial::FirstPush(false))
        }),
        ("learner.snapshot_uri", |s| {
            s.learner.as_mut().unwrap().initial = Some(Initial::SnapshotUri(String::new()))
        }),
        ("learner.logit_bias", |s| {
            s.learner.as_mut().unwrap().logit_bias = Some(f64::INFINITY)
        }),
        ("reference", |s| s.reference = None),
        ("reference.model_uri", |s| {
            s.reference.as_mut().unwrap().model_uri.clear()
        }),
        ("phases", |s| s.phases.clear()),
        ("phases[0].from_step", |s| s.phases[0].from_step = 1),
        ("phases[1].from_step", |s| s.phases[1].from_step = 0),
        ("phases[0].policy", |s| s.phases[0].policy = 0),
        ("phases[1].policy", |s| s.phases[1].policy = 77),
        ("phases[1].criterion", |s| s.phases[1].criterion = -1),
        ("phases[1].fidelity", |s| s.phases[1].fidelity = 9),
        ("phases[1].super_batch_size", |s| {
            s.phases[1].super_batch_size = 0
        }),
        ("phases[1].super_batch_size", |s| {
            s.phases[1].super_batch_size = u32::MAX
        }),
        ("phases[1].sub_batch_size", |s| {
            s.phases[1].sub_batch_size = 0
        }),
        ("phases[1].sub_batch_size", |s| {
            s.phases[1].sub_batch_size = 65
        }),
        ("phases[0].sub_batch_size", |s| s.micro_batches = 3),
        ("phases[1].gain", |s| s.phases[1].gain = -2.0),
        ("loss", |s| s.loss = 12),
        ("fallback", |s| s.fallback = 12),
        ("embedding_dtype", |s| s.embedding_dtype = 12),
        ("compute_dtype", |s| s.compute_dtype = 12),
        ("lag.at_most", |s| {
            s.lag = Some(Lag {
                bound: Some(Bound::AtMost(2)),
            });
            s.push_every_steps = 4;
        }),
        ("columns[0]", |s| s.columns = vec!["image".into()]),
        ("columns[0]", |s| s.columns = vec![String::new()]),
        ("columns[1]", |s| {
            s.columns = vec!["key".into(), "_superbatch_id".into()]
        }),
        ("columns[2]", |s| {
            s.columns = ["key", "url", "key"].map(String::from).into()
        }),
        ("window_blocks", |s| s.window_blocks = u32::MAX),
        ("micro_batch_rows", |s| s.micro_batch_rows = u32::MAX),
        ("max_ahead", |s| s.max_ahead = u32::MAX),
        ("max_bad_row_share", |s| s.max_bad_row_share = 1.5),
        ("max_bad_row_share", |s| s.max_bad_row_share = -0.1),
        ("need_deadline_seconds", |s| {
            s.need_deadline_seconds = f64::INFINITY
        }),
        ("train_flops_per_example", |s| {
            s.train_flops_per_example = -1.0
        }),
        ("fork_of.run_id", |s| {
            s.fork_of = Some(Fork {
                run_id: "../x".into(),
                step: 1,
            })
        }),
    ];
    for (field, edit) in cases {
        let mut spec = spec();
        edit(&mut spec);
        let error = complete(spec, 60.0).expect_err(field);
        assert_eq!(
            (error.reason(), error.value("field")),
            (Reason::RunSpecImpossible, Some(*field)),
            "{error}"
        );
        assert!(error.to_string().starts_with(field), "{error}");
    }
}

fn tuned(policy: Policy, tuning: Tuning) -> RunSpec {
    RunSpec {
        phases: vec![Phase {
            tuning: Some(tuning),
            ..phase(0, policy)
        }],
        ..spec()
    }
}

#[test]
fn a_policys_own_numbers_are_filled_and_stay() {
    let filled = |policy| {
        let full = complete(
            RunSpec {
                phases: vec![phase(0, policy)],
                ..spec()
            },
            60.0,
        )
        .unwrap();
        assert_eq!(complete(full.clone(), 60.0).unwrap(), full);
        full.phases[0].tuning
    };
    let none = Tuning::default();
    assert_eq!(
        filled(Policy::Independent),
        Some(Tuning {
            temperature: Some(1.0),
            ..none
        })
    );
    assert_eq!(
        filled(Policy::Rank),
        Some(Tuning {
            pressure: Some(100.0),
            ..none
        })
    );
    let proportional = Tuning {
        priority_exponent: Some(0.6),
        weight_exponent: Some(0.4),
        ..none
    };
    assert_eq!(filled(Policy::Proportional), Some(proportional));
    for policy in [
        Policy::Uniform,
        Policy::Joint,
        Policy::JointTopK,
        Policy::TopK,
        Policy::KCenter,
    ] {
        assert_eq!(filled(policy), None, "{policy:?}");
        assert_eq!(
            complete(tuned(policy, none), 60.0).unwrap().phases[0].tuning,
            None,
            "nothing said is nothing set"
        );
    }
    let given = Tuning {
        weight_exponent: Some(0.0),
        duplicates_above: Some(0.9),
        ..none
    };
    let full = complete(tuned(Policy::Proportional, given), 60.0).unwrap();
    assert_eq!(
        full.phases[0].tuning,
        Some(Tuning {
            priority_exponent: Some(0.6),
            ..given
        })
    );
}

#[test]
fn tuning_that_can_never_work_is_refused_by_field() {
    let none = Tuning::default();
    let cases = [
        (
            Policy::Joint,
            Tuning {
                temperature: Some(1.0),
                ..none
            },
            "temperature",
        ),
        (
            Policy::Independent,
            Tuning {
                temperature: Some(0.0),
                ..none
            },
            "temperature",
        ),
        (
            Policy::Independent,
            Tuning {
                temperature: Some(f64::INFINITY),
                ..none
            },
            "temperature",
        ),
        (
            Policy::TopK,
            Tuning {
                pressure: Some(9.0),
                ..none
            },
            "pressure",
        ),
        (
            Policy::Rank,
            Tuning {
                pressure: Some(-1.0),
                ..none
            },
            "pressure",
        ),
        (
            Policy::Rank,
            Tuning {
                priority_exponent: Some(1.0),
                ..none
            },
            "priority_exponent",
        ),
        (
            Policy::Proportional,
            Tuning {
                priority_exponent: Some(f64::NAN),
                ..none
            },
            "priority_exponent",
        ),
        (
            Policy::Proportional,
            Tuning {
                weight_exponent: Some(1.1),
                ..none
            },
            "weight_exponent",
        ),
        (
            Policy::Uniform,
            Tuning {
                weight_exponent: Some(1.0),
                ..none
            },
            "weight_exponent",
        ),
        (
            Policy::Joint,
            Tuning {
                clip_score_at_least: Some(2.6),
                ..none
            },
            "clip_score_at_least",
        ),
        (
            Policy::Joint,
            Tuning {
                clip_score_at_least: Some(-0.1),
                ..none
            },
            "clip_score_at_least",
        ),
        (
            Policy::Joint,
            Tuning {
                neg_clip_loss_keep: Some(0.0),
                ..none
            },
            "neg_clip_loss_keep",
        ),
        (
            Policy::Joint,
            Tuning {
                neg_clip_loss_keep: Some(1.5),
                ..none
            },
            "neg_clip_loss_keep",
        ),
        // 15 of 64 are kept, and 16 are to be chosen.
        (
            Policy::Joint,
            Tuning {
                neg_clip_loss_keep: Some(15.0 / 64.0),
                ..none
            },
            "neg_clip_loss_keep",
        ),
        (
            Policy::KCenter,
            Tuning {
                duplicates_above: Some(1.5),
                ..none
            },
            "duplicates_above",
        ),
        (
            Policy::KCenter,
            Tuning {
                duplicates_above: Some(f64::NAN),
                ..none
            },
            "duplicates_above",
        ),
    ];
    for (policy, tuning, field) in cases {
        let error = complete(tuned(policy, tuning), 60.0).expect_err(field);
        let path = format!("phases[0].tuning.{field}");
        assert_eq!(
            (error.reason(), error.value("field")),
            (Reason::RunSpecImpossible, Some(path.as_str())),
            "{error}"
        );
        assert!(error.to_string().starts_with(&path), "{error}");
    }
    let kept = Tuning {
        neg_clip_loss_keep: Some(0.25),
        ..none
    };
    complete(tuned(Policy::Joint, kept), 60.0).expect("16 of 64 are kept");
}

#[test]
fn proportional_needs_scores_that_may_be_positive() {
    let mut easy = tuned(Policy::Proportional, Tuning::default());
    easy.phases[0].criterion = Criterion::Easy.into();
    assert_eq!(
        complete(easy, 60.0).unwrap_err().value("field"),
        Some("phases[0].criterion")
    );
    let mut degrading = tuned(Policy::Proportional, Tuning::default());
    degrading.fallback = Fallback::ReferenceOnly.into();
    assert_eq!(
        complete(degrading, 60.0).unwrap_err().value("field"),
        Some("fallback")
    );
}

#[test]
fn what_is_left_out_and_distances_ask_the_reference_alone() {
    let asked = |policy, criterion: Criterion, tuning| {
        let Asked {
            learner,
            reference_losses,
            reference,
        } = Asked::by(&Phase {
            criterion: criterion.into(),
            tuning,
            ..phase(0, policy)
        });
        (learner, reference_losses, reference)
    };
    let rules = [
        Tuning {
            clip_score_at_least: Some(0.5),
            ..Default::default()
        },
        Tuning {
            neg_clip_loss_keep: Some(0.5),
            ..Default::default()
        },
        Tuning {
            duplicates_above: Some(0.9),
            ..Default::default()
        },
    ];
    for rule in rules {
        assert_eq!(
            asked(Policy::Uniform, Criterion::Learnability, Some(rule)),
            (false, false, true)
        );
        assert_eq!(
            asked(Policy::Joint, Criterion::Hard, Some(rule)),
            (true, false, true)
        );
        let mut spec = tuned(Policy::TopK, rule);
        spec.phases[0].criterion = Criterion::Hard.into();
        spec.reference = None;
        assert_eq!(
            complete(spec, 60.0).unwrap_err().value("field"),
            Some("reference")
        );
    }
    for criterion in [Criterion::Learnability, Criterion::Hard, Criterion::Easy] {
        assert_eq!(
            asked(Policy::KCenter, criterion, None),
            (false, false, true)
        );
        assert_eq!(
            asked(Policy::Uniform, criterion, None),
            (false, false, false)
        );
    }
    assert_eq!(
        asked(Policy::Rank, Criterion::Hard, None),
        (true, false, false)
    );
    let temperature = Tuning {
        temperature: Some(2.0),
        ..Default::default()
    };
    assert_eq!(
        asked(Policy::Independent, Criterion::Hard, Some(temperature)),
        (true, false, false)
    );
}

#[test]
fn each_criterion_needs_its_models_and_no_more() {
    let with = |policy, criterion: Criterion, learner, reference, fallback: Fallback| {
        let mut spec = spec();
        spec.phases = vec![Phase {
            criterion: criterion.into(),
            ..phase(0, policy)
        }];
        spec.learner = spec.learner.filter(|_| learner);
        spec.reference = spec.reference.filter(|_| reference);
        spec.fallback = fallback.into();
        complete(spec, 60.0)
            .map(drop)
            .map_err(|error| error.value("field").unwrap().to_owned())
    };
    use Criterion::*;
    use Fallback::{ReferenceOnly, Wait};
    use Policy::*;
    assert_eq!(with(Uniform, Learnability, false, false, Wait), Ok(()));
    assert_eq!(with(Joint, Hard, true, false, Wait), Ok(()));
    assert_eq!(with(Independent, Easy, false, true, Wait), Ok(()));
    assert_eq!(with(Joint, Hard, false, true, Wait), Err("learner".into()));
    assert_eq!(
        with(Joint, Easy, true, false, Wait),
        Err("reference".into())
    );
    assert_eq!(
        with(Independent, Learnability, true, false, Wait),
        Err("reference".into())
    );
    assert_eq!(
        with(Joint, Hard, true, false, ReferenceOnly),
        Err("fallback".into())
    );
    assert_eq!(with(KCenter, Hard, false, true, Wait), Ok(()));
    assert_eq!(
        with(KCenter, Hard, true, false, Wait),
        Err("reference".into())
    );
    assert_eq!(with(TopK, Easy, false, true, Wait), Ok(()));
    assert_eq!(with(Rank, Hard, false, true, Wait), Err("learner".into()));
}

#[test]
fn a_lag_that_pushes_can_meet_is_taken() {
    for (bound, push_every_steps) in [
        (Bound::Exact(0), 1),
        (Bound::Exact(0), 8),
        (Bound::AtMost(3), 4),
        (Bound::AtMost(0), 1),
    ] {
        let lag = Some(Lag { bound: Some(bound) });
        complete(
            RunSpec {
                lag,
                push_every_steps,
                ..spec()
            },
            60.0,
        )
        .unwrap();
    }
}

#[test]
fn the_first_difference_is_named_by_its_path() {
    let base = complete(spec(), 60.0).unwrap();
    assert_eq!(first_difference(&base, &base.clone()), None);
    let cases: &[(&str, Edit)] = &[
        ("seed", |s| s.seed = 1),
        ("phases[1].sub_batch_size", |s| {
            s.phases[1].sub_batch_size = 8
        }),
        ("phases[1]", |s| s.phases.truncate(1)),
        ("learner.model_uri", |s| {
            s.learner.as_mut().unwrap().model_uri.push('x')
        }),
        ("learner.initial", |s| {
            s.learner.as_mut().unwrap().initial = Some(Initial::RandomSeed(1))
        }),
        ("reference", |s| s.reference = None),
        ("lag.bound", |s| {
            s.lag = Some(Lag {
                bound: Some(Bound::AtMost(1)),
            })
        }),
        ("columns[0]", |s| s.columns.push("key".into())),
        ("phases[1].tuning", |s| {
            s.phases[1].tuning = Some(Tuning::default())
        }),
        ("sources[0].weight", |s| s.sources[0].weight = 2.0),
        // The protocol's order decides between several.
        ("sources[0].uri", |s| {
            s.seed = 3;
            s.sources[0].uri.push('x');
        }),
    ];
    for (path, edit) in cases {
        let mut other = base.clone();
        edit(&mut other);
        assert_eq!(
            first_difference(&base, &other)
                .map(|found| found.field)
                .as_deref(),
            Some(*path)
        );
    }
}

#[test]
fn a_difference_says_what_both_specs_want() {
    let base = complete(spec(), 60.0).unwrap();
    let values = |edit: Edit| {
        let mut other = base.clone();
        edit(&mut other);
        first_difference(&base, &other).unwrap().values
    };
    assert_eq!(values(|s| s.max_ahead = 9), ["2", "9"]);
    assert_eq!(
        values(|s| s.phases[1].policy = Policy::Rank.into())[1],
        "rank"
    );
    assert_eq!(
        values(|s| s.fallback = Fallback::Uniform.into()),
        ["wait", "uniform"]
    );
    assert_eq!(
        values(|s| s.columns.push("key".into())),
        ["nothing", "\"key\""]
    );
    let long = values(|s| s.sources[0].uri = "ü".repeat(1000));
    assert_eq!(long[1].chars().count(), 201);
}

#[test]
fn a_phase_is_called_as_people_write_it() {
    let error = complete(
        RunSpec {
            reference: None,
            ..spec()
        },
        60.0,
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("phase 1 (joint, learnability) scores with a reference"),
        "{error}"
    );
}

#[test]
fn a_step_belongs_to_the_last_phase_that_began() {
    let phases = [
        phase(0, Policy::Uniform),
        phase(10, Policy::Joint),
        phase(11, Policy::Independent),
    ];
    let policies = [0, 9, 10, 11, u64::MAX].map(|step| phase_at(&phases, step).policy());
    assert_eq!(
        policies,
        [
            Policy::Uniform,
            Policy::Uniform,
            Policy::Joint,
            Policy::Independent,
            Policy::Independent
        ]
    );
}

#[test]
fn phases_without_end_are_refused_before_they_are_compared() {
    let base = complete(spec(), 60.0).unwrap();
    let many = |count: u64| (0..count).map(|n| phase(20 + n, Policy::Uniform)).collect();
    for count in [100_000, crate::bounds::PHASES_MAX as u64] {
        let error = append_phases(base.clone(), many(count), None).unwrap_err();
        assert_eq!(error.value("field"), Some("phases"), "{count}: {error}");
    }
    let most = crate::bounds::PHASES_MAX as u64 - 2;
    append_phases(base, many(most), None).unwrap();
}

#[test]
fn phases_are_added_only_beyond_what_is_decided() {
    let base = complete(spec(), 60.0).unwrap();
    let more = vec![phase(20, Policy::Uniform)];
    let longer = append_phases(base.clone(), more.clone(), Some(19)).unwrap();
    assert_eq!((longer.phases.len(), longer.phases[2].n_chunks), (3, 16));
    assert_eq!(
        append_phases(longer.clone(), more.clone(), Some(100)).unwrap(),
        longer,
        "a repeated call changes nothing"
    );
    assert_eq!(append_phases(base.clone(), more, None).unwrap(), longer);
    for (from_step, last_started) in [(20, Some(20)), (10, None), (5, None)] {
        let error = append_phases(
            base.clone(),
            vec![phase(from_step, Policy::Uniform)],
            last_started,
        )
        .unwrap_err();
        assert_eq!(
            (error.reason(), error.value("field")),
            (Reason::RunSpecImpossible, Some("phases[2].from_step"))
        );
    }
}
