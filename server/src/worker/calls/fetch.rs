//! Reads rows again, for a step that is served from its receipt.
use super::{
    answers::Answers,
    rows::{RowWriter, send_rows},
    slice::{Slice, SliceBlock, each, pick},
    survey::AHEAD,
};
use crate::{
    error::{Error, Result},
    worker::{engine::Engine, inputs::row::Row},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::{collections::BTreeMap, sync::Arc};
use superbatch_proto::v1::{
    FetchRowsRequest, FetchRowsResponse, Reason, RowsDone, fetch_rows_response::Message,
};

/// Serves one `FetchRows` call: sends the rows in the order of the request.
///
/// # Errors
/// `RowChanged` if a row lacks image or caption, and those of reading.
pub async fn fetch_rows(
    engine: &Engine,
    request: FetchRowsRequest,
    answers: &Answers<FetchRowsResponse>,
) -> Result<()> {
    let FetchRowsRequest {
        dataset_manifest,
        blocks,
        columns,
    } = request;
    let slice = Slice::open(engine, &dataset_manifest, blocks, columns).await?;
    let rows = read(engine, &slice).await?;
    if let Some(n) = rows
        .iter()
        .position(|row| row.image().is_none() || row.caption().is_none())
    {
        let id = slice.id(n);
        let message =
            format!("row {id} has no image or no caption; it was replaced since it was chosen");
        return Err(Error::new(Reason::RowChanged, message).with("id", id));
    }
    let writer = RowWriter::new(&slice.manifest.data_schema(&slice.columns)?)?;
    let writer = send_rows(writer, &rows, &engine.pool, answers, arrow_ipc).await?;
    for part in writer.finish()? {
        answers.send(arrow_ipc(part)).await?;
    }
    let rows = slice.candidates as u32;
    answers
        .send(answer(Message::Done(RowsDone {
            rows,
            rows_read_again: rows,
        })))
        .await
}

/// Reads the rows in the order of the request. A receipt lists rows in the order drawn, so the rows
/// of one block are scattered over the request; they are grouped so that each block is read once.
async fn read(engine: &Engine, slice: &Slice) -> Result<Vec<Row>> {
    let mut by_block: BTreeMap<_, Vec<&SliceBlock>> = BTreeMap::new();
    for part in slice.blocks.iter().filter(|part| !part.rows.is_empty()) {
        by_block
            .entry((part.source, part.shard, part.block))
            .or_default()
            .push(part);
    }
    let reads: Vec<_> = by_block
        .into_values()
        .map(|parts| read_block(engine, slice, parts).boxed())
        .collect();
    let mut reads = stream::iter(reads).buffered(AHEAD);
    let mut rows: Vec<Option<Row>> = vec![None; slice.candidates];
    while let Some(block) = reads.try_next().await? {
        block
            .into_iter()
            .for_each(|(place, row)| rows[place] = Some(row));
    }
    each(rows)
}

/// Reads the rows of `parts`, which lie in one block, and returns them with their places.
async fn read_block(
    engine: &Engine,
    slice: &Slice,
    parts: Vec<&SliceBlock>,
) -> Result<Vec<(usize, Row)>> {
    let Some(first) = parts.first() else {
        return Ok(Vec::new());
    };
    let whole = slice.read(engine, first).await?;
    let wanted = parts
        .iter()
        .flat_map(|part| part.rows.iter().copied())
        .collect();
    // The rows are copied, so that the rest of the block does not stay in memory.
    let batch = Arc::new(engine.pool.run(move |_| pick(&whole, wanted)).await??);
    let places = parts
        .iter()
        .flat_map(|part| part.first..part.first + part.rows.len());
    Ok(places
        .enumerate()
        .map(|(row, place)| {
            (
                place,
                Row {
                    batch: batch.clone(),
                    row,
                },
            )
        })
        .collect())
}

fn answer(message: Message) -> FetchRowsResponse {
    FetchRowsResponse {
        message: Some(message),
    }
}

fn arrow_ipc(part: Bytes) -> FetchRowsResponse {
    answer(Message::ArrowIpc(part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataset::fixtures::{img2dataset, indexed, parquet},
        worker::{calls::answers::answer_with, config::WorkerConfig, kept::read::tests::counted},
    };
    use arrow::{array::AsArray, datatypes::Int64Type, ipc::reader::StreamReader};
    use std::{io::Cursor, sync::atomic::Ordering};
    use superbatch_proto::v1::BlockRows;

    #[tokio::test]
    async fn scattered_rows_cost_one_read_a_block() {
        let (stores, counts) = counted();
        let state = stores.open("memory:///state").unwrap();
        let manifest = indexed(&stores, &[("0.parquet", parquet(&img2dataset(0..12), 4))])
            .await
            .unwrap();
        let dataset_manifest = manifest.save(&state).await.unwrap();
        let config = WorkerConfig {
            device: "cpu".into(),
            threads: 1,
            block_cache_bytes: 0,
            ..Default::default()
        };
        let engine = Arc::new(Engine::new(&config, stores, state).unwrap());
        // Every fourth row has no image.
        let wanted = [9, 0, 4, 2, 8, 1, 6, 10, 5];
        let blocks = wanted.map(|n: u32| BlockRows {
            block: n / 4,
            rows: vec![n % 4],
            ..Default::default()
        });
        let request = FetchRowsRequest {
            dataset_manifest,
            blocks: blocks.to_vec(),
            columns: vec!["uid".into()],
        };
        let before = counts[0].load(Ordering::Relaxed);
        let work = |answers: Answers<_>| {
            async move { fetch_rows(&engine, request, &answers).await }.boxed()
        };
        let messages: Vec<_> = answer_with(work)
            .map(|sent| sent.unwrap().message.unwrap())
            .collect()
            .await;
        assert_eq!(
            counts[0].load(Ordering::Relaxed) - before,
            5,
            "the manifest, the footer and three blocks"
        );
        let parts = messages.iter().map(|message| match message {
            Message::ArrowIpc(part) => part.to_vec(),
            Message::Done(done) => {
                assert_eq!(done.rows, 9);
                Vec::new()
            }
        });
        let reader =
            StreamReader::try_new(Cursor::new(parts.collect::<Vec<_>>().concat()), None).unwrap();
        let batches = reader.collect::<Result<Vec<_>, _>>().unwrap();
        assert_eq!(batches.len(), 1);
        let uids = batches[0]["uid"]
            .as_primitive::<Int64Type>()
            .values()
            .to_vec();
        assert_eq!(uids, wanted.map(i64::from));
    }
}
