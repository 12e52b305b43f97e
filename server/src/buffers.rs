//! Large buffers that are used again. The kernel clears each page of a new one when it is first
//! touched, which costs more than filling it; and the C library gives large buffers back as soon as
//! they are freed.
use bytes::Bytes;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

/// Smaller buffers are left to the allocator, which keeps those.
const LEAST_BYTES: usize = 1 << 20;
/// New buffers have up to a sixteenth more than is asked for, so that one that is needed next for
/// nearly as much can be used again.
const ROUNDING: usize = 16;
/// At most this part of what is asked for may lie unused beside it: budgets count what is used.
const UNUSED: usize = 8;

/// Buffers that were dropped and wait to be used again, within a number of bytes. Clones share
/// them.
#[derive(Debug, Clone)]
pub(crate) struct Buffers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bytes_max: usize,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    bytes: usize,
    /// The one that was dropped last is the last.
    buffers: VecDeque<Vec<u8>>,
}

/// Bytes that go back to where they came from when they are dropped.
#[derive(Debug)]
pub(crate) struct Recycled {
    /// As long as its memory; what was in it before is still there.
    memory: Vec<u8>,
    length: usize,
    home: Buffers,
}

impl Buffers {
    /// Keeps up to `bytes_max` of dropped buffers; 0 keeps none.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self(Arc::new(Inner {
            bytes_max,
            free: Mutex::default(),
        }))
    }

    /// Returns `length` bytes, of any values.
    pub(crate) fn take(&self, length: usize) -> Recycled {
        let memory = self.kept(length).unwrap_or_else(|| {
            let rounded = length.next_multiple_of((length / ROUNDING).max(1));
            let rounds = length >= LEAST_BYTES && self.0.bytes_max > 0;
            vec![0; if rounds { rounded } else { length }]
        });
        let home = self.clone();
        Recycled {
            memory,
            length,
            home,
        }
    }

    /// Returns the bytes that wait to be used again.
    pub(crate) fn bytes(&self) -> usize {
        self.0.free.lock().expect("no panic while held").bytes
    }

    fn kept(&self, length: usize) -> Option<Vec<u8>> {
        if length < LEAST_BYTES {
            return None;
        }
        let mut free = self.0.free.lock().expect("no panic while held");
        let sizes = free.buffers.iter().map(Vec::len).enumerate();
        let fits = |(_, size): &(usize, usize)| (length..=length + length / UNUSED).contains(size);
        let (smallest, _) = sizes.filter(fits).min_by_key(|(_, size)| *size)?;
        let memory = free.buffers.remove(smallest)?;
        free.bytes -= memory.len();
        Some(memory)
    }

    fn give_back(&self, memory: Vec<u8>) {
        if memory.len() < LEAST_BYTES || memory.len() > self.0.bytes_max {
            return;
        }
        let mut free = self.0.free.lock().expect("no panic while held");
        free.bytes += memory.len();
        free.buffers.push_back(memory);
        // The oldest are of a size that is not asked for any more.
        let mut dropped = Vec::new();
        while free.bytes > self.0.bytes_max {
            let Some(oldest) = free.buffers.pop_front() else {
                break;
            };
            free.bytes -= oldest.len();
            dropped.push(oldest);
        }
        // To give memory back to the kernel takes long, and others wait for the lock.
        drop(free);
        drop(dropped);
    }
}

impl Recycled {
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.length]
    }

    /// Returns the bytes, which go back when the last clone of them is dropped.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Recycled {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.length]
    }
}

impl Drop for Recycled {
    fn drop(&mut self) {
        self.home.give_back(std::mem::take(&mut self.memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn address(buffer: &Recycled) -> *const u8 {
        buffer.as_ref().as_ptr()
    }

    #[test]
    fn a_dropped_buffer_is_used_for_what_needs_about_as_much() {
        let buffers = Buffers::new(64 * MIB);
        let first = buffers.take(8 * MIB);
        let place = address(&first);
        let bytes = first.into_bytes();
        let part = bytes.slice(MIB..2 * MIB);
        drop(bytes);
        assert_eq!(buffers.bytes(), 0, "a slice is still there");
        drop(part);
        assert_eq!(buffers.bytes(), 8 * MIB);
        assert_ne!(address(&buffers.take(9 * MIB)), place, "it is too small");
        assert_ne!(address(&buffers.take(MIB)), place, "it is too large");
        let length = 15 * MIB / 2;
        let mut again = buffers.take(length);
        again.as_mut().fill(1);
        assert_eq!((address(&again), again.as_ref().len()), (place, length));
    }

    #[test]
    fn no_more_is_kept_than_its_bound() {
        let buffers = Buffers::new(8 * MIB);
        let [a, b, c] = [4, 3, 4].map(|mib| buffers.take(mib * MIB));
        let (newest, large) = (address(&c), buffers.take(9 * MIB));
        drop((a, b, c, large));
        assert!(buffers.bytes() <= 8 * MIB, "{}", buffers.bytes());
        assert_eq!(address(&buffers.take(4 * MIB)), newest);
        let none = Buffers::new(0);
        drop(none.take(2 * MIB));
        assert_eq!(none.bytes(), 0);
        assert_eq!(none.take(2 * MIB).memory.len(), 2 * MIB);
        assert!(buffers.take(0).as_ref().is_empty());
    }
}
