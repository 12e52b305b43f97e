//! A CUDA device with its loaded kernels.
use super::{
    driver::Driver,
    error::{CudaError, Result},
    library::{CudaLibraries, missing, open},
    nvrtc::Nvrtc,
};
use std::{
    ffi::{CStr, c_int, c_void},
    ptr::null_mut,
};

/// Shared memory of a block: slabs of rows and columns, and each row's sums by four warps
/// (kernels.cu).
const STAGE_BYTES: usize = 2 * 128 * 64 * 2;
const SUMS_BYTES: usize = 4 * 128 * (8 + 4);

// Numbers of cuda.h.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const SHARED_BYTES_MOST: c_int = 97;
const FUNCTION_SHARED_BYTES: c_int = 8;

/// One of the kernels.
#[derive(Clone, Copy)]
pub(super) struct Kernel(pub *mut c_void);

struct Kernels {
    softplus_sums: Kernel,
    exponential_sums: Kernel,
    largest: Kernel,
    added: Kernel,
    split: Kernel,
}

/// A device's properties, found before anything runs on it.
struct FoundDevice {
    driver: Driver,
    handle: c_int,
    ordinal: u32,
    name: String,
    tile_bytes: usize,
    image: Vec<u8>,
}

/// A context of a device in which the kernels are loaded. Nothing else of the process runs in it,
/// and it ends with this value. A kernel that accesses wrong memory makes its whole context
/// unusable; LibTorch uses another context, so it may go on. (NVIDIA promises less: after such a
/// fault only a new process is certain to be able to use the device.)
pub(super) struct Device {
    driver: Driver,
    pub ordinal: u32,
    pub name: String,
    context: *mut c_void,
    kernels: Option<Kernels>,
    /// Shared memory of a block of the tiled kernels.
    pub tile_bytes: usize,
}

// SAFETY: handles of the driver may be used from any thread in which the context is current, and
// `call` makes it so.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

// SAFETY of all calls of the driver: every pointer is to a value of the header's type that outlives
// the call.
impl FoundDevice {
    fn new(libraries: &CudaLibraries, ordinal: u32) -> Result<Self> {
        let remedy = "install NVIDIA's driver, or select on the CPU";
        let library =
            open(&libraries.driver).map_err(|error| missing("the CUDA driver", &error, remedy))?;
        let driver = Driver::of(library)?;
        let (mut count, mut handle) = (0, 0);
        driver.check("cuInit", unsafe { (driver.init)(0) })?;
        driver.check("cuDeviceGetCount", unsafe {
            (driver.device_count)(&mut count)
        })?;
        if i64::from(ordinal) >= i64::from(count) {
            return Err(CudaError::NoDevice {
                ordinal,
                count: count as u32,
            });
        }
        driver.check("cuDeviceGet", unsafe {
            (driver.device_get)(&mut handle, ordinal as c_int)
        })?;
        let mut name = [0; 256];
        driver.check("cuDeviceGetName", unsafe {
            (driver.device_name)(name.as_mut_ptr(), 256, handle)
        })?;
        let bytes = name.map(|byte| byte as u8);
        let name = CStr::from_bytes_until_nul(&bytes)
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let attribute = |number| {
            let mut value = 0;
            let code = unsafe { (driver.device_attribute)(&mut value, number, handle) };
            driver
                .check("cuDeviceGetAttribute", code)
                .map(|()| value as u32)
        };
        let (major, minor) = (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?);
        if major < 8 {
            return Err(CudaError::TooOld { name, major, minor });
        }
        // Three stages hide the latency of copies from global memory best. Consumer GPUs have less
        // shared memory in a block; two stages fit there.
        let stages = if attribute(SHARED_BYTES_MOST)? as usize >= 3 * STAGE_BYTES + SUMS_BYTES {
            3
        } else {
            2
        };
        let image = Nvrtc::load(&libraries.nvrtc)?.kernels(10 * major + minor, stages)?;
        let tile_bytes = stages as usize * STAGE_BYTES + SUMS_BYTES;
        Ok(Self {
            driver,
            handle,
            ordinal,
            name,
            tile_bytes,
            image,
        })
    }

    /// Makes a context with the kernels in it.
    fn device(self) -> Result<Device> {
        let Self {
            driver,
            handle,
            ordinal,
            name,
            tile_bytes,
            image,
        } = self;
        let (mut context, mut popped) = (null_mut(), null_mut());
        driver.check("cuCtxCreate", unsafe {
            (driver.create_context)(&mut context, 0, handle)
        })?;
        // cuCtxCreate makes the new context current in this thread, where LibTorch expects its own.
        // So it is popped at once.
        let code = unsafe { (driver.pop_context)(&mut popped) };
        let device = Device {
            driver,
            ordinal,
            name,
            context,
            kernels: None,
            tile_bytes,
        };
        device.driver.check("cuCtxPopCurrent", code)?;
        device.loaded(&image)
    }
}

impl Device {
    /// Finds the device and compiles the kernels for it. What they compute is not checked yet. A
    /// device that is refused keeps nothing.
    pub(super) fn open(libraries: &CudaLibraries, ordinal: u32) -> Result<Self> {
        FoundDevice::new(libraries, ordinal)?.device()
    }

    fn loaded(mut self, image: &[u8]) -> Result<Self> {
        let mut module = null_mut();
        // The driver reads PTX as a C string; the zero at the end does not disturb machine code.
        let ended: Vec<u8> = image.iter().copied().chain([0]).collect();
        self.call("cuModuleLoadData", |driver| unsafe {
            (driver.module_load)(&mut module, ended.as_ptr().cast())
        })?;
        let function = |name: &'static CStr| {
            let mut function = null_mut();
            self.call("cuModuleGetFunction", |driver| unsafe {
                (driver.module_function)(&mut function, module, name.as_ptr())
            })?;
            Ok(Kernel(function))
        };
        let tiles = |name| {
            let kernel: Kernel = function(name)?;
            self.call("cuFuncSetAttribute", |driver| unsafe {
                (driver.function_attribute)(
                    kernel.0,
                    FUNCTION_SHARED_BYTES,
                    self.tile_bytes as c_int,
                )
            })?;
            Ok(kernel)
        };
        let kernels = Kernels {
            softplus_sums: tiles(c"softplus_sums")?,
            exponential_sums: tiles(c"exponential_sums")?,
            largest: tiles(c"largest_logits")?,
            added: function(c"added")?,
            split: function(c"split")?,
        };
        self.kernels = Some(kernels);
        Ok(self)
    }

    fn kernels(&self) -> &Kernels {
        self.kernels
            .as_ref()
            .expect("loaded when the device was opened")
    }

    /// Returns the kernel that adds a chunk's terms, under the softmax loss or the sigmoid loss.
    pub(super) fn sums(&self, softmax: bool) -> Kernel {
        if softmax {
            self.kernels().exponential_sums
        } else {
            self.kernels().softplus_sums
        }
    }

    /// Returns the kernel that keeps each row's largest logit.
    pub(super) fn largest(&self) -> Kernel {
        self.kernels().largest
    }

    pub(super) fn added(&self) -> Kernel {
        self.kernels().added
    }

    pub(super) fn split(&self) -> Kernel {
        self.kernels().split
    }

    /// Calls the driver with the device's context current, and leaves this thread's context as it
    /// was.
    pub(super) fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(&Driver) -> c_int,
    ) -> Result<()> {
        let (driver, mut ours) = (&self.driver, null_mut());
        driver.check("cuCtxPushCurrent", unsafe {
            (driver.push_context)(self.context)
        })?;
        let code = call(driver);
        let popped = unsafe { (driver.pop_context)(&mut ours) };
        driver.check(name, code)?;
        driver.check("cuCtxPopCurrent", popped)
    }

    pub(super) fn free_bytes(&self) -> Result<usize> {
        let (mut free, mut total) = (0, 0);
        self.call("cuMemGetInfo", |driver| unsafe {
            (driver.memory_info)(&mut free, &mut total)
        })?;
        Ok(free)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // An error here has no reader: whatever broke the context was reported by the call that
        // broke it.
        unsafe { (self.driver.destroy_context)(self.context) };
    }
}
