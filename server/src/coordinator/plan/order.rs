//! Keyed permutations of 0..n without a list: any place of an order is computed from (key, place).
//! A list of a billion rows would be 8 GB for each epoch in use.

/// Rounds of the network. Four are enough with a perfect round function (Luby and Rackoff 1988);
/// small domains and a cheap round function need more.
const ROUNDS: usize = 8;

/// Half-width of the smallest domain, in bits. Networks over fewer values reach only few of the
/// possible orders.
const HALF_BITS_MIN: u32 = 3;

/// A pseudo-random permutation of 0..n.
///
/// A balanced Feistel network over the next power of four. A value that falls outside 0..n is
/// encrypted again until it falls inside, fewer than four times on average if n > 16 (Black and
/// Rogaway 2002, "Ciphers with arbitrary finite domains").
#[derive(Debug, Clone)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// Makes the order of 0..n for `key`. `purpose` separates uses with the same key; it is part of
    /// the plan's version. n is at most 2^62.
    pub fn new(purpose: &str, key: &[u64], n: u64) -> Self {
        debug_assert!(n <= 1 << 62, "{n} is no row count");
        let mut hasher = blake3::Hasher::new_derive_key(purpose);
        for part in key {
            hasher.update(&part.to_le_bytes());
        }
        let mut output = hasher.finalize_xof();
        let keys = std::array::from_fn(|_| {
            let mut bytes = [0; 8];
            output.fill(&mut bytes);
            u64::from_le_bytes(bytes)
        });
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Self {
            n,
            half_bits: bits.div_ceil(2).max(HALF_BITS_MIN),
            keys,
        }
    }

    /// Returns the value at place `i`, for i < n.
    pub fn forward(&self, i: u64) -> u64 {
        self.cycle_walk(i, |x| self.encrypt(x))
    }

    /// Returns the place of `value`, for value < n.
    pub fn inverse(&self, value: u64) -> u64 {
        self.cycle_walk(value, |x| self.decrypt(x))
    }

    fn cycle_walk(&self, start: u64, step: impl Fn(u64) -> u64) -> u64 {
        debug_assert!(start < self.n, "{start} is not below {}", self.n);
        let mut x = step(start);
        // The loop ends: `step` is a bijection, so the cycle leads back to `start`, which is below
        // n.
        while x >= self.n {
            x = step(x);
        }
        x
    }

    fn encrypt(&self, x: u64) -> u64 {
        let (mut left, mut right) = self.halves(x);
        for key in self.keys {
            (left, right) = (right, left ^ self.round(right, key));
        }
        left << self.half_bits | right
    }

    fn decrypt(&self, x: u64) -> u64 {
        let (mut left, mut right) = self.halves(x);
        for key in self.keys.into_iter().rev() {
            (left, right) = (right ^ self.round(left, key), left);
        }
        left << self.half_bits | right
    }

    fn halves(&self, x: u64) -> (u64, u64) {
        (x >> self.half_bits, x & ((1 << self.half_bits) - 1))
    }

    /// Applies SplitMix64's finaliser (Steele et al. 2014) of the keyed half, its top bits.
    fn round(&self, half: u64, key: u64) -> u64 {
        let mut z = half.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(key);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> (u64::BITS - self.half_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(key: u64, n: u64) -> Vec<u64> {
        let permutation = Permutation::new("test", &[key], n);
        (0..n).map(|i| permutation.forward(i)).collect()
    }

    #[test]
    fn awkward_sizes_are_permuted_whole() {
        for n in [1, 2, 3, 7, 64, 65, 1000, 65_537] {
            let permutation = Permutation::new("test", &[5], n);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let value = permutation.forward(i);
                assert_eq!(permutation.inverse(value), i, "n = {n}");
                assert!(
                    !std::mem::replace(&mut seen[value as usize], true),
                    "n = {n}: {value} came twice"
                );
            }
        }
    }

    #[test]
    fn purposes_are_kept_apart() {
        let other = Permutation::new("another", &[1], 1000);
        assert_ne!(
            order(1, 1000),
            (0..1000).map(|i| other.forward(i)).collect::<Vec<_>>()
        );
    }

    /// Each value is as likely at each place as at any other, also if the network is small.
    #[test]
    fn places_and_values_are_independent() {
        let (n, keys) = (5_u64, 5_000_u64);
        let mut counts = vec![0_f64; (n * n) as usize];
        for key in 0..keys {
            for (place, value) in order(key, n).into_iter().enumerate() {
                counts[place * n as usize + value as usize] += 1.0;
            }
        }
        let expected = keys as f64 / n as f64;
        let chi2: f64 = counts
            .iter()
            .map(|count| (count - expected).powi(2) / expected)
            .sum();
        // 16 degrees of freedom: above 39.3 once in a thousand.
        assert!(chi2 < 39.3, "{chi2}");
    }

    proptest! {
        #[test]
        fn every_size_and_key_is_a_bijection(n in 1_u64..5_000, key: u64) {
            let mut values = order(key, n);
            values.sort_unstable();
            prop_assert!(values.into_iter().eq(0..n));
        }

        #[test]
        fn keys_differ(a: u64, b: u64) {
            prop_assume!(a != b);
            prop_assert_ne!(order(a, 100), order(b, 100));
        }

        #[test]
        fn large_domains_invert(n in 1_u64..1 << 62, key: u64, at: u64) {
            let permutation = Permutation::new("test", &[key], n);
            let i = at % n;
            let value = permutation.forward(i);
            prop_assert!(value < n);
            prop_assert_eq!(permutation.inverse(value), i);
        }
    }
}
