//! Vectors of f32 of three instruction sets under one name; the processor's best is picked at run
//! time.
//!
//! Their methods are inlined into functions compiled for the instruction set, and may be called
//! from nowhere else.

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// The instructions of the compilation target.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Returns the instruction sets of this processor, the best last.
    pub(super) fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Self::Avx2);
            if is_x86_feature_detected!("avx512f") {
                all.push(Self::Avx512);
            }
        }
        all
    }

    pub(super) fn detect() -> Self {
        *Self::all()
            .last()
            .expect("the portable one is always there")
    }
}

/// Lanes of f32.
pub(super) trait Vector: Copy {
    const LANES: usize;

    fn splat(value: f32) -> Self;
    /// Returns the first `LANES` of `values`.
    fn load(values: &[f32]) -> Self;
    /// Writes to the first `LANES` of `values`.
    fn store(self, values: &mut [f32]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    /// Returns self x factor + term, rounded once if the instruction set can.
    fn mul_add(self, factor: Self, term: Self) -> Self;
    /// self x 2^n, where `shifted` is 1.5 x 2^23 + n: n sits in its lowest bits, and is added to
    /// the exponent.
    fn scale_by(self, shifted: Self) -> Self;
}

#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 4]);

/// Whether the target has a fused multiply-add. Without it, `mul_add` is a call of a slow function
/// that emulates it.
const FUSES: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, with: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|l| with(self.0[l], other.0[l])))
    }
}

impl Vector for Portable {
    const LANES: usize = 4;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    fn load(values: &[f32]) -> Self {
        Self([values[0], values[1], values[2], values[3]])
    }

    #[inline(always)]
    fn store(self, values: &mut [f32]) {
        values[..4].copy_from_slice(&self.0);
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        let one = |l: usize| {
            if FUSES {
                self.0[l].mul_add(factor.0[l], term.0[l])
            } else {
                self.0[l] * factor.0[l] + term.0[l]
            }
        };
        Self(std::array::from_fn(one))
    }

    #[inline(always)]
    fn scale_by(self, shifted: Self) -> Self {
        self.zip(shifted, |a, n| {
            f32::from_bits(a.to_bits().wrapping_add(n.to_bits() << 23))
        })
    }
}

/// One of Intel's vector types as a [`Vector`].
#[cfg(target_arch = "x86_64")]
macro_rules! x86_vector {
    (
        $name:ident($inner:ident), $lanes:literal, $splat:ident, $load:ident, $store:ident,
            $add:ident, $sub:ident, $max:ident,
        $fma:ident, $to_int:ident, $from_int:ident, $shift:ident, $add_int:ident
    ) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name(std::arch::x86_64::$inner);

        // SAFETY of every call below: `Isa` names the instruction set only if the processor has
        // it, and the methods are reached through it alone. Loads and stores do not leave the
        // slices, whose lengths are checked.
        impl Vector for $name {
            const LANES: usize = $lanes;

            #[inline(always)]
            fn splat(value: f32) -> Self {
                Self(unsafe { std::arch::x86_64::$splat(value) })
            }

            #[inline(always)]
            fn load(values: &[f32]) -> Self {
                Self(unsafe { std::arch::x86_64::$load(values[..$lanes].as_ptr()) })
            }

            #[inline(always)]
            fn store(self, values: &mut [f32]) {
                unsafe { std::arch::x86_64::$store(values[..$lanes].as_mut_ptr(), self.0) }
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                Self(unsafe { std::arch::x86_64::$add(self.0, other.0) })
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                Self(unsafe { std::arch::x86_64::$sub(self.0, other.0) })
            }

            #[inline(always)]
            fn max(self, other: Self) -> Self {
                Self(unsafe { std::arch::x86_64::$max(self.0, other.0) })
            }

            #[inline(always)]
            fn mul_add(self, factor: Self, term: Self) -> Self {
                Self(unsafe { std::arch::x86_64::$fma(self.0, factor.0, term.0) })
            }

            #[inline(always)]
            fn scale_by(self, shifted: Self) -> Self {
                use std::arch::x86_64::{$add_int, $from_int, $shift, $to_int};
                Self(unsafe {
                    $from_int($add_int($to_int(self.0), $shift::<23>($to_int(shifted.0))))
                })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
x86_vector!(
    Avx2(__m256),
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_max_ps,
    _mm256_fmadd_ps,
    _mm256_castps_si256,
    _mm256_castsi256_ps,
    _mm256_slli_epi32,
    _mm256_add_epi32
);
#[cfg(target_arch = "x86_64")]
x86_vector!(
    Avx512(__m512),
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_max_ps,
    _mm512_fmadd_ps,
    _mm512_castps_si512,
    _mm512_castsi512_ps,
    _mm512_slli_epi32,
    _mm512_add_epi32
);
