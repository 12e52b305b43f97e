//! Walks the members of a tar: ustar, GNU and PAX headers, from the parts of the file that are in
//! memory.
use std::{fmt, ops::Range};
use tar::{Header, PaxExtensions};

const RECORD: u64 = 512;
/// Longest name or PAX header that is read.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// A regular file in a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: String,
    /// Offset of its first header.
    pub header: u64,
    /// Offset of its content.
    pub offset: u64,
    pub length: u64,
}

impl Entry {
    /// Returns the offset of the next header.
    pub(super) fn end(&self) -> u64 {
        padded(self.offset.saturating_add(self.length))
    }
}

/// How a tar ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// With its end marker.
    Whole,
    /// After a member, or at once, without the marker that tools write: what belongs at this offset
    /// may be missing.
    Unmarked(u64),
    /// In the middle of the member or header at this offset.
    Cut(u64),
    /// With bytes at this offset that are no header.
    Damaged(u64),
}

/// The result of one step of the walk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Entry(Entry),
    End(End),
    /// These bytes of the file must be read into memory first.
    Need(Range<u64>),
}

/// Why a file is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused {
    NoTar,
    Compressed(&'static str),
    /// The name of a sparse member.
    Sparse(String),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTar => write!(f, "is no tar file; let the source name tar files only"),
            Self::Compressed(how) => write!(
                f,
                "is compressed with {how}, so that its rows cannot be read by range; decompress it \
                 (images are compressed already)"
            ),
            Self::Sparse(name) => write!(
                f,
                "holds the sparse member '{name}', which is not read; write it anew without \
                 --sparse"
            ),
        }
    }
}

/// A place in a tar of `size` bytes, and the values of the extension headers just before it.
#[derive(Debug)]
pub(super) struct Walk {
    at: u64,
    size: u64,
    /// Offset of the first extension header of the next member, if one was passed already.
    header: Option<u64>,
    name: Option<Vec<u8>>,
    length: Option<u64>,
    sparse: bool,
}

impl Walk {
    /// Starts a walk at the header at `at`.
    pub(super) fn new(at: u64, size: u64) -> Self {
        Self {
            at,
            size,
            header: None,
            name: None,
            length: None,
            sparse: false,
        }
    }

    /// Returns the next regular member. `bytes` are those of the file from `start` on.
    pub(super) fn next(&mut self, start: u64, bytes: &[u8]) -> Result<Next, Refused> {
        loop {
            let begin = self.header.unwrap_or(self.at);
            if self.at >= self.size {
                let between = self.header.is_none();
                return Ok(Next::End(if between {
                    End::Unmarked(self.size)
                } else {
                    End::Cut(begin)
                }));
            }
            let range = self.at..self.at.saturating_add(RECORD);
            if range.end > self.size && self.at > 0 {
                return Ok(Next::End(End::Cut(begin)));
            }
            if range.end > self.size {
                let all = 0..self.size;
                let small = part(start, bytes, &all);
                return small.map_or(Ok(Next::Need(all)), |bytes| Err(refuse_other_format(bytes)));
            }
            let Some(block) = part(start, bytes, &range) else {
                return Ok(Next::Need(range));
            };
            if block.iter().all(|byte| *byte == 0) {
                return Ok(Next::End(End::Whole));
            }
            let header = Header::from_byte_slice(block);
            if !is_sound(header, block) {
                return match self.at {
                    0 => Err(refuse_other_format(block)),
                    _ => Ok(Next::End(End::Damaged(begin))),
                };
            }
            let Ok(length) = header.entry_size() else {
                return Ok(Next::End(End::Damaged(begin)));
            };
            let found = match header.entry_type().as_byte() {
                kind @ (b'L' | b'K' | b'x' | b'X' | b'g') => {
                    self.extension(kind, length, start, bytes)
                }
                kind => self.member(kind, header, length)?,
            };
            if let Some(found) = found {
                return Ok(found);
            }
        }
    }

    /// Handles an extension header, which describes the next header.
    fn extension(&mut self, kind: u8, length: u64, start: u64, bytes: &[u8]) -> Option<Next> {
        let begin = self.header.unwrap_or(self.at);
        let from = self.at + RECORD;
        let content = from..from.saturating_add(length);
        if content.end > self.size {
            return Some(Next::End(End::Cut(begin)));
        }
        if length > EXTENSION_BYTES_MAX {
            return Some(Next::End(End::Damaged(begin)));
        }
        let Some(text) = part(start, bytes, &content) else {
            return Some(Next::Need(self.at..content.end));
        };
        match kind {
            b'L' => self.name = Some(until_nul(text).to_vec()),
            b'x' | b'X' if self.pax(text).is_none() => {
                return Some(Next::End(End::Damaged(begin)));
            }
            // Names of links, and headers for the whole archive, are not needed for rows.
            _ => {}
        }
        self.header = Some(begin);
        self.at = padded(content.end);
        None
    }

    fn pax(&mut self, text: &[u8]) -> Option<()> {
        for extension in PaxExtensions::new(text) {
            let extension = extension.ok()?;
            match extension.key_bytes() {
                b"path" => self.name = Some(extension.value_bytes().to_vec()),
                b"size" => self.length = Some(extension.value().ok()?.parse().ok()?),
                key if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                _ => {}
            }
        }
        Some(())
    }

    /// Handles the header of a member, and skips its content.
    fn member(&mut self, kind: u8, header: &Header, length: u64) -> Result<Option<Next>, Refused> {
        let begin = self.header.take().unwrap_or(self.at);
        let name = self.name.take();
        let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
        let name = String::from_utf8_lossy(&name).into_owned();
        let length = self.length.take().unwrap_or(length);
        if std::mem::take(&mut self.sparse) || kind == b'S' {
            return Err(Refused::Sparse(name));
        }
        let offset = self.at + RECORD;
        let entry = Entry {
            name,
            header: begin,
            offset,
            // Links, folders and devices have no content, whatever their header says.
            length: if matches!(kind, b'1'..=b'6') {
                0
            } else {
                length
            },
        };
        if offset.saturating_add(entry.length) > self.size {
            return Ok(Some(Next::End(End::Cut(begin))));
        }
        self.at = entry.end();
        let is_file = matches!(kind, b'0' | b'7') || (kind == 0 && !entry.name.ends_with('/'));
        Ok(is_file.then_some(Next::Entry(entry)))
    }
}

fn padded(end: u64) -> u64 {
    end.div_ceil(RECORD).saturating_mul(RECORD)
}

fn part<'a>(start: u64, bytes: &'a [u8], range: &Range<u64>) -> Option<&'a [u8]> {
    let from = usize::try_from(range.start.checked_sub(start)?).ok()?;
    let to = usize::try_from(range.end.checked_sub(start)?).ok()?;
    bytes.get(from..to)
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Returns whether the header's checksum is right. Old writers summed signed bytes, so both sums
/// are accepted.
fn is_sound(header: &Header, record: &[u8]) -> bool {
    const CHECKSUM: Range<usize> = 148..156;
    let Ok(said) = header.cksum() else {
        return false;
    };
    let byte = |(n, byte): (usize, &u8)| if CHECKSUM.contains(&n) { b' ' } else { *byte };
    let bytes = || record.iter().enumerate().map(byte);
    let unsigned: u32 = bytes().map(u32::from).sum();
    let signed: i32 = bytes().map(|byte| i32::from(byte as i8)).sum();
    said == unsigned || i64::from(said) == i64::from(signed)
}

/// Returns the refusal of a file that does not begin with a tar header, naming its real format if
/// it is recognised.
fn refuse_other_format(record: &[u8]) -> Refused {
    let known: [(&[u8], &str); 4] = [
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ];
    let found = known.iter().find(|(magic, _)| record.starts_with(magic));
    found.map_or(Refused::NoTar, |(_, how)| Refused::Compressed(how))
}
