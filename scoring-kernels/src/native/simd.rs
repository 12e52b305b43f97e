//! The inner loops: blocked f32 dot products, sums of softplus, sums of exponentials.
//!
//! Each loop is written once over arrays of constant length, which the compiler turns into vector code, and compiled for
//! three instruction sets; the processor's is picked at run time.

/// Candidates a tile holds: a multiple of every micro-kernel's height.
pub(super) const TILE: usize = 48;
/// Columns (drawn examples) of which dot products are kept at a time: a tile's fit the L2 cache.
pub(super) const BLOCK: usize = 256;
/// Terms added up in one register before it is flushed: keeps a panel in the L1 cache, and rounding small.
const DEPTH: usize = 128;
/// Numbers reduced side by side.
const LANES: usize = 16;
/// A logit whose exponential is 0.
const NOTHING: f32 = -1e30;

/// An instruction set and with it the shape of a micro-kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    /// (candidates, drawn examples) that one micro-kernel multiplies.
    pub(super) fn shape(self) -> (usize, usize) {
        match self {
            Self::Baseline => (4, 8),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => (6, 16),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => (8, 32),
        }
    }
}

/// Compiles one generic body for each instruction set and dispatches to it.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?, $body:ident) => {
        $(#[$doc])*
        pub(super) fn $name(isa: Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                $body::<6, 16, true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                $body::<8, 32, true>($($arg),*)
            }
            match isa {
                Isa::Baseline => $body::<4, 8, { cfg!(any(target_arch = "aarch64", target_feature = "fma")) }>($($arg),*),
                // SAFETY: `Isa::detect` names these only where the processor has them.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}

for_each_isa! {
    /// Dot products of a tile with up to [`BLOCK`] drawn examples: `out[row * BLOCK + column]`. `tile` and `block` are
    /// panels as [`super::pack`] lays them out for this instruction set; padding rows and columns give zeros.
    dots(tile: &[f32], block: &[f32], dim: usize, out: &mut [f32]), dots_body
}

for_each_isa! {
    /// Sum over a row of softplus(scale x dot + bias), and so of sigmoid pair losses of negatives.
    softplus_sum(dots: &[f32], scale: f32, bias: f32) -> f64, softplus_sum_body
}

for_each_isa! {
    /// (m, sum of exp(scale x dot - m)) over a row, with m the largest scale x dot.
    exp_sum(dots: &[f32], scale: f32) -> (f64, f64), exp_sum_body
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn dots_body<const MR: usize, const NR: usize, const FMA: bool>(tile: &[f32], block: &[f32], dim: usize, out: &mut [f32]) {
    for start in (0..dim).step_by(DEPTH) {
        let end = (start + DEPTH).min(dim);
        for (column, panel) in block.chunks_exact(dim * NR).enumerate() {
            for (row, rows) in tile.chunks_exact(dim * MR).enumerate() {
                let (rows, panel) = (&rows[start * MR..end * MR], &panel[start * NR..end * NR]);
                micro::<MR, NR, FMA>(rows, panel, &mut out[row * MR * BLOCK + column * NR..], start == 0);
            }
        }
    }
}

/// MR x NR dot products, held in registers over the shared depth.
#[inline(always)]
fn micro<const MR: usize, const NR: usize, const FMA: bool>(rows: &[f32], panel: &[f32], out: &mut [f32], first: bool) {
    let mut sums = [[0f32; NR]; MR];
    for (row, column) in rows.as_chunks::<MR>().0.iter().zip(panel.as_chunks::<NR>().0) {
        for r in 0..MR {
            for c in 0..NR {
                sums[r][c] = fma::<FMA>(row[r], column[c], sums[r][c]);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[r * BLOCK..r * BLOCK + NR];
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if first { *sum } else { *out + *sum };
        }
    }
}

/// exp(-t) for t >= 0, to 2 ulp (Cephes' polynomial); 1e-38 for whatever is larger than 87.
#[inline(always)]
fn exp_neg<const FMA: bool>(t: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 x 2^23: adding it rounds to an integer, which then sits in the low bits.
    let t = t.min(87.0);
    let shifted = fma::<FMA>(t, -std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, 2.121_944_4e-4, fma::<FMA>(n, -0.693_359_4, -t));
    let mut p = fma::<FMA>(1.987_569_1e-4, r, 1.398_2e-3);
    p = fma::<FMA>(p, r, 8.333_452e-3);
    p = fma::<FMA>(p, r, 4.166_579_6e-2);
    p = fma::<FMA>(p, r, 1.666_666_5e-1);
    p = fma::<FMA>(p, r, 0.5);
    p = fma::<FMA>(p, r * r, r) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(exponent)
}

/// LANES logits of a row; those past its end are `NOTHING`.
#[inline(always)]
fn logits<const FMA: bool>(dots: &[f32], scale: f32, bias: f32) -> [f32; LANES] {
    let mut x = [NOTHING; LANES];
    if let Ok(dots) = <&[f32; LANES]>::try_from(dots) {
        for l in 0..LANES {
            x[l] = fma::<FMA>(dots[l], scale, bias);
        }
    } else {
        for (x, dot) in x.iter_mut().zip(dots) {
            *x = fma::<FMA>(*dot, scale, bias);
        }
    }
    x
}

/// softplus(x) = max(x, 0) + ln(1 + exp(-|x|)). The logarithms of a row are one logarithm of a product: its at most
/// [`BLOCK`] factors lie in 1..=2, which an f64 holds.
#[inline(always)]
fn softplus_sum_body<const MR: usize, const NR: usize, const FMA: bool>(dots: &[f32], scale: f32, bias: f32) -> f64 {
    let (mut positive, mut product) = ([0f32; LANES], [1f32; LANES]);
    for dots in dots.chunks(LANES) {
        let x = logits::<FMA>(dots, scale, bias);
        for l in 0..LANES {
            positive[l] += x[l].max(0.0);
            product[l] *= 1.0 + exp_neg::<FMA>(x[l].abs());
        }
    }
    let positive: f64 = positive.iter().map(|value| f64::from(*value)).sum();
    positive + product.iter().map(|value| f64::from(*value)).product::<f64>().ln()
}

#[inline(always)]
fn exp_sum_body<const MR: usize, const NR: usize, const FMA: bool>(dots: &[f32], scale: f32) -> (f64, f64) {
    let mut largest = [NOTHING; LANES];
    for dots in dots.chunks(LANES) {
        let x = logits::<FMA>(dots, scale, 0.0);
        for l in 0..LANES {
            largest[l] = largest[l].max(x[l]);
        }
    }
    let largest = largest.iter().copied().fold(NOTHING, f32::max);
    let mut sums = [0f32; LANES];
    for dots in dots.chunks(LANES) {
        let x = logits::<FMA>(dots, scale, 0.0);
        for l in 0..LANES {
            sums[l] += exp_neg::<FMA>(largest - x[l]);
        }
    }
    (f64::from(largest), sums.iter().map(|value| f64::from(*value)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_isa() -> Vec<Isa> {
        let mut all = vec![Isa::Baseline];
        #[cfg(target_arch = "x86_64")]
        match Isa::detect() {
            Isa::Avx512 => all.extend([Isa::Avx2, Isa::Avx512]),
            Isa::Avx2 => all.push(Isa::Avx2),
            Isa::Baseline => {}
        }
        all
    }

    #[test]
    fn the_exponential_is_right_to_a_few_ulp() {
        for k in 0..=8600 {
            let t = k as f32 * 0.01;
            let (ours, exact) = (f64::from(exp_neg::<true>(t)), f64::from(-t).exp());
            assert!((ours - exact).abs() <= 2.5e-7 * exact, "exp(-{t}): {ours} against {exact}");
        }
        assert!(exp_neg::<false>(1e30) < 2e-38);
    }

    #[test]
    fn sums_of_a_row_match_float64_on_every_instruction_set() {
        for isa in every_isa() {
            for (n, scale, bias) in [(1, 1.0, 0.0), (15, 20.0, -10.0), (100, 120.0, -20.0), (256, 1.0, -20.0), (256, -60.0, 0.0)] {
                let dots: Vec<f32> = (0..n).map(|k| (k * 37 % 101) as f32 / 50.0 - 1.0).collect();
                let logit = |dot: &f32| f64::from(scale) * f64::from(*dot) + f64::from(bias);
                let softplus: f64 = dots.iter().map(logit).map(|x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p()).sum();
                let ours = softplus_sum(isa, &dots, scale, bias);
                assert!((ours - softplus).abs() < 2e-5 + 3e-7 * softplus, "{isa:?} {n} {scale} {bias}: {ours} {softplus}");

                let sum: f64 = dots.iter().map(|dot| (logit(dot) - f64::from(bias)).exp()).sum();
                let (largest, scaled) = exp_sum(isa, &dots, scale);
                let ours = largest + scaled.ln();
                assert!((ours - sum.ln()).abs() < 2e-5, "{isa:?} {n} {scale}: {ours} {}", sum.ln());
            }
        }
    }
}
