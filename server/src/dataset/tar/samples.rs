//! Groups members into samples, as webdataset and open_clip do.
use super::entries::Entry;
use crate::dataset::manifest::Block;
use std::{collections::HashSet, ops::Range};

/// One member of a sample: `jpg` of `0001.jpg`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// Everything after the first dot of the file's name, in lower case.
    pub field: String,
    pub offset: u64,
    pub length: u64,
}

/// Consecutive members with one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sample {
    /// Path and name up to the first dot of the name. It is unique neither in a data set nor in a
    /// shard.
    pub key: String,
    /// Where its first header begins, and where the next sample's may.
    pub start: u64,
    pub end: u64,
    pub members: Vec<Member>,
}

impl Sample {
    pub(super) fn member(&self, field: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.field == field)
    }
}

/// Returns the numbers of the samples that lie in a block.
pub(super) fn rows_of(samples: &[Sample], block: &Block) -> Range<usize> {
    let before = |at: u64| samples.partition_point(|sample| sample.start < at);
    before(block.bytes.0)..before(block.bytes.1)
}

/// Returns the key and field of a member's name; `None` for members of no sample: names without a
/// dot, hidden files, and `__name__` at the top.
fn split(name: &str) -> Option<(&str, String)> {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = file + name[file..].find('.')?;
    let is_meta = file == 0 && name.starts_with("__") && name.ends_with("__");
    (dot > file && !is_meta).then(|| (&name[..dot], name[dot + 1..].to_lowercase()))
}

/// Groups the members of a tar in their order.
#[derive(Debug, Default)]
pub(super) struct Grouping {
    open: Option<Sample>,
    /// The fields of the open sample: it may have as many members as the tar.
    fields: HashSet<String>,
}

impl Grouping {
    /// Adds the next member. Returns the sample that it ends: a sample ends if the key changes or a
    /// field repeats.
    pub(super) fn push(&mut self, entry: &Entry) -> Option<Sample> {
        let (key, field) = split(&entry.name)?;
        let (end, length) = (entry.end(), entry.length);
        let member = Member {
            field,
            offset: entry.offset,
            length,
        };
        let is_more = self.open.as_ref().is_some_and(|open| open.key == key);
        if !is_more {
            self.fields.clear();
        }
        let is_new = self.fields.insert(member.field.clone());
        if let Some(open) = self.open.as_mut().filter(|_| is_more && is_new) {
            open.members.push(member);
            open.end = end;
            return None;
        }
        // Where a field repeats, the next sample has that field alone.
        if !is_new {
            self.fields.clear();
            self.fields.insert(member.field.clone());
        }
        let next = Sample {
            key: key.to_owned(),
            start: entry.header,
            end,
            members: vec![member],
        };
        self.open.replace(next)
    }

    /// Returns the last sample.
    pub(super) fn finish(self) -> Option<Sample> {
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_ends_at_the_first_dot_of_the_name() {
        for (name, expected) in [
            ("0001.jpg", Some(("0001", "jpg"))),
            ("./a.b/0001.SEG.png", Some(("./a.b/0001", "seg.png"))),
            ("a/.hidden.jpg", None),
            ("._0001.jpg", None),
            ("README", None),
            ("a/", None),
            ("__x.y__", None),
            ("a/__x.y__", Some(("a/__x", "y__"))),
            ("näme.txt", Some(("näme", "txt"))),
            ("0001.", Some(("0001", ""))),
        ] {
            let found = split(name);
            let found = found.as_ref().map(|(key, field)| (*key, field.as_str()));
            assert_eq!(found, expected, "{name}");
        }
    }

    /// Compared with each other, these would take minutes.
    #[test]
    fn a_sample_may_have_as_many_members_as_its_tar() {
        const MEMBERS: u64 = 300_000;
        let mut grouping = Grouping::default();
        for n in 0..MEMBERS {
            let entry = Entry {
                name: format!("a.{n}"),
                header: n * 512,
                offset: n * 512 + 512,
                length: 0,
            };
            assert_eq!(grouping.push(&entry), None);
        }
        let sample = grouping.finish().unwrap();
        assert_eq!(sample.members.len() as u64, MEMBERS);
    }

    #[test]
    fn a_sample_ends_where_the_key_changes_or_a_field_repeats() {
        let names = [
            "a.jpg", "a.txt", "junk", "b.txt", "b.jpg", "b.JPG", "b.txt", "a.jpg",
        ];
        let entries = names.iter().zip(0_u64..).map(|(name, n)| Entry {
            name: (*name).to_owned(),
            header: n * 1024,
            offset: n * 1024 + 512,
            length: 3,
        });
        let mut grouping = Grouping::default();
        let mut samples: Vec<Sample> = entries.filter_map(|e| grouping.push(&e)).collect();
        samples.extend(grouping.finish());
        let found = samples.iter().map(|sample| {
            let fields = sample.members.iter().map(|m| m.field.as_str());
            (
                sample.key.as_str(),
                fields.collect::<Vec<_>>().join(","),
                sample.start,
                sample.end,
            )
        });
        let expected = [
            ("a", "jpg,txt", 0, 2048),
            ("b", "txt,jpg", 3072, 5120),
            ("b", "jpg,txt", 5120, 7168),
            ("a", "jpg", 7168, 8192),
        ];
        let expected = expected.map(|(key, fields, s, e)| (key, fields.to_owned(), s, e));
        assert!(found.eq(expected), "{samples:?}");
    }
}
