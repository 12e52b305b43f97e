//! Reads rows again, for a step that is served from its receipt.
use super::{
    answers::Answers,
    chosen::hold,
    hand::hand_over,
    rows::{Form, RowWriter, send_rows},
    slice::{Slice, SliceBlock, each},
    survey::AHEAD,
};
use crate::{
    bounds::{LABEL_BYTES_MAX, check_bytes},
    error::{Error, Result},
    worker::{engine::Engine, inputs::row::Row, kept::held::HeldFor},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::collections::BTreeMap;
use superbatch_proto::v1::{
    FetchRowsRequest, FetchRowsResponse, Reason, RowsDone, RowsForm, fetch_rows_response::Message,
};

/// Serves one `FetchRows` call: sends the rows in the order of the request.
///
/// # Errors
/// `RowChanged` if a row lacks image or caption, and those of reading.
pub(crate) async fn fetch_rows(
    engine: &Engine,
    request: FetchRowsRequest,
    answers: &Answers<FetchRowsResponse>,
) -> Result<()> {
    let FetchRowsRequest {
        dataset_manifest,
        blocks,
        columns,
        form,
        run_id,
        generation,
        step,
    } = request;
    check_bytes("run_id", &run_id, LABEL_BYTES_MAX)?;
    let slot = engine.fetch_slot().await?;
    let slice = Slice::open(engine, &dataset_manifest, blocks, columns).await?;
    let rows = read(engine, &slice).await?;
    if let Some(n) = rows
        .iter()
        .position(|row| row.image().is_none() || row.caption().is_none())
    {
        return Err(replaced(slice.id(n)));
    }
    let form = match RowsForm::try_from(form) {
        Ok(RowsForm::Kept) => {
            let held_for = HeldFor {
                run_id,
                generation,
                step,
            };
            let (hold, kept) = hold(engine, held_for, &rows).await?;
            // The rows are in the budget of held rows now, or nowhere.
            drop((rows, slot));
            answers.send(answer(Message::Kept(kept))).await?;
            if let Some(hold) = hold {
                hold.until(&engine.stopping).await;
            }
            return Ok(());
        }
        Ok(RowsForm::Located) => {
            let all: Vec<usize> = (0..slice.candidates).collect();
            let places = slice.image_places(engine, &all).await?;
            Form::Located(places, slice.manifest.image_place_fields())
        }
        _ => Form::Whole,
    };
    let schema = slice.manifest.data_schema(&slice.columns)?;
    match (&form, answers.handover()) {
        (Form::Whole, Some(handover)) => {
            let handed = hand_over(&schema, &rows, &engine.pool, &engine.buffers);
            handover.put(handed.await?);
        }
        _ => {
            let writer = RowWriter::new(&schema, form)?;
            let wrap = |part| Some(arrow_ipc(part));
            let writer = send_rows(writer, &rows, &engine.pool, answers, wrap).await?;
            for part in writer.finish()? {
                answers.send(arrow_ipc(part)).await?;
            }
        }
    }
    let rows = slice.candidates as u32;
    answers
        .send(answer(Message::Done(RowsDone {
            rows,
            rows_read_again: rows,
        })))
        .await
}

fn replaced(id: String) -> Error {
    let message =
        format!("row {id} has no image or no caption; it was replaced since it was chosen");
    Error::new(Reason::RowChanged, message).with("id", id)
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
    let rows = slice.copied_rows(engine, first, whole, wanted).await?;
    let places = parts
        .iter()
        .flat_map(|part| part.first..part.first + part.rows.len());
    Ok(places.zip(rows).collect())
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
        worker::{
            calls::answers::{AnswerStream, answer_with},
            config::WorkerConfig,
            kept::read::tests::counted,
        },
    };
    use arrow::{array::AsArray, datatypes::Int64Type, ipc::reader::StreamReader};
    use std::{
        io::Cursor,
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
    };
    use superbatch_proto::v1::BlockRows;

    /// Makes an engine with one slot. Returns it with the digest of a data set of 12 rows in blocks
    /// of 4, and the count of its reads.
    async fn engine() -> (Arc<Engine>, String, Arc<[AtomicU64; 2]>) {
        let (stores, counts) = counted();
        let state = stores.open("memory:///state").unwrap();
        let manifest = indexed(&stores, &[("0.parquet", parquet(&img2dataset(0..12), 4))])
            .await
            .unwrap();
        let dataset_manifest = Arc::new(manifest).save(&state).await.unwrap();
        let config = WorkerConfig {
            device: "cpu".into(),
            threads: 1,
            slots: 1,
            block_cache_bytes: 0,
            ..Default::default()
        };
        let engine = Arc::new(Engine::new(&config, stores, state).unwrap());
        (engine, dataset_manifest, counts)
    }

    fn one_row(dataset_manifest: String, form: RowsForm) -> FetchRowsRequest {
        FetchRowsRequest {
            dataset_manifest,
            blocks: vec![BlockRows {
                rows: vec![1],
                ..Default::default()
            }],
            form: form.into(),
            ..Default::default()
        }
    }

    fn fetched(engine: &Arc<Engine>, request: FetchRowsRequest) -> AnswerStream<FetchRowsResponse> {
        let engine = engine.clone();
        answer_with(|answers: Answers<_>| {
            async move { fetch_rows(&engine, request, &answers).await }.boxed()
        })
    }

    #[tokio::test]
    async fn a_call_reads_nothing_before_it_has_a_slot() {
        let (engine, manifest, counts) = engine().await;
        let before = counts[0].load(Ordering::Relaxed);
        let taken = engine.fetch_slot().await.unwrap();
        let mut waits = fetched(&engine, one_row(manifest, RowsForm::Whole));
        // The call that waits ends as the worker does; one that reads would be answered.
        engine.stop();
        let ended = waits.next().await.unwrap().unwrap_err();
        assert!(ended.message().contains("shutting down"), "{ended}");
        assert_eq!(counts[0].load(Ordering::Relaxed), before);
        drop(taken);
    }

    #[tokio::test]
    async fn rows_that_are_kept_for_trainers_hold_no_slot() {
        let (engine, manifest, _) = engine().await;
        let mut keeps = fetched(&engine, one_row(manifest.clone(), RowsForm::Kept));
        let kept = keeps.next().await.unwrap().unwrap().message;
        assert!(matches!(kept, Some(Message::Kept(_))), "{kept:?}");
        let mut next = fetched(&engine, one_row(manifest, RowsForm::Whole));
        assert!(next.next().await.unwrap().is_ok());
        assert!(next.next().await.unwrap().is_ok());
        drop(keeps);
    }

    #[tokio::test]
    async fn scattered_rows_cost_one_read_a_block() {
        let (engine, dataset_manifest, counts) = engine().await;
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
            ..Default::default()
        };
        let before = counts[0].load(Ordering::Relaxed);
        let messages: Vec<_> = fetched(&engine, request)
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
            Message::Kept(kept) => panic!("{kept:?}"),
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
