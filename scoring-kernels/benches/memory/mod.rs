//! Counts what this process holds and held at most: the system's figures hide what its allocator
//! kept from before.
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn took(bytes: usize) {
    PEAK.fetch_max(HELD.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: all work is the system allocator's; the default `realloc` goes through these.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(place, layout) }
    }
}

/// Sets the peak to what is held now, and returns that, in MiB.
pub(crate) fn reset_peak() -> f64 {
    PEAK.store(HELD.load(Relaxed), Relaxed);
    peak()
}

/// The most that was held at once since then, in MiB.
pub(crate) fn peak() -> f64 {
    PEAK.load(Relaxed) as f64 / f64::from(1 << 20)
}
