//! The resize by the processor's integer dot products, for x86-64.
//!
//! A 32-bit lane holds four neighbouring values of one channel, and a register 8 or 16 of such
//! lanes: rows of the image in the first pass, values of a row in the second. Products of 8 or 16
//! bits are added in one instruction, but a weight has 24 bits. So it is cut into digits that are
//! small enough, and the sums of the digits' products are put together at the end. All sums are of
//! integers and exact, so the pixels are those of the portable form, to the last bit.
mod avx;

use super::Taps;
use avx::{Avx2, Avx512};
use std::arch::x86_64::*;

/// Taps of one lane.
const GROUP: usize = 4;

/// Weights in groups of four, which begin at multiples of four.
struct Groups {
    /// Of each output: the first group of values, and its first group of weights.
    outputs: Vec<(usize, usize)>,
    /// Of each group, the four weights' digits.
    digits: Vec<[u32; 4]>,
}

impl Groups {
    /// Cuts the weights of `taps`, whose values are counted from `origin` on. Returns none if a
    /// weight is too large for the digits.
    fn new<V: Lanes>(taps: &Taps, origin: usize) -> Option<Self> {
        let mut groups = Self {
            outputs: Vec::with_capacity(taps.len() + 1),
            digits: Vec::new(),
        };
        for (first, weights) in taps.iter() {
            let first = first - origin;
            groups.outputs.push((first / GROUP, groups.digits.len()));
            let (before, mut four) = (first % GROUP, [0; GROUP]);
            for (at, weight) in (before..).zip(weights) {
                four[at % GROUP] = *weight;
                if at % GROUP == GROUP - 1 {
                    groups.digits.push(V::cut(std::mem::take(&mut four))?);
                }
            }
            if (before + weights.len()) % GROUP > 0 {
                groups.digits.push(V::cut(four)?);
            }
        }
        groups.outputs.push((0, groups.digits.len()));
        Some(groups)
    }

    fn len(&self) -> usize {
        self.outputs.len() - 1
    }

    /// Returns an output's first group of values, and its weights.
    #[inline(always)]
    fn of(&self, output: usize) -> (usize, &[[u32; 4]]) {
        let (first, begin) = self.outputs[output];
        (first, &self.digits[begin..self.outputs[output + 1].1])
    }
}

/// The instructions of one kind of processor. A processor must have them when they are called.
trait Lanes {
    /// Lanes of a register.
    const COUNT: usize;
    type Register: Copy;

    /// Cuts four weights into digits.
    fn cut(weights: [i32; GROUP]) -> Option<[u32; 4]>;

    /// Returns three outputs' sums of weighted values, rounded and not yet clamped. Output `k` has
    /// its first group of values at `values + k * apart`, and each further one `stride` after it.
    ///
    /// # Safety
    /// All of these groups, of `COUNT` lanes each, must be readable.
    unsafe fn dot3(
        values: *const u32,
        apart: usize,
        stride: usize,
        weights: &[[u32; 4]],
    ) -> [Self::Register; 3];

    /// Clamps sums to bytes, and writes those of lanes 4 k .. 4 k + 3, of the first register and
    /// then of the others, to `to + k * stride`.
    ///
    /// # Safety
    /// Four values must be writable at each of these.
    unsafe fn write_groups(sums: [Self::Register; 4], to: *mut u32, stride: usize);

    /// Clamps sums to bytes, and writes them in order.
    ///
    /// # Safety
    /// `4 * COUNT` bytes must be writable; the last quarter is of no meaning.
    unsafe fn write_line(sums: [Self::Register; 3], to: *mut u8);

    fn none() -> Self::Register;
}

/// Resizes with the widest registers of this processor. Returns none if it has none of them, or if
/// there is nothing to do.
pub(super) fn resize(pixels: &[u8], rows: &Taps, columns: &Taps) -> Option<Vec<u8>> {
    if has_avx512() {
        // SAFETY: the processor has it.
        unsafe { resize_avx512(pixels, rows, columns) }
    } else if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        unsafe { resize_avx2(pixels, rows, columns) }
    } else {
        None
    }
}

fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vnni")
}

#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vnni")]
fn resize_avx512(pixels: &[u8], rows: &Taps, columns: &Taps) -> Option<Vec<u8>> {
    // SAFETY: the processor has what this function is compiled for.
    unsafe { resize_both_ways::<Avx512>(pixels, rows, columns) }
}

#[target_feature(enable = "avx2")]
fn resize_avx2(pixels: &[u8], rows: &Taps, columns: &Taps) -> Option<Vec<u8>> {
    // SAFETY: the processor has what this function is compiled for.
    unsafe { resize_both_ways::<Avx2>(pixels, rows, columns) }
}

/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn resize_both_ways<V: Lanes>(
    pixels: &[u8],
    rows: &Taps,
    columns: &Taps,
) -> Option<Vec<u8>> {
    let span = rows.span();
    if span.is_empty() || columns.span().is_empty() {
        return None;
    }
    let (across, along) = (
        Groups::new::<V>(columns, columns.span().start / GROUP * GROUP)?,
        Groups::new::<V>(rows, span.start)?,
    );
    let line = columns.source * 3;
    let pixels = &pixels[span.start * line..span.end * line];
    // A line of the first pass ends with whole registers.
    let line = (columns.len() * 3).next_multiple_of(3 * V::COUNT);
    // SAFETY: by the caller's promise.
    unsafe {
        let wide = first_pass::<V>(pixels, columns, &across, line);
        Some(second_pass::<V>(&wide, columns.len() * 3, line, &along))
    }
}

/// Resizes each row along its length. Returns four rows in each value, `line` values for each group
/// of four rows.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn first_pass<V: Lanes>(
    pixels: &[u8],
    columns: &Taps,
    groups: &Groups,
    line: usize,
) -> Vec<u32> {
    let (width, span) = (columns.source, columns.span());
    let first = span.start / GROUP;
    let mut strip = vec![0u32; (span.end.div_ceil(GROUP) - first) * 3 * V::COUNT];
    let strips = (pixels.len() / (width * 3)).div_ceil(V::COUNT);
    let mut wide = vec![0u32; strips * V::COUNT / GROUP * line];
    for (rows, wide) in pixels
        .chunks(width * 3 * V::COUNT)
        .zip(wide.chunks_exact_mut(V::COUNT / GROUP * line))
    {
        for quarter in 0..V::COUNT / 4 {
            // SAFETY: the processor has at least AVX2.
            unsafe { transpose::<V>(rows, width * 3, first, quarter, &mut strip) };
        }
        for block in 0..groups.len().div_ceil(4) {
            let mut sums = [V::none(); 12];
            for k in 0..4.min(groups.len() - block * 4) {
                let (at, weights) = groups.of(block * 4 + k);
                debug_assert!((at + weights.len()) * 3 * V::COUNT <= strip.len());
                // SAFETY: all groups of values that an output needs are in the strip.
                let three = unsafe {
                    V::dot3(
                        strip.as_ptr().add(at * 3 * V::COUNT),
                        V::COUNT,
                        3 * V::COUNT,
                        weights,
                    )
                };
                sums[k * 3..k * 3 + 3].copy_from_slice(&three);
            }
            for (k, four) in sums.as_chunks::<4>().0.iter().enumerate() {
                debug_assert!(block * 12 + k * 4 + 4 <= line);
                // SAFETY: a line holds the values of whole blocks.
                unsafe { V::write_groups(*four, wide.as_mut_ptr().add(block * 12 + k * 4), line) };
            }
        }
    }
    wide
}

/// Puts four rows' pixels into lanes: for each four columns, each channel's values of these rows.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn transpose<V: Lanes>(
    rows: &[u8],
    line: usize,
    first: usize,
    quarter: usize,
    strip: &mut [u32],
) {
    let last = rows.len() / line - 1;
    // The last strip may have fewer rows. What stands in for the others gets no weight.
    let starts: [usize; 4] = std::array::from_fn(|k| (quarter * 4 + k).min(last) * line);
    for (group, out) in strip.chunks_exact_mut(3 * V::COUNT).enumerate() {
        let at = (first + group) * 3 * GROUP;
        // SAFETY: sixteen bytes are read from a row or from a copy of its end, and each channel has
        // room for `COUNT` values.
        unsafe {
            let channels = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
            let mut four = [_mm_setzero_si128(); 4];
            for (four, start) in four.iter_mut().zip(starts) {
                let pixels = match rows.get(start + at..start + at + 16) {
                    Some(pixels) => _mm_loadu_si128(pixels.as_ptr().cast()),
                    None => _mm_loadu_si128(end_of(rows, start + at).as_ptr().cast()),
                };
                *four = _mm_shuffle_epi8(pixels, channels);
            }
            let [a, b, c, d] = four;
            let (ab, cd) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
            let blue = _mm_unpacklo_epi64(_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
            let to = out.as_mut_ptr().add(quarter * 4);
            _mm_storeu_si128(to.cast(), _mm_unpacklo_epi64(ab, cd));
            _mm_storeu_si128(to.add(V::COUNT).cast(), _mm_unpackhi_epi64(ab, cd));
            _mm_storeu_si128(to.add(2 * V::COUNT).cast(), blue);
        }
    }
}

/// Returns the bytes from `at` on, and zeros.
#[cold]
fn end_of(rows: &[u8], at: usize) -> [u8; 16] {
    let mut end = [0; 16];
    end[..rows.len() - at].copy_from_slice(&rows[at..]);
    end
}

/// Resizes along the columns. `line` of the `padded` values in a line are kept.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn second_pass<V: Lanes>(
    wide: &[u32],
    line: usize,
    padded: usize,
    groups: &Groups,
) -> Vec<u8> {
    // Each row is written with its padding, over which the next one is written.
    let mut small = vec![0u8; groups.len() * line + padded + 4 * V::COUNT];
    for output in 0..groups.len() {
        let (first, weights) = groups.of(output);
        debug_assert!((first + weights.len()) * padded <= wide.len());
        for at in (0..line).step_by(3 * V::COUNT) {
            // SAFETY: a line is padded to whole registers, and `small` has room for one more line.
            unsafe {
                let values = wide.as_ptr().add(first * padded + at);
                let sums = V::dot3(values, V::COUNT, padded, weights);
                V::write_line(sums, small.as_mut_ptr().add(output * line + at));
            }
        }
    }
    small.truncate(groups.len() * line);
    small
}

#[cfg(test)]
mod tests;
