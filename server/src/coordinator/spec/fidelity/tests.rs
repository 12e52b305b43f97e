use super::*;
use crate::coordinator::spec::complete;
use superbatch_proto::v1::{
    LearnerSpec, Policy, Reason, ReferenceSpec, Source, learner_spec::Initial,
};

fn resolution(side: u32) -> Option<Approximation> {
    Some(Approximation {
        by: Some(By::Resolution(side)),
    })
}

/// A warm-up at two resolutions, then approximate scoring.
fn spec() -> RunSpec {
    let phase = |from_step, policy: Policy| Phase {
        from_step,
        policy: policy.into(),
        super_batch_size: 64,
        sub_batch_size: 16,
        approximation: resolution(16),
        multi_resolution: Some(MultiResolution::default()),
        ..Default::default()
    };
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
            ..Default::default()
        }),
        phases: vec![
            phase(0, Policy::Uniform),
            Phase {
                fidelity: Fidelity::Approximate.into(),
                ..phase(10, Policy::Joint)
            },
        ],
        ..Default::default()
    }
}

fn refused(change: impl Fn(&mut RunSpec)) -> String {
    let mut spec = spec();
    change(&mut spec);
    let error = complete(spec, 60.0).unwrap_err();
    assert_eq!(error.reason(), Reason::RunSpecImpossible);
    error.value("field").unwrap_or_default().to_owned()
}

#[test]
fn half_of_the_rows_are_low_unless_said_otherwise() {
    let spec = complete(spec(), 60.0).unwrap();
    let asked = spec.phases[1].multi_resolution.unwrap();
    assert_eq!(asked.share, 0.5);
    assert_eq!(low_rows(Some(&asked), 16), 8);
    let whole = MultiResolution {
        whole_step: true,
        ..asked
    };
    assert_eq!((low_rows(Some(&whole), 16), low_rows(None, 16)), (0, 0));
    assert_eq!(scores_at(&spec.phases[0]), None);
    assert_eq!(scores_at(&spec.phases[1]), resolution(16));
}

#[test]
fn a_learner_that_never_trained_low_is_refused() {
    assert_eq!(
        refused(|s| s.phases[0].multi_resolution = None),
        "phases[0].approximation"
    );
    let untrained = |s: &mut RunSpec| {
        s.phases[0].multi_resolution = None;
        s.phases[0].approximation = None;
    };
    assert_eq!(refused(untrained), "phases[1].fidelity");
    assert_eq!(
        refused(|s| s.phases[0].approximation = resolution(8)),
        "phases[1].fidelity",
        "another approximation"
    );
    let mut allowed = spec();
    untrained(&mut allowed);
    allowed.phases[1].allow_untrained_fidelity = true;
    complete(allowed, 60.0).unwrap();
    let mut declared = spec();
    untrained(&mut declared);
    declared.learner.as_mut().unwrap().trained_fidelities = resolution(16).into_iter().collect();
    complete(declared, 60.0).unwrap();
}

#[test]
fn what_can_never_work_is_named() {
    type Change = fn(&mut RunSpec);
    let cases: [(&str, Change); 6] = [
        ("phases[1].approximation", |s| {
            s.phases[1].approximation = None
        }),
        ("phases[1].approximation.resolution", |s| {
            s.phases[1].approximation = resolution(0);
        }),
        ("phases[0].fidelity", |s| {
            s.phases[0].fidelity = Fidelity::Approximate.into();
        }),
        ("phases[1].multi_resolution.share", |s| {
            s.phases[1].multi_resolution = Some(MultiResolution {
                share: 1.0,
                ..Default::default()
            });
        }),
        ("phases[1].multi_resolution.share", |s| {
            s.phases[1].multi_resolution = Some(MultiResolution {
                share: 0.01,
                ..Default::default()
            });
        }),
        ("phases[0].multi_resolution.share", |s| s.micro_batches = 16),
    ];
    for (field, change) in cases {
        assert_eq!(refused(change), field);
    }
}
