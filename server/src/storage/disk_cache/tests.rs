use super::*;
use crate::blocking::tests::needs_a_thread;
use metrics_exporter_prometheus::PrometheusBuilder;
use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    time::SystemTime,
};
use superbatch_proto::v1::Reason;
use tempfile::TempDir;

/// What an entry of these tests takes on disk.
const ROOM: u64 = 4096;

fn open(folder: &Path, entries: u64) -> DiskCache {
    DiskCache::open(folder.to_owned(), entries * ROOM, "place".to_owned()).unwrap()
}

fn key(cache: &DiskCache, number: u64) -> Key {
    cache.key("s3://bucket/shard", 1 << 20, "etag", &range(number))
}

fn range(number: u64) -> Range<u64> {
    number * 1000..number * 1000 + 500
}

fn content(number: u64) -> Bytes {
    Bytes::from(vec![number as u8 + 1; 500])
}

fn file(cache: &DiskCache, number: u64) -> PathBuf {
    cache.0.folder.file(&key(cache, number).name)
}

async fn keep(cache: &DiskCache, number: u64) {
    cache.put(key(cache, number), content(number));
    cache.settled().await;
}

/// Which of the first ten entries are there and whole.
async fn kept(cache: &DiskCache) -> Vec<u64> {
    let mut found = Vec::new();
    for number in 0..10 {
        if let Some(bytes) = cache.get(key(cache, number)).await {
            assert_eq!(bytes, content(number), "{number}");
            found.push(number);
        }
    }
    found
}

fn names(folder: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_was_kept_is_there_for_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    assert_eq!(cache.get(key(&cache, 1)).await, None);
    keep(&cache, 1).await;
    keep(&cache, 2).await;
    drop(cache);
    let cache = open(folder.path(), 9);
    assert_eq!(kept(&cache).await, [1, 2]);
    assert_eq!(cache.0.index().used(), 2 * ROOM);
}

/// Each part of a key alone makes another entry.
#[tokio::test]
async fn other_bytes_are_another_entry() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    let shard = |uri, size, etag, range| cache.key(uri, size, etag, &range);
    cache.put(shard("s3://b/a", 9000, "1", 0..500), content(1));
    cache.settled().await;
    let others = [
        shard("s3://b/c", 9000, "1", 0..500),
        shard("s3://b/a", 9001, "1", 0..500),
        shard("s3://b/a", 9000, "2", 0..500),
        shard("s3://b/a", 9000, "1", 1..501),
        shard("s3://b/a", 9000, "1", 0..499),
    ];
    for other in others {
        assert_eq!(cache.get(other).await, None, "{other:?}");
    }
    let same = cache.get(shard("s3://b/a", 9000, "1", 0..500)).await;
    assert_eq!(same, Some(content(1)));
    drop(cache);
    let elsewhere = DiskCache::open(folder.path().to_owned(), 9 * ROOM, "other".to_owned());
    let elsewhere = elsewhere.unwrap();
    let key = elsewhere.key("s3://b/a", 9000, "1", &(0..500));
    assert_eq!(elsewhere.get(key).await, None, "another service's bucket");
}

#[tokio::test]
async fn a_damaged_file_is_a_miss_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    keep(&cache, 7).await;
    let whole = fs::read(file(&cache, 7)).unwrap();
    let foreign = {
        keep(&cache, 8).await;
        fs::read(file(&cache, 8)).unwrap()
    };
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let damages = [
        ("empty", Vec::new()),
        ("torn", whole[..whole.len() - 1].to_vec()),
        ("torn in its header", whole[..9].to_vec()),
        ("never written", vec![0; whole.len()]),
        ("longer", [&whole[..], b"x"].concat()),
        ("flipped in its mark", flipped(0)),
        ("flipped in its checksum", flipped(20)),
        ("flipped in its content", flipped(whole.len() - 1)),
        ("another entry's", foreign),
    ];
    for (how, bytes) in damages {
        fs::write(file(&cache, 7), bytes).unwrap();
        assert_eq!(cache.get(key(&cache, 7)).await, None, "{how}");
        assert!(!file(&cache, 7).exists(), "{how}");
        assert_eq!(cache.0.index().used(), ROOM, "{how}");
        keep(&cache, 7).await;
        assert_eq!(kept(&cache).await, [7, 8], "{how}");
    }
    fs::remove_file(file(&cache, 7)).unwrap();
    assert_eq!(kept(&cache).await, [8], "somebody removed it");
}

#[tokio::test]
async fn the_limit_holds_and_the_longest_unused_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 3);
    for number in 1..=3 {
        keep(&cache, number).await;
    }
    assert!(cache.get(key(&cache, 1)).await.is_some());
    keep(&cache, 4).await;
    assert_eq!(kept(&cache).await, [1, 3, 4]);
    assert_eq!(names(&folder).len(), 4, "three, and the lock");
    let large = cache.key("s3://bucket/shard", 1 << 20, "etag", &(0..3 * ROOM));
    cache.put(large, Bytes::from(vec![0; 3 * ROOM as usize]));
    cache.settled().await;
    assert_eq!(kept(&cache).await, [1, 3, 4], "it would never fit");
}

#[tokio::test]
async fn a_lowered_limit_holds_from_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    for number in 0..5 {
        keep(&cache, number).await;
        let used = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + number);
        let file = File::options().write(true).open(file(&cache, number));
        file.unwrap().set_modified(used).unwrap();
    }
    // Now is after all of these.
    assert!(cache.get(key(&cache, 0)).await.is_some());
    drop(cache);
    let cache = open(folder.path(), 2);
    assert_eq!(kept(&cache).await, [0, 4]);
    assert_eq!(names(&folder).len(), 3);
}

#[test]
fn a_folder_has_one_owner() {
    let folder = tempfile::tempdir().unwrap();
    let owner = open(folder.path(), 9);
    let second = || DiskCache::open(folder.path().to_owned(), ROOM, String::new());
    let error = second().unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument);
    assert_eq!(error.value("field"), Some("worker.disk_cache_dir"));
    let said = error.chain();
    for part in [folder.path().to_str().unwrap(), "a folder of its own"] {
        assert!(said.contains(part), "{said}");
    }
    drop(owner);
    second().unwrap();
}

#[tokio::test]
async fn what_a_killed_process_left_is_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    keep(&cache, 1).await;
    drop(cache);
    let own = names(&folder);
    fs::write(folder.path().join("part"), b"half of an entry").unwrap();
    let of_others = ["lost+found", "notes.txt", "short.block"];
    fs::create_dir(folder.path().join(of_others[0])).unwrap();
    for name in &of_others[1..] {
        fs::write(folder.path().join(name), b"of somebody else").unwrap();
    }
    let cache = open(folder.path(), 9);
    assert_eq!(kept(&cache).await, [1]);
    assert_eq!(cache.0.index().used(), ROOM);
    let mut expected = [&own[..], &of_others.map(str::to_owned)].concat();
    expected.sort();
    assert_eq!(names(&folder), expected);
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, b"no folder").unwrap();
    let error = DiskCache::open(path.join("cache"), ROOM, String::new()).unwrap_err();
    assert_eq!(error.value("field"), Some("worker.disk_cache_dir"));
    assert!(error.chain().contains(path.to_str().unwrap()), "{error}");
}

/// A folder in the place of the file that is written makes writes fail as a full disk does.
#[test]
fn what_cannot_be_written_is_counted_and_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    let recorder = PrometheusBuilder::new().build_recorder();
    let failures = || recorder.handle().render();
    let (key, bytes) = (key(&cache, 1), content(1));
    ::metrics::with_local_recorder(&recorder, || {
        fs::create_dir(folder.path().join("part")).unwrap();
        cache.0.write(key, &bytes);
        let line = "superbatch_disk_cache_failures_total{operation=\"write\"} 1";
        assert!(failures().contains(line), "{}", failures());
        assert_eq!(cache.0.index().used(), 0);
        assert!(!cache.0.index().holds(&key.name));
        fs::remove_dir(folder.path().join("part")).unwrap();
        cache.0.write(key, &bytes);
        assert_eq!(cache.0.read(key), Some(bytes));
        fs::write(file(&cache, 1), b"damaged").unwrap();
        assert_eq!(cache.0.read(key), None);
        let line = "superbatch_disk_cache_failures_total{operation=\"read\"} 1";
        assert!(failures().contains(line), "{}", failures());
        assert!(failures().contains("superbatch_disk_cache_bytes 0"));
    });
}

#[test]
fn files_are_read_beside_the_threads_of_calls() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    let key = key(&cache, 1);
    cache.0.write(key, &content(1));
    assert_eq!(needs_a_thread(cache.get(key)), Some(content(1)));
}

/// A named pipe in an entry's place hangs whoever opens it, as a disk may, until it has a writer.
#[tokio::test]
async fn a_disk_that_hangs_is_a_miss() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 9);
    keep(&cache, 1).await;
    keep(&cache, 2).await;
    let pipe = file(&cache, 1);
    fs::remove_file(&pipe).unwrap();
    let path = CString::new(pipe.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends in a zero byte.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    let mut found = Vec::new();
    let local = ::metrics::set_default_local_recorder(&recorder);
    for _ in 0..READS_AT_ONCE_MAX {
        let late = cache.read_within(key(&cache, 1), Duration::from_millis(1));
        found.push(late.await);
    }
    drop(local);
    let permits = cache.0.reading.available_permits();
    let whole = cache.get(key(&cache, 2)).await;
    // The reads end before anything is asserted: a failed test would wait for them. To open a pipe
    // for both directions does not hang.
    let writer = File::options().read(true).write(true).open(&pipe).unwrap();
    let all = cache.0.reading.acquire_many(READS_AT_ONCE_MAX as u32).await;
    drop(all.unwrap());
    drop(writer);
    assert!(found.iter().all(Option::is_none));
    assert_eq!(permits, 0, "each keeps its permit while it hangs");
    assert_eq!(whole, None, "a miss at once");
    assert_eq!(kept(&cache).await, [2], "the disk answers again");
    let said = recorder.handle().render();
    let line = "superbatch_disk_cache_failures_total{operation=\"read\"}";
    let line = format!("{line} {READS_AT_ONCE_MAX}");
    assert!(said.contains(&line), "{said}");
}

#[tokio::test]
async fn a_trial_leaves_everything_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("above/own");
    DiskCache::check(&path, ROOM).unwrap();
    assert!(names(&folder).is_empty(), "another user may own it");
    let cache = open(&path, 9);
    keep(&cache, 1).await;
    keep(&cache, 2).await;
    let said = DiskCache::check(&path, ROOM).unwrap_err().chain();
    assert!(said.contains("in use by another process"), "{said}");
    drop(cache);
    DiskCache::check(&path, ROOM).unwrap();
    assert!(path.join("lock").exists());
    let cache = open(&path, 9);
    assert_eq!(kept(&cache).await, [1, 2], "also beyond its limit");
}

#[test]
fn only_the_folder_itself_is_closed_to_others() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("ordinary")).unwrap();
    drop(open(&folder.path().join("above/own"), 9));
    let mode = |name: &str| {
        let found = fs::metadata(folder.path().join(name)).unwrap();
        found.permissions().mode() & 0o777
    };
    assert_eq!(mode("above"), mode("ordinary"));
    assert_eq!(mode("above/own"), 0o700);
}
