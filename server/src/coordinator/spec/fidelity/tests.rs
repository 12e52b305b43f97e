use super::*;
use crate::coordinator::spec::complete;
use superbatch_proto::v1::{
    FidelityProbe, LearnerSpec, Policy, Reason, ReferenceSpec, Source, learner_spec::Initial,
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
    let cases: [(&str, Change); 7] = [
        // A number that is none equals nothing, itself neither: the run could not be opened again.
        ("learner.trained_fidelities[0].patch_dropout", |s| {
            let none = Approximation {
                by: Some(By::PatchDropout(f64::NAN)),
            };
            s.learner.get_or_insert_default().trained_fidelities = vec![none];
        }),
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

#[test]
fn a_probe_is_due_every_so_many_steps_of_its_phase_at_the_other_fidelity() {
    let mut asked = spec();
    let probe = FidelityProbe {
        every_steps: 4,
        rows: 0,
    };
    asked.phases[1].probe = Some(probe);
    let phase = complete(asked, 60.0).unwrap().phases[1].clone();
    assert_eq!(phase.probe.unwrap().rows, 1024);
    assert_eq!(
        probes_at(&phase, 10),
        Some(None),
        "full, beside approximate"
    );
    assert_eq!(probes_at(&phase, 12), None);
    assert_eq!(probes_at(&phase, 14), Some(None));
    let full = Phase {
        fidelity: Fidelity::Full.into(),
        ..phase
    };
    assert_eq!(probes_at(&full, 14), Some(resolution(16)));
    assert_eq!(probes_at(&spec().phases[1], 10), None);
}

#[test]
fn probes_that_can_tell_nothing_are_refused() {
    let probe = |every_steps, rows| Some(FidelityProbe { every_steps, rows });
    let field = refused(|spec| spec.phases[1].probe = probe(0, 0));
    assert_eq!(field, "phases[1].probe.every_steps");
    let field = refused(|spec| spec.phases[1].probe = probe(5, 7));
    assert_eq!(field, "phases[1].probe.rows", "a draw of one row");
    let field = refused(|spec| spec.phases[0].probe = probe(5, 64));
    assert_eq!(field, "phases[0].probe", "uniform");
    let field = refused(|spec| {
        spec.phases[1] = Phase {
            approximation: None,
            multi_resolution: None,
            fidelity: Fidelity::Full.into(),
            probe: probe(5, 64),
            ..spec.phases[1].clone()
        }
    });
    assert_eq!(field, "phases[1].approximation");
}
