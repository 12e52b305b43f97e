//! What a fork takes over of another run's weights.
use super::*;
use crate::coordinator::{
    facts::chain::{Chain, Rewound},
    weights::inherit::{Inheritance, Inherited, Needed, inherited},
};

impl Bench {
    fn at(&self, run: &str) -> Location {
        self.stores
            .open(&format!("memory:///state/runs/{run}"))
            .unwrap()
    }

    /// What a fork at `step` takes over of run r, which needs its last two pushes and `references`.
    async fn inherited(&self, step: i64, chain: &Chain, references: &[i64]) -> Result<Inherited> {
        let needed = Needed {
            oldest: step - 2,
            last: step - 1,
            references: references.iter().copied().collect(),
        };
        inherited(&self.at("r"), chain, &needed).await
    }

    async fn fork(&self, found: &Inherited) -> Weights {
        let (parent, own) = (self.at("r"), self.at("fork"));
        found.copy_files(&parent, &own).await.unwrap();
        let fact = Inheritance::from_value(&found.fact.to_value().unwrap()).unwrap();
        assert_eq!(fact, found.fact);
        fact.write(&own).await.unwrap();
        // Written twice it is the same.
        fact.write(&own).await.unwrap();
        let (spec, verifier) = (self.spec.clone(), self.verifier.clone());
        Weights::open(own, spec, verifier).await.unwrap()
    }

    /// Run r, with pushes of steps 0 to `steps` - 1, each with weights of its own.
    async fn pushed(&self, steps: i64) -> Weights {
        let weights = self.open().await;
        for step in 0..steps {
            push(&weights, start(step, "p"), whole(1.0 + step as f32))
                .await
                .unwrap();
        }
        weights
    }
}

fn version_at(weights: &Weights, step: u64) -> Option<u64> {
    let found = weights.book().borrow().find(Due::Exactly(step), CHAIN);
    found.map(|published| published.version.version)
}

#[tokio::test]
async fn the_reference_of_a_later_phase_is_taken_over() {
    let bench = Bench::new();
    let weights = bench.pushed(10).await;
    let oldest: Vec<_> = weights.retire_before(8, 1, &[3]).into_iter().collect();
    weights.delete(&oldest).await.unwrap();
    let chain = Chain::default();
    let found = bench.inherited(10, &chain, &[3]).await.unwrap();
    assert!(found.lost.is_empty());
    let fork = bench.fork(&found).await;
    let there: Vec<_> = (0..10).map(|step| version_at(&fork, step)).collect();
    let mut expected = vec![None; 10];
    (expected[3], expected[8], expected[9]) = (Some(4), Some(9), Some(10));
    assert_eq!(there, expected);
    // One that is gone, and one that was never pushed.
    for gone in [2, 5] {
        let found = bench.inherited(10, &chain, &[gone]).await.unwrap();
        assert_eq!(found.lost, BTreeSet::from([gone]));
    }
    // Other weights that serve in its place are another reference.
    weights.roll_back(4, CHAIN, &[]).await.unwrap();
    let found = bench.inherited(10, &chain, &[9]).await.unwrap();
    assert_eq!(found.lost, BTreeSet::from([9]));
}

#[tokio::test]
async fn what_served_for_rolled_back_weights_serves_in_the_fork_too() {
    let mut bench = Bench::new();
    bench.spec.initial = Some(Published {
        version: WeightsVersion {
            step: -1,
            ..Default::default()
        },
        snapshot_uri: String::new(),
        logit_scale: 10.0,
        logit_bias: None,
    });
    let weights = bench.pushed(8).await;
    weights.roll_back(2, CHAIN, &[]).await.unwrap();
    let found = bench.inherited(5, &Chain::default(), &[]).await.unwrap();
    let fork = bench.fork(&found).await;
    assert_eq!(version_at(&fork, 3), Some(2));
    let served = fork.book().borrow().find(Due::Exactly(4), CHAIN).unwrap();
    let of_parent = weights
        .book()
        .borrow()
        .find(Due::Exactly(4), CHAIN)
        .unwrap();
    assert_eq!(served.version, of_parent.version);
    assert!(served.snapshot_uri.contains("runs/fork/snapshots"));
    // Its own push counts, although the other run took a version of that number back.
    push(&fork, start(5, "own"), whole(9.0)).await.unwrap();
    assert_eq!(version_at(&fork, 5), Some(6));

    // Taken back to the learner that both began with.
    weights.roll_back(0, CHAIN, &[]).await.unwrap();
    let found = bench.inherited(5, &Chain::default(), &[]).await.unwrap();
    let (own, fact) = (bench.at("second"), &found.fact);
    found.copy_files(&bench.at("r"), &own).await.unwrap();
    fact.write(&own).await.unwrap();
    let second = Weights::open(own, bench.spec.clone(), bench.verifier.clone());
    let second = second.await.unwrap();
    assert_eq!([3, 4].map(|step| version_at(&second, step)), [Some(0); 2]);
}

#[tokio::test]
async fn a_version_that_a_rewind_took_back_stands_in_for_no_fork() {
    let bench = Bench::new();
    let weights = bench.pushed(4).await;
    let began = [
        CHAIN[0],
        Began {
            generation: 1,
            step: 2,
        },
    ];
    let again = PushStart {
        generation: 1,
        ..start(2, "again")
    };
    push(&weights, again, whole(7.0)).await.unwrap();
    // An earlier build rolled back to such a version.
    let back = r#"{"nonce":"n","to":4,"through":5}"#;
    let run = bench.at("r");
    run.put("rollbacks/000000.json", back.into()).await.unwrap();
    let chain = Chain::new(vec![Rewound {
        generation: 1,
        to_step: 2,
        replay: false,
    }]);
    assert_eq!(chain.began(), began);
    let error = bench.inherited(3, &chain, &[]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WeightsMissing);
    assert_eq!(error.value("step"), Some("2"));
}

#[tokio::test]
async fn equal_weights_are_one_file_and_a_file_that_goes_leaves_no_fork() {
    let bench = Bench::new();
    let weights = bench.open().await;
    for step in 0..3 {
        push(&weights, start(step, "p"), whole(1.0)).await.unwrap();
    }
    let chain = Chain::default();
    let found = bench.inherited(3, &chain, &[]).await.unwrap();
    let fork = bench.fork(&found).await;
    let files = bench.at("fork").list("snapshots").await.unwrap();
    assert_eq!(files.len(), 1);
    assert_eq!(
        [1, 2].map(|step| version_at(&fork, step)),
        [Some(2), Some(3)]
    );
    // The other run deletes them between the look and the copy.
    for (key, _) in bench.at("r").list("snapshots").await.unwrap() {
        bench.at("r").delete(&key).await.unwrap();
    }
    let own = bench.at("third");
    let error = found.copy_files(&bench.at("r"), &own).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WeightsMissing);
    assert!(own.list("").await.unwrap().is_empty());
}

#[tokio::test]
async fn the_files_that_were_copied_go_with_the_one_that_cannot_be() {
    let bench = Bench::new();
    bench.pushed(3).await;
    let found = bench.inherited(3, &Chain::default(), &[]).await.unwrap();
    let (parent, own) = (bench.at("r"), bench.at("fork"));
    // One of the two files is gone, whichever is copied first: the other one is not left either.
    for gone in found.files.values() {
        let bytes = parent.get(gone).await.unwrap();
        parent.delete(gone).await.unwrap();
        let error = found.copy_files(&parent, &own).await.unwrap_err();
        assert_eq!(error.reason(), Reason::WeightsMissing);
        assert!(own.list("").await.unwrap().is_empty());
        parent.put(gone, bytes).await.unwrap();
    }
    found.copy_files(&parent, &own).await.unwrap();
    assert_eq!(own.list("snapshots").await.unwrap().len(), 2);
}
