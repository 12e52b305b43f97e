//! What is left of a stream that came in parts.
use arrow::buffer::{Buffer, MutableBuffer};
use bytes::Bytes;
use std::collections::VecDeque;

/// Its bytes, which are taken one after the other.
pub(super) struct Left {
    /// None of them is empty.
    parts: VecDeque<Buffer>,
    bytes: usize,
}

impl Left {
    pub(super) fn new(parts: impl IntoIterator<Item = Bytes>) -> Self {
        let parts = parts.into_iter().filter(|part| !part.is_empty());
        let parts: VecDeque<Buffer> = parts.map(Buffer::from).collect();
        Self {
            bytes: parts.iter().map(Buffer::len).sum(),
            parts,
        }
    }

    /// Returns how many they are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes the next `length` bytes; `None` if there are fewer. They are copied only if no part
    /// has them all.
    pub(super) fn take(&mut self, length: usize) -> Option<Buffer> {
        self.bytes = self.bytes.checked_sub(length)?;
        if let Some(part) = self.parts.front()
            && part.len() >= length
        {
            let taken = part.slice_with_length(0, length);
            self.advance(length);
            return Some(taken);
        }
        let mut joined = MutableBuffer::new(length);
        while let Some(part) = self.parts.front()
            && joined.len() < length
        {
            let more = part.len().min(length - joined.len());
            joined.extend_from_slice(&part[..more]);
            // A part is let go of before the next one is copied.
            self.advance(more);
        }
        Some(joined.into())
    }

    /// Goes on in the first part.
    fn advance(&mut self, bytes: usize) {
        if let Some(part) = self.parts.front_mut() {
            part.advance(bytes);
            if part.is_empty() {
                self.parts.pop_front();
            }
        }
    }
}
