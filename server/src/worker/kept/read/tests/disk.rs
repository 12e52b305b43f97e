//! Blocks of remote shards, kept on disk.
use super::*;
use crate::dataset::index;
use object_store::memory::InMemory;
use std::fs;
use tempfile::TempDir;

const URI: &str = "s3://bucket/data";
const LIMIT: u64 = 64 << 20;

/// A store that answers for a bucket, with how often and how much was read from it.
fn bucket() -> (Stores, Arc<[AtomicU64; 2]>) {
    let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let (ours, memory) = (counts.clone(), Arc::new(InMemory::new()));
    let wrap = Arc::new(move |_: Arc<dyn ObjectStore>| {
        Arc::new(Counting(memory.clone(), ours.clone())) as Arc<dyn ObjectStore>
    });
    (Stores::wrapped(StorageConfig::default(), wrap), counts)
}

/// Writes the shard with these rows, in blocks of four, and indexes it.
async fn written(stores: &Stores, rows: std::ops::Range<u32>) -> Manifest {
    let root = stores.open(URI).unwrap();
    let bytes = parquet(&img2dataset(rows), 4);
    root.put("0.parquet", bytes).await.unwrap();
    index(stores, None, &[request(URI)]).await.unwrap()
}

/// Reads all blocks with a reader that keeps nothing in memory, as a process of its own would.
async fn rows(stores: &Stores, manifest: &Manifest) -> Result<Vec<RecordBatch>> {
    let reader = BlockReader::new(stores.clone(), 0);
    let mut read = Vec::new();
    for block in 0..manifest.sources[0].shards[0].blocks.len() as u32 {
        let block = reader.read(manifest, 0, 0, block, &[]).await?;
        read.push(block.batch.as_ref().clone());
    }
    Ok(read)
}

async fn settled(stores: &Stores) {
    stores.disk_cache().unwrap().settled().await;
}

fn entries(folder: &TempDir) -> usize {
    let names = fs::read_dir(folder.path()).unwrap();
    names
        .filter(|name| name.as_ref().unwrap().file_name() != "lock")
        .count()
}

#[tokio::test]
async fn a_block_is_read_from_its_store_once() {
    let (folder, (stores, counts)) = (tempfile::tempdir().unwrap(), bucket());
    let manifest = written(&stores, 0..10).await;
    let gets = || counts[0].load(Ordering::Relaxed);
    let first = stores
        .caching_in(folder.path().into(), LIMIT)
        .await
        .unwrap();
    let before = gets();
    let expected = rows(&first, &manifest).await.unwrap();
    settled(&first).await;
    let read = gets();
    assert!(read > before);
    assert_eq!(entries(&folder) as u64, read - before, "all that was read");
    assert_eq!(rows(&first, &manifest).await.unwrap(), expected);
    drop(first);
    let next = stores
        .caching_in(folder.path().into(), LIMIT)
        .await
        .unwrap();
    assert_eq!(rows(&next, &manifest).await.unwrap(), expected);
    assert_eq!(gets(), read, "nothing is asked of the store again");
    let uncached = rows(&stores, &manifest).await.unwrap();
    assert_eq!(uncached, expected);
    assert!(gets() > read);
}

#[tokio::test]
async fn a_shard_that_was_replaced_is_read_anew() {
    let (folder, (stores, counts)) = (tempfile::tempdir().unwrap(), bucket());
    let stores_on_disk = stores
        .caching_in(folder.path().into(), LIMIT)
        .await
        .unwrap();
    let old = written(&stores, 0..8).await;
    let old_rows = rows(&stores_on_disk, &old).await.unwrap();
    settled(&stores_on_disk).await;
    let new = written(&stores, 1..9).await;
    let before = counts[0].load(Ordering::Relaxed);
    let new_rows = rows(&stores_on_disk, &new).await.unwrap();
    assert!(counts[0].load(Ordering::Relaxed) > before);
    assert_ne!(new_rows, old_rows);
    assert_eq!(captions(&new_rows[0])[0], Some("caption 1"));
    // Of the old shard there is what was read before, and no more.
    assert_eq!(rows(&stores_on_disk, &old).await.unwrap(), old_rows);
    let error = rows(&stores, &old).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged);
}

#[tokio::test]
async fn what_is_on_this_machine_is_not_kept_again() {
    let (folder, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stores = stores();
    let cached = stores
        .caching_in(folder.path().into(), LIMIT)
        .await
        .unwrap();
    let of_memory = [("0.parquet", parquet(&img2dataset(0..8), 4))];
    let of_memory = indexed(&stores, &of_memory).await.unwrap();
    let bytes = parquet(&img2dataset(0..8), 4);
    fs::write(data.path().join("0.parquet"), bytes).unwrap();
    let uri = format!("file://{}", data.path().display());
    let of_files = index(&stores, None, &[request(&uri)]).await.unwrap();
    for manifest in [of_memory, of_files] {
        rows(&cached, &manifest).await.unwrap();
        settled(&cached).await;
        assert_eq!(entries(&folder), 0);
    }
}
