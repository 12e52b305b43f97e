//! The checks of a PNG that Pillow makes and the decoder does not, and the search for its EXIF.
use crate::image::{Error, undecodable};
use flate2::{Crc, Decompress, FlushDecompress, Status};

/// Largest text or colour profile that Pillow unpacks.
const TEXT_BYTES_MAX: u64 = 1 << 20;
const SIGNATURE_BYTES: usize = 8;
const RAW_PROFILE: &[u8] = b"Raw profile type exif";

/// Checks a PNG's chunks, and returns its EXIF: from the last `eXIf`, or else from ImageMagick's
/// raw profile.
///
/// # Errors
/// [`Error::Undecodable`] if Pillow refuses the file: a chunk before the pixels with a wrong
/// checksum, a text or profile above 1 MiB, pixels with a wrong checksum.
pub(crate) fn check_and_find_exif(bytes: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    let (mut exif, mut raw, mut pixels) = (None, None, None::<Pixels>);
    let mut rest = bytes.get(SIGNATURE_BYTES..).unwrap_or_default();
    while let Some(chunk) = Chunk::next(&mut rest) {
        match chunk.kind {
            b"IDAT" => pixels
                .get_or_insert_with(|| Pixels::new(bytes))
                .inflate(chunk.data)?,
            kind if pixels.is_none() && !chunk.is_sound() => {
                let kind = String::from_utf8_lossy(kind);
                return Err(undecodable(format!(
                    "its chunk {kind} has a wrong checksum"
                )));
            }
            b"eXIf" => exif = Some(chunk.data.to_vec()),
            b"tEXt" | b"zTXt" | b"iTXt" | b"iCCP" => {
                let text = chunk.text()?;
                raw = text.and_then(|text| from_raw_profile(&text)).or(raw);
            }
            b"IEND" => break,
            _ => {}
        }
    }
    Ok(exif.or(raw))
}

struct Chunk<'a> {
    kind: &'a [u8; 4],
    data: &'a [u8],
    checksum: [u8; 4],
}

impl<'a> Chunk<'a> {
    /// Returns the next chunk; `None` at the end, also of a file that is cut off, which the decoder
    /// reports.
    fn next(rest: &mut &'a [u8]) -> Option<Self> {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (kind, after) = after.split_first_chunk::<4>()?;
        let (data, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        let (checksum, after) = after.split_first_chunk::<4>()?;
        *rest = after;
        Some(Self {
            kind,
            data,
            checksum: *checksum,
        })
    }

    fn is_sound(&self) -> bool {
        let mut sum = Crc::new();
        sum.update(self.kind);
        sum.update(self.data);
        sum.sum().to_be_bytes() == self.checksum
    }

    /// Returns the text under the raw profile's key, `None` for any other key. A packed text is
    /// unpacked whatever its key, since Pillow refuses a file for its size.
    fn text(&self) -> Result<Option<Vec<u8>>, Error> {
        let Some((key, after)) = split_at_nul(self.data) else {
            return Ok(None);
        };
        let (is_packed, content) = match (self.kind, after) {
            (b"tEXt", text) => (false, text),
            (b"zTXt" | b"iCCP", [0, packed @ ..]) => (true, packed),
            (b"zTXt" | b"iCCP", [_, ..]) => {
                return Err(undecodable(
                    "it holds a text that is packed in an unknown way",
                ));
            }
            (b"iTXt", [flag, _, tail @ ..]) => {
                let text = split_at_nul(tail).and_then(|(_, tail)| split_at_nul(tail));
                (*flag != 0, text.map_or(&[][..], |(_, text)| text))
            }
            _ => return Ok(None),
        };
        let text = if is_packed {
            unpacked(content)?
        } else {
            content.to_vec()
        };
        Ok((key == RAW_PROFILE).then_some(text))
    }
}

fn split_at_nul(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|byte| *byte == 0)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// Unpacks a text or profile. A damaged one gives no bytes, since Pillow ignores it.
fn unpacked(packed: &[u8]) -> Result<Vec<u8>, Error> {
    let mut text = Vec::with_capacity(TEXT_BYTES_MAX as usize + 1);
    let status = Decompress::new(true).decompress_vec(packed, &mut text, FlushDecompress::Finish);
    match status {
        Ok(_) if text.len() as u64 > TEXT_BYTES_MAX => Err(undecodable(
            "it holds a text or colour profile of more than 1 MiB",
        )),
        Ok(_) => Ok(text),
        Err(_) => Ok(Vec::new()),
    }
}

/// Reads ImageMagick's profile: an empty line, a name, a length, then hexadecimal digits.
fn from_raw_profile(text: &[u8]) -> Option<Vec<u8>> {
    const HEAD_LINES: usize = 3;
    let lines = text.split(|byte| *byte == b'\n').skip(HEAD_LINES);
    let digits = lines.flatten().filter(|byte| !byte.is_ascii_whitespace());
    let digits = digits.map(|byte| char::from(*byte).to_digit(16).map(|digit| digit as u8));
    let digits = digits.collect::<Option<Vec<u8>>>()?;
    Some(
        digits
            .chunks_exact(2)
            .map(|two| two[0] << 4 | two[1])
            .collect(),
    )
}

/// The packed pixels, unpacked only to verify their checksum.
struct Pixels {
    packed: Decompress,
    /// Bytes of the picture. Pillow stops reading here, so later bytes, a wrong checksum among
    /// them, are no error.
    expected: u64,
    done: bool,
}

impl Pixels {
    fn new(bytes: &[u8]) -> Self {
        Self {
            packed: Decompress::new(true),
            expected: expected_bytes(bytes).unwrap_or_default(),
            done: false,
        }
    }

    fn inflate(&mut self, mut data: &[u8]) -> Result<(), Error> {
        let mut room = [0; 16 << 10];
        while !self.done {
            let (before, out) = (self.packed.total_in(), self.packed.total_out());
            match self
                .packed
                .decompress(data, &mut room, FlushDecompress::None)
            {
                // The picture is complete; the rest is not read.
                _ if self.packed.total_out() > self.expected => self.done = true,
                Err(_) => return Err(undecodable("its pixels are damaged: a wrong checksum")),
                Ok(Status::StreamEnd) => self.done = true,
                Ok(_) => {}
            }
            data = &data[(self.packed.total_in() - before) as usize..];
            let moved = self.packed.total_in() != before || self.packed.total_out() != out;
            if !moved {
                break;
            }
        }
        Ok(())
    }
}

/// Returns the size of the unpacked pixels: the rows of each pass, each with the byte of its
/// filter.
fn expected_bytes(bytes: &[u8]) -> Option<u64> {
    const PASSES: [(u64, u64, u64, u64); 7] = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ];
    let header = bytes.get(16..29)?;
    let side = |at: usize| {
        Some(u64::from(u32::from_be_bytes(
            header.get(at..at + 4)?.try_into().ok()?,
        )))
    };
    let (width, height) = (side(0)?, side(4)?);
    let samples = match header[9] {
        2 => 3,
        4 => 2,
        6 => 4,
        _ => 1,
    };
    let bits = samples * u64::from(header[8]);
    let of = |width: u64, height: u64| match width {
        0 => 0,
        width => (width.saturating_mul(bits).div_ceil(8) + 1).saturating_mul(height),
    };
    if header[12] == 0 {
        return Some(of(width, height));
    }
    let pass = |(x, y, dx, dy): (u64, u64, u64, u64)| {
        of(
            width.saturating_sub(x).div_ceil(dx),
            height.saturating_sub(y).div_ceil(dy),
        )
    };
    Some(PASSES.into_iter().map(pass).fold(0, u64::saturating_add))
}

#[cfg(test)]
mod tests;
