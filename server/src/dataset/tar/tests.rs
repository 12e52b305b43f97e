use super::{
    build::blocks,
    entries::{End, Entry, Next, Refused, Walk},
    fixtures::{append, img2dataset, tar},
    samples::{Member, Sample},
};
use crate::dataset::{
    Format, Layout, Manifest, ShardFile, SourceRequest, Survey, TarBlock, fixtures::*, index,
};
use crate::storage::{StorageConfig, Stores};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, path::Path,
};
use proptest::prelude::*;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use superbatch_proto::v1::Reason;
use tar::{Builder, EntryType, Header};
use tokio::sync::Notify;

/// All entries, with `window` bytes in memory at a time.
fn walked(bytes: &[u8], window: usize) -> Result<(Vec<Entry>, End), Refused> {
    let mut walk = Walk::new(0, bytes.len() as u64);
    let (mut entries, mut from, mut to) = (Vec::new(), 0, 0);
    loop {
        match walk.next(from as u64, &bytes[from..to])? {
            Next::Entry(entry) => entries.push(entry),
            Next::End(end) => return Ok((entries, end)),
            Next::Need(range) => {
                assert!(
                    (range.start as usize) < from || range.end as usize > to,
                    "it is there"
                );
                from = range.start as usize;
                to = (range.end as usize).max(from + window).min(bytes.len());
            }
        }
    }
}

fn contents<'a>(bytes: &'a [u8], entries: &'a [Entry]) -> Vec<(&'a str, &'a [u8])> {
    let content = |entry: &Entry| {
        let from = entry.offset as usize;
        &bytes[from..from + entry.length as usize]
    };
    entries
        .iter()
        .map(|entry| (entry.name.as_str(), content(entry)))
        .collect()
}

/// A PAX archive: what the header cannot hold stands before it.
fn pax(builder: &mut Builder<Vec<u8>>, records: &[(&str, &str)], content: &[u8]) {
    let records = records.iter().map(|(key, value)| (*key, value.as_bytes()));
    builder.append_pax_extensions(records).unwrap();
    append(builder, &mut Header::new_ustar(), "short", content);
}

proptest! {
    #[test]
    fn every_member_is_found_whatever_its_name_and_size(
        members in prop::collection::vec(
            ("[a-zé/]{1,9}|[a-z/]{90,300}", prop::collection::vec(any::<u8>(), 0..1500), 0..3),
            0..9,
        ),
        window in 512_usize..4000,
    ) {
        let mut builder = Builder::new(Vec::new());
        let mut expected = Vec::new();
        for (n, (name, content, kind)) in members.iter().enumerate() {
            let parts: Vec<_> = name.split('/').filter(|part| !part.is_empty()).collect();
            let name = format!("d/{n}{}.jpg", parts.join("/"));
            match kind {
                0 => append(&mut builder, &mut Header::new_gnu(), &name, content),
                1 => pax(&mut builder, &[("path", &name), ("mtime", "1.5")], content),
                _ => {
                    let mut link = Header::new_gnu();
                    link.set_entry_type(EntryType::Symlink);
                    link.set_size(0);
                    builder.append_link(&mut link, format!("link{n}"), &name).unwrap();
                    continue;
                }
            }
            expected.push((name, content.clone()));
        }
        let bytes = builder.into_inner().unwrap();
        let (entries, end) = walked(&bytes, window).unwrap();
        prop_assert_eq!(end, End::Whole);
        let found: Vec<_> = contents(&bytes, &entries)
            .into_iter()
            .map(|(name, content)| (name.to_owned(), content.to_vec()))
            .collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn any_bytes_are_walked_to_an_end(
        cuts in prop::collection::vec((0_usize..6000, any::<u8>()), 1..8),
        length in 0_usize..6000,
    ) {
        let mut bytes = img2dataset(0..2).to_vec();
        for (at, byte) in cuts {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        bytes.truncate(length);
        if let Ok((entries, _)) = walked(&bytes, 512) {
            prop_assert!(entries.iter().all(|e| e.offset + e.length <= bytes.len() as u64));
            prop_assert!(entries.windows(2).all(|two| two[0].end() <= two[1].header));
        }
    }
}

#[test]
fn ustar_prefixes_and_pax_sizes_are_taken() {
    let mut builder = Builder::new(Vec::new());
    let long = format!("{}/0001.jpg", "p".repeat(120));
    append(&mut builder, &mut Header::new_ustar(), &long, b"one");
    pax(
        &mut builder,
        &[("path", "näme.txt"), ("size", "5")],
        b"three",
    );
    let bytes = builder.into_inner().unwrap();
    let (entries, end) = walked(&bytes, 512).unwrap();
    let expected: [(&str, &[u8]); 2] = [(&long, b"one"), ("näme.txt", b"three")];
    assert_eq!(
        (contents(&bytes, &entries), end),
        (expected.to_vec(), End::Whole)
    );
    assert_eq!(
        entries[1].header, 1024,
        "the member begins with its PAX header"
    );
}

#[test]
fn what_is_no_plain_tar_is_refused_with_the_reason() {
    let mut padded = [0_u8; 1024];
    padded[..4].copy_from_slice(b"\x1f\x8b\x08\x00");
    assert_eq!(walked(&padded, 512), Err(Refused::Compressed("gzip")));
    assert_eq!(walked(&padded[..40], 512), Err(Refused::Compressed("gzip")));
    padded[..4].copy_from_slice(b"PAR1");
    assert_eq!(walked(&padded, 512), Err(Refused::NoTar));
    let mut builder = Builder::new(Vec::new());
    pax(
        &mut builder,
        &[("GNU.sparse.major", "1"), ("path", "0.jpg")],
        b"x",
    );
    let refused = walked(&builder.into_inner().unwrap(), 512).unwrap_err();
    assert_eq!(refused, Refused::Sparse("0.jpg".into()));
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(0);
    header.set_path("1.jpg").unwrap();
    header.set_cksum();
    let refused = walked(header.as_bytes(), 512).unwrap_err();
    assert!(
        refused.to_string().contains("the sparse member '1.jpg'"),
        "{refused}"
    );
}

#[test]
fn a_cut_shard_has_the_members_before_the_cut() {
    let whole = img2dataset(0..3);
    let (all, _) = walked(&whole, 512).unwrap();
    for cut in 512..whole.len() - 1024 {
        let (entries, end) = walked(&whole[..cut], 512).unwrap_or_else(|e| panic!("{cut}: {e}"));
        assert_eq!(entries, all[..entries.len()]);
        let (whole, parts) = (|e: &&Entry| e.offset + e.length <= cut as u64, all.iter());
        assert_eq!(entries.len(), parts.filter(whole).count(), "{cut}");
        match end {
            End::Cut(at) => assert_eq!(at, all[entries.len()].header, "{cut}"),
            // Between two members the missing mark tells that it may have been cut.
            End::Unmarked(at) => {
                assert_eq!(at, cut as u64);
                assert!(at <= entries.last().map_or(0, Entry::end), "{cut}");
            }
            End::Whole | End::Damaged(_) => panic!("{cut}"),
        }
    }
    assert_eq!(walked(&whole, 512).unwrap().1, End::Whole);
    assert_eq!(walked(&[], 512), Ok((vec![], End::Unmarked(0))));
    let mut damaged = whole.to_vec();
    damaged[all[4].header as usize + 3] ^= 1;
    let (entries, end) = walked(&damaged, 512).unwrap();
    assert_eq!(
        (entries.as_slice(), end),
        (&all[..4], End::Damaged(all[4].header))
    );
}

async fn with(members: &[(&str, &[u8])], change: impl Fn(&mut SourceRequest)) -> Indexed {
    let stores = stores();
    put(&stores, &[("0.tar", tar(members))]).await;
    let mut request = request("memory:///data");
    change(&mut request);
    index(&stores, None, &[request]).await
}

type Indexed = crate::error::Result<Manifest>;

fn as_is(_: &mut SourceRequest) {}

#[tokio::test]
async fn img2dataset_tars_are_indexed_beside_their_parquet_files() {
    let stores = stores();
    let files = [
        ("00001.tar", img2dataset(10_000..10_400)),
        ("00000.tar", img2dataset(0..5)),
        ("00000.parquet", Bytes::from("metadata only")),
        ("00000_stats.json", Bytes::from("{}")),
    ];
    let manifest = indexed(&stores, &files).await.unwrap();
    let source = &manifest.sources[0];
    let rows: Vec<_> = source
        .blocks()
        .map(|(s, b, block)| (s, b, block.rows))
        .collect();
    assert_eq!(
        rows,
        [(0, 0, 5), (1, 0, 341), (1, 1, 59)],
        "of 1,024 members each"
    );
    assert_eq!(source.layout.image_column, "jpg;png;jpeg;webp");
    assert_eq!(source.layout.caption_column, "txt");
    let names: Vec<_> = source.columns.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["__key__", "jpg", "json", "txt"]);
    let schema = manifest
        .data_schema(&["__key__".into(), "json[n]".into()])
        .unwrap();
    assert_eq!(schema.fields().len(), 4);
    let error = manifest.data_schema(&["seg.png".into()]).unwrap_err();
    assert_eq!(error.value("available"), Some("__key__, jpg, json, txt"));
}

#[tokio::test]
async fn lists_in_a_json_are_captions_if_they_hold_texts() {
    let of = |json: &'static [u8]| [("a.jpg", &b"i"[..]), ("a.json", json)];
    let named = |r: &mut SourceRequest| r.caption_column = Some("json[caption]".into());
    let lists = of(br#"{"caption": ["a", null]}"#);
    for how in [as_is as fn(&mut SourceRequest), named] {
        let manifest = with(&lists, how).await.unwrap();
        assert_eq!(manifest.sources[0].layout.caption_seed, Some(0));
    }
    // The first sample has no caption, which says nothing of the others.
    let mut later = of(br#"{"caption": null}"#).to_vec();
    later.extend([
        ("b.jpg", &b"i"[..]),
        ("b.json", br#"{"caption": ["a", "b"]}"#),
    ]);
    let manifest = with(&later, named).await.unwrap();
    assert_eq!(manifest.sources[0].layout.caption_seed, Some(0));
    let error = with(&of(br#"{"caption": [1, 2]}"#), named)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::SchemaMismatch);
    assert_eq!(error.value("column"), Some("json[caption]"));
    let target = |r: &mut SourceRequest| {
        named(r);
        r.is_target = true;
    };
    let error = with(&lists, target).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SchemaMismatch);
    assert_eq!(error.value("column"), Some("json[caption]"));
    let one = of(br#"{"caption": "a"}"#);
    let manifest = with(&one, as_is).await.unwrap();
    assert_eq!(manifest.sources[0].layout.caption_seed, None);
}

/// A range of no bytes is none that stores read; and a JSON takes many times its bytes.
#[tokio::test]
async fn an_empty_json_and_one_that_is_too_large_are_none() {
    let endless = format!(r#"{{"caption": "{}"}}"#, "a".repeat(17 << 20));
    for other in ["", endless.as_str()] {
        let members: &[(&str, &[u8])] = &[
            ("a.jpg", b"i"),
            ("a.json", other.as_bytes()),
            ("b.jpg", b"i"),
            ("b.json", br#"{"caption": "x"}"#),
        ];
        let manifest = with(members, |r| r.predicate = Some("caption = 'x'".into()));
        let source = &manifest.await.unwrap().sources[0];
        assert_eq!(source.layout.caption_column, "json[caption]");
        assert_eq!((source.rows(), source.shards[0].outside), (1, 1));
    }
}

/// One sample may have any number of bytes, and is a block by itself.
#[test]
fn a_block_that_no_array_holds_is_refused_before_it_is_read() {
    let member = |field: &str, length| Member {
        field: field.to_owned(),
        offset: 0,
        length,
    };
    let members = vec![member("jpg", 7), member("txt", 7), member("npy", 3 << 30)];
    let sample = Sample {
        key: "a".to_owned(),
        start: 0,
        end: 4 << 30,
        members,
    };
    let survey = Survey {
        samples: vec![sample],
        end: End::Whole,
    };
    let layout = Layout {
        image_column: "jpg".into(),
        caption_column: "txt".into(),
        format: Format::Tar,
        ..Layout::default()
    };
    let block = &blocks(&survey.samples, &layout)[0];
    let file = ShardFile::new(stores().open("memory:///a.tar").unwrap(), 4 << 30, None);
    let survey = Arc::new(survey);
    let ranges = |columns: &[String]| {
        let block = TarBlock::new(survey.clone(), &layout, columns, block, &file);
        block.unwrap().ranges()
    };
    assert_eq!(ranges(&[]).unwrap(), [0..7, 0..7]);
    assert!(ranges(&["npy".to_owned()]).is_err());
}

#[tokio::test]
async fn captions_come_from_text_or_from_json_and_are_never_guessed() {
    let json = br#"{"caption": "a"}"#;
    for (members, caption) in [
        (
            &[("a.jpg", &b"i"[..]), ("a.txt", b"t"), ("a.json", json)][..],
            "txt",
        ),
        (&[("a.png", b"i"), ("a.json", json)], "json[caption]"),
    ] {
        let manifest = with(members, as_is).await.unwrap();
        assert_eq!(manifest.sources[0].layout.caption_column, caption);
    }
    let members: &[(&str, &[u8])] = &[("a.jpg", b"i"), ("a.cls", b"7"), ("a.json", b"{}")];
    let error = with(members, as_is).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ColumnNotFound);
    assert_eq!(error.value("available"), Some("cls, jpg, json"));
    let named = |r: &mut SourceRequest| r.caption_column = Some("cls".into());
    assert_eq!(with(members, named).await.unwrap().rows(), 1);
    let error = with(&[("a.gif", b"i"), ("a.txt", b"t")], as_is)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("none ends in jpg;png;jpeg;webp"),
        "{error}"
    );
    let named = |r: &mut SourceRequest| r.image_column = Some("GIF".into());
    assert_eq!(
        with(&[("a.Gif", b"i"), ("a.txt", b"t")], named)
            .await
            .unwrap()
            .rows(),
        1
    );
}

#[tokio::test]
async fn samples_without_image_or_caption_are_no_rows_and_are_counted() {
    let members: &[(&str, &[u8])] = &[
        ("a.jpg", b"i"),
        ("b.jpg", b"i"),
        ("b.txt", b"t"),
        ("c.txt", b"t"),
    ];
    let shard = &with(members, as_is).await.unwrap().sources[0].shards[0];
    assert_eq!(
        (shard.blocks[0].rows, shard.left_out, &shard.flaw),
        (1, 2, &None)
    );
    let error = with(&[("a.jpg", b"i"), ("b.txt", b"t")], as_is)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetEmpty);
}

#[tokio::test]
async fn a_shard_is_walked_once_for_one_etag() {
    let stores = stores();
    let state = stores.open("memory:///state").unwrap();
    put(
        &stores,
        &[("0.tar", img2dataset(0..5)), ("1.tar", img2dataset(5..9))],
    )
    .await;
    let sources = [request("memory:///data")];
    let first = index(&stores, Some(&state), &sources).await.unwrap();
    let kept = state.list("tar-indexes").await.unwrap();
    assert_eq!(kept.len(), 2);
    // What the state says is believed: here, that the first shard is the second.
    let [a, b] = [&kept[0].0, &kept[1].0];
    state.put(a, state.get(b).await.unwrap()).await.unwrap();
    let again = index(&stores, Some(&state), &sources).await.unwrap();
    let rows: Vec<_> = again.sources[0]
        .blocks()
        .map(|(_, _, block)| block.rows)
        .collect();
    assert!(rows == [5, 5] || rows == [4, 4], "{rows:?}");
    // What is damaged is made anew.
    state.put(a, Bytes::from("PAR1")).await.unwrap();
    assert_eq!(index(&stores, Some(&state), &sources).await.unwrap(), first);
}

#[tokio::test]
async fn an_empty_shard_and_one_without_an_end_mark_are_flaws() {
    let stores = stores();
    let whole = img2dataset(0..4);
    let files = [
        ("0.tar", Bytes::new()),
        ("1.tar", whole.slice(..whole.len() - 1024)),
        ("2.tar", whole),
    ];
    put(&stores, &files).await;
    let manifest = index(&stores, None, &[request("memory:///data")]).await;
    let shards = &manifest.unwrap().sources[0].shards;
    let rows = |n: usize| shards[n].blocks.iter().map(|block| block.rows).sum::<u32>();
    assert_eq!([0, 1, 2].map(rows), [0, 4, 4]);
    let flaw = |n: usize| shards[n].flaw.as_deref();
    assert_eq!(flaw(0), Some("it is empty"));
    assert!(flaw(1).unwrap().contains("no end mark"), "{:?}", flaw(1));
    assert_eq!(flaw(2), None);
}

/// One tar's entries are looked at while another is still walked.
#[tokio::test]
async fn no_request_of_a_shard_stands_still_while_another_is_walked() {
    let all = index_of_first(Arc::default(), &["0.tar"]).await;
    let needed = all.first.load(Ordering::SeqCst);
    assert!(needed > 1, "the tar and its JSON are read apart");
    let order = Arc::new(Order {
        needed,
        ..Order::default()
    });
    let indexed = index_of_first(order, &["0.tar", "1.tar"]);
    let ended = tokio::time::timeout(Duration::from_secs(60), indexed).await;
    assert!(ended.is_ok(), "the first tar waits for the second");
}

#[tokio::test]
async fn an_entry_that_the_first_tars_lack_is_told_before_the_others_are_walked() {
    let asked = SourceRequest {
        predicate: Some("m > 1".into()),
        ..request("memory:///data")
    };
    let members: &[(&str, &[u8])] = &[("a.jpg", b"i"), ("a.json", br#"{"m": 2}"#), ("a.txt", b"x")];
    let no_tar = Bytes::from([0x1f_u8, 0x8b, 8, 0].repeat(200));
    let outcome = async |other: usize, bytes: Bytes| {
        let stores = stores();
        let mut tars = vec![img2dataset(0..2); 40];
        tars[other] = bytes;
        let names: Vec<String> = (0..40).map(|n| format!("{n:02}.tar")).collect();
        let files: Vec<_> = names.iter().map(String::as_str).zip(tars).collect();
        put(&stores, &files).await;
        index(&stores, None, std::slice::from_ref(&asked)).await
    };
    let error = outcome(39, no_tar).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ColumnNotFound, "{error}");
    assert!(error.to_string().contains("the first 16 tars"), "{error}");
    let found = outcome(15, tar(members)).await.unwrap();
    assert_eq!(found.sources[0].rows(), 1);
}

/// Indexes tars with a predicate from a store that answers for `1.tar` after so many requests for
/// `0.tar`.
async fn index_of_first(order: Arc<Order>, names: &[&str]) -> Arc<Order> {
    let stores = in_order(&order);
    for name in names {
        put(&stores, &[(*name, img2dataset(0..4))]).await;
    }
    let asked = SourceRequest {
        predicate: Some("n > 1".into()),
        ..request("memory:///data")
    };
    index(&stores, None, &[asked]).await.unwrap();
    order
}

fn in_order(order: &Arc<Order>) -> Stores {
    let order = order.clone();
    let wrap = move |store| {
        let order = order.clone();
        Arc::new(InOrder { store, order }) as Arc<dyn ObjectStore>
    };
    Stores::wrapped(StorageConfig::default(), Arc::new(wrap))
}

#[tokio::test]
async fn indexing_that_was_interrupted_goes_on_with_the_tars_that_are_left() {
    let order: Arc<Order> = Arc::default();
    let stores = in_order(&order);
    let state = stores.open("memory:///state").unwrap();
    let sources = [request("memory:///data")];
    let mut names = vec!["first.tar".to_owned(), "g0.tar".to_owned()];
    names.extend((0..40).map(|n| format!("h{n:02}x.tar")));
    for name in &names {
        put(&stores, &[(name.as_str(), img2dataset(0..2))]).await;
    }
    let no_tar = Bytes::from([0x1f_u8, 0x8b, 8, 0].repeat(200));
    put(&stores, &[("h20x.tar", no_tar)]).await;
    let error = index(&stores, Some(&state), &sources).await.unwrap_err();
    assert!(error.to_string().contains("h20x.tar"), "{error}");
    let walked = order.first.load(Ordering::SeqCst);
    let kept = state.list("tar-indexes").await.unwrap().len();
    assert!(walked > 0 && (22..42).contains(&kept), "{walked} {kept}");
    put(&stores, &[("h20x.tar", img2dataset(0..2))]).await;
    let manifest = index(&stores, Some(&state), &sources).await.unwrap();
    assert_eq!(manifest.rows(), 84);
    assert_eq!(
        order.first.load(Ordering::SeqCst),
        walked,
        "it is not read again"
    );
    assert_eq!(state.list("tar-indexes").await.unwrap().len(), 42);
}

#[derive(Debug, Default)]
struct Order {
    /// Requests for `0.tar` so far.
    first: AtomicUsize,
    needed: usize,
    come: Notify,
}

#[derive(Debug)]
struct InOrder {
    store: Arc<dyn ObjectStore>,
    order: Arc<Order>,
}

impl std::fmt::Display for InOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InOrder({})", self.store)
    }
}

#[async_trait]
impl ObjectStore for InOrder {
    async fn get_opts(&self, at: &Path, o: GetOptions) -> object_store::Result<GetResult> {
        if at.as_ref().ends_with("0.tar") {
            self.order.first.fetch_add(1, Ordering::SeqCst);
            self.order.come.notify_one();
        }
        if at.as_ref().ends_with("1.tar") {
            while self.order.first.load(Ordering::SeqCst) < self.order.needed {
                self.order.come.notified().await;
            }
        }
        self.store.get_opts(at, o).await
    }

    async fn put_opts(
        &self,
        at: &Path,
        p: PutPayload,
        o: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.store.put_opts(at, p, o).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        o: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(at, o).await
    }

    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.store.delete_stream(at)
    }

    fn list(&self, at: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.store.list(at)
    }

    async fn list_with_delimiter(&self, at: Option<&Path>) -> object_store::Result<ListResult> {
        self.store.list_with_delimiter(at).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, o: CopyOptions) -> object_store::Result<()> {
        self.store.copy_opts(from, to, o).await
    }
}

#[tokio::test]
async fn a_flaw_of_a_shard_is_named_once() {
    let stores = stores();
    let whole = img2dataset(0..4);
    put(&stores, &[("0.tar", whole.slice(..whole.len() - 1600))]).await;
    let manifest = index(&stores, None, &[request("memory:///data")])
        .await
        .unwrap();
    let shard = &manifest.sources[0].shards[0];
    assert_eq!((shard.blocks[0].rows, shard.left_out), (3, 1));
    assert!(
        shard
            .flaw
            .as_ref()
            .unwrap()
            .contains("in the middle of the member")
    );
    put(
        &stores,
        &[(
            "0.tar",
            Bytes::from_static(&[0x1f, 0x8b, 8, 0]).repeat(200).into(),
        )],
    )
    .await;
    let error = index(&stores, None, &[request("memory:///data")])
        .await
        .unwrap_err();
    assert_eq!(error.value("shard"), Some("memory:///data/0.tar"));
    assert!(
        error.to_string().contains("compressed with gzip"),
        "{error}"
    );
}
