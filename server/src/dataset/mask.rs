//! Which rows of a block are candidates, where a source leaves some out for good.
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The rows of a block that are kept, one bit a row. At least one is, and not all are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mask {
    /// Rows of the block as it is stored.
    of: u32,
    /// Row n is bit n % 8 of byte n / 8.
    bits: Vec<u8>,
}

impl Mask {
    /// Returns `None` if all rows are kept, or none.
    pub fn new(kept: &[bool]) -> Option<Self> {
        let of = u32::try_from(kept.len()).ok()?;
        let mut bits = vec![0; kept.len().div_ceil(8)];
        for (row, _) in kept.iter().enumerate().filter(|(_, kept)| **kept) {
            bits[row / 8] |= 1 << (row % 8);
        }
        let mask = Self { of, bits };
        (1..of).contains(&mask.count()).then_some(mask)
    }

    /// Returns the number of rows of the block as it is stored.
    pub fn stored(&self) -> u32 {
        self.of
    }

    /// Returns the number of rows that are kept.
    pub fn count(&self) -> u32 {
        self.bits.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Returns whether each of the stored rows is kept, in their order.
    pub fn rows(&self) -> impl Iterator<Item = bool> {
        (0..self.of).map(|row| self.keeps(row))
    }

    fn keeps(&self, stored: u32) -> bool {
        self.bits[stored as usize / 8] & 1 << (stored % 8) != 0
    }

    /// Returns the number among all stored rows of the `n`-th that is kept. n is below
    /// [`Mask::count`].
    pub fn stored_row(&self, n: u32) -> u32 {
        let mut left = n;
        for (byte, bits) in (0_u32..).zip(&self.bits) {
            let kept_in_word = bits.count_ones();
            if left < kept_in_word {
                let bit = (0..8).filter(|bit| bits & 1 << bit != 0).nth(left as usize);
                return byte * 8 + bit.unwrap_or_default();
            }
            left -= kept_in_word;
        }
        debug_assert!(false, "{n} is not below {}", self.count());
        n
    }

    /// Returns where among the kept rows a stored one is; `None` if it is left out.
    pub fn kept_row(&self, stored: u32) -> Option<u32> {
        if stored >= self.of || !self.keeps(stored) {
            return None;
        }
        let (bytes, rest) = (stored as usize / 8, stored % 8);
        let before: u32 = self.bits[..bytes].iter().map(|b| b.count_ones()).sum();
        Some(before + (self.bits[bytes] & ((1 << rest) - 1)).count_ones())
    }
}

/// As `[rows, bits in hex]`.
impl Serialize for Mask {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.bits.iter().map(|byte| format!("{byte:02x}")).collect();
        (self.of, hex).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Mask {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (of, hex) = <(u32, String)>::deserialize(deserializer)?;
        let byte = |at: usize| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
        let bits = (0..hex.len()).step_by(2).map(byte);
        let bits: Vec<u8> = bits
            .collect::<Option<_>>()
            .filter(|bits: &Vec<u8>| bits.len() == of.div_ceil(8) as usize)
            .ok_or_else(|| D::Error::custom("a mask of rows is damaged"))?;
        Ok(Self { of, bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn kept_and_stored_rows_are_told_from_each_other(
            kept in prop::collection::vec(any::<bool>(), 0..70),
        ) {
            let numbered = (0..).zip(&kept);
            let expected: Vec<u32> = numbered.filter(|(_, k)| **k).map(|(n, _)| n).collect();
            let Some(mask) = Mask::new(&kept) else {
                prop_assert!(expected.is_empty() || expected.len() == kept.len());
                return Ok(());
            };
            prop_assert_eq!(mask.stored() as usize, kept.len());
            prop_assert_eq!(mask.count() as usize, expected.len());
            prop_assert!(mask.rows().eq(kept.iter().copied()));
            let stored: Vec<u32> = (0..mask.count()).map(|n| mask.stored_row(n)).collect();
            prop_assert_eq!(&stored, &expected);
            for row in 0..=kept.len() as u32 {
                let at = expected.iter().position(|stored| *stored == row);
                prop_assert_eq!(mask.kept_row(row), at.map(|at| at as u32));
            }
            let json = serde_json::to_string(&mask).unwrap();
            prop_assert_eq!(serde_json::from_str::<Mask>(&json).unwrap(), mask);
        }
    }

    #[test]
    fn a_damaged_mask_is_refused() {
        for json in [
            "[9, \"ff\"]",
            "[9, \"fffff\"]",
            "[9, \"fxff\"]",
            "[9, \"ffé\"]",
        ] {
            assert!(serde_json::from_str::<Mask>(json).is_err(), "{json}");
        }
    }
}
