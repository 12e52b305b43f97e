//! Which forks may be, and what they take over.
use super::*;
use crate::{
    coordinator::facts::{chain::Chain, run::RunFact},
    storage::{StorageConfig, Stores},
};
use superbatch_proto::v1::{Criterion, LearnerSpec, Policy, Source};

fn phase(from_step: u64, sub_batch_size: u32) -> Phase {
    Phase {
        from_step,
        sub_batch_size,
        ..Default::default()
    }
}

fn field(change: impl Fn(&mut RunSpec), step: u64) -> Option<String> {
    let parent = RunSpec {
        sources: vec![Source::default()],
        learner: Some(LearnerSpec::default()),
        phases: vec![phase(0, 8), phase(10, 16)],
        ..Default::default()
    };
    let mut fork = parent.clone();
    change(&mut fork);
    history_differs(&parent, &fork, step).map(|difference| difference.field)
}

#[test]
fn a_fork_may_differ_in_what_its_history_does_not_rest_on() {
    assert_eq!(field(|spec| spec.phases[1].sub_batch_size = 4, 10), None);
    assert_eq!(field(|spec| spec.phases.push(phase(12, 2)), 12), None);
    assert_eq!(field(|spec| spec.max_ahead = 9, 12), None);
    assert_eq!(
        field(|spec| spec.phases[1].sub_batch_size = 4, 11).as_deref(),
        Some("phases[1].sub_batch_size")
    );
    assert_eq!(field(|spec| spec.seed = 3, 1).as_deref(), Some("seed"));
    let other = |spec: &mut RunSpec| spec.sources[0].uri = "x".into();
    assert_eq!(field(other, 1).as_deref(), Some("sources[0].uri"));
    let learner = |spec: &mut RunSpec| spec.learner.as_mut().unwrap().model_uri = "m".into();
    assert_eq!(field(learner, 1).as_deref(), Some("learner.model_uri"));
}

#[tokio::test]
async fn a_fork_of_too_many_forks_is_refused_before_it_is_there() {
    let stores = Stores::new(StorageConfig::default());
    let state = stores.open("memory:///state").unwrap();
    let mut spec = RunSpec {
        phases: vec![phase(0, 8)],
        ..Default::default()
    };
    let mut opened = 0;
    let refused = loop {
        let id = format!("r{opened}");
        let fork = match point(&state, &id, &spec).await {
            Ok(fork) => fork.map(|fork| fork.fact),
            Err(error) => break error,
        };
        let fact = RunFact::new(&spec, String::new(), None, None, fork);
        let own = location(&state, &id);
        run::create_run(&own, fact).await.unwrap();
        let facts = load(&state, &id).await.unwrap();
        receipts(&state, &id, &facts).await.unwrap();
        spec.fork_of = Some(v1::Fork {
            run_id: id,
            step: 0,
        });
        opened += 1;
    };
    assert_eq!(
        (opened, refused.value("field")),
        (DEPTH_MAX + 1, Some("fork_of"))
    );
}

#[tokio::test]
async fn a_fork_that_an_older_build_left_without_weights_takes_them_over() {
    let stores = Stores::new(StorageConfig::default());
    let state = stores.open("memory:///state").unwrap();
    let parent = location(&state, "first");
    for step in 0..3 {
        let file = format!("snapshots/d{step}.n.safetensors");
        let fact = serde_json::json!({
            "nonce": "n", "push_id": "p", "version": step + 1, "generation": 0, "step": step,
            "digest": format!("d{step}"), "snapshot": file, "logit_scale": 1.0,
            "logit_bias": null,
        });
        let key = format!("pushes/0/{step}.json");
        parent.put(&key, fact.to_string().into()).await.unwrap();
        parent.put(&file, "w".into()).await.unwrap();
    }
    let spec = RunSpec {
        phases: vec![Phase {
            policy: Policy::Joint.into(),
            criterion: Criterion::Hard.into(),
            ..phase(0, 8)
        }],
        push_every_steps: 1,
        ..Default::default()
    };
    let of_older_build = ForkFact {
        run_id: "first".into(),
        step: 3,
        chain: Chain::default(),
        weights: serde_json::Value::Null,
    };
    let fork = async |id: &str| {
        let own = location(&state, id);
        let fact = RunFact::new(
            &spec,
            String::new(),
            None,
            None,
            Some(of_older_build.clone()),
        );
        run::create_run(&own, fact).await.unwrap();
        let facts = load(&state, id).await.unwrap();
        let taken = take_over(&state, &own, &facts).await;
        (own, taken)
    };
    let (own, taken) = fork("second").await;
    taken.unwrap();
    // Under exact(1) step 3 is scored with the weights after step 1.
    let pushes = own.list("pushes").await.unwrap().into_iter();
    let pushes: Vec<String> = pushes.map(|(key, _)| key).collect();
    assert_eq!(pushes, ["pushes/0/1.json", "pushes/0/2.json"]);
    assert_eq!(own.list("snapshots").await.unwrap().len(), 2);

    parent.delete("snapshots/d1.n.safetensors").await.unwrap();
    let (own, taken) = fork("third").await;
    assert_eq!(taken.unwrap_err().reason(), Reason::WeightsMissing);
    assert!(own.head(TAKEN_OVER).await.unwrap().is_none());
    assert!(own.list("snapshots").await.unwrap().is_empty());
}

#[test]
fn a_fork_needs_the_references_of_its_phases_from_before_its_step() {
    let own = |from_step, reference_step| Phase {
        policy: Policy::Joint.into(),
        reference_step: Some(reference_step),
        ..phase(from_step, 8)
    };
    let spec = RunSpec {
        phases: vec![phase(0, 8), own(500, 300), own(1500, 1200)],
        ..Default::default()
    };
    let needed = needed(1000, &spec);
    assert_eq!((needed.oldest, needed.last), (998, 999));
    assert_eq!(needed.references.into_iter().collect::<Vec<_>>(), [300]);
}
