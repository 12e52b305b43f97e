//! A CUDA device for machines without one: the kernels' own source, compiled for the CPU behind the
//! driver's functions.
//!
//! The backend is not told: it compiles the kernels by the real NVRTC, loads them into the emulated
//! driver and launches them there. See `tests/cuda_emulation`.
use crate::support::named_device;
use libloading::{Library, Symbol};
use std::{
    ffi::c_int,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};
use superbatch_kernels::{CudaDevice, CudaLibraries};

/// What the emulated driver does wrong (`Fault` of driver.cpp).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    NoDevice = 1,
    OldDevice,
    Memory,
    Launch,
    WrongSum,
    BadImage,
    Unavailable,
}

/// NVRTC where `pip install torch` puts it. `make test` names the Python, and then it must be
/// there; else its absence is said. If there is a GPU (`named_device`) the tests run on it, and
/// the emulation, which needs a C++ compiler, is left out.
fn nvrtc() -> Option<PathBuf> {
    if named_device().is_some() {
        eprintln!(
            "NOT TESTED: the emulated CUDA device. The tests that need nothing of it run on the \
            real one."
        );
        return None;
    }
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
    let found = versions
        .map(|version| {
            version
                .path()
                .join("site-packages/nvidia/cu13/lib/libnvrtc.so.13")
        })
        .find(|path| path.exists());
    assert!(
        found.is_some() || python.is_none(),
        "no NVRTC below {}: is torch's CUDA half missing?",
        home.display()
    );
    if found.is_none() {
        eprintln!(
            "NOT TESTED: the CUDA kernels. There is no NVRTC below {}; run `make setup`.",
            home.display()
        );
    }
    found
}

/// The emulated driver with two or three slabs in shared memory, compiled once.
fn driver(stages: u32) -> &'static Path {
    static DRIVERS: [OnceLock<PathBuf>; 2] = [const { OnceLock::new() }; 2];
    DRIVERS[stages as usize - 2].get_or_init(|| {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let library = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("cuda{stages}-{}.so", std::process::id()));
        let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
        command.args([
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-Wno-unknown-pragmas",
        ]);
        command
            .arg(format!("-DSTAGES={stages}"))
            .arg("-I")
            .arg(here.join("src/cuda"));
        let status = command
            .arg(here.join("tests/cuda_emulation/driver.cpp"))
            .arg("-o")
            .arg(&library)
            .status();
        assert!(
            status.expect("a C++ compiler").success(),
            "the emulation does not compile"
        );
        library
    })
}

/// A device that does everything right.
pub(crate) fn device(stages: u32) -> Option<CudaDevice> {
    let nvrtc = vec![nvrtc()?];
    let libraries = CudaLibraries {
        driver: driver(stages).to_owned(),
        nvrtc,
    };
    Some(CudaDevice::open(&libraries, 0).expect("a device that passes its check"))
}

/// A driver of its own, with memory and faults that no other test sees.
pub(crate) struct Alone {
    pub libraries: CudaLibraries,
    library: Library,
}

impl Alone {
    pub(crate) fn new(name: &str) -> Option<Self> {
        let nvrtc = vec![nvrtc()?];
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("cuda-{name}-{}.so", std::process::id()));
        std::fs::copy(driver(3), &path).expect("room for a copy");
        // SAFETY: our own library; it is kept loaded with this, or it would forget.
        let library = unsafe { Library::new(&path) }.expect("a library");
        Some(Self {
            libraries: CudaLibraries {
                driver: path,
                nvrtc,
            },
            library,
        })
    }

    pub(crate) fn with(fault: Fault) -> Option<Self> {
        let alone = Self::new(&format!("{fault:?}"))?;
        // SAFETY: the function's type in driver.cpp.
        unsafe {
            let set: Symbol<'_, unsafe extern "C" fn(c_int) -> c_int> =
                alone.library.get(b"emulate_fault\0").expect("its function");
            set(fault as c_int);
        }
        Some(alone)
    }

    /// Bytes taken now, the most since this was asked last, and contexts that are current, and that
    /// there are.
    pub(crate) fn used(&self) -> (usize, usize, [c_int; 2]) {
        let (mut now, mut most, mut current, mut alive) = (0, 0, 0, 0);
        // SAFETY: the function's type in driver.cpp.
        unsafe {
            let used: Symbol<
                '_,
                unsafe extern "C" fn(*mut usize, *mut usize, *mut c_int, *mut c_int) -> c_int,
            > = self.library.get(b"emulated_use\0").expect("its function");
            used(&mut now, &mut most, &mut current, &mut alive);
        }
        (now, most, [current, alive])
    }
}
