//! The CUDA driver's functions and its errors.
use super::{
    error::{CudaError, OUT_OF_MEMORY, Result},
    library::functions,
};
use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr::null,
};

const UNAVAILABLE: c_int = 46;
const NO_DEVICE: c_int = 100;

functions! {
    Driver("the CUDA driver", "update NVIDIA's driver to CUDA 12 or later") {
        init = b"cuInit\0"(c_uint);
        error_name = b"cuGetErrorName\0"(c_int, *mut *const c_char);
        device_count = b"cuDeviceGetCount\0"(*mut c_int);
        device_get = b"cuDeviceGet\0"(*mut c_int, c_int);
        device_name = b"cuDeviceGetName\0"(*mut c_char, c_int, c_int);
        device_attribute = b"cuDeviceGetAttribute\0"(*mut c_int, c_int, c_int);
        create_context = b"cuCtxCreate_v2\0"(*mut *mut c_void, c_uint, c_int);
        destroy_context = b"cuCtxDestroy_v2\0"(*mut c_void);
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
        launch = b"cuLaunchKernel\0"(*mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint,
            c_uint, *mut c_void,
            *mut *mut c_void, *mut *mut c_void);
    }
}

/// CUDA_MEMCPY2D of cuda.h.
#[repr(C)]
pub(super) struct Copy2D {
    pub from_x: usize,
    pub from_y: usize,
    pub from_type: c_uint,
    pub from_host: *const c_void,
    pub from_device: u64,
    pub from_array: *const c_void,
    pub from_pitch: usize,
    pub to_x: usize,
    pub to_y: usize,
    pub to_type: c_uint,
    pub to_host: *const c_void,
    pub to_device: u64,
    pub to_array: *const c_void,
    pub to_pitch: usize,
    pub width: usize,
    pub height: usize,
}

impl Driver {
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut name = null();
        // SAFETY: a string that lives as long as the library is written, or nothing.
        let known = unsafe { (self.error_name)(code, &mut name) } == 0 && !name.is_null();
        let name = if known {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(name) }
                .to_string_lossy()
                .into_owned()
        } else {
            "an unknown error".to_owned()
        };
        let remedy = match code {
            OUT_OF_MEMORY => "free memory on the device, or select on the CPU",
            UNAVAILABLE => {
                "the device takes no more contexts (see its compute mode in nvidia-smi): select \
                by LibTorch there"
            }
            NO_DEVICE => "check nvidia-smi, and that the container was given a GPU",
            _ => {
                "select by LibTorch or on the CPU, and report it with the device's name and \
                driver version"
            }
        };
        Err(CudaError::Call {
            call,
            name,
            code,
            remedy,
        })
    }
}
