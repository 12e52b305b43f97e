//! Chooses the device, and loads CUDA's half of LibTorch if the device is a GPU.
//!
//! The binary links libtorch_cpu and libc10 alone, so that it starts anywhere. LibTorch looks for
//! its CUDA backend once, at the first question about CUDA: the library must be in the process
//! before that, so the device is started first.
use crate::error::{Error, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};
use superbatch_proto::v1::Reason;
use tch::{Cuda, Device, Kind, Tensor};

const LIBRARY: &str = "libtorch_cuda.so";
/// Exists if NVIDIA's driver is loaded.
const DRIVER: &str = "/dev/nvidiactl";

/// Opens `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// `DeviceUnavailable` if a CUDA device is asked for that is not there; `InvalidArgument` for
/// another word.
pub(super) fn open(choice: &str) -> Result<Device> {
    match choice {
        "cpu" => Ok(Device::Cpu),
        // Loading libtorch_cuda takes more than a second and 300 MB. A machine without a driver is
        // told apart by a file, so that a CPU worker does not pay for it.
        "auto" if !Path::new(DRIVER).exists() => Ok(Device::Cpu),
        "auto" => cuda(0).or_else(|error| {
            tracing::warn!(
                error = error.chain(),
                "there is an NVIDIA driver, but CUDA cannot be used: scoring on the CPU"
            );
            Ok(Device::Cpu)
        }),
        "cuda" => cuda(0),
        other => match other.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(index)) => cuda(index),
            _ => Err(Error::invalid(
                "device",
                format!("device '{other}' should be auto, cpu, cuda or cuda:N"),
            )),
        },
    }
}

/// Returns `cpu` or `cuda:N`.
pub(super) fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

fn cuda(index: usize) -> Result<Device> {
    let unavailable = |problem: String| {
        let message = format!(
            "device cuda:{index} is not available: {problem}. Set the device to 'cpu' to do without"
        );
        Error::new(Reason::DeviceUnavailable, message).with("device", format!("cuda:{index}"))
    };
    static LOADED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    LOADED
        .get_or_init(load)
        .clone()
        .map_err(|problem| unavailable(format!("{LIBRARY} cannot be loaded ({problem})")))?;
    if !tch::utils::has_cudart() {
        return Err(unavailable(
            "LibTorch was asked about CUDA before this device was started; start it first".into(),
        ));
    }
    if !Cuda::is_available() {
        return Err(unavailable(
            "LibTorch finds no GPU; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES".into(),
        ));
    }
    let count = Cuda::device_count();
    if i64::try_from(index).is_ok_and(|index| index >= count) {
        return Err(unavailable(format!(
            "this machine has {count} CUDA device(s), counted from 0"
        )));
    }
    let device = Device::Cuda(index);
    Tensor::f_ones([1], (Kind::Float, device))
        .and_then(|x| x.f_double_value(&[]))
        .map_err(|cause| unavailable("its first computation failed".into()).because(cause))?;
    Ok(device)
}

/// Loads the library for the life of the process, from beside libtorch_cpu or from the dynamic
/// linker's paths.
fn load() -> std::result::Result<(), String> {
    let path = beside_libtorch()
        .map(|folder| folder.join(LIBRARY))
        .filter(|path| path.exists());
    let path = path.unwrap_or_else(|| PathBuf::from(LIBRARY));
    // SAFETY: the initialisers of LibTorch's own library are run; they only register kernels with
    // libtorch_cpu.
    let library =
        unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|e| e.to_string())?;
    // libtorch_cpu now holds pointers to its kernels, so unloading would leave them dangling.
    std::mem::forget(library);
    Ok(())
}

/// Returns the folder of the libtorch_cpu in this process.
fn beside_libtorch() -> Option<PathBuf> {
    // The two libraries must be of the same build. The dynamic linker's search may find another
    // LibTorch than the one that this process runs with, so the folder is read from the process's
    // own memory map.
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps
        .lines()
        .find(|line| line.contains("/libtorch_cpu.so"))?;
    Path::new(line.get(line.find('/')?..)?)
        .parent()
        .map(Path::to_owned)
}
