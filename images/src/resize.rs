//! Pillow's antialiased resize of 8-bit RGB, to the last bit: weights in steps of 2⁻²², first along
//! the rows, then along the columns. Each pass is rounded to 8 bits, as in Pillow, which clips
//! where bicubic overshoots; one pass in floats would be more exact and differ from the trainer's
//! pixels.
#[cfg(target_arch = "x86_64")]
mod wide;

use std::ops::Range;

/// Bits of a weight's fraction. A sum must fit 32 bits: 8 for the pixel and 2 for sign and
/// overshoot leave 22.
const PRECISION: u32 = 22;
const ONE: i32 = 1 << PRECISION;
const HALF: i32 = ONE / 2;
/// Rows that are resized along their length at the same time, one in each lane.
const LANES: usize = 8;

/// The resampling filter. It is widened when shrinking, so that every source pixel counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    /// Returns the weight at a distance in source pixels. Bicubic is Keys's with a = -1/2.
    fn weight_at(self, distance: f64) -> f64 {
        let x = distance.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
            _ => 0.0,
        }
    }
}

/// One axis: `source` pixels become `resized` pixels, of which `kept` are computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Axis {
    pub source: u32,
    pub resized: u64,
    pub kept: Range<u64>,
}

/// The source pixels of each output pixel, and their weights.
#[derive(Debug, Clone)]
pub struct Taps {
    source: usize,
    /// The first source pixel of each output, and its weights' place.
    outputs: Vec<(usize, Range<usize>)>,
    weights: Vec<i32>,
}

impl Taps {
    /// Computes the taps of the kept pixels, each as in a resize of the whole axis.
    pub fn new(filter: Filter, axis: &Axis) -> Self {
        let mut taps = Self {
            source: axis.source as usize,
            outputs: Vec::new(),
            weights: Vec::new(),
        };
        for output in axis.kept.clone() {
            let begin = taps.weights.len();
            let first = if u64::from(axis.source) == axis.resized {
                taps.weights.push(ONE);
                output as usize
            } else {
                taps.push(filter, axis, output)
            };
            taps.outputs.push((first, begin..taps.weights.len()));
        }
        taps
    }

    /// Appends one output's weights. Returns its first source pixel.
    fn push(&mut self, filter: Filter, axis: &Axis, output: u64) -> usize {
        let scale = f64::from(axis.source) / axis.resized as f64;
        let wide = scale.max(1.0);
        let (centre, reach) = ((output as f64 + 0.5) * scale, filter.support() * wide);
        // `as u32` truncates and clamps at zero, which equals Pillow's cast to int and its clamp.
        // The order of these operations in doubles is Pillow's: another one moves a border by a
        // pixel.
        let first = (centre - reach + 0.5) as u32;
        let end = ((centre + reach + 0.5) as u32).min(axis.source);
        let narrow = 1.0 / wide;
        let weight = |pixel| filter.weight_at((f64::from(pixel) - centre + 0.5) * narrow);
        let weights = || (first..end).map(weight);
        let sum: f64 = weights().sum();
        let scaled =
            weights().map(|weight| if sum == 0.0 { weight } else { weight / sum } * f64::from(ONE));
        self.weights
            .extend(scaled.map(|weight| (weight + 0.5f64.copysign(weight)) as i32));
        first as usize
    }

    /// Returns the range of source pixels that are read.
    pub fn span(&self) -> Range<usize> {
        let first = self
            .outputs
            .iter()
            .map(|(first, _)| *first)
            .min()
            .unwrap_or(0);
        let end = self
            .outputs
            .iter()
            .map(|(first, weights)| first + weights.len())
            .max()
            .unwrap_or(0);
        first..end.max(first)
    }

    /// Returns the number of output pixels.
    pub fn len(&self) -> usize {
        self.outputs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.outputs
            .iter()
            .map(|(first, weights)| (*first, &self.weights[weights.clone()]))
    }
}

/// Resizes an RGB image, given row by row, to `rows.len() * columns.len()` pixels. It needs up to
/// 96 bytes for each source column, and 3 bytes for each of `columns.len()` pixels (in whole
/// registers) of the source rows that are read ([`Taps::span`]).
pub fn resize(pixels: &[u8], rows: &Taps, columns: &Taps) -> Vec<u8> {
    debug_assert_eq!(pixels.len(), rows.source * columns.source * 3);
    #[cfg(target_arch = "x86_64")]
    if let Some(resized) = wide::resize(pixels, rows, columns) {
        return resized;
    }
    resize_both_ways(pixels, rows, columns)
}

/// The portable form, which the compiler vectorises for the least processor of the target.
#[inline(always)]
fn resize_both_ways(pixels: &[u8], rows: &Taps, columns: &Taps) -> Vec<u8> {
    if rows.is_empty() || columns.is_empty() {
        return Vec::new();
    }
    let (span, line) = (rows.span(), columns.source * 3);
    let wide = resize_rows(&pixels[span.start * line..span.end * line], columns);
    down(&wide, columns.len() * 3, span.start, rows)
}

/// Resizes each row along its length, several rows at a time.
#[inline(always)]
fn resize_rows(pixels: &[u8], columns: &Taps) -> Vec<u8> {
    let (width, line, span) = (columns.source, columns.len() * 3, columns.span());
    let mut wide = vec![0; pixels.len() / (width * 3) * line];
    // All rows use the same weights, so eight rows are transposed into lanes and each weight is one
    // multiplication of a vector. Within a row the weights change from pixel to pixel and three
    // channels fill no vector, so the compiler could not vectorise along it.
    let mut strip = vec![[0i32; 3 * LANES]; span.len()];
    for (rows, outputs) in pixels
        .chunks(width * 3 * LANES)
        .zip(wide.chunks_mut(line * LANES))
    {
        for (lane, row) in rows.chunks_exact(width * 3).enumerate() {
            for (column, pixel) in strip
                .iter_mut()
                .zip(row[span.start * 3..].as_chunks::<3>().0)
            {
                for (channel, value) in pixel.iter().enumerate() {
                    column[channel * LANES + lane] = i32::from(*value);
                }
            }
        }
        for (output, (first, weights)) in columns.iter().enumerate() {
            let mut sums = [HALF; 3 * LANES];
            for (column, weight) in strip[first - span.start..].iter().zip(weights) {
                for (sum, value) in sums.iter_mut().zip(column) {
                    *sum += value * weight;
                }
            }
            for (lane, row) in outputs.chunks_exact_mut(line).enumerate() {
                for channel in 0..3 {
                    row[output * 3 + channel] = round_to_byte(sums[channel * LANES + lane]);
                }
            }
        }
    }
    wide
}

/// Resizes along the columns. `lines` holds the source's rows from `first_row` on, `line` values
/// each.
#[inline(always)]
fn down(lines: &[u8], line: usize, first_row: usize, rows: &Taps) -> Vec<u8> {
    let mut small = Vec::with_capacity(rows.len() * line);
    let mut sums = vec![0; line];
    for (first, weights) in rows.iter() {
        sums.fill(HALF);
        for (values, weight) in lines[(first - first_row) * line..]
            .chunks_exact(line)
            .zip(weights)
        {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += i32::from(*value) * weight;
            }
        }
        small.extend(sums.iter().map(|sum| round_to_byte(*sum)));
    }
    small
}

#[inline(always)]
fn round_to_byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(source: u32, resized: u64) -> Axis {
        Axis {
            source,
            resized,
            kept: 0..resized,
        }
    }

    fn noise(pixels: usize) -> Vec<u8> {
        (0..pixels * 3)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect()
    }

    #[test]
    fn a_part_is_what_the_whole_has_there() {
        let pixels = noise(57 * 31);
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            let taps = |axis| Taps::new(filter, &axis);
            let all = resize(&pixels, &taps(whole(31, 20)), &taps(whole(57, 90)));
            let part = [
                Axis {
                    kept: 5..12,
                    ..whole(31, 20)
                },
                Axis {
                    kept: 40..51,
                    ..whole(57, 90)
                },
            ]
            .map(taps);
            let expected: Vec<u8> = (5..12)
                .flat_map(|row| &all[(row * 90 + 40) * 3..(row * 90 + 51) * 3])
                .copied()
                .collect();
            assert_eq!(resize(&pixels, &part[0], &part[1]), expected);
            assert!(part[0].span().len() < 31 && part[1].span().len() < 57);
        }
    }

    #[test]
    fn a_size_that_stays_keeps_its_pixels() {
        let (pixels, rows) = (noise(9 * 4), Taps::new(Filter::Bicubic, &whole(4, 4)));
        assert_eq!(
            resize(&pixels, &rows, &Taps::new(Filter::Bicubic, &whole(9, 9))),
            pixels
        );
        let nothing = Taps::new(
            Filter::Bicubic,
            &Axis {
                kept: 0..0,
                ..whole(9, 9)
            },
        );
        assert!(nothing.is_empty() && resize(&pixels, &rows, &nothing).is_empty());
    }

    #[test]
    fn a_step_overshoots_and_is_clamped() {
        let pixels: Vec<u8> = (0..8)
            .flat_map(|n| [if n < 4 { 10 } else { 245 }; 3])
            .collect();
        let (rows, columns) = (
            Taps::new(Filter::Bicubic, &whole(1, 1)),
            Taps::new(Filter::Bicubic, &whole(8, 32)),
        );
        let wide = resize(&pixels, &rows, &columns);
        assert!(
            wide.contains(&0) && wide.contains(&255) && wide[0] == 10,
            "{wide:?}"
        );
    }
}
