//! What a TIFF's directory says of its own size. The decoder makes room for as many values as a tag
//! is said to have, before it looks for them in the file.

/// Tags from this one on are those of other programs, which the decoder does not read. Pillow opens
/// a file where these are damaged.
const FIRST_PRIVATE_TAG: u16 = 0x8000;

/// Returns whether the file is long enough for the values of each tag of its first page.
pub(crate) fn values_lie_in(bytes: &[u8]) -> bool {
    let numbers = Numbers {
        bytes,
        is_little: bytes.starts_with(b"II"),
    };
    numbers.all_lie_in().unwrap_or(false)
}

struct Numbers<'a> {
    bytes: &'a [u8],
    is_little: bool,
}

impl Numbers<'_> {
    /// Returns `None` for a directory that is cut off.
    fn all_lie_in(&self) -> Option<bool> {
        const ENTRY_BYTES: usize = 12;
        let directory = self.long(4)? as usize;
        let entries = usize::from(self.short(directory)?);
        for entry in 0..entries {
            let at = directory.checked_add(2 + entry * ENTRY_BYTES)?;
            let (tag, kind, count) = (self.short(at)?, self.short(at + 2)?, self.long(at + 4)?);
            let bytes = u64::from(count) * width(kind);
            if tag < FIRST_PRIVATE_TAG && bytes > self.bytes.len() as u64 {
                return Some(false);
            }
        }
        Some(true)
    }

    fn short(&self, at: usize) -> Option<u16> {
        let bytes = *self.bytes.get(at..)?.first_chunk::<2>()?;
        Some(if self.is_little {
            u16::from_le_bytes(bytes)
        } else {
            u16::from_be_bytes(bytes)
        })
    }

    fn long(&self, at: usize) -> Option<u32> {
        let bytes = *self.bytes.get(at..)?.first_chunk::<4>()?;
        Some(if self.is_little {
            u32::from_le_bytes(bytes)
        } else {
            u32::from_be_bytes(bytes)
        })
    }
}

/// Returns the bytes of one value of a type. The decoder reads none of an unknown type.
fn width(kind: u16) -> u64 {
    match kind {
        3 | 8 => 2,
        4 | 9 | 11 | 13 => 4,
        5 | 10 | 12 | 16..=18 => 8,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(is_little: bool, tag: u16, kind: u16, count: u32) -> Vec<u8> {
        let short = |v: u16| {
            if is_little {
                v.to_le_bytes()
            } else {
                v.to_be_bytes()
            }
        };
        let long = |v: u32| {
            if is_little {
                v.to_le_bytes()
            } else {
                v.to_be_bytes()
            }
        };
        let mut page = if is_little {
            b"II".to_vec()
        } else {
            b"MM".to_vec()
        };
        page.extend(short(42));
        page.extend(long(8));
        page.extend(short(1));
        page.extend([short(tag), short(kind)].concat());
        page.extend([long(count), long(0), long(0)].concat());
        page
    }

    #[test]
    fn tags_of_more_values_than_bytes_are_told() {
        for is_little in [true, false] {
            let lies = |tag, kind, count| !values_lie_in(&page(is_little, tag, kind, count));
            assert!(!lies(0x100, 4, 1) && !lies(0x102, 3, 13) && !lies(0x102, 1, 26));
            assert!(lies(0x100, 4, 7) && lies(0x102, 3, 14) && lies(0x11a, 5, u32::MAX));
            assert!(!lies(0x8769, 4, u32::MAX), "the decoder does not read it");
            let page = page(is_little, 0x100, 4, 1);
            for cut in 0..page.len() - 8 {
                assert!(!values_lie_in(&page[..cut]), "{cut}");
            }
        }
    }
}
