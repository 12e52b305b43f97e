//! Counts the memory that Rust code holds: an input which takes too much is told from all others,
//! and does not take that of the machine.
use std::{
    alloc::{GlobalAlloc, Layout, System},
    backtrace::Backtrace,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// More than this is refused, and the process ends.
const HELD_MAX: usize = 6 << 30;

/// The system's allocator, with a count of what is held.
pub(crate) struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Who takes memory beyond this is told, once.
static TELL_BEYOND: AtomicUsize = AtomicUsize::new(usize::MAX);

fn add(bytes: usize) -> bool {
    let held = HELD.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(held, Relaxed);
    // Before the trace is made, which takes memory itself.
    if held > TELL_BEYOND.load(Relaxed) && held > TELL_BEYOND.swap(usize::MAX, Relaxed) {
        eprintln!(
            "FOUND {held} bytes held after {bytes} were taken\n{}",
            Backtrace::force_capture()
        );
    }
    held <= HELD_MAX
}

// SAFETY: all memory is the system allocator's, by the layouts that callers give.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !add(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !add(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller's.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !add(size) {
            return std::ptr::null_mut();
        }
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller's.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// Runs `work`, and returns the most bytes that were held during it beyond those before it. Tells
/// who took more than `allowed`.
pub(crate) fn most_held(allowed: usize, work: impl FnOnce()) -> usize {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    TELL_BEYOND.store(before.saturating_add(allowed), Relaxed);
    work();
    TELL_BEYOND.store(usize::MAX, Relaxed);
    PEAK.load(Relaxed).saturating_sub(before)
}
