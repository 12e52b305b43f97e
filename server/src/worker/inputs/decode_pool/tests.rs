use super::*;
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use std::sync::mpsc;

fn rows(count: usize) -> Vec<Row> {
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

/// As many images that never end as there are threads: each costs its row, and no other one.
#[tokio::test]
async fn an_image_that_loops_costs_its_row_alone() {
    let limits = ImageLimits {
        pixels_max: 1,
        bytes_max: 1,
    };
    let pool = Pool::new(2, limits).unwrap();
    let pool = pool.with_deadline(Duration::from_millis(50));
    // It hangs until the test ends.
    let (end, ended) = mpsc::channel::<()>();
    let ended = Mutex::new(ended);
    let one = move |row: &Row| -> PreparedRow {
        if row.row == 1 || row.row == 5 {
            assert!(ended.lock().unwrap().recv().is_err());
        }
        Err(RowFault::new(BadRowReason::ImageNull, row.row.to_string()))
    };
    let prepared = pool.each(rows(8), Arc::new(one)).await.unwrap();
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
    assert_eq!(pool.run(|_| 7).await.unwrap(), 7, "others go on");
    drop(end);
}
