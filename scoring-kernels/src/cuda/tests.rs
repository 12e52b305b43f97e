//! The kernels compile for every kind of device, and fit its registers. What they compute is tested
//! on an emulated device.
use super::{library::CudaLibraries, nvrtc::Nvrtc};
use std::path::{Path, PathBuf};

/// NVRTC where `pip install torch` puts it. `make test` names the Python, and then it must be
/// there; else its absence is said.
fn nvrtc() -> Option<Nvrtc> {
    let python = std::env::var_os("SUPERBATCH_PYTHON").map(PathBuf::from);
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv");
    let home = python
        .as_deref()
        .and_then(|python| python.parent()?.parent())
        .unwrap_or(&here);
    let versions = std::fs::read_dir(home.join("lib"))
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    let paths = versions.map(|version| {
        version
            .path()
            .join("site-packages/nvidia/cu13/lib/libnvrtc.so.13")
    });
    let paths: Vec<_> = paths
        .filter(|path| path.exists())
        .chain(CudaLibraries::default().nvrtc)
        .collect();
    let found = Nvrtc::load(&paths).ok();
    assert!(
        found.is_some() || python.is_none(),
        "no NVRTC below {}: is torch's CUDA half missing?",
        home.display()
    );
    if found.is_none() {
        eprintln!(
            "NOT TESTED: whether the CUDA kernels compile. There is no NVRTC below {}.",
            home.display()
        );
    }
    found
}

#[test]
fn the_kernels_compile_for_every_architecture_and_keep_everything_in_registers() {
    let Some(nvrtc) = nvrtc() else { return };
    let known: Vec<i32> = nvrtc
        .architectures()
        .into_iter()
        .filter(|architecture| *architecture >= 80)
        .collect();
    assert!(
        [80, 90, 100, 120]
            .iter()
            .all(|wanted| known.contains(wanted)),
        "{known:?}"
    );
    for (architecture, stages) in known
        .iter()
        .flat_map(|known| [(format!("sm_{known}"), 3), (format!("sm_{known}"), 2)])
    {
        let (image, log) = nvrtc
            .compile(&architecture, stages)
            .expect("kernels that compile");
        assert!(
            image.starts_with(b"\x7fELF"),
            "{architecture} has no machine code"
        );
        let kernels = log.matches("Compiling entry function").count();
        assert_eq!(kernels, 5, "{architecture}: {log}");
        let nothing = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
        // From the first number on, for "40 bytes stack frame" ends like it.
        let sizes = log
            .lines()
            .map(|line| line.trim_start_matches(|letter: char| !letter.is_ascii_digit()));
        let in_registers = sizes.filter(|sizes| sizes.trim_end() == nothing).count();
        assert_eq!(in_registers, kernels, "{architecture} spills: {log}");
    }
}

#[test]
fn devices_newer_than_the_compiler_get_code_that_their_driver_translates() {
    let Some(nvrtc) = nvrtc() else { return };
    let image = nvrtc
        .kernels(999, 3)
        .expect("PTX of the newest that is known");
    let text = String::from_utf8_lossy(&image);
    assert!(
        text.contains(".version")
            && text.contains(".entry softplus_sums")
            && text.contains("mma.sync")
    );
    assert!(nvrtc.kernels(20, 3).is_err());
}

#[test]
fn a_source_that_does_not_compile_is_reported_with_the_compilers_words() {
    let Some(nvrtc) = nvrtc() else { return };
    let refused = nvrtc
        .compile("sm_1", 3)
        .expect_err("no such architecture")
        .to_string();
    assert!(refused.contains("sm_1"), "{refused}");
    // Asynchronous copies came with 8.0.
    assert!(nvrtc.compile("sm_75", 3).is_err());
}
