//! What the C library's allocator does with large buffers that are freed.

/// Buffers of this many bytes and more come from the kernel and go back to it. It is the value with
/// which glibc starts.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: std::ffi::c_int = 128 << 10;

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

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
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
