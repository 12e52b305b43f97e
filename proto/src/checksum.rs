//! The checksum of a batch's stream, and of a part of weights.
use twox_hash::xxhash3_128::Hasher;

/// XXH3-128 of bytes that come in parts.
pub struct Checksum(Hasher);

impl Default for Checksum {
    fn default() -> Self {
        Self(Hasher::with_seed(0))
    }
}

impl Checksum {
    /// Returns the checksum of bytes that are whole.
    #[must_use]
    pub fn of(bytes: &[u8]) -> [u8; 16] {
        let mut checksum = Self::default();
        checksum.update(bytes);
        checksum.finish()
    }

    pub fn update(&mut self, part: &[u8]) {
        self.0.write(part);
    }

    /// Returns the canonical form: the highest byte first.
    #[must_use]
    pub fn finish(&self) -> [u8; 16] {
        self.0.finish_128().to_be_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_give_what_the_whole_gives_and_what_is_published() {
        let of = |parts: &[&[u8]]| {
            let mut checksum = Checksum::default();
            parts.iter().for_each(|part| checksum.update(part));
            checksum.finish()
        };
        // The value that the algorithm's specification gives for no bytes.
        assert_eq!(
            of(&[]),
            0x99aa_06d3_0147_98d8_6001_c324_468d_497f_u128.to_be_bytes()
        );
        let long: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        assert_eq!(
            Checksum::of(&long),
            of(&[&long[..7], &[], &long[7..70_000], &long[70_000..]])
        );
        assert_ne!(of(&[&long]), of(&[&long[1..]]));
    }
}
