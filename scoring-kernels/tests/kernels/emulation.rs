//! A CUDA device for machines without one: the kernels' own source, compiled for the CPU behind the driver's functions.
//!
//! The backend is not told: it compiles the kernels by the real NVRTC, loads them into the emulated driver and launches them
//! there. See `tests/cuda_emulation`.
use std::{
    ffi::c_int,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};
use superbatch_kernels::{CudaDevice, CudaLibraries};

/// What the emulated driver does wrong (`Fault` of driver.cpp).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    NoDevice = 1,
    OldDevice,
    Memory,
    Launch,
    WrongSum,
    BadImage,
}

/// NVRTC where `pip install torch` puts it. `make test` names the Python, and then it must be there; else its absence is said.
pub fn nvrtc() -> Option<PathBuf> {
    let python = std::env::var_os("SUPERBATCH_PYTHON").map(PathBuf::from);
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv");
    let home = python.as_deref().and_then(|python| python.parent()?.parent()).unwrap_or(&here);
    let versions = std::fs::read_dir(home.join("lib")).into_iter().flatten().filter_map(Result::ok);
    let found = versions
        .map(|version| version.path().join("site-packages/nvidia/cu13/lib/libnvrtc.so.13"))
        .find(|path| path.exists());
    assert!(found.is_some() || python.is_none(), "no NVRTC below {}: is torch's CUDA half missing?", home.display());
    if found.is_none() {
        eprintln!("NOT TESTED: the CUDA kernels. There is no NVRTC below {}; run `make setup`.", home.display());
    }
    found
}

/// The emulated driver with slabs of `stages`, as a library of its own name.
fn build(name: &str, stages: u32) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}.so", std::process::id()));
    let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    command.args(["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas"]);
    command.arg(format!("-DSTAGES={stages}")).arg("-I").arg(here.join("src/cuda"));
    let status = command.arg(here.join("tests/cuda_emulation/driver.cpp")).arg("-o").arg(&library).status();
    assert!(status.expect("a C++ compiler").success(), "the emulation does not compile");
    library
}

fn libraries(driver: PathBuf) -> Option<CudaLibraries> {
    Some(CudaLibraries { driver, nvrtc: vec![nvrtc()?] })
}

/// A device that does everything right, with three or two slabs at a time.
pub fn device(stages: u32) -> Option<CudaDevice> {
    static DEVICES: [OnceLock<Option<CudaDevice>>; 2] = [const { OnceLock::new() }; 2];
    *DEVICES[stages as usize - 2].get_or_init(|| {
        let libraries = libraries(build(&format!("cuda{stages}"), stages))?;
        Some(CudaDevice::open(&libraries, 0).expect("a device that passes its check"))
    })
}

/// Libraries of a driver that does something wrong.
pub fn faulty(fault: Fault) -> Option<CudaLibraries> {
    let driver = build(&format!("cuda-{fault:?}"), 3);
    // SAFETY: our own library and its function. It is kept loaded, or it would forget.
    unsafe {
        let library = Box::leak(Box::new(libloading::Library::new(&driver).expect("a library")));
        let set: libloading::Symbol<'_, unsafe extern "C" fn(c_int) -> c_int> =
            library.get(b"emulate_fault\0").expect("its function");
        set(fault as c_int);
    }
    libraries(driver)
}
