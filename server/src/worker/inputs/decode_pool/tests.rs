use super::*;
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use std::sync::{Mutex, mpsc};

pub(super) fn rows(count: usize) -> Vec<Row> {
    let options = RecordBatchOptions::new().with_row_count(Some(count));
    let schema = Arc::new(arrow::datatypes::Schema::empty());
    let batch = RecordBatch::try_new_with_options(schema, Vec::new(), &options).unwrap();
    let batch = Arc::new(batch);
    (0..count)
        .map(|row| Row {
            batch: batch.clone(),
            row,
        })
        .collect()
}

const LIMITS: ImageLimits = ImageLimits {
    pixels_max: 1,
    bytes_max: 1,
};

/// Returns a decoder that hangs over the rows `hanging` until its sender is dropped, and says when
/// it begins one of them.
fn hanging_over(
    hanging: &'static [usize],
    ended: mpsc::Receiver<()>,
) -> (
    impl Fn(&Row) -> PreparedRow + Send + Sync + 'static,
    tokio::sync::mpsc::UnboundedReceiver<usize>,
) {
    let ended = Mutex::new(ended);
    let (begin, begun) = tokio::sync::mpsc::unbounded_channel();
    let one = move |row: &Row| {
        if hanging.contains(&row.row) {
            let _ = begin.send(row.row);
            assert!(ended.lock().unwrap().recv().is_err());
        }
        Err(RowFault::new(BadRowReason::ImageNull, row.row.to_string()))
    };
    (one, begun)
}

/// As many images that never end as there are threads: each costs its row, and no other one.
#[tokio::test]
async fn an_image_that_loops_costs_its_row_alone() {
    let pool = DecodePool::new(2, LIMITS, Duration::from_millis(50)).unwrap();
    let (end, ended) = mpsc::channel();
    let (one, _begun) = hanging_over(&[1, 5], ended);
    let prepared = pool.each(rows(8), one).await.unwrap();
    let told = |n: usize| prepared[n].as_ref().err().unwrap();
    for n in 0..8 {
        match n {
            1 | 5 => {
                assert_eq!(told(n).reason, BadRowReason::ImageUndecodable);
                assert!(told(n).detail.contains("worker.decode_deadline_seconds"));
            }
            _ => assert_eq!(told(n).detail, n.to_string()),
        }
    }
    drop(end);
}

/// The call that brought the image is cancelled while its decoder hangs. The thread is lost, but
/// its seat is not.
#[tokio::test]
async fn a_decoder_that_hangs_is_replaced_after_its_call_has_gone() {
    let pool = DecodePool::new(1, LIMITS, Duration::from_millis(50)).unwrap();
    let (end, ended) = mpsc::channel();
    let (one, mut begun) = hanging_over(&[0], ended);
    tokio::select! {
        biased;
        hangs = pool.each(rows(1), one) => panic!("it came back: {} rows", hangs.unwrap().len()),
        row = begun.recv() => assert_eq!(row, Some(0)),
    }
    let (one, _begun) = hanging_over(&[], mpsc::channel().1);
    let prepared = pool.each(rows(3), one).await.unwrap();
    let details: Vec<_> = prepared
        .into_iter()
        .map(|row| row.unwrap_err().detail)
        .collect();
    assert_eq!(details, ["0", "1", "2"]);
    drop(end);
}

/// A draw or a cut of rows is not queued behind decoders.
#[tokio::test]
async fn other_work_does_not_wait_for_decoders_that_hang() {
    let pool = DecodePool::new(1, LIMITS, Duration::from_secs(3600)).unwrap();
    let (end, ended) = mpsc::channel();
    let (one, mut begun) = hanging_over(&[0], ended);
    let hangs = pool.each(rows(2), one);
    let other = async {
        assert_eq!(begun.recv().await, Some(0));
        let seven = pool.run(|| 7).await.unwrap();
        drop(end);
        seven
    };
    let (prepared, seven) = tokio::join!(hangs, other);
    assert_eq!((prepared.unwrap().len(), seven), (2, 7));
}

#[tokio::test]
async fn a_decoder_that_panics_costs_its_row() {
    let pool = DecodePool::new(1, LIMITS, Duration::from_secs(3600)).unwrap();
    let one = |row: &Row| match row.row {
        1 => panic!("oh no"),
        n => Err(RowFault::new(BadRowReason::ImageNull, n.to_string())),
    };
    let prepared = pool.each(rows(3), one).await.unwrap();
    let details: Vec<_> = prepared
        .into_iter()
        .map(|row| row.unwrap_err().detail)
        .collect();
    assert_eq!(details, ["0", "the decoder panicked", "2"]);
}
