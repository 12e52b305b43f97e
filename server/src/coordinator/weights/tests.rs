//! Pushes against state in memory, with a verifier that reads the snapshot for real and compares it
//! with a shape.
mod ahead;
mod forked;
mod stores;
mod versions;

use super::*;
use crate::storage::{StorageConfig, Stores};
use futures::{FutureExt, StreamExt, channel::mpsc, stream};
use safetensors::SafeTensors;
use std::sync::atomic::{AtomicUsize, Ordering};
use superbatch_proto::{
    Checksum,
    v1::{
        PartHeader, PushStart, PushWeightsRequest, Reason, TensorDtype, WeightsVersion, lag::Bound,
        push_weights_request::Message,
    },
};
use tonic::Status;

type Messages = Vec<PushWeightsRequest>;

/// Reads the snapshot back and checks digest, names and shapes, as a worker does, but for the
/// forward pass.
struct ReadsBack {
    stores: Stores,
    shape: ModelShape,
    /// A tensor that the canary batch is said to fail on.
    refuse: Mutex<Option<&'static str>>,
    /// What keeps it from looking.
    fails: Mutex<Option<Reason>>,
    verified: AtomicUsize,
    /// While this is held for writing, it does not answer.
    held: tokio::sync::RwLock<()>,
    /// What checking in memory comes to, if there is a worker for it.
    in_memory: Mutex<Option<Result<(), Reason>>>,
}

#[async_trait]
impl Verifier for ReadsBack {
    async fn verify(&self, snapshot_uri: &str, digest: &str) -> Result<ModelShape> {
        self.verified.fetch_add(1, Ordering::SeqCst);
        drop(self.held.read().await);
        if let Some(reason) = *self.fails.lock().unwrap() {
            return Err(Error::new(reason, "no space left"));
        }
        let bytes = self.stores.open(snapshot_uri)?.get("").await?;
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), digest);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let found = file.tensors().into_iter();
        let tensors: BTreeMap<String, Vec<u64>> = found
            .map(|(name, view)| (name, view.shape().iter().map(|&n| n as u64).collect()))
            .collect();
        let mut expected = self.shape.tensors.clone();
        expected
            .retain(|name, _| tensors.contains_key(name) || !self.shape.optional.contains(name));
        assert_eq!(expected, tensors);
        match *self.refuse.lock().unwrap() {
            Some(tensor) => Err(Error::new(
                Reason::WeightsRefused,
                "the canary batch is not finite",
            )
            .with("tensor", tensor)),
            None => Ok(self.shape.clone()),
        }
    }

    async fn verify_in_memory(
        &self,
        snapshot_uri: &str,
        pushed: Pushed,
    ) -> Result<Option<ModelShape>> {
        let file: Vec<_> = pushed.pieces().collect();
        assert_eq!(
            blake3::hash(&file.concat()).to_hex().as_str(),
            pushed.digest
        );
        assert!(snapshot_uri.contains(&pushed.digest));
        match *self.in_memory.lock().unwrap() {
            None => Ok(None),
            Some(Ok(())) => Ok(Some(self.shape.clone())),
            Some(Err(reason)) => Err(Error::new(reason, "said by the worker in this process")),
        }
    }

    async fn shape(&self) -> Result<ModelShape> {
        Ok(self.shape.clone())
    }
}

struct Bench {
    stores: Stores,
    verifier: Arc<ReadsBack>,
    spec: RunWeights,
}

impl Bench {
    fn new() -> Self {
        let stores = Stores::new(StorageConfig::default());
        let tensors = BTreeMap::from([
            ("a.weight".into(), vec![4, 2]),
            ("b.bias".into(), vec![3]),
            ("scale".into(), vec![]),
            ("bias".into(), vec![]),
        ]);
        let shape = ModelShape {
            tensors,
            optional: BTreeSet::from(["bias".into()]),
            logit_scale: 10.0,
            logit_bias: Some(-10.0),
        };
        let (refuse, fails, verified) =
            (Mutex::default(), Mutex::default(), AtomicUsize::default());
        let verifier = Arc::new(ReadsBack {
            stores: stores.clone(),
            shape,
            refuse,
            fails,
            verified,
            held: tokio::sync::RwLock::default(),
            in_memory: Mutex::default(),
        });
        let spec = RunWeights {
            run_id: "r".into(),
            lag: Lag {
                bound: Some(Bound::Exact(1)),
            },
            push_every_steps: 1,
            first_push: true,
            initial: None,
            push_bytes_max: 1 << 10,
            push_deadline: Duration::from_secs(60),
            owner: None,
        };
        Self {
            stores,
            verifier,
            spec,
        }
    }

    async fn open(&self) -> Weights {
        let run = self.stores.open("memory:///state/runs/r").unwrap();
        Weights::open(run, self.spec.clone(), self.verifier.clone())
            .await
            .unwrap()
    }

    async fn snapshots(&self) -> usize {
        self.stores
            .open("memory:///state/runs/r/snapshots")
            .unwrap()
            .list("")
            .await
            .unwrap()
            .len()
    }
}

fn start(step: i64, push_id: &str) -> PushStart {
    PushStart {
        run_id: "r".into(),
        step,
        push_id: push_id.into(),
        ..Default::default()
    }
}

fn message(message: Message) -> PushWeightsRequest {
    PushWeightsRequest {
        message: Some(message),
    }
}

fn part(name: &str, shape: &[u64], start: &[u64], extent: &[u64], values: &[f32]) -> Messages {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let header = PartHeader {
        name: name.into(),
        dtype: TensorDtype::F32.into(),
        global_shape: shape.into(),
        start: start.into(),
        extent: extent.into(),
        xxh3: Checksum::of(&bytes).to_vec().into(),
    };
    // Cut at no element boundary.
    let data = bytes
        .chunks(7)
        .map(|data| message(Message::Data(data.to_vec().into())));
    std::iter::once(message(Message::Part(header)))
        .chain(data)
        .collect()
}

fn a_rows(from: u64, rows: u64) -> Messages {
    let values: Vec<f32> = (from * 2..(from + rows) * 2).map(|x| x as f32).collect();
    part("a.weight", &[4, 2], &[from, 0], &[rows, 2], &values)
}

fn b(values: [f32; 3]) -> Messages {
    part("b.bias", &[3], &[0], &[3], &values)
}

fn scale(value: f32) -> Messages {
    part("scale", &[], &[], &[], &[value])
}

fn whole(value: f32) -> Messages {
    [a_rows(0, 4), b([0.5; 3]), scale(value)].concat()
}

fn sent(
    messages: Messages,
) -> impl futures::Stream<Item = Result<PushWeightsRequest, Status>> + Send + Unpin {
    stream::iter(messages.into_iter().map(Ok))
}

async fn push(weights: &Weights, start: PushStart, messages: Messages) -> Result<WeightsVersion> {
    weights
        .push(start.generation, &[], start, sent(messages))
        .await
}

/// The reason and the tensor of a refusal.
fn refusal(result: Result<WeightsVersion>) -> (Reason, Option<String>) {
    let error = result.unwrap_err();
    (error.reason(), error.value("tensor").map(str::to_owned))
}

fn refused(tensor: &str) -> (Reason, Option<String>) {
    (Reason::WeightsRefused, Some(tensor.into()))
}

const CHAIN: &[Began] = &[Began {
    generation: 0,
    step: 0,
}];

#[tokio::test]
async fn one_stream_brings_all_and_is_published() {
    let bench = Bench::new();
    let weights = bench.open().await;
    // Position ids, in a dtype of their own, are dropped.
    let ids = PartHeader {
        name: "text.embeddings.position_ids".into(),
        global_shape: vec![1, 9],
        ..Default::default()
    };
    let ids = vec![
        message(Message::Part(ids)),
        message(Message::Data(vec![0; 72].into())),
    ];
    let version = push(&weights, start(3, "p"), [ids, whole(2.0)].concat())
        .await
        .unwrap();
    assert_eq!(
        (version.version, version.step, version.generation),
        (1, 3, 0)
    );
    let found = weights
        .book()
        .borrow()
        .find(due(5, &bench.spec.lag, 1), CHAIN)
        .unwrap();
    assert_eq!(
        (&found.version, found.logit_scale, found.logit_bias),
        (&version, 10.0, Some(-10.0))
    );
    let bytes = bench
        .stores
        .open(&found.snapshot_uri)
        .unwrap()
        .get("")
        .await
        .unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values: Vec<f32> = file
        .tensor("a.weight")
        .unwrap()
        .data()
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(values, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    assert_eq!(file.tensor("scale").unwrap().data(), 2.0f32.to_le_bytes());
    assert!(weights.traffic().borrow().staging.is_empty());
}

#[tokio::test]
async fn ranks_push_their_shards_and_get_one_answer() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let of = |rank| PushStart {
        rank,
        expected_parts: 6,
        ..start(0, "p")
    };
    // The third rank's shard of `a.weight` is empty, as FSDP leaves it if rows run out.
    let shards = [
        [a_rows(2, 2), scale(1.0)].concat(),
        [a_rows(0, 1), b([1.0; 3])].concat(),
        [a_rows(1, 1), a_rows(4, 0)].concat(),
    ];
    let [x, y, z] = shards;
    let (x, y, z) = tokio::join!(
        push(&weights, of(0), x),
        push(&weights, of(1), y),
        push(&weights, of(2), z)
    );
    let version = x.unwrap();
    assert_eq!((version.version, &version), (1, &y.unwrap()));
    assert_eq!(version, z.unwrap());
    // The bytes do not depend on how the weights were cut.
    let again = push(
        &weights,
        start(1, "q"),
        [scale(1.0), b([1.0; 3]), a_rows(0, 4)].concat(),
    )
    .await
    .unwrap();
    assert_eq!((again.version, again.digest), (2, version.digest));
    assert_eq!(bench.snapshots().await, 2, "no two versions share a file");
}

#[tokio::test]
async fn what_is_wrong_is_refused_by_name_and_the_old_version_serves_on() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let old = push(&weights, start(0, "old"), whole(1.0)).await.unwrap();
    let wrong_checksum = {
        let mut messages = whole(1.0);
        let Some(Message::Part(header)) = &mut messages[0].message else {
            panic!("a header comes first")
        };
        header.xxh3 = vec![0; 16].into();
        messages
    };
    let half = {
        let mut messages = whole(1.0);
        let Some(Message::Part(header)) = &mut messages[0].message else {
            panic!("a header comes first")
        };
        header.set_dtype(TensorDtype::F16);
        messages
    };
    let nan = [a_rows(0, 4), b([0.0, f32::NAN, 0.0]), scale(f32::INFINITY)].concat();
    let cases = [
        (
            "gap",
            [a_rows(0, 2), a_rows(3, 1), b([0.0; 3]), scale(1.0)].concat(),
            refused("a.weight"),
        ),
        (
            "missing",
            [a_rows(0, 4), scale(1.0)].concat(),
            refused("b.bias"),
        ),
        (
            "overlap",
            [a_rows(0, 3), a_rows(2, 2)].concat(),
            (Reason::PushConflict, Some("a.weight".into())),
        ),
        (
            "shape",
            part("b.bias", &[2], &[0], &[2], &[0.0; 2]),
            refused("b.bias"),
        ),
        (
            "outside",
            part("b.bias", &[3], &[u64::MAX], &[3], &[0.0; 3]),
            refused("b.bias"),
        ),
        ("name", part("c", &[1], &[0], &[1], &[0.0]), refused("c")),
        ("nan", nan, refused("b.bias")),
        ("checksum", wrong_checksum, refused("a.weight")),
        ("too many bytes", half, refused("a.weight")),
        (
            "too few bytes",
            [a_rows(0, 4)[..2].to_vec(), b([0.0; 3])].concat(),
            refused("a.weight"),
        ),
        (
            "no header",
            vec![message(Message::Data(vec![0].into()))],
            (Reason::InvalidArgument, None),
        ),
    ];
    for (what, messages, expected) in cases {
        assert_eq!(
            refusal(push(&weights, start(1, what), messages).await),
            expected,
            "{what}"
        );
        assert_eq!(
            weights.book().borrow().newest().unwrap().version,
            old,
            "{what}"
        );
        assert!(weights.traffic().borrow().staging.is_empty(), "{what}");
    }
    *bench.verifier.refuse.lock().unwrap() = Some("scale");
    assert_eq!(
        refusal(push(&weights, start(1, "canary"), whole(9.0)).await),
        refused("scale")
    );
    assert_eq!(
        (
            bench.snapshots().await,
            weights.book().borrow().newest().unwrap().version
        ),
        (1, old)
    );
    *bench.verifier.refuse.lock().unwrap() = None;
    assert_eq!(
        push(&weights, start(1, "canary"), whole(9.0))
            .await
            .unwrap()
            .version,
        2,
        "the same push may be tried again"
    );
}

#[tokio::test]
async fn a_worker_of_this_process_spares_the_snapshot_a_read() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let says = |said| *bench.verifier.in_memory.lock().unwrap() = said;
    let read_back = || bench.verifier.verified.load(Ordering::SeqCst);
    says(Some(Ok(())));
    let first = push(&weights, start(0, "a"), whole(1.0)).await.unwrap();
    assert_eq!(
        (first.version, read_back(), bench.snapshots().await),
        (1, 0, 1)
    );
    says(Some(Err(Reason::WeightsRefused)));
    let second = || push(&weights, start(1, "b"), whole(2.0));
    assert_eq!(second().await.unwrap_err().reason(), Reason::WeightsRefused);
    assert_eq!((read_back(), bench.snapshots().await), (0, 1));
    // If that worker is lost, another one reads what was uploaded.
    says(Some(Err(Reason::NoWorkers)));
    assert_eq!(second().await.unwrap().version, 2);
    assert_eq!((read_back(), bench.snapshots().await), (1, 2));
}

#[tokio::test]
async fn wrapped_names_and_one_element_are_the_learners_own() {
    let weights = Bench::new().open().await;
    let wrapped: Messages = [
        part("module.a.weight", &[4, 2], &[0, 0], &[4, 2], &[1.0; 8]),
        part("_orig_mod.b.bias", &[3], &[0], &[3], &[0.5; 3]),
        part("scale", &[1], &[0], &[1], &[3.0]),
        part("module.bias", &[1], &[0], &[1], &[-2.0]),
    ]
    .concat();
    let wrapped = push(&weights, start(0, "p"), wrapped).await.unwrap();
    let bias = part("bias", &[], &[], &[], &[-2.0]);
    let plain = [
        part("a.weight", &[4, 2], &[0, 0], &[4, 2], &[1.0; 8]),
        b([0.5; 3]),
        scale(3.0),
        bias,
    ];
    let plain = push(&weights, start(1, "q"), plain.concat()).await.unwrap();
    assert_eq!(wrapped.digest, plain.digest);
}

#[tokio::test]
async fn a_wrong_name_is_told_the_nearest_right_one() {
    let weights = Bench::new().open().await;
    let misnamed = part("head.b.bias", &[3], &[0], &[3], &[0.0; 3]);
    let said = push(&weights, start(0, "p"), misnamed)
        .await
        .unwrap_err()
        .chain();
    assert!(
        said.contains("head.b.bias is no tensor") && said.contains("it has 'b.bias'"),
        "{said}"
    );
}

#[tokio::test]
async fn a_push_that_fails_in_passing_is_told_as_such_until_it_is_published() {
    let bench = Bench::new();
    let weights = bench.open().await;
    *bench.verifier.fails.lock().unwrap() = Some(Reason::StorageUnreachable);
    assert!(push(&weights, start(0, "p"), whole(1.0)).await.is_err());
    let failed = || weights.traffic().borrow().failed.get(&(0, 0)).cloned();
    assert!(failed().is_some_and(|cause| cause.contains("no space left")));
    assert!(
        weights.traffic().borrow().refused.is_empty(),
        "it may come yet"
    );
    *bench.verifier.fails.lock().unwrap() = None;
    push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    assert_eq!(failed(), None);
}

#[tokio::test]
async fn a_refusal_reaches_every_rank() {
    let weights = Bench::new().open().await;
    let of = |rank| PushStart {
        rank,
        expected_parts: 3,
        ..start(0, "p")
    };
    let bad = part("c", &[1], &[0], &[1], &[0.0]);
    let (good, bad) = tokio::join!(
        push(&weights, of(0), a_rows(0, 4)),
        push(&weights, of(1), bad)
    );
    assert_eq!((refusal(good), refusal(bad)), (refused("c"), refused("c")));
}

#[tokio::test]
async fn what_may_not_be_pushed_is_refused_at_once() {
    let mut bench = Bench::new();
    bench.spec.push_every_steps = 4;
    let weights = bench.open().await;
    let mut reasons = Vec::new();
    let bases = PushStart {
        base_version: Some(1),
        ..start(3, "p")
    };
    for start in [start(2, "p"), start(-2, "p"), start(3, ""), bases] {
        reasons.push(
            push(&weights, start, whole(1.0))
                .await
                .unwrap_err()
                .reason(),
        );
    }
    assert_eq!(
        reasons,
        [
            Reason::PushOffCadence,
            Reason::PushOffCadence,
            Reason::InvalidArgument,
            Reason::WeightsMissing
        ]
    );
    let stale = weights.push(1, &[], start(3, "p"), sent(whole(1.0))).await;
    assert_eq!(refusal(stale).0, Reason::GenerationStale);
    assert_eq!(
        push(&weights, start(-1, "i"), whole(1.0))
            .await
            .unwrap()
            .step,
        -1
    );
    bench.spec.push_bytes_max = 40;
    let large = push(&bench.open().await, start(3, "p"), whole(1.0)).await;
    assert_eq!(
        refusal(large),
        (Reason::MessageTooLarge, Some("b.bias".into()))
    );
    bench.spec.lag = Lag {
        bound: Some(Bound::AtMost(2)),
    };
    bench.spec.first_push = false;
    let weights = bench.open().await;
    assert_eq!(
        refusal(push(&weights, start(-1, "j"), whole(1.0)).await).0,
        Reason::PushOffCadence
    );
    assert_eq!(
        refusal(push(&weights, start(2, "p"), whole(1.0)).await).0,
        Reason::MessageTooLarge,
        "the cadence is no rule"
    );
}

#[tokio::test]
async fn a_push_that_begins_with_silence_is_ended_by_name() {
    let mut silence = stream::pending::<Result<PushWeightsRequest, Status>>();
    let begun = member::read_start(&mut silence, Duration::from_millis(10)).await;
    let error = begun.unwrap_err();
    assert_eq!(error.value("field"), Some("start"));
    assert!(error.to_string().contains("silence, for 0.01 s"), "{error}");
}

#[tokio::test]
async fn ids_and_parts_of_a_push_are_bounded_before_they_are_kept() {
    let weights = Bench::new().open().await;
    let many = PushStart {
        expected_parts: 1 << 21,
        ..start(3, "p")
    };
    for (start, field) in [
        (start(3, &"p".repeat(257)), "push_id"),
        (many, "expected_parts"),
    ] {
        let error = push(&weights, start, whole(1.0)).await.unwrap_err();
        assert_eq!(error.value("field"), Some(field));
    }
}

/// A model of one tensor.
fn staged(rows: u64) -> staging::Staged {
    let shape = ModelShape {
        tensors: [("t".to_owned(), vec![rows])].into(),
        optional: Default::default(),
        logit_scale: 1.0,
        logit_bias: None,
    };
    staging::Staged::new(Arc::new(shape), 0, 1 << 30)
}

fn one_part(start: u64, extent: u64) -> PartHeader {
    PartHeader {
        name: "t".into(),
        dtype: TensorDtype::F32.into(),
        global_shape: vec![1 << 20],
        start: vec![start],
        extent: vec![extent],
        ..Default::default()
    }
}

#[test]
fn parts_of_a_push_are_bounded() {
    let mut staged = staged(1 << 20);
    let named = PartHeader {
        name: "t".repeat(2000),
        ..one_part(0, 1)
    };
    let error = staged.reserve(0, named).err().unwrap();
    assert_eq!(error.value("field"), Some("name"));
    let most = crate::bounds::PARTS_OF_TENSOR_MAX as u64;
    (0..most).for_each(|n| drop(staged.reserve(0, one_part(n, 1)).unwrap()));
    let error = staged.reserve(0, one_part(most, 1)).err().unwrap();
    assert_eq!(
        (error.value("field"), error.value("tensor")),
        (Some("part"), Some("t"))
    );
}

/// A rank whose shard is empty sends parts of no extent. They hold nothing, but each is a slot.
#[test]
fn parts_of_no_extent_are_bounded_and_compared_with_few() {
    let mut staged = staged(1 << 20);
    let most = crate::bounds::PARTS_MAX as u64;
    (0..most).for_each(|_| drop(staged.reserve(0, one_part(0, 0)).unwrap()));
    let error = staged.reserve(0, one_part(0, 0)).err().unwrap();
    assert_eq!(error.value("field"), Some("part"));
    staged.drop_stream(0);
    staged.reserve(1, one_part(0, 1 << 20)).unwrap();
}

#[tokio::test]
async fn a_repeated_push_answers_the_same_and_another_is_a_conflict() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let first = push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    let again = weights
        .push(
            0,
            &[],
            start(0, "p"),
            stream::pending::<Result<_, Status>>(),
        )
        .await
        .unwrap();
    assert_eq!(
        (first, bench.verifier.verified.load(Ordering::SeqCst)),
        (again, 1),
        "nothing needs to be sent again"
    );
    assert_eq!(
        refusal(push(&weights, start(0, "q"), whole(1.0)).await).0,
        Reason::PushConflict
    );
    // Another coordinator, which opened the run before that push, finds it when it publishes.
    let run = bench.stores.open("memory:///state/runs/r").unwrap();
    let late = Weights::open(
        run.below("elsewhere"),
        bench.spec.clone(),
        bench.verifier.clone(),
    )
    .await
    .unwrap();
    let fact = run.get("pushes/0/0.json").await.unwrap();
    run.put("elsewhere/pushes/0/0.json", fact).await.unwrap();
    assert_eq!(
        refusal(push(&late, start(0, "q"), whole(1.0)).await).0,
        Reason::PushConflict
    );
    assert_eq!(
        push(&late, start(0, "p"), whole(1.0))
            .await
            .unwrap()
            .version,
        1
    );
}

#[tokio::test]
async fn a_broken_stream_may_come_again() {
    let weights = Bench::new().open().await;
    let of = |rank| PushStart {
        rank,
        expected_parts: 3,
        ..start(0, "p")
    };
    let other = push(&weights, of(0), a_rows(0, 4));
    tokio::pin!(other);
    assert!(
        (&mut other).now_or_never().is_none(),
        "it waits for the other rank"
    );
    // Broken off by the transport, by a quiet end inside of a part, and by the call's cancellation.
    let broken = sent(b([0.0; 3])).chain(stream::iter([Err(Status::unavailable("reset"))]));
    assert_eq!(
        refusal(weights.push(0, &[], of(1), broken).await).0,
        Reason::InvalidArgument
    );
    let short = b([0.0; 3])[..2].to_vec();
    assert_eq!(
        refusal(push(&weights, of(1), short).await).0,
        Reason::InvalidArgument
    );
    let hanging = sent(b([0.0; 3])).chain(stream::pending());
    assert!(
        weights
            .push(0, &[], of(1), hanging)
            .now_or_never()
            .is_none()
    );
    assert_eq!(
        weights
            .traffic()
            .borrow()
            .staging
            .iter()
            .collect::<Vec<_>>(),
        [&(0, 0)]
    );
    let (other, again) = tokio::join!(
        other,
        push(&weights, of(1), [b([0.0; 3]), scale(1.0)].concat())
    );
    assert_eq!((other.unwrap(), 1), (again.unwrap(), 1));
}

#[tokio::test]
async fn a_rank_that_comes_again_before_its_old_stream_is_seen_to_break_takes_over() {
    let weights = Bench::new().open().await;
    let (sender, receiver) = mpsc::unbounded();
    let old = weights.push(0, &[], start(0, "p"), receiver);
    tokio::pin!(old);
    for message in a_rows(0, 4) {
        sender.unbounded_send(Ok(message)).unwrap();
    }
    assert!((&mut old).now_or_never().is_none());
    let other = PushStart {
        rank: 1,
        ..start(0, "p")
    };
    assert_eq!(
        refusal(push(&weights, other, whole(1.0)).await).0,
        Reason::PushConflict,
        "one stream brings all"
    );
    let (old, new) = tokio::join!(old, push(&weights, start(0, "p"), whole(1.0)));
    let old = old.unwrap_err();
    assert_eq!(
        (old.reason(), new.unwrap().version),
        (Reason::PushConflict, 1)
    );
    let why = "a newer stream of rank 0 brings the push of step 0";
    assert!(old.to_string().contains(why), "{old}");
}

#[tokio::test]
async fn a_stream_that_arrives_after_the_one_sent_again_takes_nothing_over() {
    let weights = Bench::new().open().await;
    let of = |sender, attempt| PushStart {
        sender,
        attempt,
        ..start(0, "p")
    };
    let (sender, receiver) = mpsc::unbounded();
    let mut newer = Box::pin(weights.push(0, &[], of(7, 1), receiver));
    for message in a_rows(0, 4) {
        sender.unbounded_send(Ok(message)).unwrap();
    }
    assert!((&mut newer).now_or_never().is_none());
    let late = push(&weights, of(7, 0), whole(9.0)).await.unwrap_err();
    assert_eq!(late.reason(), Reason::PushConflict);
    assert!(late.to_string().contains("arrives late"), "{late}");
    for message in [b([0.0; 3]), scale(1.0)].concat() {
        sender.unbounded_send(Ok(message)).unwrap();
    }
    drop(sender);
    assert_eq!(newer.await.unwrap().version, 1);
}

#[tokio::test]
async fn a_trainer_that_starts_again_takes_over_however_often_the_old_one_tried() {
    let weights = Bench::new().open().await;
    let of = |sender, attempt| PushStart {
        sender,
        attempt,
        ..start(0, "p")
    };
    let (_sender, receiver) = mpsc::unbounded();
    let mut old = Box::pin(weights.push(0, &[], of(7, 5), receiver));
    assert!((&mut old).now_or_never().is_none());
    assert_eq!(
        push(&weights, of(8, 0), whole(1.0)).await.unwrap().version,
        1
    );
    assert_eq!(refusal(old.await).0, Reason::PushConflict);
}

#[tokio::test]
async fn attempts_of_a_client_that_names_no_sender_are_not_compared() {
    let weights = Bench::new().open().await;
    let attempted = |attempt| PushStart {
        attempt,
        ..start(0, "p")
    };
    let (_sender, receiver) = mpsc::unbounded();
    let mut old = Box::pin(weights.push(0, &[], attempted(5), receiver));
    assert!((&mut old).now_or_never().is_none());
    let new = push(&weights, attempted(0), whole(1.0)).await.unwrap();
    assert_eq!(new.version, 1);
    assert_eq!(refusal(old.await).0, Reason::PushConflict);
}

#[tokio::test]
async fn a_trainer_of_another_world_size_takes_over_from_ranks_that_linger() {
    let weights = Bench::new().open().await;
    let sharded = |rank| PushStart {
        rank,
        expected_parts: 7,
        ..start(0, "p")
    };
    let mut lingering = Vec::new();
    for rank in [1, 2] {
        let (sender, receiver) = mpsc::unbounded();
        let mut old = Box::pin(weights.push(0, &[], sharded(rank), receiver));
        if rank == 1 {
            for message in a_rows(0, 4) {
                sender.unbounded_send(Ok(message)).unwrap();
            }
        }
        assert!((&mut old).now_or_never().is_none());
        lingering.push((sender, old));
    }
    let anew = PushStart {
        incarnation: "anew".into(),
        ..start(0, "p")
    };
    let new = push(&weights, anew, whole(1.0)).await.unwrap();
    assert_eq!(new.version, 1);
    for (sender, old) in lingering {
        let old = old.await.unwrap_err();
        assert_eq!(old.reason(), Reason::PushConflict);
        let why = "rank 0 of the trainer's start 'anew' took the push of step 0 over";
        assert!(old.to_string().contains(why), "{old}");
        drop(sender);
    }
}

#[tokio::test]
async fn a_straggler_takes_no_push_back_from_the_start_that_replaced_it() {
    let weights = Bench::new().open().await;
    let of = |incarnation: &str, rank, expected_parts| PushStart {
        rank,
        expected_parts,
        incarnation: incarnation.into(),
        ..start(0, "p")
    };
    let (sender, receiver) = mpsc::unbounded();
    let mut old = Box::pin(weights.push(0, &[], of("old", 0, 4), receiver));
    // All of the old start's rank 0. Its parts must not be mixed with those of the new one.
    for message in [a_rows(0, 2), a_rows(2, 2)].concat() {
        sender.unbounded_send(Ok(message)).unwrap();
    }
    assert!((&mut old).now_or_never().is_none());
    let mut new = Box::pin(push(&weights, of("new", 0, 3), a_rows(0, 4)));
    assert!((&mut new).now_or_never().is_none());
    assert_eq!(refusal(old.await).0, Reason::PushConflict);
    // The old start comes again, with its own cut and with that of the new one.
    for parts in [4, 3] {
        let late = push(&weights, of("old", 1, parts), b([9.0; 3])).await;
        let error = late.unwrap_err();
        assert_eq!(error.reason(), Reason::WorldSizeConflict);
        assert!(error.to_string().contains("straggler"), "{error}");
    }
    let rest = push(
        &weights,
        of("new", 1, 3),
        [b([0.0; 3]), scale(1.0)].concat(),
    );
    let (new, rest) = tokio::join!(new, rest);
    assert_eq!((new.unwrap().version, rest.unwrap().version), (1, 1));
}

#[tokio::test]
async fn the_start_before_takes_no_push_back_from_one_that_has_not_asked_yet() {
    let weights = Bench::new().open().await;
    let of = |incarnation: &str| PushStart {
        expected_parts: 3,
        incarnation: incarnation.into(),
        ..start(0, "p")
    };
    let known = ["old".to_owned()];
    let push =
        |incarnation: &str, messages| weights.push(0, &known, of(incarnation), sent(messages));
    // It resumes, and pushes what is missing before it asks for its first step.
    let mut resumed = Box::pin(push("resumed", a_rows(0, 4)));
    assert!((&mut resumed).now_or_never().is_none());
    // The queue of the start before was cut off, and sends again what it held.
    let error = push("old", whole(9.0)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WorldSizeConflict);
    let other = PushStart {
        rank: 1,
        ..of("resumed")
    };
    let rest = [b([0.0; 3]), scale(1.0)].concat();
    let rest = weights.push(0, &known, other, sent(rest));
    let (resumed, rest) = tokio::join!(resumed, rest);
    assert_eq!((resumed.unwrap().version, rest.unwrap().version), (1, 1));
}

#[tokio::test]
async fn ranks_that_count_their_own_parts_only_learn_what_to_do() {
    let weights = Bench::new().open().await;
    let of = |rank, expected_parts| PushStart {
        rank,
        expected_parts,
        ..start(0, "p")
    };
    let mut first = Box::pin(push(&weights, of(0, 2), a_rows(0, 4)));
    assert!((&mut first).now_or_never().is_none());
    let error = push(&weights, of(1, 1), b([0.0; 3])).await.unwrap_err();
    assert_eq!(error.reason(), Reason::PushConflict);
    for part in [
        "rank 1 expects 1 parts",
        "rank 0 expects 2",
        "all_reduce",
        "incarnation",
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // The rank that was first goes on.
    let (first, rest) = tokio::join!(
        first,
        push(&weights, of(1, 2), [b([0.0; 3]), scale(1.0)].concat())
    );
    assert_eq!(
        (first.is_err(), rest.is_err()),
        (true, true),
        "three parts of two"
    );
}

#[tokio::test]
async fn two_pushes_at_once_and_two_of_one_step() {
    let weights = Bench::new().open().await;
    let waiting = weights.push(
        0,
        &[],
        start(0, "p"),
        stream::pending::<Result<_, Status>>(),
    );
    let mut waiting = Box::pin(waiting);
    assert!((&mut waiting).now_or_never().is_none());
    assert_eq!(
        refusal(push(&weights, start(0, "q"), whole(1.0)).await).0,
        Reason::PushConflict
    );
    let (one, two) = tokio::join!(
        push(&weights, start(1, "x"), whole(1.0)),
        push(&weights, start(2, "y"), whole(2.0))
    );
    let mut versions = [one.unwrap().version, two.unwrap().version];
    versions.sort_unstable();
    assert_eq!(versions, [1, 2]);
    drop(waiting);
    assert_eq!(
        push(&weights, start(0, "q"), whole(1.0))
            .await
            .unwrap()
            .version,
        3,
        "the older one has no live stream"
    );
}

#[tokio::test]
async fn ranks_that_stay_away_are_waited_for_until_the_deadline() {
    let mut bench = Bench::new();
    bench.spec.push_deadline = Duration::from_millis(20);
    let weights = bench.open().await;
    let alone = PushStart {
        expected_parts: 3,
        ..start(0, "p")
    };
    let answer = push(&weights, alone, a_rows(0, 4)).await;
    let said = answer.as_ref().unwrap_err().to_string();
    assert!(said.starts_with("2 of 3 parts"), "{said}");
    assert!(
        said.contains("only those of rank 0: each rank that holds a part calls push_weights"),
        "{said}"
    );
    assert_eq!(refusal(answer), refused("b.bias"));
    let silent = weights
        .push(
            0,
            &[],
            start(0, "p"),
            stream::pending::<Result<_, Status>>(),
        )
        .await;
    assert_eq!(refusal(silent).0, Reason::InvalidArgument);
    // Where this process reads the parts, there is no stream that a trainer could mend.
    let by_uri = PushStart {
        snapshot_uri: "s3://bucket/w.safetensors".into(),
        ..start(0, "p")
    };
    let silent = stream::pending::<Result<_, Status>>();
    let error = weights.push(0, &[], by_uri, silent).await.unwrap_err();
    assert_eq!(error.reason(), Reason::StorageUnreachable);
    assert_eq!(error.value("uri"), Some("s3://bucket/w.safetensors"));
    assert!(weights.traffic().borrow().staging.is_empty());
}

#[tokio::test]
async fn a_restart_finds_the_versions_of_all_generations() {
    let bench = Bench::new();
    let weights = bench.open().await;
    for (version, step) in (1..).zip([-1, 0, 1]) {
        push(&weights, start(step, "p"), whole(version as f32))
            .await
            .unwrap();
    }
    let rewound = PushStart {
        generation: 1,
        ..start(1, "again")
    };
    push(&weights, rewound, whole(9.0)).await.unwrap();
    let chain = [
        CHAIN[0],
        Began {
            generation: 1,
            step: 1,
        },
    ];
    let book = weights.book().borrow().clone();
    let found = |step| {
        book.find(due(step, &bench.spec.lag, 1), &chain)
            .map(|p| p.version.version)
    };
    assert_eq!([found(1), found(2), found(3)], [Some(1), Some(2), Some(4)]);
    drop(weights);
    let weights = bench.open().await;
    assert_eq!(*weights.book().borrow(), book);
    assert_eq!(
        push(
            &weights,
            PushStart {
                generation: 1,
                ..start(2, "p")
            },
            whole(2.5)
        )
        .await
        .unwrap()
        .version,
        5
    );
}

/// Retires what is old, and deletes it.
async fn forget(weights: &Weights, oldest_step: i64) -> usize {
    let retired = weights.retire_before(oldest_step, 1, &[]);
    weights.delete(&retired).await.unwrap();
    retired.len()
}

/// The steps whose weights the book finds and the store holds.
async fn served(bench: &Bench, weights: &Weights, steps: std::ops::Range<u64>) -> Vec<i64> {
    let mut served = Vec::new();
    for step in steps {
        let found = weights.book().borrow().find(Due::Exactly(step), CHAIN);
        let Some(found) = found else { continue };
        let snapshot = bench.stores.open(&found.snapshot_uri).unwrap();
        if snapshot.head("").await.unwrap().is_some() {
            served.push(found.version.step);
        }
    }
    served
}

#[tokio::test]
async fn forgotten_snapshots_are_deleted_and_stay_forgotten() {
    let bench = Bench::new();
    let weights = bench.open().await;
    for step in 0..4 {
        push(&weights, start(step, "p"), whole(step as f32))
            .await
            .unwrap();
    }
    let orphan = "snapshots/orphan.safetensors";
    let run = bench.stores.open("memory:///state/runs/r").unwrap();
    run.put(orphan, "x".into()).await.unwrap();
    assert_eq!((bench.snapshots().await, forget(&weights, 2).await), (5, 2));
    assert!(
        run.head(orphan).await.unwrap().is_some(),
        "it may be of a push that is on its way elsewhere"
    );
    for weights in [weights, bench.open().await] {
        let book = weights.book().borrow().clone();
        let found = |step| book.find(Due::Exactly(step), CHAIN).map(|p| p.version.step);
        assert_eq!(
            [found(1), found(2), found(3)],
            [None, Some(2), Some(3)],
            "the newest is always kept"
        );
        assert_eq!(book.newest().unwrap().version.version, 4);
    }
}

#[tokio::test]
async fn snapshots_whose_deletion_was_dropped_go_with_the_next() {
    let bench = Bench::new();
    let weights = bench.open().await;
    for step in 0..4 {
        push(&weights, start(step, "p"), whole(step as f32))
            .await
            .unwrap();
    }
    let dropped = weights.retire_before(1, 1, &[]);
    assert_eq!((dropped.len(), bench.snapshots().await), (1, 4));
    assert!(weights.has_before(1, 1, &[]), "one is left");
    let run = bench.stores.open("memory:///state/runs/r").unwrap();
    run.delete(&dropped[0]).await.unwrap();
    assert_eq!(
        forget(&weights, 2).await,
        2,
        "that it is gone is no failure"
    );
    assert_eq!(bench.snapshots().await, 2);
    assert!(!weights.has_before(2, 1, &[]));
}

#[tokio::test]
async fn a_former_owner_deletes_nothing_of_the_new_ones() {
    let bench = Bench::new();
    let former = bench.open().await;
    for step in 0..3 {
        push(&former, start(step, "p"), whole(step as f32))
            .await
            .unwrap();
    }
    // It is stopped after it has checked that it owns the run, and another takes over.
    let retired = former.retire_before(2, 1, &[]);
    assert_eq!(retired.len(), 2);
    let new = bench.open().await;
    for step in 3..6 {
        // Among them are the bytes that the former is about to delete.
        push(&new, start(step, "p"), whole((step - 3) as f32))
            .await
            .unwrap();
    }
    former.delete(&retired).await.unwrap();
    assert_eq!(served(&bench, &new, 2..6).await, [2, 3, 4, 5]);
    assert_eq!(
        served(&bench, &bench.open().await, 2..6).await,
        [2, 3, 4, 5]
    );
}

#[tokio::test]
async fn a_push_that_the_former_owner_refuses_leaves_the_new_ones_weights() {
    let bench = Bench::new();
    let (former, new) = (bench.open().await, bench.open().await);
    push(&new, start(0, "p"), whole(1.0)).await.unwrap();
    *bench.verifier.fails.lock().unwrap() = Some(Reason::NoWorkers);
    push(&former, start(0, "p"), whole(1.0)).await.unwrap_err();
    assert_eq!(served(&bench, &new, 0..1).await, [0]);
    assert_eq!(bench.snapshots().await, 1, "its own upload is deleted");
    *bench.verifier.fails.lock().unwrap() = None;
    // The former then publishes what is published: the new one's file serves both.
    assert_eq!(
        push(&former, start(0, "p"), whole(1.0)).await.unwrap(),
        new.book().borrow().newest().unwrap().version
    );
    assert_eq!(bench.snapshots().await, 1);
    assert_eq!(served(&bench, &former, 0..1).await, [0]);
}

#[tokio::test]
async fn a_repeated_push_puts_lost_weights_back() {
    let bench = Bench::new();
    let weights = bench.open().await;
    let version = push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    let lose = async || {
        let run = bench.stores.open("memory:///state/runs/r").unwrap();
        for (key, _) in run.list("snapshots").await.unwrap() {
            run.delete(&key).await.unwrap();
        }
    };
    lose().await;
    // Other weights are not what was published, and change nothing.
    assert_eq!(
        push(&weights, start(0, "p"), whole(2.0)).await.unwrap(),
        version
    );
    assert_eq!(served(&bench, &weights, 0..1).await, [0; 0]);
    assert_eq!(
        push(&weights, start(0, "p"), whole(1.0)).await.unwrap(),
        version
    );
    assert_eq!(served(&bench, &weights, 0..1).await, [0]);
    // Also of a run that was opened without them.
    lose().await;
    let weights = bench.open().await;
    assert_eq!(served(&bench, &weights, 0..1).await, [0; 0]);
    push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    assert_eq!(served(&bench, &weights, 0..1).await, [0]);
    // What no step needs any more is not taken again.
    push(&weights, start(1, "p"), whole(3.0)).await.unwrap();
    forget(&weights, 1).await;
    let verified = bench.verifier.verified.load(Ordering::SeqCst);
    push(&weights, start(0, "p"), whole(1.0)).await.unwrap();
    assert_eq!(bench.verifier.verified.load(Ordering::SeqCst), verified);
}

#[tokio::test]
async fn nothing_waits_for_a_verifier_that_does_not_answer() {
    let bench = Bench::new();
    let weights = bench.open().await;
    for step in 0..3 {
        push(&weights, start(step, "p"), whole(step as f32))
            .await
            .unwrap();
    }
    let held = bench.verifier.held.write().await;
    let (pushing, verified) = (
        weights.clone(),
        bench.verifier.verified.load(Ordering::SeqCst),
    );
    let pushed =
        tokio::spawn(async move { push(&pushing, start(3, "p"), whole(3.0)).await.unwrap() });
    while bench.verifier.verified.load(Ordering::SeqCst) == verified {
        tokio::task::yield_now().await;
    }
    // A commit lets old snapshots go: without the verifier's answer.
    assert_eq!(forget(&weights, 2).await, 2);
    drop(held);
    assert_eq!(pushed.await.unwrap().step, 3);
}
