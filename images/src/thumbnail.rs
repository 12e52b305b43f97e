//! Small pictures of images, to show to people.
use crate::{
    decode::decode,
    image::{Error, ImageLimits, undecodable},
    resize::{Axis, Filter, Taps, resize},
};
use mozjpeg::{ColorSpace, Compress};
use std::panic::{AssertUnwindSafe, catch_unwind};

const QUALITY: f32 = 82.0;

/// Returns an image decoded and encoded again as a JPEG, whose longer side is at most `side` pixels
/// (at least 1). A smaller image keeps its size.
///
/// # Errors
/// Those of [`decode`].
pub fn thumbnail(bytes: &[u8], limits: &ImageLimits, side: u32) -> Result<Vec<u8>, Error> {
    let image = decode(bytes, limits)?;
    let (width, height) = fit(image.width(), image.height(), side.max(1));
    let taps = |source: u32, resized: u32| {
        Taps::new(
            Filter::Bilinear,
            &Axis {
                source,
                resized: resized.into(),
                kept: 0..resized.into(),
            },
        )
    };
    let pixels = resize(
        image.as_raw(),
        &taps(image.height(), height),
        &taps(image.width(), width),
    );
    // libjpeg reports a fatal error by unwinding.
    let encoded = catch_unwind(AssertUnwindSafe(|| encode(&pixels, width, height)));
    encoded.unwrap_or_else(|_| Err(undecodable("its thumbnail cannot be encoded")))
}

/// Returns the largest size inside `side` x `side` with the same proportions, not larger than the
/// image.
fn fit(width: u32, height: u32, side: u32) -> (u32, u32) {
    let longer = width.max(height).max(1);
    if longer <= side {
        return (width, height);
    }
    let scaled =
        |length: u32| (u64::from(length) * u64::from(side) / u64::from(longer)).max(1) as u32;
    (scaled(width), scaled(height))
}

fn encode(pixels: &[u8], width: u32, height: u32) -> Result<Vec<u8>, Error> {
    let mut compress = Compress::new(ColorSpace::JCS_RGB);
    compress.set_size(width as usize, height as usize);
    compress.set_quality(QUALITY);
    let mut started = compress.start_compress(Vec::new()).map_err(undecodable)?;
    started.write_scanlines(pixels).map_err(undecodable)?;
    started.finish().map_err(undecodable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageFormat, RgbImage};
    use std::io::Cursor;

    const LIMITS: ImageLimits = ImageLimits {
        pixels_max: 1 << 20,
        bytes_max: 1 << 20,
    };

    /// A PNG, red on the left and blue on the right.
    fn png(width: u32, height: u32) -> Vec<u8> {
        let image = RgbImage::from_fn(width, height, |x, _| {
            if x < width / 2 {
                image::Rgb([220, 10, 10])
            } else {
                image::Rgb([10, 10, 220])
            }
        });
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn a_large_image_becomes_small_and_keeps_its_proportions_and_colours() {
        for (from, to) in [
            ((400, 100), (64, 16)),
            ((30, 600), (3, 64)),
            ((20, 10), (20, 10)),
            ((900, 1), (64, 1)),
        ] {
            let jpeg = thumbnail(&png(from.0, from.1), &LIMITS, 64).unwrap();
            assert_eq!(jpeg[..3], [0xFF, 0xD8, 0xFF], "a JPEG");
            let seen = decode(&jpeg, &LIMITS).unwrap();
            assert_eq!((seen.width(), seen.height()), to, "{from:?}");
            if to.0 > 16 {
                let [left, right] = [2, to.0 - 3].map(|x| seen.get_pixel(x, to.1 / 2).0);
                assert!(
                    left[0] > 180 && left[2] < 60 && right[2] > 180 && right[0] < 60,
                    "{left:?} {right:?}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_decoded_has_none() {
        assert!(matches!(
            thumbnail(b"<svg onload=alert(1)>", &LIMITS, 64),
            Err(Error::Undecodable(_))
        ));
        assert!(matches!(
            thumbnail(&png(2000, 1000), &LIMITS, 64),
            Err(Error::TooLarge(_))
        ));
    }
}
