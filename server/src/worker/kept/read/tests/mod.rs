use super::*;
use crate::{
    dataset::fixtures::*,
    storage::StorageConfig,
    worker::inputs::{
        decode_pool::DecodePool, images, model_inputs::Inputs, preprocess::ImageLimits, row::Row,
    },
};
use arrow::{
    array::{
        ArrayRef, AsArray, BinaryArray, LargeBinaryArray, LargeStringArray, StringArray,
        StructArray,
    },
    datatypes::{DataType, Field, Int64Type},
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, path::Path,
};
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};
use superbatch_proto::v1::{BadRowReason, Reason};

mod beside;
mod disk;
mod several;
mod tar;
mod targets;

/// Counts the gets, and their bytes, of the store it wraps.
#[derive(Debug)]
struct Counting(Arc<dyn ObjectStore>, Arc<[AtomicU64; 2]>);

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Counting({})", self.0)
    }
}

#[async_trait]
impl ObjectStore for Counting {
    async fn put_opts(
        &self,
        at: &Path,
        p: PutPayload,
        o: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.0.put_opts(at, p, o).await
    }
    async fn put_multipart_opts(
        &self,
        at: &Path,
        o: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(at, o).await
    }
    async fn get_opts(&self, at: &Path, o: GetOptions) -> object_store::Result<GetResult> {
        let got = self.0.get_opts(at, o).await?;
        self.1[0].fetch_add(1, Ordering::Relaxed);
        self.1[1].fetch_add(got.range.end - got.range.start, Ordering::Relaxed);
        Ok(got)
    }
    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.0.delete_stream(at)
    }
    fn list(&self, at: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.0.list(at)
    }
    async fn list_with_delimiter(&self, at: Option<&Path>) -> object_store::Result<ListResult> {
        self.0.list_with_delimiter(at).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, o: CopyOptions) -> object_store::Result<()> {
        self.0.copy_opts(from, to, o).await
    }
}

/// Storage, with how often and how much was read from it.
pub(in crate::worker) fn counted() -> (Stores, Arc<[AtomicU64; 2]>) {
    let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let ours = counts.clone();
    let wrap =
        Arc::new(move |store| Arc::new(Counting(store, ours.clone())) as Arc<dyn ObjectStore>);
    (Stores::wrapped(StorageConfig::default(), wrap), counts)
}

fn captions(batch: &RecordBatch) -> Vec<Option<&str>> {
    batch.column(1).as_string::<i32>().iter().collect()
}

#[tokio::test]
async fn a_block_of_img2dataset_comes_with_its_nulls() {
    let stores = stores();
    let manifest = indexed(&stores, &[("0.parquet", parquet(&img2dataset(0..10), 4))])
        .await
        .unwrap();
    let reader = BlockReader::new(stores, 1 << 20);
    let batch = reader
        .read(&manifest, 0, 0, 1, &["uid".into()])
        .await
        .unwrap()
        .batch;
    assert_eq!(
        batch.schema(),
        manifest.data_schema(&["uid".into()]).unwrap()
    );
    assert_eq!(
        captions(&batch),
        [4, 5, 6, 7]
            .map(|n| format!("caption {n}"))
            .each_ref()
            .map(|s| Some(s.as_str()))
    );
    let images: Vec<_> = batch.column(0).as_binary::<i32>().iter().collect();
    assert_eq!(
        images,
        [
            Some(&b"image 4"[..]),
            Some(b"image 5"),
            Some(b"image 6"),
            None
        ]
    );
    assert_eq!(
        batch.column(2).as_primitive::<Int64Type>().values(),
        &[4, 5, 6, 7]
    );
}

#[tokio::test]
async fn a_block_of_hugging_face_comes_under_the_same_names() {
    let stores = stores();
    let manifest = indexed(&stores, &[("0.parquet", parquet(&hugging_face(0..5), 3))])
        .await
        .unwrap();
    let reader = BlockReader::new(stores, 1 << 20);
    let columns = ["thumb".to_owned(), "text".to_owned()];
    let batch = reader
        .read(&manifest, 0, 0, 1, &columns)
        .await
        .unwrap()
        .batch;
    assert_eq!(captions(&batch), [Some("caption 3"), Some("caption 4")]);
    assert_eq!(batch.column(0).as_binary::<i32>().value(1), b"image 4");
    assert_eq!(
        batch.column(2).as_struct().num_columns(),
        2,
        "a whole struct where it is an extra column"
    );
    assert_eq!(batch.column(3).as_string::<i32>().value(0), "caption 3");
}

#[tokio::test]
async fn wide_types_are_narrowed() {
    let images = Arc::new(LargeBinaryArray::from_iter([Some("a"), None]));
    let texts = Arc::new(LargeStringArray::from_iter([None, Some("y")]));
    let stores = stores();
    let wide = batch(vec![("webp", images), ("text", texts)]);
    let manifest = indexed(&stores, &[("0.parquet", parquet(&wide, 9))])
        .await
        .unwrap();
    let batch = BlockReader::new(stores, 0)
        .read(&manifest, 0, 0, 0, &[])
        .await
        .unwrap()
        .batch;
    assert_eq!(captions(&batch), [None, Some("y")]);
    assert_eq!(
        batch
            .column(0)
            .as_binary::<i32>()
            .iter()
            .collect::<Vec<_>>(),
        [Some(&b"a"[..]), None]
    );
}

#[tokio::test]
async fn uncompressed_images_take_as_much_memory_as_they_have_bytes() {
    const ROWS: usize = 37;
    // Several to a page, and not a power of two in all.
    fn image(row: usize) -> Vec<u8> {
        vec![row as u8; 30_000 + row]
    }
    let expected = || (0..ROWS).map(|row| (row % 5 != 4).then(|| image(row)));
    let bytes: usize = expected().flatten().map(|image| image.len()).sum();
    let plain: ArrayRef = Arc::new(BinaryArray::from_iter(expected()));
    let wide: ArrayRef = Arc::new(LargeBinaryArray::from_iter(expected()));
    let field = Arc::new(Field::new("bytes", DataType::Binary, true));
    let nested: ArrayRef = Arc::new(StructArray::from(vec![(field, plain.clone())]));
    for (name, column) in [("jpg", plain), ("png", wide), ("image", nested)] {
        let texts = StringArray::from_iter_values((0..ROWS).map(|row| format!("caption {row}")));
        let rows = batch(vec![(name, column), ("caption", Arc::new(texts))]);
        for codec in [Compression::UNCOMPRESSED, Compression::SNAPPY] {
            let properties = WriterProperties::builder()
                .set_compression(codec)
                .set_data_page_size_limit(100_000)
                .build();
            let mut writer =
                ArrowWriter::try_new(Vec::new(), rows.schema(), Some(properties)).unwrap();
            writer.write(&rows).unwrap();
            let stores = stores();
            let files = [("0.parquet", writer.into_inner().unwrap().into())];
            let manifest = indexed(&stores, &files).await.unwrap();
            let reader = BlockReader::new(stores.clone(), 1 << 30);
            let read = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
            let found = read.batch.column(0).as_binary::<i32>();
            let found = found.iter().map(|image| image.map(<[u8]>::to_vec));
            assert!(found.eq(expected()), "{name} {codec:?}");
            let (held, is_plain) = (read.bytes(), codec == Compression::UNCOMPRESSED);
            assert!(
                !is_plain || (bytes..bytes + 8_000).contains(&held),
                "{name}: {held} of {bytes}"
            );
            let reader = BlockReader::new(stores, 1 << 30).keeping_views();
            let viewed = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
            assert_eq!(images::are_views(&viewed.batch), is_plain);
            let row = |row| Row {
                batch: viewed.batch.clone(),
                row,
            };
            let each: Vec<Row> = (0..ROWS).map(row).collect();
            let found = each.iter().map(|row| row.image().map(<[u8]>::to_vec));
            assert!(found.eq(expected()), "{name} {codec:?}");
            assert_eq!(images::without_views(&viewed.batch).unwrap(), *read.batch);
        }
    }
}

#[tokio::test]
async fn a_block_with_views_counts_all_bytes_that_they_hold() {
    let images = (0..20_u8).map(|row| vec![row; 30_000]);
    let urls = (0..20_u8).map(|row| char::from(b'a' + row).to_string().repeat(5_000));
    let captions = (0..20).map(|row| format!("caption {row}"));
    // Images and captions are read together, with what lies between them.
    let rows = batch(vec![
        ("jpg", Arc::new(BinaryArray::from_iter_values(images))),
        ("url", Arc::new(StringArray::from_iter_values(urls))),
        ("caption", Arc::new(StringArray::from_iter_values(captions))),
    ]);
    let stores = stores();
    let files = [("0.parquet", parquet(&rows, 20))];
    let manifest = indexed(&stores, &files).await.unwrap();
    let reader = BlockReader::new(stores, 1 << 30).keeping_views();
    let read = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    assert!(images::are_views(&read.batch));
    assert!(read.batch.get_array_memory_size() < 20 * 34_000);
    assert!((20 * 35_000..20 * 45_000).contains(&read.bytes()));
    assert_eq!(reader.cached_bytes(), read.bytes());
}

#[tokio::test]
async fn views_that_refer_to_little_of_what_was_read_do_not_stay() {
    // So short that they lie in the views themselves.
    let images = (0..1_000).map(|row| format!("image {row:06}").into_bytes());
    let images = BinaryArray::from_iter_values(images);
    let captions = StringArray::from_iter_values((0..1_000).map(|_| "caption"));
    let rows = batch(vec![
        ("jpg", Arc::new(images.clone())),
        ("caption", Arc::new(captions)),
    ]);
    let stores = stores();
    let files = [("0.parquet", parquet(&rows, 1_000))];
    let manifest = indexed(&stores, &files).await.unwrap();
    let reader = BlockReader::new(stores, 1 << 30).keeping_views();
    let read = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    assert_eq!(read.batch.column(0).as_binary::<i32>(), &images);
}

/// Two blocks whose unneeded column is much larger than the rest.
fn heavy() -> Bytes {
    let mut noise = 1u64;
    let blob = std::iter::repeat_with(|| {
        let next = || {
            noise = noise
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (noise >> 56) as u8
        };
        Some(
            std::iter::repeat_with(next)
                .take(3 << 20)
                .collect::<Vec<u8>>(),
        )
    });
    let rows = img2dataset(0..2);
    let [caption, jpg] = [rows.column(1).clone(), rows.column(3).clone()];
    let blobs = arrow::array::BinaryArray::from_iter(blob.take(2));
    parquet(
        &batch(vec![
            ("caption", caption),
            ("blob", Arc::new(blobs)),
            ("jpg", jpg),
        ]),
        1,
    )
}

#[tokio::test]
async fn only_the_needed_columns_are_read_once() {
    let (stores, counts) = counted();
    let manifest = indexed(&stores, &[("0.parquet", heavy())]).await.unwrap();
    let bytes = || counts[1].load(Ordering::Relaxed);
    let before = bytes();
    let reader = BlockReader::new(stores, 1 << 20);
    let reads = (0..8).map(|_| reader.read(&manifest, 0, 0, 0, &[]));
    let batches = futures::future::try_join_all(reads).await.unwrap();
    assert!(
        batches
            .iter()
            .all(|read| Arc::ptr_eq(&read.batch, &batches[0].batch)),
        "eight reads, one block"
    );
    assert!(
        bytes() - before < 200_000,
        "{} bytes read: the blob was not asked for",
        bytes() - before
    );
    let gets = counts[0].load(Ordering::Relaxed);
    reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    assert_eq!(counts[0].load(Ordering::Relaxed), gets, "the block is kept");
    reader.read(&manifest, 0, 0, 1, &[]).await.unwrap();
    assert_eq!(
        counts[0].load(Ordering::Relaxed),
        gets + 2,
        "the footer is kept: two ranges around the blob"
    );
}

#[tokio::test]
async fn blocks_beyond_the_room_are_dropped_oldest_first() {
    let (stores, counts) = counted();
    let manifest = indexed(&stores, &[("0.parquet", parquet(&img2dataset(0..6), 2))])
        .await
        .unwrap();
    let one = BlockReader::new(stores.clone(), 0)
        .read(&manifest, 0, 0, 0, &[])
        .await
        .unwrap()
        .bytes();
    let reader = BlockReader::new(stores, one * 5 / 2);
    let gets = async |block| {
        let before = counts[0].load(Ordering::Relaxed);
        reader.read(&manifest, 0, 0, block, &[]).await.unwrap();
        counts[0].load(Ordering::Relaxed) - before
    };
    assert_eq!(gets(0).await, 2, "the footer and the block");
    assert_eq!([gets(1).await, gets(0).await, gets(2).await], [1, 0, 1]);
    assert_eq!(
        [gets(0).await, gets(1).await],
        [0, 1],
        "1 was used longest ago"
    );
}

#[tokio::test]
async fn a_changed_shard_is_refused() {
    let stores = stores();
    let old = parquet(&img2dataset(0..4), 4);
    let mut flipped = old.to_vec();
    flipped[10] ^= 1;
    let longer = parquet(&img2dataset(0..5), 5);
    let manifest = indexed(&stores, &[("0.parquet", old.clone())])
        .await
        .unwrap();
    for (new, how) in [
        (longer, "bytes, not"),
        (flipped.into(), "ETag"),
        (old.slice(..9), "bytes, not"),
    ] {
        put(&stores, &[("0.parquet", new)]).await;
        let reader = BlockReader::new(stores.clone(), 0);
        let error = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap_err();
        assert_eq!(
            (error.reason(), error.value("shard")),
            (Reason::DatasetChanged, Some("memory:///data/0.parquet"))
        );
        assert!(error.to_string().contains(how), "{error}");
    }
    stores
        .open("memory:///data")
        .unwrap()
        .delete("0.parquet")
        .await
        .unwrap();
    let error = BlockReader::new(stores, 0)
        .read(&manifest, 0, 0, 0, &[])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged);
}

#[tokio::test]
async fn a_shard_that_changes_after_its_footer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("0.parquet");
    let old = parquet(&img2dataset(0..4), 2);
    std::fs::write(&path, &old).unwrap();
    let stores = stores();
    let uri = url::Url::from_file_path(folder.path()).unwrap();
    let manifest = crate::dataset::index(&stores, None, &[request(uri.as_str())])
        .await
        .unwrap();
    let reader = BlockReader::new(stores, 0);
    reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    std::fs::write(&path, &old[..100]).unwrap();
    let error = reader.read(&manifest, 0, 0, 1, &[]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged, "{}", error.chain());
}

#[tokio::test]
async fn a_caption_that_is_no_text_costs_its_row() {
    for rows in [img2dataset(0..8), hugging_face(0..8)] {
        let stores = stores();
        let mut file = parquet(&rows, 4).to_vec();
        let (good, bad) = (b"caption 5".as_slice(), b"captio\xFF 5");
        let places: Vec<usize> = (0..file.len() - good.len())
            .filter(|at| file[*at..].starts_with(good))
            .collect();
        places
            .iter()
            .for_each(|at| file[*at..*at + bad.len()].copy_from_slice(bad));
        let manifest = indexed(&stores, &[("0.parquet", file.into())])
            .await
            .unwrap();
        let columns = ["uid".to_owned()];
        let whole = BlockReader::new(stores, 1 << 20)
            .read(&manifest, 0, 0, 1, &columns)
            .await
            .unwrap()
            .batch;
        assert_eq!(whole.schema(), manifest.data_schema(&columns).unwrap());
        assert_eq!(
            captions(&whole),
            [
                Some("caption 4"),
                None,
                Some("caption 6"),
                Some("caption 7")
            ]
        );
        assert_eq!(whole.column(0).as_binary::<i32>().value(1), b"image 5");
        assert_eq!(
            whole.column(2).as_primitive::<Int64Type>().values(),
            &[4, 5, 6, 7]
        );
        let rows = (0..3)
            .map(|row| Row {
                batch: whole.clone(),
                row,
            })
            .collect();
        let pool = DecodePool::new(
            1,
            ImageLimits {
                pixels_max: 1,
                bytes_max: 99,
            },
            std::time::Duration::from_secs(120),
        )
        .unwrap();
        let (checked, _) = pool.prepare(rows, Arc::new(Inputs::check())).await.unwrap();
        let reasons: Vec<_> = checked
            .into_iter()
            .map(|row| row.unwrap_err().reason)
            .collect();
        let undecodable = BadRowReason::ImageUndecodable;
        assert_eq!(
            reasons,
            [undecodable, BadRowReason::CaptionInvalid, undecodable]
        );
    }
}

#[tokio::test]
async fn what_was_indexed_and_cannot_be_decoded_is_not_called_changed() {
    let stores = stores();
    let whole = parquet(&img2dataset(0..4), 4);
    let start = indexed(&stores, &[("0.parquet", whole.clone())])
        .await
        .unwrap()
        .sources[0]
        .shards[0]
        .blocks[0]
        .bytes
        .0;
    let mut bad = whole.to_vec();
    bad[start as usize..start as usize + 8].fill(0xFF);
    let manifest = indexed(&stores, &[("0.parquet", bad.into())])
        .await
        .unwrap();
    let error = BlockReader::new(stores, 0)
        .read(&manifest, 0, 0, 0, &["uid".into()])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument, "{}", error.chain());
    assert_eq!(error.value("shard"), Some("memory:///data/0.parquet"));
}

#[tokio::test]
async fn a_copy_of_a_local_file_is_the_file_that_was_indexed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("0.parquet"), folder.path().join("copy"));
    std::fs::write(&path, parquet(&img2dataset(0..4), 2)).unwrap();
    let written = std::fs::metadata(&path).unwrap().modified().unwrap();
    let stores = stores();
    let uri = url::Url::from_file_path(folder.path()).unwrap();
    let manifest = crate::dataset::index(&stores, None, &[request(uri.as_str())])
        .await
        .unwrap();
    std::fs::copy(&path, &copy).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&copy)
        .unwrap()
        .set_modified(written)
        .unwrap();
    std::fs::rename(&copy, &path).unwrap();
    BlockReader::new(stores.clone(), 0)
        .read(&manifest, 0, 0, 0, &[])
        .await
        .unwrap();
    let later = written + std::time::Duration::from_secs(1);
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(later)
        .unwrap();
    let error = BlockReader::new(stores, 0)
        .read(&manifest, 0, 0, 0, &[])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged);
    assert!(error.to_string().contains("another time"), "{error}");
}

#[tokio::test]
async fn an_extra_text_that_is_none_costs_its_row() {
    let stores = stores();
    let mut file = parquet(&img2dataset(0..3), 4).to_vec();
    let (good, bad) = (b"https://x/1".as_slice(), b"https://\xFF/1");
    let at = file
        .windows(good.len())
        .position(|bytes| bytes == good)
        .unwrap();
    file[at..at + bad.len()].copy_from_slice(bad);
    let manifest = indexed(&stores, &[("0.parquet", file.into())])
        .await
        .unwrap();
    let columns = ["uid".to_owned(), "url".to_owned()];
    let reader = BlockReader::new(stores, 0);
    let whole = reader
        .read(&manifest, 0, 0, 0, &columns)
        .await
        .unwrap()
        .batch;
    assert_eq!(captions(&whole)[1], Some("caption 1"));
    let urls: Vec<_> = whole.column(3).as_string::<i32>().iter().collect();
    assert_eq!(urls, [Some("https://x/0"), None, Some("https://x/2")]);
    let found = (0..3).map(|row| crate::worker::inputs::captions::invalid_column(&whole, row));
    assert_eq!(found.collect::<Vec<_>>(), [None, Some("url"), None]);
}

#[tokio::test]
async fn categories_and_unmarked_bytes_are_captions() {
    use arrow::{array::DictionaryArray, datatypes::Int32Type};
    let category: DictionaryArray<Int32Type> = ["a", "b", "a"].into_iter().collect();
    let bytes = BinaryArray::from_iter([Some(&b"x"[..]), Some(b"\xFF"), None]);
    let image = || Arc::new(BinaryArray::from_iter([Some("i"); 3]));
    for (caption, expected) in [
        (
            Arc::new(category) as ArrayRef,
            [Some("a"), Some("b"), Some("a")],
        ),
        (Arc::new(bytes), [Some("x"), None, None]),
    ] {
        let stores = stores();
        let file = batch(vec![("jpg", image()), ("caption", caption)]);
        put(&stores, &[("0.parquet", parquet(&file, 4))]).await;
        let asked = crate::dataset::SourceRequest {
            caption_column: Some("caption".into()),
            ..request("memory:///data")
        };
        let manifest = crate::dataset::index(&stores, None, &[asked])
            .await
            .unwrap();
        let extra = ["caption".to_owned()];
        assert!(manifest.data_schema(&extra).is_err());
        let reader = BlockReader::new(stores, 0);
        let whole = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap().batch;
        assert_eq!(captions(&whole), expected);
    }
}

#[tokio::test]
async fn a_dictionary_at_byte_0_is_none() {
    use parquet::file::metadata::ParquetMetaDataWriter;
    let stores = stores();
    let text = StringArray::from_iter_values(["a", "b"]);
    let image = BinaryArray::from_iter([Some("x"), Some("y")]);
    let rows = batch(vec![("jpg", Arc::new(image)), ("caption", Arc::new(text))]);
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_dictionary_enabled(false)
        .build();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(Vec::new(), rows.schema(), Some(properties)).unwrap();
    writer.write(&rows).unwrap();
    let file = Bytes::from(writer.into_inner().unwrap());
    put(&stores, &[("0.parquet", file.clone())]).await;
    let size = file.len() as u64;
    let shard = ShardFile::new(stores.open("memory:///data/0.parquet").unwrap(), size, None);
    let metadata = shard.footer().await.unwrap().metadata().as_ref().clone();
    // As parquet-mr 1.8 writes it.
    let groups = metadata.row_groups().iter().map(|group| {
        let columns = group.columns().iter().map(|column| {
            assert_eq!(column.dictionary_page_offset(), None);
            column
                .clone()
                .into_builder()
                .set_dictionary_page_offset(Some(0))
                .build()
                .unwrap()
        });
        group
            .clone()
            .into_builder()
            .set_column_metadata(columns.collect())
            .build()
            .unwrap()
    });
    let data_end = groups
        .clone()
        .flat_map(|g: parquet::file::metadata::RowGroupMetaData| {
            g.columns()
                .iter()
                .map(|c| c.data_page_offset() + c.compressed_size())
                .collect::<Vec<_>>()
        });
    let data_end = data_end.max().unwrap() as usize;
    let metadata = metadata
        .clone()
        .into_builder()
        .set_row_groups(groups.collect())
        .build();
    let mut old = file[..data_end].to_vec();
    ParquetMetaDataWriter::new(&mut old, &metadata)
        .finish()
        .unwrap();
    let manifest = indexed(&stores, &[("0.parquet", old.into())])
        .await
        .unwrap();
    let reader = BlockReader::new(stores, 0);
    let whole = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap().batch;
    assert_eq!(captions(&whole), [Some("a"), Some("b")]);
}

/// Row groups that their statistics rule out, or take whole, are not read by indexing; of the
/// others the rows that are kept are read.
#[tokio::test]
async fn rows_outside_a_predicate_are_not_there() {
    for (text, gets, rows) in [
        ("uid < 4", 1, &[0, 1, 2, 3][..]),
        ("uid > 100 or uid < 5", 2, &[0, 1, 2, 3, 4]),
        ("caption in ('caption 5', 'caption 9')", 2, &[5, 9]),
    ] {
        let (stores, counts) = counted();
        put(&stores, &[("0.parquet", parquet(&img2dataset(0..10), 4))]).await;
        let asked = crate::dataset::SourceRequest {
            predicate: Some(text.to_owned()),
            ..request("memory:///data")
        };
        let manifest = crate::dataset::index(&stores, None, &[asked])
            .await
            .unwrap();
        assert_eq!(counts[0].load(Ordering::Relaxed), gets, "{text}");
        let reader = BlockReader::new(stores, 1 << 20);
        let mut found = Vec::new();
        for (_, block, indexed) in manifest.sources[0].blocks() {
            if indexed.rows > 0 {
                let batch = reader
                    .read(&manifest, 0, 0, block, &["uid".into()])
                    .await
                    .unwrap()
                    .batch;
                assert_eq!(batch.num_rows(), indexed.rows as usize);
                found.extend_from_slice(batch["uid"].as_primitive::<Int64Type>().values());
            }
        }
        assert_eq!(found, rows, "{text}");
    }
}
