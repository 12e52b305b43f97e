//! What is fuzzed: by name, a function of bytes that panics if a promise is broken, and the memory
//! that it may hold. `main.rs` runs one of them under the fuzzer, and `tests/tests/fuzz.rs` all of
//! them on the inputs that are kept.
use crate::memory::most_held;
use superbatch_client::fuzzing as client;
use superbatch_images::{Error, ImageLimits, check, decode, decode_at_least, thumbnail};
use superbatch_server::fuzzing as server;

pub(crate) struct Target {
    pub(crate) name: &'static str,
    run: fn(&[u8]),
    /// Memory for an input of any size, in MiB, beside `OF_BYTE` for each of its bytes.
    mebibytes: usize,
}

/// Bytes of memory for each byte of an input.
const OF_BYTE: usize = 4096;

/// For what reads a few records at a time.
const SMALL: usize = 64;
/// For what may be unpacked to many times its size.
const LARGE: usize = 1024;

pub(crate) static TARGETS: [Target; 17] = [
    target("tar", server::tar, SMALL),
    target("parquet", server::parquet, LARGE),
    target("lists", server::lists, LARGE),
    target("uri_pattern", server::uri_pattern, LARGE),
    target("predicate", server::predicate, SMALL),
    target("safetensors", server::safetensors, SMALL),
    target("parts", server::parts, SMALL),
    target("rows", server::rows, SMALL),
    target("receipt", server::receipt, LARGE),
    target("pack", server::pack, LARGE),
    target("facts", server::facts, SMALL),
    target("config", server::config, SMALL),
    target("tokens", server::tokens, SMALL),
    target("requests", server::requests, SMALL),
    target("message", server::message, SMALL),
    target("arrow_ipc", arrow_ipc, SMALL),
    target("image", image, SMALL),
];

const fn target(name: &'static str, run: fn(&[u8]), mebibytes: usize) -> Target {
    Target {
        name,
        run,
        mebibytes,
    }
}

impl Target {
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// # Panics
    /// If a promise is broken.
    pub(crate) fn check(&self, input: &[u8]) {
        let allowed = (self.mebibytes << 20) + input.len() * OF_BYTE;
        let held = most_held(allowed, || (self.run)(input));
        assert!(
            held <= allowed,
            "{}: {} bytes took {} MiB of memory, and {} are allowed",
            self.name,
            input.len(),
            held >> 20,
            allowed >> 20
        );
    }
}

/// After a byte that says which: a coordinator's batch, or a worker's rows beside it.
fn arrow_ipc(input: &[u8]) {
    match input.split_first() {
        Some((0, stream)) => client::batch(stream),
        Some((_, streams)) => client::rows(streams),
        None => {}
    }
}

/// An image file, of which only few pixels are allowed.
fn image(input: &[u8]) {
    let limits = ImageLimits {
        pixels_max: 1 << 18,
        bytes_max: 1 << 16,
    };
    let pixels = |(width, height): (u32, u32)| u64::from(width) * u64::from(height);
    let decoded = decode(input, &limits);
    let is_checked = check(input, &limits).is_ok();
    assert_eq!(is_checked, decoded.is_ok(), "a check finds something else");
    match decoded {
        Ok(image) => {
            assert!(pixels(image.dimensions()) <= limits.pixels_max);
            // As many pixels as it says, and the same again.
            let again = decode(input, &limits).expect("it was decoded just now");
            assert!(again == image, "decoding depends on more than the file");
        }
        Err(Error::TooLarge(_) | Error::Undecodable(_)) => {}
    }
    if let Ok(half) = decode_at_least(input, &limits, 4) {
        assert!(pixels(half.dimensions()) <= limits.pixels_max);
    }
    if let Ok(small) = thumbnail(input, &limits, 32) {
        let shown = decode(&small, &limits).expect("what was encoded can be decoded");
        assert!(shown.width().max(shown.height()) <= 32);
    }
}
