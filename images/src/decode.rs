//! Decodes images as Pillow does: turned by their EXIF orientation, on white, in 8-bit RGB.
//!
//! The result equals, to the last bit, `ImageOps.exif_transpose` followed by a paste through the
//! alpha channel onto a white RGB canvas.
use crate::{
    image::{Decoded, Error, ImageLimits, check_size, undecodable},
    jpeg::{Scale, jpeg},
    png, riff, tiff,
};
use image::{
    DynamicImage, ImageDecoder, Limits, RgbImage, RgbaImage,
    codecs::{
        bmp::BmpDecoder, gif::GifDecoder, png::PngDecoder, tiff::TiffDecoder, webp::WebPDecoder,
    },
    metadata::Orientation,
};
use std::{
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Memory for a PNG's text, profile and row buffers, besides its pixels.
const CHUNK_BYTES: u64 = 16 << 20;

/// Decodes a JPEG, PNG, WebP, GIF, BMP or TIFF file, recognised by its first bytes. As in Pillow,
/// an animation gives its first frame, colour profiles are not applied, CMYK is read as Adobe
/// writes it (inverted), and grey of 16 bits is clipped at 255.
///
/// # Errors
/// [`Error::TooLarge`], or [`Error::Undecodable`], also for an image that was cut off.
pub fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<RgbImage, Error> {
    decode_scaled(bytes, limits, Scale::Full)
}

/// As [`decode`], for the error alone. A JPEG file's entropy code is read as a whole, which is all
/// that can fail, and its pixels are made at an eighth of their size.
///
/// # Errors
/// Those of [`decode`].
pub fn check(bytes: &[u8], limits: &ImageLimits) -> Result<(), Error> {
    decode_scaled(bytes, limits, Scale::Least).map(drop)
}

/// As [`decode`], but a JPEG file is decoded at half its size if its shorter side then still has
/// `shorter` pixels. That uses an inverse DCT of half the size, whose pixels differ from Pillow's.
///
/// # Errors
/// Those of [`decode`].
pub fn decode_at_least(
    bytes: &[u8],
    limits: &ImageLimits,
    shorter: u32,
) -> Result<RgbImage, Error> {
    decode_scaled(bytes, limits, Scale::AtLeast(shorter))
}

fn decode_scaled(bytes: &[u8], limits: &ImageLimits, scale: Scale) -> Result<RgbImage, Error> {
    if bytes.len() as u64 > limits.bytes_max {
        return Err(Error::TooLarge(format!(
            "{} bytes, the limit is {}",
            bytes.len(),
            limits.bytes_max
        )));
    }
    // Decoders should not panic, but they read untrusted bytes. A panic costs the row and not the
    // worker.
    let decoded = catch_unwind(AssertUnwindSafe(|| match bytes {
        [0xFF, 0xD8, 0xFF, ..] => jpeg(bytes, limits, scale),
        [0x89, b'P', b'N', b'G', ..] => {
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), memory(limits));
            let mut decoded = raster(decoder.map_err(undecodable)?, limits)?;
            decoded.exif = png::check_and_find_exif(bytes)?;
            Ok(decoded)
        }
        [b'G', b'I', b'F', b'8', ..] => raster(
            GifDecoder::new(Cursor::new(bytes)).map_err(undecodable)?,
            limits,
        ),
        [b'B', b'M', ..] => raster(
            BmpDecoder::new(Cursor::new(bytes)).map_err(undecodable)?,
            limits,
        ),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => tiff_page(bytes, limits),
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => webp(bytes, limits),
        _ => Err(undecodable(format!(
            "it is no JPEG, PNG, WebP, GIF, BMP or TIFF{}",
            named(bytes)
        ))),
    }));
    let mut decoded = decoded.unwrap_or_else(|_| Err(undecodable("the decoder panicked")))?;
    let orientation = orientation(&decoded);
    decoded.image = DynamicImage::ImageRgb8(on_white(decoded.image));
    decoded.image.apply_orientation(orientation);
    Ok(decoded.image.into_rgb8())
}

/// Returns the memory that a decoder may take.
fn memory(limits: &ImageLimits) -> Limits {
    let pixels = limits.pixels_max.saturating_mul(8);
    let mut allowed = Limits::no_limits();
    allowed.max_alloc = Some(pixels.saturating_add(CHUNK_BYTES));
    allowed
}

/// Names a format that people have and that is not decoded.
fn named(bytes: &[u8]) -> &'static str {
    // The brand of a file of ISO's boxes, its version, and the brands that it is compatible with.
    let mut brands = bytes.get(8..).unwrap_or_default().chunks(4).take(8);
    let is_avif = brands.any(|brand| brand == b"avif" || brand == b"avis");
    match bytes.get(4..12) {
        Some([b'f', b't', b'y', b'p', ..]) if is_avif => ", but AVIF",
        Some([b'f', b't', b'y', b'p', b'h' | b'm', ..]) => ", but HEIF",
        _ if bytes.starts_with(&[0xFF, 0x0A]) => ", but JPEG XL",
        Some([b'J', b'X', b'L', b' ', ..]) => ", but JPEG XL",
        Some([b'j', b'P', b' ', b' ', ..]) => ", but JPEG 2000",
        _ if bytes.starts_with(b"<svg") || bytes.starts_with(b"<?xml") => ", but SVG",
        _ if bytes.starts_with(b"<!DOCTYPE") || bytes.starts_with(b"<html") => ", but HTML",
        _ => "",
    }
}

/// Decodes the first page. As Pillow opens it, it is turned by its own tag.
fn tiff_page(bytes: &[u8], limits: &ImageLimits) -> Result<Decoded, Error> {
    if !tiff::values_lie_in(bytes) {
        return Err(undecodable(
            "a TIFF whose tags have more values than it has bytes",
        ));
    }
    let mut decoder = TiffDecoder::new(Cursor::new(bytes)).map_err(undecodable)?;
    let turned = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut decoded = raster(decoder, limits)?;
    if matches!(
        decoded.image,
        DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_)
    ) {
        return Err(undecodable("a TIFF of floating-point numbers"));
    }
    decoded.image.apply_orientation(turned);
    (decoded.exif, decoded.xmp) = (None, None);
    Ok(decoded)
}

fn raster(mut decoder: impl ImageDecoder, limits: &ImageLimits) -> Result<Decoded, Error> {
    let (width, height) = decoder.dimensions();
    check_size(width.into(), height.into(), limits)?;
    decoder.set_limits(memory(limits)).map_err(undecodable)?;
    let (exif, xmp) = (
        decoder.exif_metadata().ok().flatten(),
        decoder.xmp_metadata().ok().flatten(),
    );
    let image = DynamicImage::from_decoder(decoder).map_err(undecodable)?;
    Ok(Decoded { image, exif, xmp })
}

/// Decodes by libwebp, as Pillow does. The `image` crate reads the first frame of an animation, and
/// the metadata.
fn webp(bytes: &[u8], limits: &ImageLimits) -> Result<Decoded, Error> {
    let broken = || undecodable("libwebp cannot decode it: it is cut off or damaged");
    let features = webp::BitstreamFeatures::new(bytes).ok_or_else(broken)?;
    if !riff::metadata_lie_in(bytes) {
        return Err(broken());
    }
    let described = WebPDecoder::new(Cursor::new(bytes)).map_err(undecodable);
    if features.has_animation() {
        // The first frame may be there although the file is cut off, and Pillow refuses such a
        // file.
        return if riff::is_whole(bytes) && riff::frames_have_their_size(bytes) {
            raster(described?, limits)
        } else {
            Err(broken())
        };
    }
    let (width, height) = (features.width(), features.height());
    check_size(width.into(), height.into(), limits)?;
    let stored = webp::Decoder::new(bytes).decode().ok_or_else(broken)?;
    let pixels = stored.to_vec();
    let image = if features.has_alpha() {
        RgbaImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgba8)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
    };
    let (exif, xmp) = described.map_or((None, None), |mut described| {
        (
            described.exif_metadata().ok().flatten(),
            described.xmp_metadata().ok().flatten(),
        )
    });
    Ok(Decoded {
        image: image.ok_or_else(broken)?,
        exif,
        xmp,
    })
}

/// Returns the orientation by the EXIF tag or, if there is none, by the XMP property, in Pillow's
/// order. Malformed EXIF, and a tag that is no number, count as present: Pillow then does not look
/// at XMP, and turning the image would train and score on different pixels.
fn orientation(decoded: &Decoded) -> Orientation {
    let exif = decoded.exif.as_deref().and_then(|data| {
        let data = data.strip_prefix(b"Exif\0\0").unwrap_or(data).to_vec();
        let is_tiff = data.starts_with(b"II") || data.starts_with(b"MM");
        if !data.is_empty() && !is_tiff {
            return Some(u32::from(Orientation::NoTransforms.to_exif()));
        }
        let read = exif::Reader::new().continue_on_error(true).read_raw(data);
        let exif = read
            .or_else(|partial| partial.distill_partial_result(|_| ()))
            .ok()?;
        let tag = exif.get_field(exif::Tag::Orientation, exif::In::PRIMARY)?;
        match tag.value {
            exif::Value::Byte(_) => Some(u32::from(Orientation::NoTransforms.to_exif())),
            ref value => value.get_uint(0),
        }
    });
    let tag = exif.or_else(|| xmp_orientation(decoded.xmp.as_deref()?));
    tag.and_then(|tag| Orientation::from_exif(u8::try_from(tag).ok()?))
        .unwrap_or(Orientation::NoTransforms)
}

fn xmp_orientation(xmp: &[u8]) -> Option<u32> {
    let text = String::from_utf8_lossy(xmp);
    let value = text.split_once("tiff:Orientation")?.1;
    let value = value
        .strip_prefix("=\"")
        .or_else(|| value.strip_prefix('>'))?;
    value.chars().next()?.to_digit(10)
}

/// Puts an image on white, in 8-bit RGB.
fn on_white(image: DynamicImage) -> RgbImage {
    let (width, height) = (image.width(), image.height());
    let high = |v: u16| (v >> 8) as u8;
    let pixels: Vec<u8> = match image {
        DynamicImage::ImageRgb8(image) => return image,
        DynamicImage::ImageLuma8(image) => image.as_raw().iter().flat_map(|&v| [v; 3]).collect(),
        DynamicImage::ImageLumaA8(image) => image
            .pixels()
            .flat_map(|p| blend([p[0]; 3], p[1]))
            .collect(),
        DynamicImage::ImageRgba8(image) => image
            .pixels()
            .flat_map(|p| blend([p[0], p[1], p[2]], p[3]))
            .collect(),
        // Pillow keeps 16 bits of grey and clips them on conversion to RGB. Of all other 16-bit
        // kinds it reads the high bytes only.
        DynamicImage::ImageLuma16(image) => image
            .as_raw()
            .iter()
            .flat_map(|&v| [v.min(255) as u8; 3])
            .collect(),
        DynamicImage::ImageLumaA16(image) => image
            .pixels()
            .flat_map(|p| blend([high(p[0]); 3], high(p[1])))
            .collect(),
        DynamicImage::ImageRgb16(image) => image.as_raw().iter().map(|&v| high(v)).collect(),
        DynamicImage::ImageRgba16(image) => image
            .pixels()
            .flat_map(|p| blend([high(p[0]), high(p[1]), high(p[2])], high(p[3])))
            .collect(),
        other => return other.into_rgb8(),
    };
    RgbImage::from_raw(width, height, pixels).expect("three bytes were made of each pixel")
}

/// Puts a pixel over white, rounded as in Pillow's paste: an exact division by 255 in integers.
fn blend(pixel: [u8; 3], alpha: u8) -> [u8; 3] {
    pixel.map(|value| {
        let sum = u32::from(value) * u32::from(alpha) + 255 * (255 - u32::from(alpha)) + 128;
        (((sum >> 8) + sum) >> 8) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

    const ROOMY: ImageLimits = ImageLimits {
        pixels_max: 1 << 20,
        bytes_max: 1 << 20,
    };

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let pixels = vec![7; (width * height * 3) as usize];
        PngEncoder::new(&mut bytes)
            .write_image(&pixels, width, height, ExtendedColorType::Rgb8)
            .unwrap();
        bytes
    }

    #[test]
    fn limits_hold_before_pixels_are_made() {
        let mut huge = png(1, 1);
        // The header says 60,000 x 60,000; its checksum is made to fit.
        huge[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
        let sum = crc32(&huge[12..29]).to_be_bytes();
        huge[29..33].copy_from_slice(&sum);
        let fault = decode(&huge, &ROOMY).unwrap_err();
        assert!(matches!(fault, Error::TooLarge(_)), "{fault}");
        let small = png(4, 4);
        let tight = ImageLimits {
            bytes_max: small.len() as u64 - 1,
            ..ROOMY
        };
        assert!(matches!(decode(&small, &tight), Err(Error::TooLarge(_))));
        assert_eq!(
            decode(
                &small,
                &ImageLimits {
                    pixels_max: 16,
                    ..ROOMY
                }
            )
            .unwrap()
            .dimensions(),
            (4, 4)
        );
    }

    fn crc32(bytes: &[u8]) -> u32 {
        let step = |crc: u32, byte: &u8| {
            (0..8).fold(crc ^ u32::from(*byte), |c, _| {
                if c & 1 == 1 {
                    (c >> 1) ^ 0xEDB8_8320
                } else {
                    c >> 1
                }
            })
        };
        !bytes.iter().fold(!0, step)
    }

    #[test]
    fn a_webp_is_held_to_the_limits_and_must_be_whole() {
        let whole = webp::Encoder::from_rgb(&[7; 40 * 40 * 3], 40, 40)
            .encode_lossless()
            .to_vec();
        assert_eq!(
            decode(&whole, &ROOMY).unwrap().as_raw()[..],
            [7; 40 * 40 * 3]
        );
        let tight = ImageLimits {
            pixels_max: 40 * 40 - 1,
            ..ROOMY
        };
        assert!(matches!(decode(&whole, &tight), Err(Error::TooLarge(_))));
        for cut in [13, 22, whole.len() - 4] {
            assert!(
                matches!(decode(&whole[..cut], &ROOMY), Err(Error::Undecodable(_))),
                "{cut}"
            );
        }
    }

    #[test]
    fn other_formats_are_held_to_the_limits_and_must_be_whole() {
        use image::ImageFormat;
        let image = DynamicImage::ImageRgb8(RgbImage::from_pixel(40, 40, image::Rgb([7; 3])));
        let tight = ImageLimits {
            pixels_max: 40 * 40 - 1,
            ..ROOMY
        };
        for format in [ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff] {
            let mut whole = Cursor::new(Vec::new());
            image.write_to(&mut whole, format).unwrap();
            let whole = whole.into_inner();
            let pixels = decode(&whole, &ROOMY).unwrap();
            assert_eq!(pixels.as_raw()[..], [7; 40 * 40 * 3], "{format:?}");
            assert!(matches!(decode(&whole, &tight), Err(Error::TooLarge(_))));
            let cut = decode(&whole[..whole.len() / 2], &ROOMY);
            assert!(matches!(cut, Err(Error::Undecodable(_))), "{format:?}");
        }
    }

    #[test]
    fn metadata_beyond_the_end_are_a_fault_before_they_take_memory() {
        let picture = webp::Encoder::from_rgb(&[7; 16 * 16 * 3], 16, 16).encode_lossless();
        // What follows the 12 bytes of the file's head: the picture's chunk.
        let picture = &picture[12..];
        let file = |exif_bytes: u32| {
            let extended = [&b"VP8X"[..], &[10, 0, 0, 0, 8, 0, 0, 0, 15, 0, 0, 15, 0, 0]].concat();
            let exif = [&b"EXIF"[..], &exif_bytes.to_le_bytes(), b"II*\0"].concat();
            let chunks = [&b"WEBP"[..], &extended, picture, &exif].concat();
            [&b"RIFF"[..], &(chunks.len() as u32).to_le_bytes(), &chunks].concat()
        };
        assert_eq!(decode(&file(4), &ROOMY).unwrap().dimensions(), (16, 16));
        let fault = decode(&file(u32::MAX - 1), &ROOMY).unwrap_err();
        assert!(matches!(fault, Error::Undecodable(_)), "{fault}");
    }

    #[test]
    fn a_format_that_is_not_decoded_is_named() {
        for (bytes, name) in [
            (&b"\0\0\0\x1cftypavif\0\0"[..], "AVIF"),
            (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "AVIF"),
            (b"\0\0\0\x1cftypheic\0\0", "HEIF"),
            (b"\xFF\x0A\0\0", "JPEG XL"),
            (b"<html><body>", "HTML"),
        ] {
            let fault = decode(bytes, &ROOMY).unwrap_err().to_string();
            assert!(fault.ends_with(&format!("but {name}")), "{fault}");
        }
    }

    #[test]
    fn what_is_no_image_is_a_fault() {
        let cut = &png(40, 40)[..60];
        for bytes in [
            &b""[..],
            b"GIF89a",
            b"\xFF\xD8\xFF",
            b"\x89PNG\r\n\x1a\n",
            b"RIFF\0\0\0\0WEBP",
            cut,
        ] {
            assert!(
                matches!(decode(bytes, &ROOMY), Err(Error::Undecodable(_))),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn alpha_is_laid_on_white() {
        assert_eq!(blend([0, 100, 255], 255), [0, 100, 255]);
        assert_eq!(blend([0, 100, 255], 0), [255; 3]);
        assert_eq!(blend([0; 3], 127), [128; 3]);
    }

    #[test]
    fn orientation_is_found_in_xmp_where_exif_has_none() {
        assert_eq!(xmp_orientation(br#"<x tiff:Orientation="6"/>"#), Some(6));
        assert_eq!(
            xmp_orientation(b"<tiff:Orientation>8</tiff:Orientation>"),
            Some(8)
        );
        assert_eq!(xmp_orientation(b"<x/>"), None);
    }
}
