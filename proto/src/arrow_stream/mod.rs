//! Reads the Arrow IPC streams in which rows are sent.
//!
//! Arrow's own decoder trusts what a message says of its body, and panics if that is not so. Here
//! each message is checked before Arrow reads it: whoever sends a stream cannot end the process
//! that reads it. What lies inside of a buffer (offsets, texts, null counts) Arrow checks itself.
mod layout;
mod left;
#[cfg(test)]
mod tests;

use arrow::{
    array::RecordBatch,
    buffer::Buffer,
    datatypes::SchemaRef,
    error::ArrowError,
    ipc::{Message, MessageHeader, convert::try_fb_to_schema, reader::read_record_batch},
};
use bytes::Bytes;
use left::Left;
use std::{collections::HashMap, sync::Arc};

/// What each message begins with.
const CONTINUES: [u8; 4] = [0xff; 4];

/// Reads a whole stream, which may be cut into parts anywhere. A batch that lies in one part shares
/// its memory.
///
/// # Errors
/// `IpcError` for anything else than a schema and record batches of it, with the number of the
/// message that is wrong. Streams of Superbatch have no dictionaries, unions, runs or compressed
/// buffers: these are refused.
pub fn read(
    parts: impl IntoIterator<Item = Bytes>,
) -> Result<(SchemaRef, Vec<RecordBatch>), ArrowError> {
    let mut left = Left::new(parts);
    let (mut schema, mut batches) = (None, Vec::new());
    for number in 0_u64.. {
        let is_wrong =
            |what: String| ArrowError::IpcError(format!("message {number} of the stream: {what}"));
        let Some(metadata) = metadata(&mut left).map_err(is_wrong)? else {
            break;
        };
        let message = message(&metadata).map_err(is_wrong)?;
        let body = body(&message, &mut left).map_err(is_wrong)?;
        match (message.header_type(), &schema) {
            (MessageHeader::Schema, None) => {
                schema = Some(self::schema(&message, &body).map_err(is_wrong)?);
            }
            (MessageHeader::RecordBatch, Some(schema)) => {
                let batch = batch(&message, &body, schema).map_err(is_wrong)?;
                batches.push(batch);
            }
            (MessageHeader::Schema, Some(_)) => {
                return Err(is_wrong("the stream has a second schema".to_owned()));
            }
            (MessageHeader::RecordBatch, None) => {
                return Err(is_wrong("rows come before the schema".to_owned()));
            }
            (other, _) => {
                let what = format!("it is a {other:?}, and only a schema and rows are sent");
                return Err(is_wrong(what));
            }
        }
    }
    let schema =
        schema.ok_or_else(|| ArrowError::IpcError("the stream has no schema".to_owned()))?;
    Ok((schema, batches))
}

/// Returns the next message without its body; `None` at the end of the stream.
fn metadata(left: &mut Left) -> Result<Option<Buffer>, String> {
    if left.bytes() == 0 {
        return Ok(None);
    }
    let cut = || "the stream ends in its length".to_owned();
    let prefix = left.take(8).ok_or_else(cut)?;
    let (marker, length) = prefix.split_at(4);
    if marker != CONTINUES {
        return Err(format!(
            "it begins with {marker:02x?} and not with {CONTINUES:02x?}"
        ));
    }
    let length = length.try_into().map_or(0, u32::from_le_bytes) as usize;
    let bytes = left.bytes();
    match length {
        0 if bytes == 0 => Ok(None),
        0 => Err(format!("{bytes} bytes follow the end of the stream")),
        _ => left.take(length).map(Some).ok_or_else(|| {
            format!("it should have {length} bytes, and the stream has {bytes} more")
        }),
    }
}

fn message(metadata: &Buffer) -> Result<Message<'_>, String> {
    arrow::ipc::root_as_message(metadata).map_err(|e| format!("it cannot be read: {e}"))
}

fn body(message: &Message<'_>, left: &mut Left) -> Result<Buffer, String> {
    let (length, bytes) = (message.bodyLength(), left.bytes());
    let body = usize::try_from(length).ok();
    body.and_then(|length| left.take(length)).ok_or_else(|| {
        format!("its body should have {length} bytes, and the stream has {bytes} more")
    })
}

fn schema(message: &Message<'_>, body: &Buffer) -> Result<SchemaRef, String> {
    let schema = message.header_as_schema().ok_or("it has no schema")?;
    if !body.is_empty() {
        return Err(format!("a schema has a body of {} bytes", body.len()));
    }
    layout::check_schema(schema)?;
    let schema = try_fb_to_schema(schema).map_err(|e| e.to_string())?;
    Ok(Arc::new(schema))
}

fn batch(message: &Message<'_>, body: &Buffer, schema: &SchemaRef) -> Result<RecordBatch, String> {
    let batch = message.header_as_record_batch().ok_or("it has no rows")?;
    layout::check_batch(batch, body.len(), schema)?;
    let none = HashMap::new();
    let read = read_record_batch(body, batch, schema.clone(), &none, None, &message.version());
    read.map_err(|e| e.to_string())
}
