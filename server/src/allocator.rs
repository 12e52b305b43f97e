//! Large buffers: pages of which size the system gives them, and what becomes of them when they are
//! freed.
use std::{
    alloc::{GlobalAlloc, Layout, System},
    ops::Range,
};

/// The size of a huge page, on x86-64 and on most others.
const HUGE_PAGE: usize = 2 << 20;
/// Buffers of this many bytes and more are asked to lie in huge pages. NumPy draws the line there,
/// too.
const HUGE_MIN: usize = 4 << 20;

/// Buffers of this many bytes and more come from the kernel and go back to it. It is the value with
/// which glibc starts.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: std::ffi::c_int = 128 << 10;

/// The system's allocator, with huge pages for large buffers: the allocator of the `superbatch`
/// binary.
///
/// Row groups, embeddings and weights are copied into buffers of megabytes. Memory that is new to
/// the process costs a fault for each page of 4 KiB: on a virtual machine the faults of a gigabyte
/// were seen to take 0.6 to 1.1 seconds, and the copy itself 0.17. Huge pages take 0.13 seconds, if
/// the system has some free; the first ones may have to be made of memory that holds cached files,
/// which took up to 1.7. glibc keeps most of what is freed, so that the price is paid while a
/// process grows, and for buffers above 32 MiB. Copies into huge pages are a sixth faster, too.
/// A system that has none, or is told to give none (`transparent_hugepage/enabled` is `never`),
/// passes over the advice.
#[derive(Debug, Clone, Copy, Default)]
pub struct HugePages;

// SAFETY: all memory is the system allocator's, which keeps the contract; advice about its pages
// changes neither contents nor addresses.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duties are the same.
        let start = unsafe { System.alloc(layout) };
        prefer_huge_pages(start, layout.size());
        start
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duties are the same.
        let start = unsafe { System.alloc_zeroed(layout) };
        prefer_huge_pages(start, layout.size());
        start
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's duties are the same.
        let moved = unsafe { System.realloc(start, layout, size) };
        if size > layout.size() {
            prefer_huge_pages(moved, size);
        }
        moved
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's duties are the same.
        unsafe { System.dealloc(start, layout) };
    }
}

/// Asks for huge pages in a new buffer of so many bytes. None of its pages that are there already
/// changes.
fn prefer_huge_pages(start: *mut u8, bytes: usize) {
    if bytes < HUGE_MIN || start.is_null() {
        return;
    }
    let whole = huge_pages(start.addr(), bytes);
    #[cfg(target_os = "linux")]
    // SAFETY: the range lies in the buffer, and the call changes no byte of it. It is advice: it
    // may fail, and then the pages are small.
    unsafe {
        let first = start.with_addr(whole.start).cast::<libc::c_void>();
        libc::madvise(first, whole.len(), libc::MADV_HUGEPAGE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = whole;
}

/// Returns the huge pages that lie in a buffer as a whole. What is outside of them belongs to other
/// buffers, too.
fn huge_pages(start: usize, bytes: usize) -> Range<usize> {
    let end = start + bytes;
    let (first, last) = (start.next_multiple_of(HUGE_PAGE), end - end % HUGE_PAGE);
    first..last.max(first)
}

/// Has every large buffer given back to the system as soon as it is freed. For a coordinator that
/// does not score.
///
/// By default glibc raises its threshold to the size of each large buffer that is freed, up to 32
/// MiB, and keeps what is freed below it. A coordinator receives embeddings in messages of some
/// hundred KiB and copies them to their places, so half as much memory again stayed with the
/// process. A process that scores is left alone: LibTorch frees many MiB with every micro-batch,
/// and would get them back from the kernel page by page.
///
/// `MALLOC_MMAP_THRESHOLD_` or `GLIBC_TUNABLES` among the variables of `environment` decide if they
/// are there. Other C libraries are left as they are.
pub fn give_back_large_buffers(environment: impl IntoIterator<Item = (String, String)>) {
    let decides = |name: &str| ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"].contains(&name);
    let is_decided = environment.into_iter().any(|(name, _)| decides(&name));
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if !is_decided {
        // SAFETY: mallopt takes two numbers and may be called at any time; a value that it does not
        // take changes nothing.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let _ = is_decided;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_lie_in_their_buffer() {
        let at = |start: usize, bytes: usize| huge_pages(start, bytes);
        assert_eq!(at(HUGE_PAGE, 2 * HUGE_PAGE), HUGE_PAGE..3 * HUGE_PAGE);
        assert_eq!(
            at(HUGE_PAGE + 16, 2 * HUGE_PAGE),
            2 * HUGE_PAGE..3 * HUGE_PAGE
        );
        assert_eq!(at(HUGE_PAGE - 16, 2 * HUGE_PAGE), HUGE_PAGE..2 * HUGE_PAGE);
        assert!(at(HUGE_PAGE + 16, HUGE_PAGE).is_empty());
    }

    /// The flags of the mapping in which an address lies.
    #[cfg(target_os = "linux")]
    fn flags_at(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lies_here = false;
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap_or_default();
            let ends = first.split_once('-');
            let ends = ends.map(|(a, b)| [a, b].map(|end| usize::from_str_radix(end, 16)));
            if let Some([Ok(start), Ok(end)]) = ends {
                lies_here = (start..end).contains(&address);
            } else if let (true, Some(flags)) = (lies_here, line.strip_prefix("VmFlags:")) {
                return flags.to_owned();
            }
        }
        panic!("no mapping has {address:#x}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn large_buffers_are_asked_to_lie_in_huge_pages() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            eprintln!("skipped: this system has no huge pages to give");
            return;
        }
        let is_huge = |start: *mut u8| flags_at(start.addr() + 16 * HUGE_PAGE).contains(" hg");
        // Above 32 MiB glibc makes a mapping for each buffer.
        let layout = Layout::array::<u8>(64 << 20).unwrap();
        // SAFETY: the layouts are not empty; each buffer is freed once, by its own layout.
        unsafe {
            let plain = System.alloc(layout);
            let [new, zeroed] = [HugePages.alloc(layout), HugePages.alloc_zeroed(layout)];
            let small = HugePages.alloc(Layout::array::<u8>(1 << 20).unwrap());
            let grown = HugePages.realloc(small, Layout::array::<u8>(1 << 20).unwrap(), 64 << 20);
            let found = [plain, new, zeroed, grown].map(is_huge);
            assert_eq!(*zeroed.add(40 << 20), 0);
            for start in [new, zeroed, grown] {
                HugePages.dealloc(start, layout);
            }
            System.dealloc(plain, layout);
            assert_eq!(found, [false, true, true, true]);
        }
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod glibc_tests {
    use super::*;

    /// Bytes that the allocator has from the kernel one buffer at a time.
    fn mapped() -> usize {
        // SAFETY: it returns counts by value.
        unsafe { libc::mallinfo2() }.hblkhd
    }

    #[test]
    fn large_buffers_are_mapped_even_after_a_larger_one_was_freed() {
        give_back_large_buffers([]);
        // Without the call, this raises the threshold to 16 MiB.
        drop(std::hint::black_box(Vec::<u8>::with_capacity(16 << 20)));
        let before = mapped();
        let buffers: Vec<Vec<u8>> = (0..512).map(|_| Vec::with_capacity(1 << 20)).collect();
        let held = mapped().saturating_sub(before);
        // Other tests of this process free buffers meanwhile, so not every byte is counted here.
        assert!(held > 256 << 20, "{held}");
        drop(std::hint::black_box(buffers));
    }
}
