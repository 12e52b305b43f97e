use super::*;
use crate::resize::{Axis, Filter, resize_both_ways as portable};

fn noise(pixels: usize, seed: usize) -> Vec<u8> {
    (seed..seed + pixels * 3)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// The pixels of each kind of processor that this one can stand for.
fn by_each(pixels: &[u8], rows: &Taps, columns: &Taps) -> Vec<Option<Vec<u8>>> {
    let mut all = Vec::new();
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        all.push(unsafe { resize_avx2(pixels, rows, columns) });
    }
    if has_avx512() {
        // SAFETY: the processor has it.
        all.push(unsafe { resize_avx512(pixels, rows, columns) });
    }
    all
}

#[test]
fn the_bits_are_those_of_the_portable_form_at_any_size() {
    let sides = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 50, 97];
    let mut compared = 0;
    for (n, &width) in sides.iter().enumerate() {
        for (m, &height) in sides.iter().enumerate() {
            let pixels = noise((width * height) as usize, n * 31 + m);
            // Of all pairs of sizes to which these could be resized, some, and others each time.
            for k in 0..4 {
                let to = |at: usize| u64::from(sides[(at * 5 + k * 3 + 1) % sides.len()]);
                let filter = [Filter::Bicubic, Filter::Bilinear][(n + m + k) % 2];
                let taps = |source, resized: u64, cut: u64| {
                    let kept = resized / 4 * cut..resized - resized / 3 * cut;
                    Taps::new(
                        filter,
                        &Axis {
                            source,
                            resized,
                            kept,
                        },
                    )
                };
                let cut = (k % 2) as u64;
                let (rows, columns) = (taps(height, to(m), cut), taps(width, to(n), cut));
                let expected = portable(&pixels, &rows, &columns);
                for found in by_each(&pixels, &rows, &columns) {
                    assert!(
                        found.is_some_and(|found| found == expected),
                        "{width}x{height} by {filter:?} to {}x{}",
                        to(n),
                        to(m)
                    );
                }
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 4 * sides.len() * sides.len());
}

#[test]
fn black_white_and_steps_are_clamped_as_in_the_portable_form() {
    let taps = |source, resized| {
        let kept = 0..resized;
        Taps::new(
            Filter::Bicubic,
            &Axis {
                source,
                resized,
                kept,
            },
        )
    };
    for period in [1, 2, 5, 9] {
        let pixels: Vec<u8> = (0..64 * 64 * 3)
            .map(|n| if n / 3 % 64 / period % 2 == 0 { 0 } else { 255 })
            .collect();
        for side in [16, 64, 150] {
            let (rows, columns) = (taps(64, side), taps(64, side));
            let expected = portable(&pixels, &rows, &columns);
            assert!(side < 64 || expected.contains(&0) && expected.contains(&255));
            for found in by_each(&pixels, &rows, &columns) {
                assert!(
                    found.is_some_and(|found| found == expected),
                    "{period}, {side}"
                );
            }
        }
    }
}

#[test]
fn weights_are_the_sum_of_their_digits_or_are_refused() {
    for weight in [
        0,
        1,
        -1,
        127,
        128,
        -128,
        -129,
        1 << 22,
        -(1 << 20),
        (1 << 22) + 99_999,
    ] {
        let digits = Avx512::cut([weight; 4]).unwrap();
        let of = |digit: u32| i32::from(digit as u8 as i8);
        let sum = of(digits[0]) + of(digits[1]) * 256 + of(digits[2]) * 65_536;
        assert_eq!((sum, digits[3]), (weight, 0));
        let digits = Avx2::cut([weight; 4]).unwrap();
        let of = |digit: u32| i32::from(digit as u16 as i16);
        for (high, low) in [(0, 2), (1, 3)] {
            assert_eq!(of(digits[high]) * 4096 + of(digits[low]), weight);
        }
    }
    assert_eq!(Avx512::cut([0, 0, 0, 1 << 23]), None);
    assert_eq!(Avx2::cut([0, 1 << 30, 0, 0]), None);
}
