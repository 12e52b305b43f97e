//! Ids that users see.
use std::fmt;

/// Longest run id, in bytes.
pub const RUN_ID_BYTES_MAX: usize = 128;

/// Returns whether `id` may name a run: letters, digits, `-`, `_` and `.`, not starting with a dot,
/// at most [`RUN_ID_BYTES_MAX`] bytes. Run ids become object keys.
pub fn is_run_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= RUN_ID_BYTES_MAX
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// The id of a row: its shard's path below the source, and its number in the shard. Keys inside
/// data sets repeat; this id does not.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RowId<'a> {
    /// The number of the source; shown only if a run has several.
    pub source: Option<u32>,
    pub shard: &'a str,
    pub row: u64,
}

impl fmt::Display for RowId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = self.source {
            write!(f, "{source}:")?;
        }
        write!(f, "{}#{}", self.shard, self.row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_ids_are_safe_object_keys() {
        for good in ["a", "siglip-b16.v2_3", &"x".repeat(RUN_ID_BYTES_MAX)] {
            assert!(is_run_id(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a b",
            "ü",
            &"x".repeat(RUN_ID_BYTES_MAX + 1),
        ] {
            assert!(!is_run_id(bad), "{bad}");
        }
    }

    #[test]
    fn row_ids_name_shard_and_row() {
        let mut id = RowId {
            source: None,
            shard: "00003.parquet",
            row: 17,
        };
        assert_eq!(id.to_string(), "00003.parquet#17");
        id.source = Some(1);
        assert_eq!(id.to_string(), "1:00003.parquet#17");
    }
}
