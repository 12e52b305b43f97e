//! What the chunks of a WebP file say of their own size, before a decoder makes room for it.

/// The file's own header: `RIFF`, a size, `WEBP`.
const HEAD_BYTES: usize = 12;
/// Place, size and duration of a frame of an animation, before its own chunks.
const FRAME_HEAD_BYTES: usize = 16;

/// Returns whether a file is as long as its RIFF header says.
pub(crate) fn is_whole(bytes: &[u8]) -> bool {
    let stated = bytes.get(4..8).and_then(|size| size.try_into().ok());
    let stated = stated.map_or(u64::MAX, |size| u64::from(u32::from_le_bytes(size)) + 8);
    bytes.len() as u64 >= stated
}

/// Returns whether the metadata of a file lie in it. Pillow refuses a file where they do not, and
/// the reader of metadata would take as much memory as their header says.
pub(crate) fn metadata_lie_in(bytes: &[u8]) -> bool {
    let is_metadata = |name: &[u8; 4]| matches!(name, b"EXIF" | b"XMP " | b"ICCP");
    Chunks::of_file(bytes).all(|chunk| chunk.is_whole || !is_metadata(chunk.name))
}

/// Returns whether pictures of an animation's frames have the sizes that their frames have. libwebp
/// refuses others. The reader of animations makes room for such a picture before it compares.
pub(crate) fn frames_have_their_size(bytes: &[u8]) -> bool {
    let mut frames = Chunks::of_file(bytes).filter(|chunk| chunk.name == b"ANMF");
    frames.all(|frame| has_its_size(frame.rest).unwrap_or(true))
}

/// As the reader does, it goes on behind the frame if its chunks are longer. `None` for a frame
/// without a lossy picture, for which no more room is made than for its frame.
fn has_its_size(frame: &[u8]) -> Option<bool> {
    let size = |at: usize| {
        let [a, b, c] = *frame.get(at..)?.first_chunk::<3>()?;
        Some(u32::from_le_bytes([a, b, c, 0]) + 1)
    };
    let mut chunks = Chunks(frame.get(FRAME_HEAD_BYTES..)?);
    let first = chunks.next()?;
    let picture = match first.name {
        b"VP8 " => first,
        // What comes after transparency is read as a lossy picture, whatever its name.
        b"ALPH" => chunks.next()?,
        _ => return None,
    };
    // After three bytes and the mark of a picture: in each, the upper two bits are a scale.
    let [_, _, _, 0x9D, 0x01, 0x2A, wide @ .., a, b] = picture.rest.first_chunk::<10>()? else {
        return None;
    };
    let pixels = |number: [u8; 2]| u32::from(u16::from_le_bytes(number) & 0x3FFF);
    Some((pixels(*wide), pixels([*a, *b])) == (size(6)?, size(9)?))
}

struct Chunk<'a> {
    name: &'a [u8; 4],
    /// From the chunk's content on to the end of the file.
    rest: &'a [u8],
    /// Whether the content ends before the file does.
    is_whole: bool,
}

/// Chunks one after the other; the last one may be cut off.
struct Chunks<'a>(&'a [u8]);

impl<'a> Chunks<'a> {
    fn of_file(bytes: &'a [u8]) -> Self {
        Self(bytes.get(HEAD_BYTES..).unwrap_or_default())
    }
}

impl<'a> Iterator for Chunks<'a> {
    type Item = Chunk<'a>;

    fn next(&mut self) -> Option<Chunk<'a>> {
        let (name, after) = self.0.split_first_chunk::<4>()?;
        let (size, rest) = after.split_first_chunk::<4>()?;
        let size = u32::from_le_bytes(*size) as usize;
        let next = rest.get(size..);
        // A chunk of an odd size has a byte behind it that fills it up.
        let next_chunk = next.and_then(|next| next.get(size % 2..));
        self.0 = next_chunk.unwrap_or_default();
        Some(Chunk {
            name,
            rest,
            is_whole: next.is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
        let size = content.len() as u32;
        let filled_up = &[0][..content.len() % 2];
        [&name[..], &size.to_le_bytes(), content, filled_up].concat()
    }

    #[test]
    fn an_animation_that_was_cut_off_is_a_fault() {
        let riff = |stated: u32| [&b"RIFF"[..], &stated.to_le_bytes(), b"WEBPVP8X"].concat();
        assert!(is_whole(&riff(8)) && is_whole(&riff(7)));
        assert!(!is_whole(&riff(9)) && !is_whole(b"RIFF"));
    }

    #[test]
    fn a_picture_of_another_size_than_its_frame_is_told() {
        // A frame of 16 x 12, and lossy pictures of so many pixels, with the scale's bits set.
        let frame = |chunks: &[Vec<u8>]| {
            let head = [0_u8, 0, 0, 0, 0, 0, 15, 0, 0, 11, 0, 0, 0, 0, 0, 0];
            let content = [&head[..], &chunks.concat()].concat();
            [&b"RIFF\0\0\0\0WEBP"[..], &chunk(b"ANMF", &content)].concat()
        };
        let lossy = |wide: u16, high: u16| {
            let sizes = [wide | 0x4000, high | 0x8000]
                .map(u16::to_le_bytes)
                .concat();
            [&[0_u8, 0, 0, 0x9D, 0x01, 0x2A][..], &sizes].concat()
        };
        let alpha = chunk(b"ALPH", &[0; 3]);
        for (wide, high, is_right) in [(16, 12, true), (16, 13, false), (0x3FFF, 0x3FFF, false)] {
            let picture = lossy(wide, high);
            for chunks in [
                vec![chunk(b"VP8 ", &picture)],
                vec![alpha.clone(), chunk(b"VP8 ", &picture)],
                vec![alpha.clone(), chunk(b"ALPH", &picture)],
            ] {
                assert_eq!(
                    frames_have_their_size(&frame(&chunks)),
                    is_right,
                    "{chunks:?}"
                );
            }
            let other = [chunk(b"VP8L", &picture)];
            assert!(
                frames_have_their_size(&frame(&other)),
                "its reader compares first"
            );
        }
        assert!(frames_have_their_size(b"RIFF") && frames_have_their_size(&frame(&[])));
    }
}
