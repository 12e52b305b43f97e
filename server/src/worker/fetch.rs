//! Rows read again, for a step that is served from its receipt.
use super::{
    answers::Answers,
    engine::Engine,
    pool::Row,
    rows::{RowWriter, send_rows},
    slice::{Rows, Slice},
    survey::AHEAD,
};
use crate::error::{Error, Result};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use superbatch_proto::v1::{FetchRowsRequest, FetchRowsResponse, Reason, RowsDone, fetch_rows_response::Message};

/// Serves one `FetchRows` call: the rows in the order asked.
///
/// # Errors
/// `RowChanged` where a row lacks image or caption, and those of reading.
pub(super) async fn fetch_rows(
    engine: &Engine,
    request: FetchRowsRequest,
    answers: &Answers<FetchRowsResponse>,
) -> Result<()> {
    let FetchRowsRequest { dataset_manifest, blocks, columns } = request;
    let slice = Slice::open(engine, &dataset_manifest, blocks, columns).await?;
    let reads: Vec<_> = slice.blocks.iter().map(|block| slice.read(engine, block).boxed()).collect();
    let mut reads = stream::iter(reads).buffered(AHEAD).zip(stream::iter(&slice.blocks));
    let mut writer = RowWriter::new(&slice.manifest.data_schema(&slice.columns)?)?;
    while let Some((whole, block)) = reads.next().await {
        let whole = Rows::Whole(whole?);
        let rows: Vec<Row> = (0..block.rows.len()).map(|n| block.row(&whole, n)).collect();
        if let Some(n) = rows.iter().position(|row| row.image().is_none() || row.caption().is_none()) {
            let id = slice.id(block.first + n);
            let message = format!("row {id} has no image or no caption; it was replaced since it was chosen");
            return Err(Error::new(Reason::RowChanged, message).with("id", id));
        }
        writer = send_rows(writer, &rows, &engine.pool, answers, arrow_ipc).await?;
    }
    for part in writer.finish()? {
        answers.send(arrow_ipc(part)).await?;
    }
    let rows = slice.candidates as u32;
    answers.send(answer(Message::Done(RowsDone { rows, rows_read_again: rows }))).await
}

fn answer(message: Message) -> FetchRowsResponse {
    FetchRowsResponse { message: Some(message) }
}

fn arrow_ipc(part: Bytes) -> FetchRowsResponse {
    answer(Message::ArrowIpc(part))
}
