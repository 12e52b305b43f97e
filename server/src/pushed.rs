//! Weights in memory, between a push and the worker that loads them, and the look for values that
//! are not finite. Coordinator and worker share it.
use bytes::Bytes;
use safetensors::Dtype;

/// A safetensors file in memory: its header, then its tensors in the header's order.
#[derive(Debug, Clone)]
pub struct Pushed {
    pub header: Bytes,
    pub tensors: Vec<Tensor>,
    /// BLAKE3 of the file, in hex.
    pub digest: String,
}

/// A tensor of the file.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
}

impl Pushed {
    /// Returns the file's bytes. They are shared, not copied.
    pub fn pieces(&self) -> impl Iterator<Item = Bytes> {
        let tensors = self.tensors.iter().map(|tensor| tensor.bytes.clone());
        std::iter::once(self.header.clone()).chain(tensors)
    }
}

/// Bytes that are looked at together.
const BLOCK_BYTES: usize = 4096;

/// Returns the index of the first value of `width` bytes (little endian) whose exponent, the bits
/// of `mask` in its highest two bytes, is all ones: NaN or infinity. In all float types the whole
/// exponent lies there.
pub(crate) fn first_not_finite(values: &[u8], width: usize, mask: u16) -> Option<usize> {
    let is_bad = |value: &[u8]| match value {
        [.., low, high] => u16::from_le_bytes([*low, *high]) & mask == mask,
        _ => false,
    };
    // Nearly all blocks are good. Asking for a whole block whether any value is bad, instead of for
    // the first one, is what the compiler can do with wide registers.
    let block = BLOCK_BYTES / width * width;
    let has_bad = |values: &&[u8]| match width {
        4 => {
            let mask = u32::from(mask) << 16;
            let bits = values
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| u32::from_le_bytes(*b));
            bits.fold(false, |bad, bits| bad | (bits & mask == mask))
        }
        8 => {
            let mask = u64::from(mask) << 48;
            let bits = values
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| u64::from_le_bytes(*b));
            bits.fold(false, |bad, bits| bad | (bits & mask == mask))
        }
        _ => {
            let bits = values
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| u16::from_le_bytes(*b));
            bits.fold(false, |bad, bits| bad | (bits & mask == mask))
        }
    };
    let (at, bad) = values
        .chunks(block)
        .enumerate()
        .find(|(_, values)| has_bad(values))?;
    let within = bad.chunks_exact(width).position(is_bad)?;
    Some(at * (block / width) + within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_value_is_found_wherever_it_is() {
        let f32s = |count: usize| -> Vec<u8> { f32::MAX.to_le_bytes().repeat(count) };
        for count in [1, 3, 1023, 1024, 1025, 5000] {
            assert_eq!(first_not_finite(&f32s(count), 4, 0x7f80), None);
            for at in [0, count / 2, count - 1] {
                let mut values = f32s(count);
                values[at * 4..at * 4 + 4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
                values[count * 4 - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
                assert_eq!(first_not_finite(&values, 4, 0x7f80), Some(at));
                let good = half::f16::MAX.to_le_bytes().repeat(count);
                assert_eq!(first_not_finite(&good, 2, 0x7c00), None);
                let mut values = good;
                values[at * 2..at * 2 + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
                assert_eq!(first_not_finite(&values, 2, 0x7c00), Some(at));
                let mut values = f64::MAX.to_le_bytes().repeat(count);
                assert_eq!(first_not_finite(&values, 8, 0x7ff0), None);
                values[at * 8..at * 8 + 8].copy_from_slice(&f64::NAN.to_le_bytes());
                assert_eq!(first_not_finite(&values, 8, 0x7ff0), Some(at));
            }
        }
        assert_eq!(first_not_finite(&[], 4, 0x7f80), None);
    }
}
