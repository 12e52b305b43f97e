//! Pushes that are written while they arrive, to a local disk.
use super::*;
use crate::storage::Location;
use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};
use tempfile::TempDir;
use tokio::task::{JoinHandle, yield_now};

const A: [u64; 2] = [1024, 1024];
const B: [u64; 2] = [2048, 1024];
const MIB: usize = 1 << 20;

/// A run on a local disk, whose weights are large enough to be written ahead.
struct OnDisk {
    bench: Bench,
    folder: TempDir,
}

impl OnDisk {
    fn new() -> Self {
        let mut bench = Bench::new();
        let tensors = [("a.weight", A.to_vec()), ("b.weight", B.to_vec())];
        let tensors = tensors.into_iter().chain([("scale", vec![])]);
        let verifier = Arc::get_mut(&mut bench.verifier).unwrap();
        verifier.shape.optional.clear();
        verifier.shape.tensors = tensors
            .map(|(name, shape)| (name.to_owned(), shape))
            .collect();
        bench.spec.push_bytes_max = 64 << 20;
        let folder = tempfile::tempdir().unwrap();
        Self { bench, folder }
    }

    fn run(&self) -> Location {
        let uri = url::Url::from_file_path(self.folder.path().join("run")).unwrap();
        self.bench.stores.open(uri.as_str()).unwrap()
    }

    async fn open(&self) -> Weights {
        let (spec, verifier) = (self.bench.spec.clone(), self.bench.verifier.clone());
        Weights::open(self.run(), spec, verifier).await.unwrap()
    }

    fn snapshots(&self) -> PathBuf {
        self.folder.path().join("run/snapshots")
    }

    /// Names and inodes of all that lies with the weights' files, whatever it is called.
    fn files(&self) -> Vec<(String, u64)> {
        let entries = fs::read_dir(self.snapshots()).into_iter().flatten();
        // One may have been removed since.
        let entries = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name, entry.metadata().ok()?.ino()))
        });
        entries.collect()
    }

    /// The inodes of files that are not finished.
    fn unfinished(&self) -> Vec<u64> {
        let files = self.files().into_iter();
        files
            .filter(|(name, _)| name.contains('#'))
            .map(|(_, inode)| inode)
            .collect()
    }

    async fn until_unfinished(&self, count: usize) -> Vec<u64> {
        loop {
            let found = self.unfinished();
            if found.len() == count {
                return found;
            }
            yield_now().await;
        }
    }

    /// The value of `a.weight` that comes first in a version's file.
    fn first_of_a(&self, version: &WeightsVersion) -> f32 {
        let files = self.files().into_iter();
        let mut named = files.filter(|(name, _)| name.starts_with(&version.digest));
        let (name, _) = named.next().unwrap();
        let bytes = fs::read(self.snapshots().join(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = file.tensor("a.weight").unwrap();
        f32::from_le_bytes(tensor.data()[..4].try_into().unwrap())
    }
}

/// Rows of a tensor that has 1,024 columns.
fn rows(name: &str, shape: [u64; 2], first: u64, count: u64, value: f32) -> Messages {
    let numbers = (first * 1024..(first + count) * 1024).map(|n| value + n as f32 / 4096.0);
    let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
    let header = PartHeader {
        name: name.into(),
        dtype: TensorDtype::F32.into(),
        global_shape: shape.into(),
        start: vec![first, 0],
        extent: vec![count, 1024],
        xxh3: Checksum::of(&bytes).to_vec().into(),
    };
    let data = bytes.chunks(MIB);
    let data = data.map(|data| message(Message::Data(data.to_vec().into())));
    std::iter::once(message(Message::Part(header)))
        .chain(data)
        .collect()
}

fn a(value: f32) -> Messages {
    rows("a.weight", A, 0, A[0], value)
}

fn b(value: f32) -> Messages {
    rows("b.weight", B, 0, B[0], value)
}

fn all(value: f32) -> Messages {
    [a(value), b(value), scale(value)].concat()
}

type Sender = mpsc::UnboundedSender<Result<PushWeightsRequest, Status>>;

/// Begins a push whose messages are sent one by one.
fn begin(weights: &Weights, start: PushStart) -> (Sender, JoinHandle<Result<WeightsVersion>>) {
    let (sender, receiver) = mpsc::unbounded();
    let weights = weights.clone();
    let pushing = async move {
        let generation = start.generation;
        weights.push(generation, &[], start, receiver).await
    };
    (sender, tokio::spawn(pushing))
}

fn send(sender: &Sender, messages: Messages) {
    for message in messages {
        sender.unbounded_send(Ok(message)).unwrap();
    }
}

#[tokio::test]
async fn a_push_like_the_last_one_is_written_while_it_arrives() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    let (sender, pushing) = begin(&weights, start(1, "q"));
    // In another order than the file's, and one of them in two parts.
    let b = [
        rows("b.weight", B, 1024, 1024, 2.0),
        rows("b.weight", B, 0, 1024, 2.0),
    ];
    send(&sender, b.concat());
    let begun = disk.until_unfinished(1).await;
    send(&sender, [scale(2.0), a(2.0)].concat());
    drop(sender);
    let version = pushing.await.unwrap().unwrap();
    assert_eq!((version.version, disk.unfinished().len()), (2, 0));
    let files = disk.files().into_iter();
    let own: Vec<u64> = files
        .filter(|(name, _)| name.starts_with(&version.digest))
        .map(|(_, inode)| inode)
        .collect();
    assert_eq!(own, begun, "the file that was begun has been named");
    // The bytes do not depend on how they were written.
    let another = OnDisk::new();
    let plain = push(&another.open().await, start(0, "p"), all(2.0)).await;
    assert_eq!(plain.unwrap().digest, version.digest);
}

#[tokio::test]
async fn a_push_that_is_given_up_leaves_no_file() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    let (sender, pushing) = begin(&weights, start(1, "q"));
    send(&sender, b(2.0));
    disk.until_unfinished(1).await;
    pushing.abort();
    disk.until_unfinished(0).await;
    assert_eq!(disk.files().len(), 1, "the first version's");
    let again = push(&weights, start(1, "q"), all(2.0)).await.unwrap();
    assert_eq!(
        (again.version, disk.first_of_a(&again)),
        (2, 2.0),
        "it may come again"
    );
}

#[tokio::test]
async fn a_part_that_is_sent_again_counts_as_it_came_last() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    let of = |rank| PushStart {
        rank,
        expected_parts: 3,
        ..start(1, "q")
    };
    let (other, others) = begin(&weights, of(1));
    let (first, broken) = begin(&weights, of(0));
    send(&first, a(2.0));
    disk.until_unfinished(1).await;
    first
        .unbounded_send(Err(Status::unavailable("reset")))
        .unwrap();
    assert!(broken.await.unwrap().is_err());
    disk.until_unfinished(0).await;
    send(&other, [b(3.0), scale(3.0)].concat());
    drop(other);
    let again = push(&weights, of(0), a(3.0)).await.unwrap();
    assert_eq!(others.await.unwrap().unwrap(), again);
    assert_eq!(disk.first_of_a(&again), 3.0);
    assert!(disk.unfinished().is_empty());
}

#[tokio::test]
async fn what_was_not_expected_is_written_once_it_is_whole() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    let half = |value: f32| {
        let bytes = half::f16::from_f32(value).to_le_bytes();
        let header = PartHeader {
            name: "scale".into(),
            dtype: TensorDtype::F16.into(),
            xxh3: Checksum::of(&bytes).to_vec().into(),
            ..Default::default()
        };
        let data = Message::Data(bytes.to_vec().into());
        vec![message(Message::Part(header)), message(data)]
    };
    let (sender, pushing) = begin(&weights, start(1, "q"));
    send(&sender, a(2.0));
    disk.until_unfinished(1).await;
    send(&sender, half(2.0));
    disk.until_unfinished(0).await;
    send(&sender, b(2.0));
    drop(sender);
    let version = pushing.await.unwrap().unwrap();
    assert_eq!(disk.first_of_a(&version), 2.0);
    // The next one is expected to be like it.
    let (sender, pushing) = begin(&weights, start(2, "r"));
    send(&sender, [a(3.0), half(3.0)].concat());
    disk.until_unfinished(1).await;
    send(&sender, b(3.0));
    drop(sender);
    let version = pushing.await.unwrap().unwrap();
    assert_eq!(disk.first_of_a(&version), 3.0);
    assert_eq!((disk.files().len(), disk.unfinished().len()), (3, 0));
}

#[tokio::test]
async fn values_that_are_not_finite_are_refused_by_name_and_leave_no_file() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    let bad = [a(2.0), b(f32::NAN), scale(2.0)].concat();
    let said = push(&weights, start(1, "q"), bad).await;
    assert_eq!(refusal(said), refused("b.weight"));
    disk.until_unfinished(0).await;
    assert_eq!(disk.files().len(), 1, "the first version's");
}

#[tokio::test]
async fn two_pushes_at_once_are_written_apart() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    let (second, of_second) = begin(&weights, start(1, "q"));
    let (third, of_third) = begin(&weights, start(2, "r"));
    send(&second, a(2.0));
    send(&third, b(3.0));
    disk.until_unfinished(2).await;
    send(&third, [a(3.0), scale(3.0)].concat());
    send(&second, [b(2.0), scale(2.0)].concat());
    drop((second, third));
    let (second, third) = (of_second.await.unwrap(), of_third.await.unwrap());
    let (second, third) = (second.unwrap(), third.unwrap());
    assert_eq!(disk.first_of_a(&second), 2.0);
    assert_eq!(disk.first_of_a(&third), 3.0);
    assert_eq!((disk.files().len(), disk.unfinished().len()), (3, 0));
}

/// What the disk refuses while a push arrives is told when it is whole, as of any other push.
#[tokio::test]
async fn a_disk_that_fails_in_the_middle_of_a_push_is_told() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    let (sender, pushing) = begin(&weights, start(1, "q"));
    send(&sender, a(2.0));
    disk.until_unfinished(1).await;
    fs::remove_dir_all(disk.snapshots()).unwrap();
    fs::write(disk.snapshots(), "no folder").unwrap();
    send(&sender, [b(2.0), scale(2.0)].concat());
    drop(sender);
    let error = pushing.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::StorageUnreachable);
    assert!(
        error.to_string().contains("cannot write file://"),
        "{error}"
    );
    fs::remove_file(disk.snapshots()).unwrap();
    let again = push(&weights, start(1, "q"), all(2.0)).await.unwrap();
    assert_eq!(disk.first_of_a(&again), 2.0);
    assert_eq!((disk.files().len(), disk.unfinished().len()), (1, 0));
}

#[tokio::test]
async fn what_a_process_left_that_was_killed_goes_when_the_run_is_opened() {
    let disk = OnDisk::new();
    let weights = disk.open().await;
    push(&weights, start(0, "p"), all(1.0)).await.unwrap();
    fs::write(disk.snapshots().join("arriving.n#1"), "half of it").unwrap();
    let (sender, pushing) = begin(&weights, start(1, "q"));
    send(&sender, a(2.0));
    disk.until_unfinished(2).await;
    // As another coordinator does that takes the run over while this one still writes.
    disk.open().await;
    assert_eq!(disk.unfinished().len(), 1, "that of the writer");
    send(&sender, [b(2.0), scale(2.0)].concat());
    drop(sender);
    assert_eq!(pushing.await.unwrap().unwrap().version, 2);
    assert!(disk.unfinished().is_empty());
}
