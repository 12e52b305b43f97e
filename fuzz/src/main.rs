//! One target under libFuzzer: `scripts/fuzz.sh` builds and starts it.
//!
//! `FUZZ_TARGET` names the target.
#![no_main]
mod memory;
mod targets;

use std::{
    backtrace::Backtrace,
    panic::{self, AssertUnwindSafe},
    process::exit,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};
use targets::Target;

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

static TARGET: OnceLock<&Target> = OnceLock::new();
/// What the panics of this input said. Those of decoders are caught, and cost their image alone;
/// their traces are not made readable, which takes long.
static PANICS: Mutex<Vec<(String, Backtrace)>> = Mutex::new(Vec::new());

libfuzzer_sys::fuzz_target!(init: start(), |input: &[u8]| check(input));

fn panics() -> MutexGuard<'static, Vec<(String, Backtrace)>> {
    PANICS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start() {
    // The fuzzer's own hook ends the process also by a panic that is caught.
    panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::force_capture();
        panics().push((panic.to_string(), trace));
    }));
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let Some(target) = Target::named(&name) else {
        let all: Vec<&str> = targets::TARGETS.iter().map(|target| target.name).collect();
        eprintln!("FUZZ_TARGET is '{name}'; it is one of {}", all.join(", "));
        exit(2);
    };
    TARGET.get_or_init(|| target);
}

fn check(input: &[u8]) {
    let Some(target) = TARGET.get() else {
        return;
    };
    panics().clear();
    if panic::catch_unwind(AssertUnwindSafe(|| target.check(input))).is_err() {
        for (said, trace) in panics().iter() {
            eprintln!("FOUND by {}: {said}\n{trace}", target.name);
        }
        std::process::abort();
    }
}
