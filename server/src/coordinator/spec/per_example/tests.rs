use crate::coordinator::spec::{append_phases, complete};
use superbatch_proto::v1::{
    Approximation, Criterion, EmbeddingDtype, Fidelity, FidelityProbe, LearnerSpec, Loss,
    MultiResolution, Phase, Policy, Reason, ReferenceSpec, RunSpec, ScoreColumn, Source, Tuning,
    approximation::By, learner_spec::Initial,
};

fn spec() -> RunSpec {
    let model_uri = "memory:///models/classifier".to_owned();
    RunSpec {
        sources: vec![Source {
            uri: "memory:///data".into(),
            target_column: "label".into(),
            ..Default::default()
        }],
        learner: Some(LearnerSpec {
            model_uri: model_uri.clone(),
            initial: Some(Initial::SnapshotUri(model_uri.clone())),
            ..Default::default()
        }),
        reference: Some(ReferenceSpec {
            model_uri,
            logit_bias: None,
        }),
        phases: vec![Phase {
            policy: Policy::TopK.into(),
            super_batch_size: 64,
            sub_batch_size: 16,
            ..Default::default()
        }],
        loss: Loss::PerExample.into(),
        ..Default::default()
    }
}

#[test]
fn policies_of_single_scores_are_taken_and_losses_stay_f32() {
    for policy in [
        Policy::Uniform,
        Policy::Independent,
        Policy::TopK,
        Policy::Rank,
        Policy::Proportional,
    ] {
        let mut asked = spec();
        asked.phases[0].policy = policy.into();
        let completed = complete(asked, 60.0).unwrap();
        assert_eq!(completed.embedding_dtype(), EmbeddingDtype::F32);
    }
    let mut by_column = spec();
    by_column.phases[0].criterion = Criterion::Column.into();
    by_column.phases[0].score_columns = vec![ScoreColumn {
        name: "quality".into(),
        ..Default::default()
    }];
    complete(by_column, 60.0).unwrap();
    let mut of_texts = spec();
    of_texts.sources[0].text_column = "text".into();
    // A language model's target is its text.
    of_texts.sources[0].target_column = "text".into();
    complete(of_texts, 60.0).unwrap();
}

/// A change of the spec, and the field that is refused with it.
type Refused = (fn(&mut RunSpec), &'static str);

const REFUSED: [Refused; 22] = [
    (
        |s| s.phases[0].token_share = Some(0.0),
        "phases[0].token_share",
    ),
    (
        |s| s.phases[0].token_share = Some(f64::NAN),
        "phases[0].token_share",
    ),
    (
        |s| {
            s.phases[0].token_share = Some(0.5);
            s.phases[0].policy = Policy::Uniform.into();
        },
        "phases[0].token_share",
    ),
    (
        |s| {
            s.phases[0].token_share = Some(0.5);
            s.phases[0].criterion = Criterion::Hard.into();
        },
        "phases[0].token_share",
    ),
    (
        |s| {
            s.phases[0].token_share = Some(0.5);
            s.loss = Loss::Softmax.into();
            s.sources[0].target_column.clear();
        },
        "phases[0].token_share",
    ),
    (
        |s| s.phases[0].policy = Policy::Joint.into(),
        "phases[0].policy",
    ),
    (
        |s| s.phases[0].policy = Policy::JointTopK.into(),
        "phases[0].policy",
    ),
    (
        |s| s.phases[0].policy = Policy::KCenter.into(),
        "phases[0].policy",
    ),
    (
        |s| {
            s.phases[0].tuning = Some(Tuning {
                duplicates_above: Some(0.95),
                ..Default::default()
            });
        },
        "phases[0].tuning",
    ),
    (
        |s| {
            s.phases[0].fidelity = Fidelity::Approximate.into();
            s.phases[0].approximation = low();
            s.phases[0].allow_untrained_fidelity = true;
        },
        "phases[0].fidelity",
    ),
    (
        |s| {
            s.phases[0].multi_resolution = Some(MultiResolution::default());
            s.phases[0].approximation = low();
        },
        "phases[0].multi_resolution",
    ),
    (
        |s| {
            s.phases[0].approximation = low();
            s.phases[0].probe = Some(FidelityProbe {
                every_steps: 1,
                rows: 64,
            });
        },
        "phases[0].probe",
    ),
    (
        |s| s.embedding_dtype = EmbeddingDtype::F16.into(),
        "embedding_dtype",
    ),
    (
        |s| s.sources[0].target_column.clear(),
        "sources[0].target_column",
    ),
    (
        |s| s.sources[0].caption_column = "caption".into(),
        "sources[0].caption_column",
    ),
    (
        |s| s.sources[0].caption_seed = Some(1),
        "sources[0].caption_column",
    ),
    (
        |s| s.sources[0].image_column = "label".into(),
        "sources[0].target_column",
    ),
    (
        |s| {
            s.sources[0].text_column = "text".into();
            s.sources[0].image_column = "jpg".into();
        },
        "sources[0].text_column",
    ),
    (
        |s| {
            s.sources[0].text_column = "text".into();
            s.sources[0].image_root = "memory:///images".into();
        },
        "sources[0].text_column",
    ),
    (
        |s| {
            let mut of_texts = s.sources[0].clone();
            of_texts.uri = "memory:///texts".into();
            of_texts.text_column = "text".into();
            s.sources.push(of_texts);
        },
        "sources[1].text_column",
    ),
    (
        |s| s.loss = Loss::Sigmoid.into(),
        "sources[0].target_column",
    ),
    (
        |s| {
            s.loss = Loss::Softmax.into();
            s.sources[0].target_column.clear();
            s.sources[0].text_column = "text".into();
        },
        "sources[0].text_column",
    ),
];

fn low() -> Option<Approximation> {
    Some(Approximation {
        by: Some(By::Resolution(16)),
    })
}

#[test]
fn what_needs_pairs_or_embeddings_is_refused_by_its_field() {
    for (change, field) in REFUSED {
        let mut asked = spec();
        change(&mut asked);
        let error = complete(asked, 60.0).expect_err(field);
        assert_eq!(error.reason(), Reason::RunSpecImpossible);
        assert_eq!(error.value("field"), Some(field), "{error}");
    }
}

#[test]
fn masks_are_there_from_the_opening_on_or_never() {
    let later = |token_share| Phase {
        from_step: 10,
        token_share,
        ..spec().phases.remove(0)
    };
    let without = complete(spec(), 60.0).unwrap();
    let error = append_phases(without.clone(), vec![later(Some(0.5))], None).unwrap_err();
    assert_eq!(error.reason(), Reason::RunSpecImpossible);
    assert_eq!(error.value("field"), Some("phases[1].token_share"));
    append_phases(without, vec![later(None)], None).unwrap();
    let mut with = spec();
    with.phases[0].token_share = Some(1.0);
    let with = complete(with, 60.0).unwrap();
    append_phases(with.clone(), vec![later(None)], None).unwrap();
    append_phases(with, vec![later(Some(0.5))], None).unwrap();
}

#[test]
fn joint_is_refused_with_the_reason() {
    let mut asked = spec();
    asked.phases[0].policy = Policy::Joint.into();
    let error = complete(asked, 60.0).unwrap_err().to_string();
    assert!(
        error.contains("no pairs") && error.contains("top_k"),
        "{error}"
    );
}
