//! The integer dot products of AVX2 and of AVX-512 with VNNI.
//!
//! The functions use intrinsics without having the processor's features themselves: they are
//! compiled into functions that have them. So they contain no closures, which would not be.
#![allow(
    clippy::needless_range_loop,
    reason = "iterators take closures, which would not have the processor's features"
)]
use super::{GROUP, Lanes};
use crate::resize::{HALF, PRECISION};
use std::arch::x86_64::*;

pub(super) struct Avx2;

impl Lanes for Avx2 {
    const COUNT: usize = 8;
    type Register = __m256i;

    /// Returns two digits of 16 bits: of the first and third weight, and of the second and fourth.
    fn cut(weights: [i32; GROUP]) -> Option<[u32; 4]> {
        let mut cut = [0; 4];
        for (at, weight) in weights.into_iter().enumerate() {
            let low = (weight << 20) >> 20;
            let high = i16::try_from((weight - low) >> 12).ok()?;
            for (digit, value) in [(0, high), (2, low as i16)] {
                cut[digit + at % 2] |= u32::from(value as u16) << (at / 2 * 16);
            }
        }
        Some(cut)
    }

    #[inline(always)]
    unsafe fn dot3(
        values: *const u32,
        apart: usize,
        stride: usize,
        weights: &[[u32; 4]],
    ) -> [__m256i; 3] {
        // SAFETY: by the caller's promise.
        unsafe {
            let even = _mm256_set1_epi32(0x00ff_00ff);
            let mut high = [_mm256_setzero_si256(); 3];
            let mut low = [_mm256_set1_epi32(HALF); 3];
            for (group, weights) in weights.iter().enumerate() {
                let [a_high, b_high, a_low, b_low] = [
                    _mm256_set1_epi32(weights[0] as i32),
                    _mm256_set1_epi32(weights[1] as i32),
                    _mm256_set1_epi32(weights[2] as i32),
                    _mm256_set1_epi32(weights[3] as i32),
                ];
                for k in 0..3 {
                    let four = values.add(group * stride + k * apart).cast();
                    let four = _mm256_loadu_si256(four);
                    let (a, b) = (_mm256_and_si256(four, even), _mm256_srli_epi16::<8>(four));
                    high[k] = _mm256_add_epi32(high[k], _mm256_madd_epi16(a, a_high));
                    high[k] = _mm256_add_epi32(high[k], _mm256_madd_epi16(b, b_high));
                    low[k] = _mm256_add_epi32(low[k], _mm256_madd_epi16(a, a_low));
                    low[k] = _mm256_add_epi32(low[k], _mm256_madd_epi16(b, b_low));
                }
            }
            let mut sums = low;
            for k in 0..3 {
                let sum = _mm256_add_epi32(_mm256_slli_epi32::<12>(high[k]), low[k]);
                sums[k] = _mm256_srai_epi32::<{ PRECISION as i32 }>(sum);
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn write_groups(sums: [__m256i; 4], to: *mut u32, stride: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            let four = packed_avx2(sums);
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(four));
            let second = _mm256_extracti128_si256::<1>(four);
            _mm_storeu_si128(to.add(stride).cast(), second);
        }
    }

    #[inline(always)]
    unsafe fn write_line(sums: [__m256i; 3], to: *mut u8) {
        // SAFETY: by the caller's promise.
        unsafe {
            let four = packed_avx2([sums[0], sums[1], sums[2], sums[2]]);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256(to.cast(), _mm256_permutevar8x32_epi32(four, order));
        }
    }

    #[inline(always)]
    fn none() -> __m256i {
        // SAFETY: the processor has AVX2.
        unsafe { _mm256_setzero_si256() }
    }
}

/// Clamps sums to bytes: in each 128 bits, four of each register.
#[inline(always)]
unsafe fn packed_avx2([a, b, c, d]: [__m256i; 4]) -> __m256i {
    // SAFETY: the processor has AVX2. Sums are far inside of 16 bits after the shift.
    unsafe { _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)) }
}

pub(super) struct Avx512;

impl Lanes for Avx512 {
    const COUNT: usize = 16;
    type Register = __m512i;

    /// Returns three digits of 8 bits.
    fn cut(weights: [i32; GROUP]) -> Option<[u32; 4]> {
        let mut cut = [0; 4];
        for (at, mut weight) in weights.into_iter().enumerate() {
            for digit in &mut cut[..3] {
                let low = weight as i8;
                *digit |= u32::from(low as u8) << (at * 8);
                weight = (weight - i32::from(low)) >> 8;
            }
            if weight != 0 {
                return None;
            }
        }
        Some(cut)
    }

    #[inline(always)]
    unsafe fn dot3(
        values: *const u32,
        apart: usize,
        stride: usize,
        weights: &[[u32; 4]],
    ) -> [__m512i; 3] {
        // SAFETY: by the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); 3]; 3];
            for (group, weights) in weights.iter().enumerate() {
                for k in 0..3 {
                    let four = values.add(group * stride + k * apart).cast();
                    let four = _mm512_loadu_si512(four);
                    for digit in 0..3 {
                        let digits = _mm512_set1_epi32(weights[digit] as i32);
                        sums[k][digit] = _mm512_dpbusd_epi32(sums[k][digit], four, digits);
                    }
                }
            }
            let mut rounded = [_mm512_setzero_si512(); 3];
            for k in 0..3 {
                let [low, middle, high] = sums[k];
                let upper = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), middle);
                let low = _mm512_add_epi32(low, _mm512_set1_epi32(HALF));
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), low);
                rounded[k] = _mm512_srai_epi32::<PRECISION>(sum);
            }
            rounded
        }
    }

    #[inline(always)]
    unsafe fn write_groups(sums: [__m512i; 4], to: *mut u32, stride: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            let four = packed_avx512(sums);
            let parts = [
                _mm512_castsi512_si128(four),
                _mm512_extracti32x4_epi32::<1>(four),
                _mm512_extracti32x4_epi32::<2>(four),
                _mm512_extracti32x4_epi32::<3>(four),
            ];
            for (k, part) in parts.into_iter().enumerate() {
                _mm_storeu_si128(to.add(k * stride).cast(), part);
            }
        }
    }

    #[inline(always)]
    unsafe fn write_line(sums: [__m512i; 3], to: *mut u8) {
        // SAFETY: by the caller's promise.
        unsafe {
            let four = packed_avx512([sums[0], sums[1], sums[2], sums[2]]);
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi32(order, four));
        }
    }

    #[inline(always)]
    fn none() -> __m512i {
        // SAFETY: the processor has AVX-512.
        unsafe { _mm512_setzero_si512() }
    }
}

/// As [`packed_avx2`].
#[inline(always)]
unsafe fn packed_avx512([a, b, c, d]: [__m512i; 4]) -> __m512i {
    // SAFETY: the processor has AVX-512 with bytes and words.
    unsafe { _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)) }
}
