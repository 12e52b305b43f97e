//! Large buffers: pages of which size the system gives them, and what becomes of them when they are
//! freed.
use std::alloc::{GlobalAlloc, Layout, System};
#[cfg(target_os = "linux")]
use std::{ops::Range, sync::OnceLock};

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
    #[cfg(target_os = "linux")]
    // SAFETY: the call changes no byte, neither of the buffer nor of what lies beside it in its
    // first and last page. It is advice: it may fail, and then the pages are small.
    unsafe {
        let pages = pages(start.addr(), bytes, page_bytes());
        let first = start.with_addr(pages.start).cast::<libc::c_void>();
        libc::madvise(first, pages.len(), libc::MADV_HUGEPAGE);
    }
}

/// Returns the pages on which a buffer lies, whole. A mapping that is advised in part is cut into
/// several, and the system extends and moves a buffer without a copy only within one.
#[cfg(target_os = "linux")]
fn pages(start: usize, bytes: usize, page: usize) -> Range<usize> {
    start - start % page..(start + bytes).next_multiple_of(page)
}

/// The size of the system's small pages.
#[cfg(target_os = "linux")]
fn page_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    // SAFETY: it takes a number, and returns one.
    *BYTES.get_or_init(|| match unsafe { libc::sysconf(libc::_SC_PAGESIZE) } {
        bytes @ 1.. => bytes as usize,
        _ => 4096,
    })
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

#[cfg(target_os = "linux")]
#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 64 << 20;

    #[test]
    fn a_buffer_is_advised_with_the_whole_of_its_pages() {
        assert_eq!(pages(8192, 8192, 4096), 8192..16384);
        assert_eq!(pages(8192 + 16, 8192, 4096), 8192..20480);
        assert_eq!(pages(8192 - 16, 8192, 4096), 4096..16384);
        assert!(page_bytes().is_power_of_two());
    }

    /// The mapping in which an address lies, and its flags; `None` where the system tells none.
    fn mapping_at(address: usize) -> Option<(Range<usize>, String)> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let mut here = None;
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap_or_default();
            let ends = first.split_once('-');
            let ends = ends.map(|(a, b)| [a, b].map(|end| usize::from_str_radix(end, 16)));
            if let Some([Ok(start), Ok(end)]) = ends {
                here = (start..end).contains(&address).then_some(start..end);
            } else if let (Some(here), Some(flags)) = (&here, line.strip_prefix("VmFlags:")) {
                return Some((here.clone(), flags.to_owned()));
            }
        }
        None
    }

    /// Whether one mapping holds a buffer whole, and whether it is asked to have huge pages.
    fn found(start: *mut u8, bytes: usize) -> Option<[bool; 2]> {
        let (mapping, flags) = mapping_at(start.addr() + bytes / 2)?;
        let is_one = mapping.start <= start.addr() && start.addr() + bytes <= mapping.end;
        Some([is_one, flags.contains(" hg")])
    }

    #[test]
    fn large_buffers_lie_in_one_mapping_that_is_asked_to_have_huge_pages() {
        let here = std::ptr::from_ref(&ROOM).addr();
        let huge = std::path::Path::new("/sys/kernel/mm/transparent_hugepage");
        if !huge.exists() || mapping_at(here).is_none() {
            eprintln!("skipped: this system has no huge pages, or does not tell where they are");
            return;
        }
        // Above 32 MiB glibc makes a mapping for each buffer.
        let of = |bytes| Layout::array::<u8>(bytes).unwrap();
        // SAFETY: the layouts are not empty; each buffer is freed once, by its own layout, and
        // written and read within.
        unsafe {
            let [new, zeroed] = [HugePages.alloc(of(ROOM)), HugePages.alloc_zeroed(of(ROOM))];
            let small = HugePages.alloc(of(1 << 20));
            let grown = HugePages.realloc(small, of(1 << 20), ROOM);
            let before = [new, zeroed, grown].map(|start| found(start, ROOM));
            assert_eq!(*zeroed.add(40 << 20), 0);
            // Its pages move: they lie in one mapping.
            *new.add(ROOM - 1) = 7;
            let doubled = HugePages.realloc(new, of(ROOM), 2 * ROOM);
            let after = found(doubled, 2 * ROOM);
            assert_eq!(*doubled.add(ROOM - 1), 7);
            HugePages.dealloc(doubled, of(2 * ROOM));
            for start in [zeroed, grown] {
                HugePages.dealloc(start, of(ROOM));
            }
            assert_eq!((before, after), ([Some([true; 2]); 3], Some([true; 2])));
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
