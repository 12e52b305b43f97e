//! Entries of the samples' `json` members.
use super::{
    build::blocks,
    layout,
    samples::{Member, Sample, rows_of},
    survey::Survey,
};
use crate::{
    dataset::{
        file::ShardFile,
        filter::{Entries, KEY},
        manifest::{Block, Layout},
    },
    error::{Error, Result},
};
use bytes::Bytes;
use parquet::file::reader::ChunkReader;
use serde_json::Value;

/// Returns what the rows of a shard have under these names, block by block so that little is in
/// memory at once.
///
/// # Errors
/// Those of reading.
pub(in crate::dataset) async fn entries(
    file: &ShardFile,
    survey: &Survey,
    layout: &Layout,
    names: &[&str],
) -> Result<Entries> {
    let mut found = Entries::new(names);
    let needs_json = names.iter().any(|name| *name != KEY);
    for block in blocks(&survey.samples, layout) {
        let samples = &survey.samples[rows_of(&survey.samples, &block)];
        let rows = samples.iter().filter(|s| layout::is_row(layout, s));
        let rows: Vec<_> = rows.collect();
        let contents = if needs_json {
            contents(file, &block, &rows).await?
        } else {
            vec![None; rows.len()]
        };
        for (sample, content) in rows.iter().zip(contents) {
            let json: Option<Value> = content.and_then(|c| serde_json::from_slice(&c).ok());
            found.push(&sample.key, json.as_ref());
        }
    }
    Ok(found)
}

/// Returns the `json` of each row of a block.
async fn contents(file: &ShardFile, block: &Block, rows: &[&Sample]) -> Result<Vec<Option<Bytes>>> {
    let json = |sample: &Sample| -> Option<Member> {
        let member = sample.member("json")?;
        layout::is_json(member).then(|| member.clone())
    };
    let members: Vec<Option<Member>> = rows.iter().map(|sample| json(sample)).collect();
    let ranges = members.iter().flatten();
    let ranges: Vec<_> = ranges.map(|m| m.offset..m.offset + m.length).collect();
    let bytes = file.ranges(&ranges).await?;
    let content = |member: Option<Member>| {
        let content = member.map(|m| bytes.get_bytes(m.offset, m.length as usize));
        content.transpose().map_err(|cause| {
            let message = format!("a member of block {:?} was not read", block.bytes);
            Error::internal(message).because(cause)
        })
    };
    members.into_iter().map(content).collect()
}
