//! A text in several parts, read as one.
use bytes::Bytes;
use std::{
    collections::VecDeque,
    io::{self, Read},
};

/// A text in parts, each of which is freed once it is read: what is parsed takes its place, so that
/// memory never holds both whole.
pub(super) struct Parts(VecDeque<Bytes>);

impl Parts {
    pub(super) fn new(parts: Vec<Bytes>) -> Self {
        Self(parts.into())
    }
}

impl Read for Parts {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.0.front().is_some_and(Bytes::is_empty) {
            self.0.pop_front();
        }
        let Some(part) = self.0.front_mut() else {
            return Ok(0);
        };
        let read = part.len().min(into.len());
        into[..read].copy_from_slice(&part.split_to(read));
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    #[test]
    fn a_text_in_parts_is_read_over_their_borders() {
        let parts = ["", "[12,", "", "3", "4]", ""].map(Bytes::from);
        let parts = Parts::new(parts.into());
        let read: Vec<u32> = serde_json::from_reader(BufReader::with_capacity(2, parts)).unwrap();
        assert_eq!(read, [12, 34]);
    }
}
