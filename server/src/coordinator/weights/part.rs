//! One part of a push: a block of a tensor.
use bytes::Bytes;
use safetensors::Dtype;

/// A block of one tensor: elements start .. start + extent in each dimension, C order, little
/// endian.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub dtype: Dtype,
    pub start: Vec<u64>,
    pub extent: Vec<u64>,
    /// Empty until it has arrived.
    pub bytes: Bytes,
}

impl Part {
    pub(super) fn elements(&self) -> u64 {
        self.extent.iter().product()
    }

    /// Returns whether its bytes have arrived.
    pub(super) fn is_here(&self) -> bool {
        self.bytes.len() as u64 * 8 == self.elements() * self.dtype.bitsize() as u64
    }

    /// Returns whether both contain a common element.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let both_have_elements = self.elements() > 0 && other.elements() > 0;
        let mut dimensions = self
            .start
            .iter()
            .zip(&self.extent)
            .zip(other.start.iter().zip(&other.extent));
        both_have_elements && dimensions.all(|((a, n), (b, m))| a < &(b + m) && b < &(a + n))
    }
}
