//! Runs the Python scripts that write what tests compare with.
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Runs a script, named from the folder of this crate, with the folder to write to and further
/// arguments. Python is part of the development set-up, so a test without it fails.
pub(crate) fn run(script: &str, to: &Path, arguments: &[&str]) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("SUPERBATCH_PYTHON")
        .map_or(here.join("../.venv/bin/python"), PathBuf::from);
    let output = Command::new(&python)
        .arg(here.join(script))
        .arg(to)
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap_or_else(|e| panic!("cannot run {} (make setup): {e}", python.display()));
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
