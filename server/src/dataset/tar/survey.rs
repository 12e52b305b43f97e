//! Surveys one tar: finds its samples by reading headers only.
use super::{
    entries::{End, Next, Walk},
    samples::{Grouping, Sample},
};
use crate::{dataset::file::ShardFile, error::Result};
use bytes::Bytes;

/// Bytes of one read: few if headers are far apart, more while they are close together. So neither
/// a tar of large images nor one of tiny files needs many requests or many bytes.
const READ_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=8 << 20;
/// A gap between headers that is cheaper to read than to skip by another request.
const GAP_BYTES: u64 = 1 << 20;

/// The samples of a shard in their order, and how the file ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    pub(super) samples: Vec<Sample>,
    pub(super) end: End,
}

impl Survey {
    /// Returns its approximate size in memory.
    pub fn bytes(&self) -> usize {
        let member = |m: &super::samples::Member| size_of_val(m) + m.field.capacity();
        let sample = |sample: &Sample| {
            let members = sample.members.iter().map(member).sum::<usize>();
            size_of_val(sample) + sample.key.capacity() + members
        };
        self.samples.iter().map(sample).sum()
    }
}

/// Reads all headers of a shard.
///
/// # Errors
/// `InvalidArgument` if it is no tar, compressed or sparse; those of reading.
pub(super) async fn survey(file: &ShardFile) -> Result<Survey> {
    let mut walk = Walk::new(0, file.size());
    let mut grouping = Grouping::default();
    let mut samples = Vec::new();
    let (mut start, mut bytes, mut read_bytes) = (0, Bytes::new(), *READ_BYTES.start());
    let end = loop {
        let next = walk.next(start, &bytes);
        match next.map_err(|refused| file.refused(refused))? {
            Next::Entry(entry) => samples.extend(grouping.push(&entry)),
            Next::End(end) => break end,
            Next::Need(range) => {
                let passed = start + bytes.len() as u64;
                read_bytes = if range.start <= passed + GAP_BYTES {
                    (read_bytes * 2).min(*READ_BYTES.end())
                } else {
                    *READ_BYTES.start()
                };
                let to = range.end.max(range.start + read_bytes).min(file.size());
                start = range.start;
                bytes = file.fetch(start..to).await?;
            }
        }
    };
    samples.extend(grouping.finish());
    Ok(Survey { samples, end })
}
