//! What scoring reads of a data set whose images lie beside it, by the real store's requests.
use super::*;
use crate::{
    dataset::{
        SourceRequest,
        fixtures::{batch, by_path, indexed, parquet, put, request, stores},
        index,
    },
    fidelity::Fidelity,
    storage::Stores,
    worker::{
        calls::{
            embed::Shape,
            extent::Extent,
            survey::{Surveyed, Task, survey},
        },
        config::WorkerConfig,
        kept::read::tests::counted,
    },
};
use arrow::array::{BinaryArray, StringArray};
use bytes::Bytes;
use std::{
    io::Cursor,
    sync::atomic::{AtomicU64, Ordering},
};
use superbatch_proto::v1::{BadRowReason, BlockRows, EmbeddingDtype};

const ROWS: usize = 3_000;

fn png(shade: u8) -> Bytes {
    let mut png = Vec::new();
    let image = image::RgbImage::from_pixel(4, 4, image::Rgb([shade, 0, 0]));
    image
        .write_to(&mut Cursor::new(&mut png), image::ImageFormat::Png)
        .unwrap();
    png.into()
}

/// An engine, and a data set of one row group of 3,000 rows.
struct Rig {
    engine: Engine,
    stores: Stores,
    manifest: String,
    counts: Arc<[AtomicU64; 2]>,
}

impl Rig {
    async fn new(row_bytes_max: usize) -> Self {
        let (stores, counts) = counted();
        let paths: Vec<String> = (0..ROWS).map(|row| format!("{row}.png")).collect();
        let names: Vec<&str> = paths.iter().map(String::as_str).collect();
        let file = parquet(&by_path(&names), ROWS);
        put(&stores, &[("rows/0.parquet", file)]).await;
        for row in (0..ROWS).filter(|row| row % 10 != 9) {
            let at = format!("images/{row}.png");
            put(&stores, &[(at.as_str(), png(row as u8))]).await;
        }
        let asked = SourceRequest {
            image_root: Some("memory:///data/images".into()),
            ..request("memory:///data/rows")
        };
        let manifest = Arc::new(index(&stores, None, &[asked]).await.unwrap());
        let state = stores.open("memory:///state").unwrap();
        let manifest = manifest.save(&state).await.unwrap();
        let config = WorkerConfig {
            device: "cpu".into(),
            threads: 1,
            row_bytes_max,
            ..Default::default()
        };
        let engine = Engine::new(&config, stores.clone(), state).unwrap();
        Self {
            engine,
            stores,
            manifest,
            counts,
        }
    }

    fn gets(&self) -> u64 {
        self.counts[0].load(Ordering::Relaxed)
    }

    /// The pass of a step that only checks its candidates, as uniform steps do.
    async fn surveyed(&self, rows: &[u32]) -> (Slice, Surveyed) {
        let rows = BlockRows {
            block: 2,
            rows: rows.to_vec(),
            ..Default::default()
        };
        let mut slice = Slice::open(&self.engine, &self.manifest, vec![rows], Vec::new())
            .await
            .unwrap();
        slice.keep_for = Some(0);
        let task = Task {
            step: 0,
            shape: Shape {
                micro_batch_rows: 16,
                dtype: EmbeddingDtype::F16,
            },
            fidelity: Fidelity::Full,
            reference: None,
            extent: Extent::Step,
            inputs: Some(Arc::new(Inputs::check())),
            keep_ready: false,
        };
        let mut surveyed = survey(&self.engine, &slice, &task).await.unwrap();
        (slice, surveyed.pop().unwrap())
    }

    /// The rows as they would be sent.
    async fn chosen(&self, slice: &Slice, rows: &[u32]) -> Result<Vec<Row>> {
        let block = &slice.blocks[0];
        let whole = slice.read(&self.engine, block).await?;
        slice
            .copied_rows(&self.engine, block, whole, rows.to_vec())
            .await
    }
}

#[tokio::test]
async fn a_step_reads_the_images_of_its_candidates_once() {
    let rig = Rig::new(64 << 20).await;
    // Of the last block, which begins at row 2048. The image of 2049 is missing.
    let mut rows: Vec<u32> = (0..952).step_by(10).collect();
    rows.push(1);
    let before = rig.gets();
    let (slice, surveyed) = rig.surveyed(&rows).await;
    // The manifest, the footer, the columns of the row group.
    assert_eq!(rig.gets() - before, 3 + 96);
    let holes = surveyed.faults.iter();
    let holes: Vec<_> = holes.map(|(n, fault)| (*n, fault.reason)).collect();
    assert_eq!(holes, [(96, BadRowReason::ImageMissing)]);
    let before = rig.gets();
    let chosen = rig.chosen(&slice, &[900, 0, 10]).await.unwrap();
    assert_eq!(rig.gets(), before, "they are kept");
    let expected = [2_948, 2_048, 2_058].map(|row: usize| png(row as u8));
    let images = chosen.iter().map(|row| row.image().unwrap());
    assert!(images.eq(expected.iter().map(|image| &image[..])));
    assert_eq!(chosen[2].caption(), Some("caption 2058"));
    drop((slice, surveyed));
    assert_eq!(rig.engine.raw.bytes(), 0, "the call is over");
}

#[tokio::test]
async fn an_image_that_is_replaced_while_its_step_is_scored_is_refused() {
    let rig = Rig::new(0).await;
    let (slice, _) = rig.surveyed(&[0, 10, 20]).await;
    let before = rig.gets();
    rig.chosen(&slice, &[20, 10]).await.unwrap();
    assert_eq!(
        rig.gets() - before,
        2,
        "there was no room, so they are read again"
    );
    // Another object, of the same bytes.
    put(&rig.stores, &[("images/2058.png", png(10))]).await;
    rig.chosen(&slice, &[20, 10]).await.unwrap();
    put(&rig.stores, &[("images/2058.png", png(7))]).await;
    rig.chosen(&slice, &[20, 0]).await.unwrap();
    let error = rig.chosen(&slice, &[20, 10]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::RowChanged);
    assert_eq!(error.value("id"), Some("0.parquet#2058"));
    // Another call takes it as it is now.
    let (slice, _) = rig.surveyed(&[10]).await;
    let chosen = rig.chosen(&slice, &[10]).await.unwrap();
    assert_eq!(chosen[0].image().unwrap(), &png(7)[..]);
}

#[tokio::test]
async fn rows_that_are_chosen_next_stay_in_their_block_while_there_is_much_room() {
    let stores = stores();
    let state = stores.open("memory:///state").unwrap();
    let images = BinaryArray::from_iter_values((0..12_u8).map(|row| vec![row; 4_000]));
    let captions = StringArray::from_iter_values((0..12).map(|row| format!("caption {row}")));
    let rows = batch(vec![
        ("jpg", Arc::new(images)),
        ("caption", Arc::new(captions)),
    ]);
    let files = [("0.parquet", parquet(&rows, 12))];
    let manifest = Arc::new(indexed(&stores, &files).await.unwrap());
    let manifest = manifest.save(&state).await.unwrap();
    let mut row_bytes_max = WorkerConfig::default().row_bytes_max;
    let most = vec![9, 1, 8, 0, 2, 3, 4, 5];
    for (wanted, waits, is_tight, is_shared) in [
        (most.clone(), false, false, true),
        // A quarter of the block: other steps take the rest.
        (vec![9, 1, 8], false, false, true),
        (most.clone(), true, false, false),
        (most, false, true, false),
    ] {
        let config = WorkerConfig {
            device: "cpu".into(),
            threads: 1,
            row_bytes_max,
            ..Default::default()
        };
        let engine = Engine::new(&config, stores.clone(), state.clone()).unwrap();
        let rows = BlockRows {
            rows: wanted,
            ..Default::default()
        };
        let mut slice = Slice::open(&engine, &manifest, vec![rows], Vec::new())
            .await
            .unwrap();
        slice.keep_for = Some(3);
        let block = &slice.blocks[0];
        let whole = slice.read(&engine, block).await.unwrap();
        let bytes = whole.bytes();
        assert_eq!(is_tight, row_bytes_max == bytes);
        let kept = slice.keep_candidates(&engine, block, &whole, waits).await;
        let kept = kept.unwrap().unwrap();
        assert_eq!(engine.raw.bytes() == bytes, is_shared);
        let rows = kept.rows(block, &[2, 0]).unwrap();
        let captions: Vec<_> = rows.iter().map(|row| row.caption().unwrap()).collect();
        assert_eq!(captions, ["caption 8", "caption 9"]);
        assert_eq!(Arc::ptr_eq(&rows[0].batch, &whole.batch), is_shared);
        // The last one has room for the block, and not for twice as much.
        row_bytes_max = if waits { bytes } else { row_bytes_max };
        drop(kept);
        assert_eq!(engine.raw.bytes(), 0);
    }
}
