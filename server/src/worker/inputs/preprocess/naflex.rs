//! Images of any shape, as NaFlex models of SigLIP 2 take them: resized to as many patches as there
//! may be, and cut into them.
use super::{Pixels, RowFault};
use superbatch_proto::v1::BadRowReason;

/// How near to the largest scale the search comes, and where it begins.
const EPS: f64 = 1e-5;
const SCALES: (f64, f64) = (EPS / 10.0, 100.0);

/// Returns the height and width to which an image is resized: whole patches, at most `most` of
/// them, at about the image's ratio.
///
/// It is the search of `get_image_size_for_max_num_patches` of transformers, step by step: another
/// one would end at another size where a side is about to become one patch longer.
///
/// # Errors
/// `ImageTooLarge` if the image is so long that it has more patches at the smallest scale.
pub(super) fn resized(
    [height, width]: [u32; 2],
    side: u32,
    most: u32,
) -> Result<[u32; 2], RowFault> {
    let cut = |length: u32, scale: f64| {
        let patches = (f64::from(length) * scale / f64::from(side)).ceil();
        (patches as u64).max(1)
    };
    let at = |scale: f64| [cut(height, scale), cut(width, scale)];
    let fits = |[rows, columns]: [u64; 2]| rows.saturating_mul(columns) <= u64::from(most);
    let (mut low, mut high) = SCALES;
    while high - low >= EPS {
        let scale = (low + high) / 2.0;
        if fits(at(scale)) {
            low = scale;
        } else {
            high = scale;
        }
    }
    let grid = at(low);
    if !fits(grid) {
        let detail = format!("{width}x{height} pixels are too long for {most} patches");
        return Err(RowFault::new(BadRowReason::ImageTooLarge, detail));
    }
    Ok(grid.map(|patches| patches as u32 * side))
}

/// Cuts RGB pixels of that height and width into patches, row by row; in each patch by row, pixel
/// and channel, as `convert_image_to_patches` of transformers.
pub(super) fn cut(pixels: &[u8], [height, width]: [u32; 2], side: u32) -> Pixels {
    let (line, of_patch) = (width as usize * 3, side as usize * 3);
    let mut bytes = Vec::with_capacity(pixels.len());
    for row in pixels.chunks_exact(line * side as usize) {
        for left in (0..line).step_by(of_patch) {
            for of_image in row.chunks_exact(line) {
                bytes.extend_from_slice(&of_image[left..left + of_patch]);
            }
        }
    }
    Pixels {
        bytes,
        grid: Some([height / side, width / side]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `get_image_size_for_max_num_patches` of transformers 4.57.6 returns.
    #[test]
    fn sizes_are_those_of_transformers() {
        for (image, side, most, expected) in [
            ([480, 640], 16, 256, [224, 288]),
            ([640, 480], 16, 256, [288, 224]),
            ([256, 256], 16, 256, [256, 256]),
            ([224, 224], 16, 256, [256, 256]),
            ([1080, 1920], 16, 256, [192, 336]),
            ([1365, 2048], 16, 256, [208, 304]),
            ([2048, 1365], 16, 576, [464, 304]),
            ([375, 500], 14, 196, [168, 224]),
            ([131, 97], 16, 1024, [592, 432]),
            ([33, 25], 8, 24, [48, 32]),
            // Not more than a hundred times as large.
            ([1, 1], 16, 256, [112, 112]),
            ([1, 1], 14, 4096, [112, 112]),
            ([1, 40], 16, 256, [48, 1360]),
            ([40, 1], 8, 12, [96, 8]),
            // One patch on the shorter side, whatever the ratio.
            ([7, 300], 8, 25, [8, 200]),
            ([300, 7], 8, 25, [200, 8]),
            ([10, 10_000], 16, 64, [16, 1024]),
            ([1, 1_000_000], 16, 9, [16, 144]),
            ([500, 333], 16, 1, [16, 16]),
        ] {
            let found = resized(image, side, most);
            assert_eq!(found.as_ref(), Ok(&expected), "{image:?} {side} {most}");
        }
    }

    /// For these transformers returns more patches than there may be.
    #[test]
    fn images_that_are_too_long_cost_their_row() {
        for (image, most) in [([1, 17_000_000], 1), ([90_000_000, 1], 4)] {
            let fault = resized(image, 16, most).unwrap_err();
            assert_eq!(fault.reason, BadRowReason::ImageTooLarge, "{image:?}");
        }
    }

    #[test]
    fn patches_go_row_by_row_and_end_with_the_channel() {
        // Pixel n of two rows of patches, three a row, has the channels 3 n, 3 n + 1 and 3 n + 2.
        let pixels: Vec<u8> = (0..4 * 6 * 3).collect();
        let found = cut(&pixels, [4, 6], 2);
        assert_eq!(found.grid, Some([2, 3]));
        let patch = |n: usize| &found.bytes[n * 12..(n + 1) * 12];
        let of = |pixels: [u8; 4]| pixels.map(|n| [3 * n, 3 * n + 1, 3 * n + 2]).concat();
        assert_eq!(patch(0), of([0, 1, 6, 7]));
        assert_eq!(patch(2), of([4, 5, 10, 11]));
        assert_eq!(patch(5), of([16, 17, 22, 23]));
    }
}
