//! The CUDA driver: a device, its memory, and kernels that run on it.
use super::{
    error::{CudaError, Result},
    library::{CudaLibraries, functions, missing, open},
    nvrtc::Nvrtc,
};
use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    marker::PhantomData,
    ptr::{null, null_mut},
};

/// Threads of a block, of every kernel.
const THREADS: usize = 256;
/// Shared memory of a block: slabs of rows and columns, and each row's sums by four warps (kernels.cu).
const STAGE_BYTES: usize = 2 * 128 * 64 * 2;
const SUMS_BYTES: usize = 4 * 128 * (8 + 4);

// Numbers of cuda.h.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const SHARED_BYTES_MOST: c_int = 97;
const FUNCTION_SHARED_BYTES: c_int = 8;
const STREAM_NON_BLOCKING: c_uint = 1;
const OUT_OF_MEMORY: c_int = 2;
const HOST: c_uint = 1;
const DEVICE: c_uint = 2;

functions! {
    Driver("the CUDA driver", "update NVIDIA's driver to CUDA 12 or later") {
        init = b"cuInit\0"(c_uint);
        error_name = b"cuGetErrorName\0"(c_int, *mut *const c_char);
        device_count = b"cuDeviceGetCount\0"(*mut c_int);
        device_get = b"cuDeviceGet\0"(*mut c_int, c_int);
        device_name = b"cuDeviceGetName\0"(*mut c_char, c_int, c_int);
        device_attribute = b"cuDeviceGetAttribute\0"(*mut c_int, c_int, c_int);
        primary_context = b"cuDevicePrimaryCtxRetain\0"(*mut *mut c_void, c_int);
        push_context = b"cuCtxPushCurrent_v2\0"(*mut c_void);
        pop_context = b"cuCtxPopCurrent_v2\0"(*mut *mut c_void);
        module_load = b"cuModuleLoadData\0"(*mut *mut c_void, *const c_void);
        module_function = b"cuModuleGetFunction\0"(*mut *mut c_void, *mut c_void, *const c_char);
        function_attribute = b"cuFuncSetAttribute\0"(*mut c_void, c_int, c_int);
        memory_info = b"cuMemGetInfo_v2\0"(*mut usize, *mut usize);
        allocate = b"cuMemAlloc_v2\0"(*mut u64, usize);
        free = b"cuMemFree_v2\0"(u64);
        to_device = b"cuMemcpyHtoDAsync_v2\0"(u64, *const c_void, usize, *mut c_void);
        to_host = b"cuMemcpyDtoHAsync_v2\0"(*mut c_void, u64, usize, *mut c_void);
        copy_2d = b"cuMemcpy2DAsync_v2\0"(*const Copy2D, *mut c_void);
        set_bytes = b"cuMemsetD8Async\0"(u64, u8, usize, *mut c_void);
        stream_create = b"cuStreamCreate\0"(*mut *mut c_void, c_uint);
        stream_destroy = b"cuStreamDestroy_v2\0"(*mut c_void);
        stream_wait = b"cuStreamSynchronize\0"(*mut c_void);
        launch = b"cuLaunchKernel\0"(*mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void,
            *mut *mut c_void, *mut *mut c_void);
    }
}

/// CUDA_MEMCPY2D of cuda.h.
#[repr(C)]
pub(super) struct Copy2D {
    from_x: usize,
    from_y: usize,
    from_type: c_uint,
    from_host: *const c_void,
    from_device: u64,
    from_array: *const c_void,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: c_uint,
    to_host: *const c_void,
    to_device: u64,
    to_array: *const c_void,
    to_pitch: usize,
    width: usize,
    height: usize,
}

impl Driver {
    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut name = null();
        // SAFETY: a string that lives as long as the library is written, or nothing.
        let known = unsafe { (self.error_name)(code, &mut name) } == 0 && !name.is_null();
        let name = match known {
            // SAFETY: as above.
            true => unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(),
            false => "an unknown error".to_owned(),
        };
        let remedy = match code {
            OUT_OF_MEMORY => "free memory on the device, or select on the CPU",
            100 => "check nvidia-smi, and that the container was given a GPU",
            _ => "select by LibTorch or on the CPU, and report it with the device's name and driver version",
        };
        Err(CudaError::Call { call, name, code, remedy })
    }
}

/// One of the kernels.
#[derive(Clone, Copy)]
pub(super) struct Kernel(*mut c_void);

pub(super) struct Kernels {
    pub softplus_sums: Kernel,
    pub exponential_sums: Kernel,
    pub added: Kernel,
    pub split: Kernel,
}

/// A device with its kernels, for the rest of the process. Its context is the one that LibTorch uses too.
pub(super) struct Device {
    driver: Driver,
    pub ordinal: u32,
    pub name: String,
    context: *mut c_void,
    kernels: Option<Kernels>,
    /// Of a block of `softplus_sums` or `exponential_sums`.
    pub tile_bytes: usize,
}

// SAFETY: handles of the driver may be used from any thread in which the context is current, and `call` makes it so.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

impl Device {
    /// Finds the device and compiles the kernels for it.
    pub(super) fn open(libraries: &CudaLibraries, ordinal: u32) -> Result<Self> {
        let remedy = "install NVIDIA's driver, or select on the CPU";
        let library = open(&libraries.driver).map_err(|error| missing("the CUDA driver", &error, remedy))?;
        let driver = Driver::of(library)?;
        let (mut count, mut handle, mut context) = (0, 0, null_mut());
        // SAFETY: here and below, every pointer is to a value of the header's type that outlives the call.
        driver.check("cuInit", unsafe { (driver.init)(0) })?;
        driver.check("cuDeviceGetCount", unsafe { (driver.device_count)(&mut count) })?;
        if i64::from(ordinal) >= i64::from(count) {
            return Err(CudaError::NoDevice { ordinal, count: count as u32 });
        }
        driver.check("cuDeviceGet", unsafe { (driver.device_get)(&mut handle, ordinal as c_int) })?;
        let mut name = [0; 256];
        driver.check("cuDeviceGetName", unsafe { (driver.device_name)(name.as_mut_ptr(), 256, handle) })?;
        let bytes = name.map(|byte| byte as u8);
        let name = CStr::from_bytes_until_nul(&bytes).unwrap_or_default().to_string_lossy().into_owned();
        let attribute = |number| {
            let mut value = 0;
            let code = unsafe { (driver.device_attribute)(&mut value, number, handle) };
            driver.check("cuDeviceGetAttribute", code).map(|()| value as u32)
        };
        let (major, minor) = (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?);
        if major < 8 {
            return Err(CudaError::TooOld { name, major, minor });
        }
        // Two slabs at a time where three do not fit.
        let stages = if attribute(SHARED_BYTES_MOST)? as usize >= 3 * STAGE_BYTES + SUMS_BYTES { 3 } else { 2 };
        let image = Nvrtc::load(&libraries.nvrtc)?.kernels(10 * major + minor, stages)?;
        driver.check("cuDevicePrimaryCtxRetain", unsafe { (driver.primary_context)(&mut context, handle) })?;
        let tile_bytes = stages as usize * STAGE_BYTES + SUMS_BYTES;
        let mut device = Self { driver, ordinal, name, context, kernels: None, tile_bytes };
        device.kernels = Some(device.load(&image)?);
        Ok(device)
    }

    fn load(&self, image: &[u8]) -> Result<Kernels> {
        let mut module = null_mut();
        let ended: Vec<u8> = image.iter().copied().chain([0]).collect();
        self.call("cuModuleLoadData", |driver| unsafe { (driver.module_load)(&mut module, ended.as_ptr().cast()) })?;
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
                (driver.function_attribute)(kernel.0, FUNCTION_SHARED_BYTES, self.tile_bytes as c_int)
            })?;
            Ok(kernel)
        };
        Ok(Kernels {
            softplus_sums: tiles(c"softplus_sums")?,
            exponential_sums: tiles(c"exponential_sums")?,
            added: function(c"added")?,
            split: function(c"split")?,
        })
    }

    pub(super) fn kernels(&self) -> &Kernels {
        self.kernels.as_ref().expect("loaded when the device was opened")
    }

    /// Calls the driver with the device's context current, and leaves this thread's context as it was.
    fn call(&self, name: &'static str, call: impl FnOnce(&Driver) -> c_int) -> Result<()> {
        let (driver, mut ours) = (&self.driver, null_mut());
        driver.check("cuCtxPushCurrent", unsafe { (driver.push_context)(self.context) })?;
        let code = call(driver);
        let popped = unsafe { (driver.pop_context)(&mut ours) };
        driver.check(name, code)?;
        driver.check("cuCtxPopCurrent", popped)
    }

    pub(super) fn free_bytes(&self) -> Result<usize> {
        let (mut free, mut total) = (0, 0);
        self.call("cuMemGetInfo", |driver| unsafe { (driver.memory_info)(&mut free, &mut total) })?;
        Ok(free)
    }
}

/// What is done one after the other.
pub(super) struct Stream<'d> {
    pub device: &'d Device,
    handle: *mut c_void,
}

/// Values on a device.
pub(super) struct Buffer<'d, T> {
    device: &'d Device,
    pub address: u64,
    pub len: usize,
    values: PhantomData<T>,
}

impl<'d> Stream<'d> {
    pub(super) fn new(device: &'d Device) -> Result<Self> {
        let mut handle = null_mut();
        device.call("cuStreamCreate", |driver| unsafe { (driver.stream_create)(&mut handle, STREAM_NON_BLOCKING) })?;
        Ok(Self { device, handle })
    }

    /// Waits for all that was begun.
    pub(super) fn wait(&self) -> Result<()> {
        self.device.call("cuStreamSynchronize", |driver| unsafe { (driver.stream_wait)(self.handle) })
    }

    pub(super) fn allocate<T>(&self, len: usize) -> Result<Buffer<'d, T>> {
        let (mut address, bytes) = (0, (len * size_of::<T>()).max(1));
        self.device.call("cuMemAlloc", |driver| unsafe { (driver.allocate)(&mut address, bytes) })?;
        Ok(Buffer { device: self.device, address, len, values: PhantomData })
    }

    pub(super) fn clear<T>(&self, buffer: &Buffer<'_, T>) -> Result<()> {
        let bytes = buffer.len * size_of::<T>();
        self.device
            .call("cuMemsetD8Async", |driver| unsafe { (driver.set_bytes)(buffer.address, 0, bytes, self.handle) })
    }

    /// Writes `values` to the start of a buffer. They must stay as they are until `wait`.
    pub(super) fn upload<T>(&self, to: &Buffer<'_, T>, values: &[T]) -> Result<()> {
        assert!(values.len() <= to.len, "more values than the buffer holds");
        self.device.call("cuMemcpyHtoDAsync", |driver| unsafe {
            (driver.to_device)(to.address, values.as_ptr().cast(), size_of_val(values), self.handle)
        })
    }

    /// Writes rows of `dim` values to rows that are `stride` apart, from the buffer's start; as [`Self::upload`].
    pub(super) fn upload_rows<T>(&self, to: &Buffer<'_, T>, values: &[T], dim: usize, stride: usize) -> Result<()> {
        let height = values.len() / dim;
        assert!(height * stride <= to.len && dim <= stride, "more rows than the buffer holds");
        let size = size_of::<T>();
        let copy = Copy2D {
            from_x: 0,
            from_y: 0,
            from_type: HOST,
            from_host: values.as_ptr().cast(),
            from_device: 0,
            from_array: null(),
            from_pitch: dim * size,
            to_x: 0,
            to_y: 0,
            to_type: DEVICE,
            to_host: null(),
            to_device: to.address,
            to_array: null(),
            to_pitch: stride * size,
            width: dim * size,
            height,
        };
        self.device.call("cuMemcpy2DAsync", |driver| unsafe { (driver.copy_2d)(&copy, self.handle) })
    }

    /// The first values of a buffer, after all that was begun.
    pub(super) fn download(&self, from: &Buffer<'_, f64>, len: usize) -> Result<Vec<f64>> {
        assert!(len <= from.len, "more values than the buffer holds");
        let mut values = vec![0f64; len];
        self.device.call("cuMemcpyDtoHAsync", |driver| unsafe {
            (driver.to_host)(values.as_mut_ptr().cast(), from.address, len * size_of::<f64>(), self.handle)
        })?;
        self.wait()?;
        Ok(values)
    }

    /// Runs a kernel on `blocks` x `slots` blocks.
    ///
    /// # Safety
    ///
    /// `arguments` point to values of the kernel's parameter types, and what those point to on the device is large enough.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        [blocks, slots]: [usize; 2],
        shared: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let blocks = c_uint::try_from(blocks).expect("fewer than 2^32 candidates");
        self.device.call("cuLaunchKernel", |driver| unsafe {
            (driver.launch)(
                kernel.0,
                blocks,
                slots as c_uint,
                1,
                THREADS as c_uint,
                1,
                1,
                shared as c_uint,
                self.handle,
                arguments.as_mut_ptr(),
                null_mut(),
            )
        })
    }

    /// Blocks of a kernel that has a thread for each of `items`.
    pub(super) fn blocks(items: usize) -> usize {
        items.div_ceil(THREADS)
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        // What fails here has failed before, where it was said.
        let _ = self.wait();
        let _ = self.device.call("cuStreamDestroy", |driver| unsafe { (driver.stream_destroy)(self.handle) });
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        let _ = self.device.call("cuMemFree", |driver| unsafe { (driver.free)(self.address) });
    }
}
