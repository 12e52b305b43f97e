//! The inner loops: dot products of a panel of candidates with a block of drawn examples, and their
//! reduction.
//!
//! A lane is a candidate. Each lane's numbers are added in the order of the drawn examples, so a
//! candidate's sums depend neither on its lane nor on its panel. Every loop is written once and
//! compiled for three instruction sets.
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Isa, Portable, Vector};
use crate::problem::chunk_sizes;

/// Most drawn examples of a block. The sum of softplus takes one logarithm of a product of as many
/// factors of at most 2, and 2^120 is still below the largest f32. A block's dot products with a
/// panel (15 KiB) also fit the L1 cache.
pub(super) const BLOCK: usize = 120;
/// Most candidates of a panel.
pub(super) const WIDEST: usize = 32;
/// Terms of a dot product that are summed in registers before they are added to memory. The panel's
/// part then stays in the L1 cache, and sums of 128 terms lose less to rounding than one long sum.
const DEPTH: usize = 128;
/// A logit whose exponential is 0.
const NOTHING: f32 = -1e30;

impl Isa {
    /// Returns the candidates of a panel: two vectors.
    pub(super) fn width(self) -> usize {
        match self {
            Self::Portable => 2 * Portable::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 2 * Avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 2 * Avx512::LANES,
        }
    }

    /// Returns the most drawn examples of a group, whose sums with a panel are held in registers.
    /// Two vectors of sums for each row must fit beside the operands: 12 rows take 24 of AVX-512's
    /// 32 registers, 6 rows 12 of AVX2's 16.
    fn height(self) -> usize {
        match self {
            Self::Portable => 4,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 6,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 12,
        }
    }

    /// Cuts a block of `rows` drawn examples into groups of nearly equal height. A full group and a
    /// remainder of one would waste most of the second pass over the panel.
    pub(super) fn groups(self, rows: usize) -> Vec<usize> {
        chunk_sizes(rows, rows.div_ceil(self.height()))
    }
}

/// Compiles one generic body for each instruction set and dispatches to it.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*), $body:ident) => {
        $(#[$doc])*
        pub(super) fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                $body::<Avx2>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma")]
            fn avx512($($arg: $ty),*) {
                $body::<Avx512>($($arg),*)
            }
            match isa {
                Isa::Portable => $body::<Portable>($($arg),*),
                // SAFETY: `Isa` names these only if the processor has them.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}

for_each_isa! {
    /// Dot products of a block's rows with a panel: `dots[row * width + lane]`. `block` holds
    /// `[group][dim][row]` for groups of the given heights, `panel` `[dim][lane]`.
    dots(block: &[f32], groups: &[usize], panel: &[f32], dim: usize, dots: &mut [f32]), dots_body
}

for_each_isa! {
    /// For each lane, the sum over rows of softplus(scale x dot + bias): of sigmoid pair losses of
    /// negatives. Within 1e-7 a term of the exact sum.
    softplus_sums(dots: &[f32], scale: f64, bias: f64, sums: &mut [f64; WIDEST]), softplus_sums_body
}

for_each_isa! {
    /// For each lane, m = the largest scale x dot over rows, and the sum of exp(scale x dot - m).
    exp_sums(dots: &[f32], scale: f64, largest: &mut [f64; WIDEST], sums: &mut [f64; WIDEST]),
        exp_sums_body
}

#[inline(always)]
fn dots_body<V: Vector>(
    block: &[f32],
    groups: &[usize],
    panel: &[f32],
    dim: usize,
    dots: &mut [f32],
) {
    for start in (0..dim).step_by(DEPTH) {
        let end = (start + DEPTH).min(dim);
        let panel = &panel[start * 2 * V::LANES..end * 2 * V::LANES];
        let mut row = 0;
        for &height in groups {
            let rows = &block[row * dim..];
            let rows = &rows[start * height..end * height];
            let out = &mut dots[row * 2 * V::LANES..(row + height) * 2 * V::LANES];
            match height {
                1 => group::<V, 1>(rows, panel, out, start == 0),
                2 => group::<V, 2>(rows, panel, out, start == 0),
                3 => group::<V, 3>(rows, panel, out, start == 0),
                4 => group::<V, 4>(rows, panel, out, start == 0),
                5 => group::<V, 5>(rows, panel, out, start == 0),
                6 => group::<V, 6>(rows, panel, out, start == 0),
                7 => group::<V, 7>(rows, panel, out, start == 0),
                8 => group::<V, 8>(rows, panel, out, start == 0),
                9 => group::<V, 9>(rows, panel, out, start == 0),
                10 => group::<V, 10>(rows, panel, out, start == 0),
                11 => group::<V, 11>(rows, panel, out, start == 0),
                _ => group::<V, 12>(rows, panel, out, start == 0),
            }
            row += height;
        }
    }
}

/// Multiplies H rows by a panel over a shared depth, written to `out` (`first`) or added to it.
#[inline(always)]
fn group<V: Vector, const H: usize>(rows: &[f32], panel: &[f32], out: &mut [f32], first: bool) {
    let mut sums = [[V::splat(0.0); 2]; H];
    for (row, column) in rows
        .as_chunks::<H>()
        .0
        .iter()
        .zip(panel.chunks_exact(2 * V::LANES))
    {
        let (left, right) = (V::load(column), V::load(&column[V::LANES..]));
        for r in 0..H {
            let value = V::splat(row[r]);
            sums[r] = [
                value.mul_add(left, sums[r][0]),
                value.mul_add(right, sums[r][1]),
            ];
        }
    }
    for (sums, out) in sums.iter().zip(out.chunks_exact_mut(2 * V::LANES)) {
        for (sum, out) in sums.iter().zip(out.chunks_exact_mut(V::LANES)) {
            let sum = if first { *sum } else { V::load(out).add(*sum) };
            sum.store(out);
        }
    }
}

/// Returns 2^z for z <= 0, to 1e-7 of its value; 1e-38 if z is less than -126.
#[inline(always)]
fn exp2_of_negative<V: Vector>(z: V) -> V {
    // 1.5 x 2^23: adding it rounds to an integer, which is then in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let z = z.max(V::splat(-126.0));
    let shifted = z.add(V::splat(ROUND));
    let r = z.sub(shifted.sub(V::splat(ROUND)));
    // Minimax in relative error on |r| <= 1/2: 2e-9 before rounding.
    let mut p = V::splat(1.535_336e-4);
    for coefficient in [
        1.339_887e-3,
        9.618_437e-3,
        5.550_332e-2,
        0.240_226_48,
        std::f32::consts::LN_2,
        1.0,
    ] {
        p = p.mul_add(r, V::splat(coefficient));
    }
    p.scale_by(shifted)
}

/// Splits a factor in f64 into two f32, whose sum is exact to 2^-48.
fn split(value: f64) -> (f32, f32) {
    let high = value as f32;
    (high, (value - f64::from(high)) as f32)
}

/// softplus(x) = max(x, 0) + ln(1 + exp(-|x|)), with logits in units of ln 2. The logarithms of a
/// lane are taken as one logarithm of a product, since a logarithm costs as much as many products.
/// The loop keeps the product minus 1: for well separated pairs exp(-|x|) is below 1e-7, and 1 + it
/// would round to 1.
#[inline(always)]
fn softplus_sums_body<V: Vector>(dots: &[f32], scale: f64, bias: f64, sums: &mut [f64; WIDEST]) {
    let (high, low) = split(scale * std::f64::consts::LOG2_E);
    let (high, low, bias) = (
        V::splat(high),
        V::splat(low),
        V::splat((bias * std::f64::consts::LOG2_E) as f32),
    );
    let zero = V::splat(0.0);
    let width = 2 * V::LANES;
    let (mut products, mut positives) = ([0f32; WIDEST], [0f64; WIDEST]);
    for lane in [0, V::LANES] {
        let mut product = zero;
        // Eight positives are summed in f32 and those sums in f64. One f32 sum over a block would
        // lose digits when a logit of hundreds meets many small ones.
        for rows in dots.chunks(8 * width) {
            let mut positive = zero;
            for dots in rows.chunks_exact(width) {
                let dot = V::load(&dots[lane..]);
                let z = dot.mul_add(high, dot.mul_add(low, bias));
                positive = positive.add(z.max(zero));
                let small = exp2_of_negative(negative(z));
                product = product.mul_add(small, product.add(small));
            }
            let mut values = [0f32; WIDEST];
            positive.store(&mut values[lane..]);
            for l in lane..lane + V::LANES {
                positives[l] += f64::from(values[l]);
            }
        }
        product.store(&mut products[lane..]);
    }
    for l in 0..width {
        sums[l] = positives[l] * std::f64::consts::LN_2 + ln_1p(f64::from(products[l]));
    }
}

/// Returns -|z|.
#[inline(always)]
fn negative<V: Vector>(z: V) -> V {
    let zero = V::splat(0.0);
    zero.sub(z.max(zero.sub(z)))
}

#[inline(always)]
fn exp_sums_body<V: Vector>(
    dots: &[f32],
    scale: f64,
    largest: &mut [f64; WIDEST],
    sums: &mut [f64; WIDEST],
) {
    let (high, low) = split(scale * std::f64::consts::LOG2_E);
    let (high, low) = (V::splat(high), V::splat(low));
    let width = 2 * V::LANES;
    for lane in [0, V::LANES] {
        let logit = |dots: &[f32]| {
            let dot = V::load(&dots[lane..]);
            dot.mul_add(high, dot.mul_add(low, V::splat(0.0)))
        };
        let mut most = V::splat(NOTHING);
        for dots in dots.chunks_exact(width) {
            most = most.max(logit(dots));
        }
        let mut sum = V::splat(0.0);
        for dots in dots.chunks_exact(width) {
            sum = sum.add(exp2_of_negative(logit(dots).sub(most)));
        }
        let (mut mosts, mut values) = ([0f32; WIDEST], [0f32; WIDEST]);
        most.store(&mut mosts[lane..]);
        sum.store(&mut values[lane..]);
        for l in lane..lane + V::LANES {
            largest[l] = f64::from(mosts[l]) * std::f64::consts::LN_2;
            sums[l] = f64::from(values[l]);
        }
    }
}

/// ln(1 + u) for u >= 0, within 1e-12 of 1 + its value. The standard library's function is a call
/// for each lane; this one consists of operations that the compiler vectorises.
#[inline(always)]
fn ln_1p(u: f64) -> f64 {
    // 2^52: an integer below it is in the low bits of their sum.
    const INTEGER: f64 = 4_503_599_627_370_496.0;
    let bits = (1.0 + u).to_bits();
    // If the mantissa is above the square root of 2, the exponent is one more.
    let exponent = (bits + (2f64.to_bits() - std::f64::consts::SQRT_2.to_bits())) >> 52;
    let mantissa = f64::from_bits(bits - ((exponent - 1023) << 52));
    let exponent = f64::from_bits(exponent | INTEGER.to_bits()) - INTEGER - 1023.0;
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    // 2 atanh(s); |s| < 0.172.
    let mut tail = 1.0 / 15.0;
    for k in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        tail = tail * square + 1.0 / k;
    }
    exponent * std::f64::consts::LN_2 + 2.0 * s * tail
}

#[cfg(test)]
mod tests {
    use super::{super::pack, *};
    use crate::types::Rows;

    /// Values in -1..1 without a pattern that a lane or a row could share.
    fn values(n: usize) -> Vec<f32> {
        (0..n as u64)
            .map(|k| (k * k * 37 % 1_009) as f32 / 505.0 - 1.0)
            .collect()
    }

    fn exact_dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    }

    #[test]
    fn the_exponential_is_right_to_a_ten_millionth() {
        for k in 0..=12_600 {
            let z = k as f32 * -0.01;
            let mut ours = [0f32; 4];
            exp2_of_negative(Portable::splat(z)).store(&mut ours);
            let exact = f64::from(z).exp2();
            assert!(
                (f64::from(ours[0]) - exact).abs() <= 1.3e-7 * exact,
                "2^{z}: {} against {exact}",
                ours[0]
            );
        }
        let mut none = [1f32; 4];
        exp2_of_negative(Portable::splat(-1e30)).store(&mut none);
        assert!(none[0] < 2e-38);
    }

    #[test]
    fn the_logarithm_of_one_and_more_is_right() {
        for u in (-300..400)
            .map(|k| 1.25f64.powi(k))
            .chain([0.0, 0.414_213, 0.414_214, 1.0, 3.0])
        {
            assert!(
                (ln_1p(u) - u.ln_1p()).abs() <= 1e-11 * (1.0 + u.ln_1p()),
                "{u}"
            );
        }
    }

    #[test]
    fn dot_products_match_float64_on_every_instruction_set_for_every_height() {
        let dim = 2 * DEPTH + 3;
        for isa in Isa::all() {
            let (width, all) = (isa.width(), values(60 * dim));
            let mut panel = vec![0f32; width * dim];
            pack::panel(&Rows::F32(&all), dim, 0..width as u32, width, &mut panel);
            for count in 1..=28u32 {
                let drawn: Vec<u32> = (60 - count..60).collect();
                let blocks = pack::Blocks::new(isa, &Rows::F32(&all), dim, &drawn);
                let mut out = vec![0f32; drawn.len() * width];
                let (block, groups) = blocks.iter().next().expect("one block");
                dots(isa, block, groups, &panel, dim, &mut out);
                for (row, lane) in
                    (0..drawn.len()).flat_map(|row| (0..width).map(move |lane| (row, lane)))
                {
                    let exact = exact_dot(
                        &all[drawn[row] as usize * dim..][..dim],
                        &all[lane * dim..][..dim],
                    );
                    let ours = f64::from(out[row * width + lane]);
                    assert!(
                        (ours - exact).abs() < 2e-5,
                        "{isa:?} {count} rows, {row} {lane}: {ours} against {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn sums_match_float64_on_every_instruction_set() {
        let cases = [
            (1, 1.0, 0.0),
            (15, 20.0, -10.0),
            (100, 120.0, -20.0),
            (120, 1.0, -20.0),
            (120, -60.0, 0.1),
        ];
        for (isa, (rows, scale, bias)) in Isa::all()
            .into_iter()
            .flat_map(|isa| cases.map(|case| (isa, case)))
        {
            let (width, dots) = (isa.width(), values(rows * isa.width()));
            let [mut plus, mut largest, mut scaled] = [[0f64; WIDEST]; 3];
            softplus_sums(isa, &dots, scale, bias, &mut plus);
            exp_sums(isa, &dots, scale, &mut largest, &mut scaled);
            for lane in 0..width {
                let cosines = || {
                    dots.iter()
                        .skip(lane)
                        .step_by(width)
                        .map(|dot| f64::from(*dot))
                };
                let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
                let exact: f64 = cosines()
                    .map(|cosine| softplus(scale * cosine + bias))
                    .sum();
                let error = (plus[lane] - exact).abs();
                assert!(
                    error < 1e-7 * rows as f64 + 2e-7 * exact,
                    "{isa:?} {rows} {scale} {bias}: {error} of {exact}"
                );
                let exact = cosines()
                    .map(|cosine| (scale * cosine).exp())
                    .sum::<f64>()
                    .ln();
                let error = (largest[lane] + scaled[lane].ln() - exact).abs();
                assert!(error < 1e-5, "{isa:?} {rows} {scale}: {error} of {exact}");
            }
        }
    }

    #[test]
    fn many_small_terms_are_not_lost() {
        for isa in Isa::all() {
            let (dots, mut sums) = (vec![0f32; BLOCK * isa.width()], [0f64; WIDEST]);
            softplus_sums(isa, &dots, 1.0, -18.0, &mut sums);
            let exact = BLOCK as f64 * (-18f64).exp().ln_1p();
            assert!(
                (sums[0] - exact).abs() < 1e-5 * exact,
                "{isa:?}: {} against {exact}",
                sums[0]
            );
        }
    }
}
