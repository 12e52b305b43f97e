//! Older versions: as the base of a push, by their digests, and in force again after a roll-back.
use super::*;
use crate::coordinator::weights::{TensorFile, by_uri};
use superbatch_proto::v1::WeightsState;

async fn tensors(bench: &Bench, weights: &Weights, step: u64) -> BTreeMap<String, Vec<f32>> {
    let found = weights.book().borrow().find(Due::Exactly(step), CHAIN);
    let uri = found.unwrap().snapshot_uri;
    let bytes = bench.stores.open(&uri).unwrap().get("").await.unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| {
        let values = data
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        values.collect()
    };
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(name, view)| (name, values(view.data())))
        .collect()
}

/// Weights of steps 0 to 2, of which the first version is no longer kept.
async fn first_forgotten(bench: &Bench) -> Weights {
    let weights = bench.open().await;
    for step in 0..3 {
        push(&weights, start(step, "p"), whole(1.0 + step as f32))
            .await
            .unwrap();
    }
    assert_eq!(forget(&weights, 1).await, 1);
    weights
}

fn on(base: u64, step: i64) -> PushStart {
    PushStart {
        base_version: Some(base),
        ..start(step, "changed")
    }
}

#[tokio::test]
async fn changed_tensors_are_joined_with_those_of_their_base() {
    let bench = Bench::new();
    let weights = bench.open().await;
    push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    let version = push(&weights, on(1, 1), scale(7.0)).await.unwrap();
    assert_eq!(version.version, 2);
    let (old, new) = (
        tensors(&bench, &weights, 0).await,
        tensors(&bench, &weights, 1).await,
    );
    assert_eq!(new["scale"], [7.0]);
    for same in ["a.weight", "b.bias"] {
        assert_eq!(new[same], old[same]);
    }
    // The same weights have the same digest, however they were pushed.
    let at_once = push(&weights, start(2, "p"), whole(7.0)).await.unwrap();
    assert_eq!(at_once.digest, version.digest);
    // A tensor comes whole or not at all.
    let part = push(&weights, on(2, 3), a_rows(0, 2)).await;
    assert_eq!(refusal(part), refused("a.weight"));
}

#[tokio::test]
async fn a_base_that_is_not_there_is_refused_by_number() {
    let bench = Bench::new();
    let weights = first_forgotten(&bench).await;
    for (base, said) in [
        (9, "there is no version 9; the newest is 3"),
        (1, "no longer kept"),
    ] {
        let error = push(&weights, on(base, 3), scale(7.0)).await.unwrap_err();
        assert_eq!(error.reason(), Reason::WeightsMissing);
        assert_eq!(error.value("version"), Some(base.to_string().as_str()));
        assert!(error.to_string().contains(said), "{error}");
    }
    let rank = |rank, base| PushStart {
        rank,
        expected_parts: 2,
        base_version: base,
        ..start(3, "p")
    };
    // The first rank's other half never comes, so it waits while the second one is refused.
    let mut first = Box::pin(push(&weights, rank(0, Some(2)), scale(7.0)));
    assert!(first.as_mut().now_or_never().is_none());
    let second = push(&weights, rank(1, None), b([0.5; 3])).await;
    assert_eq!(refusal(second).0, Reason::PushConflict);
}

async fn by_file(
    bench: &Bench,
    weights: &Weights,
    step: i64,
    bytes: Vec<u8>,
    blake3: Vec<u8>,
) -> Result<WeightsVersion> {
    let at = bench
        .stores
        .open("memory:///checkpoint.safetensors")
        .unwrap();
    at.put("", bytes.into()).await.unwrap();
    by_uri_at(weights, step, at, blake3).await
}

async fn by_uri_at(
    weights: &Weights,
    step: i64,
    at: Location,
    blake3: Vec<u8>,
) -> Result<WeightsVersion> {
    let start = PushStart {
        snapshot_uri: at.uri().into(),
        ..start(step, "by file")
    };
    let open = async move {
        let file = TensorFile::open(at, 1 << 20).await?;
        file.ok_or_else(|| Error::new(Reason::WeightsRefused, "there is no file"))
    };
    let messages = by_uri::messages(open, blake3.into());
    weights.push(0, &[], start, messages).await
}

#[tokio::test]
async fn the_file_of_a_push_that_may_not_come_is_not_opened() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let at = |name: &str| bench.stores.open(&format!("memory:///{name}")).unwrap();
    // Off the cadence: it would fail to open, too.
    let early = by_uri_at(&weights, -2, at("none"), Vec::new()).await;
    assert_eq!(early.unwrap_err().reason(), Reason::PushOffCadence);
    push(&weights, start(0, "by file"), whole(1.0))
        .await
        .unwrap();
    let again = by_uri_at(&weights, 0, at("none"), Vec::new()).await;
    assert_eq!(again.unwrap().version, 1, "it is published already");
    let none = by_uri_at(&weights, 1, at("none"), Vec::new()).await;
    assert_eq!(none.unwrap_err().reason(), Reason::WeightsRefused);
    assert!(weights.traffic().borrow().refused.contains_key(&(0, 1)));
}

#[tokio::test]
async fn a_stored_file_is_pushed_as_if_it_had_been_sent() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let sent = push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    let uri = weights.book().borrow().newest().unwrap().snapshot_uri;
    let bytes = bench
        .stores
        .open(&uri)
        .unwrap()
        .get("")
        .await
        .unwrap()
        .to_vec();
    let digest = blake3::hash(&bytes).as_bytes().to_vec();
    let stored = by_file(&bench, &weights, 1, bytes.clone(), digest)
        .await
        .unwrap();
    assert_eq!((stored.version, &stored.digest), (2, &sent.digest));
    // Another file than the one that was meant, and one that diverged.
    let other = by_file(&bench, &weights, 2, bytes.clone(), vec![7; 32]).await;
    assert_eq!(other.unwrap_err().reason(), Reason::WeightsRefused);
    let mut diverged = bytes;
    let end = diverged.len();
    diverged[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let diverged = by_file(&bench, &weights, 2, diverged, Vec::new()).await;
    assert_eq!(refusal(diverged), refused("scale"));
}

#[tokio::test]
async fn digests_are_those_of_the_tensors_that_were_pushed() {
    let bench = Bench::new();
    let weights = bench.open().await;
    assert_eq!(
        weights.digests(None, 0).await.unwrap_err().reason(),
        Reason::WeightsMissing
    );
    push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    push(&weights, start(1, "p"), whole(2.0)).await.unwrap();
    let of = |name: &str, found: &superbatch_proto::v1::GetWeightsDigestsResponse| {
        let tensor = found
            .tensors
            .iter()
            .find(|tensor| tensor.name == name)
            .unwrap();
        tensor.blake3.to_vec()
    };
    let hash = |value: f32| blake3::hash(&value.to_le_bytes()).as_bytes().to_vec();
    let newest = weights.digests(None, 0).await.unwrap();
    assert_eq!((of("scale", &newest), newest.tensors.len()), (hash(2.0), 3));
    assert_eq!(newest.version.unwrap().version, 2);
    let first = weights.digests(Some(1), 0).await.unwrap();
    assert_eq!(of("scale", &first), hash(1.0));
    assert_eq!(first.next_tensor_offset, None);
    let rest = weights.digests(Some(1), 2).await.unwrap();
    assert_eq!(rest.tensors, first.tensors[2..]);
}

#[tokio::test]
async fn a_roll_back_is_in_force_after_a_restart_too() {
    let bench = Bench::new();
    let weights = bench.open().await;
    for step in 0..3 {
        push(&weights, start(step, "p"), whole(1.0 + step as f32))
            .await
            .unwrap();
    }
    assert_eq!(
        weights.roll_back(9, CHAIN, &[]).await.unwrap_err().reason(),
        Reason::WeightsMissing
    );
    assert_eq!(
        weights
            .roll_back(3, CHAIN, &[])
            .await
            .unwrap_err()
            .value("field"),
        Some("version")
    );
    let (version, through) = weights.roll_back(1, CHAIN, &[]).await.unwrap();
    assert_eq!((version.step, through), (0, 3));
    for weights in [weights, bench.open().await] {
        assert_eq!(tensors(&bench, &weights, 2).await["scale"], [1.0]);
        let replaced: Vec<_> = weights
            .list(9)
            .iter()
            .map(|kept| kept.replaced_by)
            .collect();
        assert_eq!(replaced, [Some(1), Some(1), None]);
        assert_eq!(weights.list(1)[0].state(), WeightsState::Kept);
    }
    // What is pushed from now on counts, and can be taken back in turn.
    let weights = bench.open().await;
    push(&weights, start(3, "p"), whole(9.0)).await.unwrap();
    assert_eq!(tensors(&bench, &weights, 3).await["scale"], [9.0]);
    weights.roll_back(1, CHAIN, &[]).await.unwrap();
    assert_eq!(
        tensors(&bench, &bench.open().await, 3).await["scale"],
        [1.0]
    );
}

/// The state of a store that wrote a roll-back and did not say so.
async fn written(bench: &Bench, number: usize, to: u64, through: u64) {
    let run = bench.stores.open("memory:///state/runs/r").unwrap();
    let fact = format!(r#"{{"nonce":"n","to":{to},"through":{through}}}"#);
    let key = format!("rollbacks/{number:06}.json");
    run.put(&key, fact.into()).await.unwrap();
}

#[tokio::test]
async fn a_roll_back_whose_outcome_was_not_known_can_be_repeated() {
    let bench = Bench::new();
    let weights = bench.open().await;
    for step in 0..3 {
        push(&weights, start(step, "p"), whole(1.0 + step as f32))
            .await
            .unwrap();
    }
    written(&bench, 0, 1, 3).await;
    let (version, through) = weights.roll_back(1, CHAIN, &[]).await.unwrap();
    assert_eq!((version.version, through), (1, 3));
    let (version, _) = weights.roll_back(1, CHAIN, &[]).await.unwrap();
    assert_eq!(version.version, 1, "once more it changes nothing");
    let run = bench.stores.open("memory:///state/runs/r").unwrap();
    assert_eq!(run.list("rollbacks").await.unwrap().len(), 1);
    // Another one is there, which this process does not know: both are in force, in their order.
    push(&weights, start(3, "p"), whole(9.0)).await.unwrap();
    written(&bench, 1, 1, 4).await;
    let (version, through) = weights.roll_back(3, CHAIN, &[]).await.unwrap();
    assert_eq!((version.version, through), (3, 4));
    for weights in [weights, bench.open().await] {
        assert_eq!(weights.rollbacks(), 3);
        assert!(weights.is_taken_back_since(1, 4) && !weights.is_taken_back_since(3, 4));
    }
}

#[tokio::test]
async fn no_roll_back_goes_to_another_trajectory_or_behind_a_reference() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let later = |generation, step, id: &str| PushStart {
        generation,
        ..start(step, id)
    };
    for step in 0..3 {
        push(&weights, start(step, "p"), whole(1.0)).await.unwrap();
    }
    push(&weights, later(1, 1, "q"), whole(2.0)).await.unwrap();
    let began = [
        CHAIN[0],
        Began {
            generation: 1,
            step: 1,
        },
    ];
    for taken_back in [2, 3] {
        let error = weights
            .roll_back(taken_back, &began, &[])
            .await
            .unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        assert!(error.to_string().contains("a rewind took back"), "{error}");
    }
    let error = weights.roll_back(1, &began, &[0, 1]).await.unwrap_err();
    assert_eq!(error.value("reference_step"), Some("1"));
    assert!(error.to_string().contains("version 4, pushed after step 1"));
    weights.roll_back(1, &began, &[0]).await.unwrap();
    let found = weights.book().borrow().find(Due::Exactly(1), &began);
    assert_eq!(found.unwrap().version.version, 1);
}

#[tokio::test]
async fn a_reference_is_there_or_comes_yet() {
    let bench = Bench::new();
    let weights = first_forgotten(&bench).await;
    for (step, is_past, may_be) in [
        (0, false, false),
        (1, true, true),
        (7, false, true),
        (7, true, false),
    ] {
        let found = weights.check_reference(step, CHAIN, is_past);
        assert_eq!(found.is_ok(), may_be, "{step} {is_past}");
        let reason = found.err().map(|error| error.reason());
        assert_eq!(reason, (!may_be).then_some(Reason::WeightsMissing));
    }
    // What a rewind took back comes again.
    let rewound = Began {
        generation: 1,
        step: 2,
    };
    let began = [CHAIN[0], rewound];
    assert!(weights.check_reference(2, CHAIN, false).is_ok());
    assert!(weights.check_reference(2, &began, false).is_ok());
    // Other weights that serve in their place are another reference.
    weights.roll_back(2, CHAIN, &[]).await.unwrap();
    let error = weights.check_reference(2, CHAIN, false).unwrap_err();
    assert!(error.to_string().contains("were rolled back"), "{error}");
}
