//! Decodes JPEG by libjpeg-turbo's algorithms (through mozjpeg), which Pillow uses too: the same
//! pixels to the last bit.
use crate::image::{Decoded, Error, ImageLimits, check_size, undecodable};
use image::{DynamicImage, RgbImage};
use mozjpeg::{ColorSpace, Decompress, Marker};
use std::panic::{AssertUnwindSafe, catch_unwind};

const EXIF: &[u8] = b"Exif\0\0";
/// Half of the image's size, in eighths.
const HALF: u8 = 4;
/// The least size, in eighths.
const LEAST: u8 = 1;
const XMP: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";

/// At which size an image is decoded.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scale {
    Full,
    /// Half the size, if the shorter side then still has so many pixels.
    AtLeast(u32),
    Least,
}

/// # Errors
/// `TooLarge`, or `Undecodable` with libjpeg's message.
pub(crate) fn jpeg(bytes: &[u8], limits: &ImageLimits, scale: Scale) -> Result<Decoded, Error> {
    // libjpeg reports a fatal error by unwinding, with its message.
    let decoded = catch_unwind(AssertUnwindSafe(|| read(bytes, limits, scale)));
    decoded.unwrap_or_else(|cause| {
        let said = cause
            .downcast_ref::<String>()
            .map_or("the decoder panicked", String::as_str);
        Err(undecodable(
            said.trim_start_matches("libjpeg fatal error: "),
        ))
    })
}

fn read(bytes: &[u8], limits: &ImageLimits, scale: Scale) -> Result<Decoded, Error> {
    let mut decoder = Decompress::with_markers(&[Marker::APP(1)])
        .from_mem(bytes)
        .map_err(undecodable)?;
    let (width, height) = decoder.size();
    check_size(width as u64, height as u64, limits)?;
    // libjpeg fills the missing part of a cut file with grey and reports only a warning. Pillow
    // refuses a file without its end marker. Without this check a row that the trainer cannot
    // decode would be scored and perhaps chosen.
    let scan = scan_start(bytes).unwrap_or(bytes.len());
    if !bytes[scan..]
        .windows(2)
        .rev()
        .any(|pair| pair == [0xFF, 0xD9])
    {
        return Err(undecodable(
            "the image is cut off: its end marker is missing",
        ));
    }
    match scale {
        Scale::AtLeast(shorter) if width.min(height) / 2 >= shorter as usize => decoder.scale(HALF),
        Scale::Least => decoder.scale(LEAST),
        Scale::Full | Scale::AtLeast(_) => {}
    }
    let exif = application(&decoder, EXIF);
    let xmp = application(&decoder, XMP);
    let ((width, height), pixels) = match decoder.color_space() {
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => {
            let (size, stored) = scanlines(decoder, ColorSpace::JCS_CMYK)?;
            let pixels = stored.as_chunks().0.iter();
            (
                size,
                pixels.flat_map(|pixel| inverted_cmyk(*pixel)).collect(),
            )
        }
        _ => scanlines(decoder, ColorSpace::JCS_RGB)?,
    };
    let image = RgbImage::from_raw(width as u32, height as u32, pixels);
    let image = image.ok_or_else(|| undecodable("its colours are of an unknown kind"))?;
    Ok(Decoded {
        image: DynamicImage::ImageRgb8(image),
        exif,
        xmp,
    })
}

/// Reads the pixels. Returns them with their width and height, which may have been scaled.
fn scanlines(
    decoder: Decompress<&[u8]>,
    colours: ColorSpace,
) -> Result<((usize, usize), Vec<u8>), Error> {
    let mut started = decoder.to_colorspace(colours).map_err(undecodable)?;
    let size = (started.width(), started.height());
    let pixels = started.read_scanlines().map_err(undecodable)?;
    started.finish().map_err(undecodable)?;
    Ok((size, pixels))
}

/// Returns the segments of an application, joined, without their names.
fn application(decoder: &Decompress<&[u8]>, name: &[u8]) -> Option<Vec<u8>> {
    let segments: Vec<&[u8]> = decoder
        .markers()
        .filter_map(|segment| segment.data.strip_prefix(name))
        .collect();
    (!segments.is_empty()).then(|| segments.concat())
}

/// Returns the RGB of a CMYK pixel as Adobe stores it, inverted: 255 is no ink. Rounded as in
/// Pillow.
fn inverted_cmyk([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    [cyan, magenta, yellow].map(|light| {
        let product = u32::from(255 - light) * u32::from(black) + 128;
        black - (((product >> 8) + product) >> 8) as u8
    })
}

/// Returns where the first scan's data begin. Segments before it may hold thumbnails with end
/// markers of their own.
fn scan_start(bytes: &[u8]) -> Option<usize> {
    let mut at = 2;
    loop {
        match *bytes.get(at..at + 2)? {
            [0xFF, 0xDA] => return Some(at + 2),
            [0xFF, 0x01 | 0xD0..=0xD9] => at += 2,
            [0xFF, 0x02..=0xFE] => {
                at += 2 + usize::from(u16::from_be_bytes([
                    *bytes.get(at + 2)?,
                    *bytes.get(at + 3)?,
                ]))
            }
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{check, decode, decode_at_least};

    const LIMITS: ImageLimits = ImageLimits {
        pixels_max: 1 << 20,
        bytes_max: 1 << 20,
    };

    /// A smooth picture of 64 by 48.
    fn picture() -> Vec<u8> {
        let pixels: Vec<u8> = (0..48)
            .flat_map(|y| (0..64).flat_map(move |x| [4 * x as u8, 5 * y as u8, 2 * (x + y) as u8]))
            .collect();
        let mut compress = mozjpeg::Compress::new(ColorSpace::JCS_RGB);
        compress.set_size(64, 48);
        compress.set_quality(95.0);
        let mut started = compress.start_compress(Vec::new()).unwrap();
        started.write_scanlines(&pixels).unwrap();
        started.finish().unwrap()
    }

    #[test]
    fn half_the_size_is_nearly_the_mean_of_four_pixels() {
        let bytes = picture();
        let full = decode(&bytes, &LIMITS).unwrap();
        let half = decode_at_least(&bytes, &LIMITS, 24).unwrap();
        assert_eq!((half.dimensions(), full.dimensions()), ((32, 24), (64, 48)));
        for (x, y, pixel) in half.enumerate_pixels() {
            for channel in 0..3 {
                let of = |dx, dy| i32::from(full.get_pixel(2 * x + dx, 2 * y + dy)[channel]);
                let mean = (of(0, 0) + of(1, 0) + of(0, 1) + of(1, 1)) / 4;
                let found = i32::from(pixel[channel]);
                assert!((found - mean).abs() <= 8, "{x} {y}: {found} for {mean}");
            }
        }
    }

    #[test]
    fn no_image_is_made_smaller_than_asked() {
        let bytes = picture();
        let full = decode(&bytes, &LIMITS).unwrap();
        assert_eq!(decode_at_least(&bytes, &LIMITS, 25).unwrap(), full);
    }

    #[test]
    fn a_check_finds_what_a_decoder_does() {
        let good = picture();
        let mut noise = 1_u64;
        let mut next = |below: usize| {
            noise = noise
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (noise >> 33) as usize % below
        };
        let mut counts = [0, 0];
        for round in 0..2_000 {
            let mut bytes = good.clone();
            if round % 4 == 0 {
                bytes.truncate(next(good.len()));
            }
            for _ in 0..next(4) {
                // Half of the changes hit the header, where most faults come from.
                let within = if next(2) == 0 {
                    bytes.len().min(700)
                } else {
                    bytes.len()
                };
                if within > 0 {
                    bytes[next(within)] = next(256) as u8;
                }
            }
            let decoded = decode(&bytes, &LIMITS).map(drop);
            assert_eq!(check(&bytes, &LIMITS), decoded, "{round}");
            counts[usize::from(decoded.is_err())] += 1;
        }
        assert!(counts.iter().all(|count| *count > 200), "{counts:?}");
    }
}
