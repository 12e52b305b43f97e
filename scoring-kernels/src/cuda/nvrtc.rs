//! Compiles the kernels for a device, by NVIDIA's compiler library.
use super::{
    error::{CudaError, Result},
    library::{functions, open, open_first},
};
use std::{
    ffi::{CString, c_char, c_int, c_void},
    path::PathBuf,
    ptr::null,
};

const SOURCE: &str = concat!(include_str!("primitives.cuh"), include_str!("kernels.cu"));

functions! {
    Nvrtc("NVRTC", "use NVRTC 12 or 13") {
        version = b"nvrtcVersion\0"(*mut c_int, *mut c_int);
        supported_count = b"nvrtcGetNumSupportedArchs\0"(*mut c_int);
        supported = b"nvrtcGetSupportedArchs\0"(*mut c_int);
        create = b"nvrtcCreateProgram\0"(*mut *mut c_void, *const c_char, *const c_char, c_int,
            *const c_void,
            *const c_void);
        compile = b"nvrtcCompileProgram\0"(*mut c_void, c_int, *const *const c_char);
        destroy = b"nvrtcDestroyProgram\0"(*mut *mut c_void);
        log_size = b"nvrtcGetProgramLogSize\0"(*mut c_void, *mut usize);
        log = b"nvrtcGetProgramLog\0"(*mut c_void, *mut c_char);
        cubin_size = b"nvrtcGetCUBINSize\0"(*mut c_void, *mut usize);
        cubin = b"nvrtcGetCUBIN\0"(*mut c_void, *mut c_char);
        ptx_size = b"nvrtcGetPTXSize\0"(*mut c_void, *mut usize);
        ptx = b"nvrtcGetPTX\0"(*mut c_void, *mut c_char);
    }
}

/// A program, destroyed with this.
struct Program<'n> {
    nvrtc: &'n Nvrtc,
    handle: *mut c_void,
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and not used again.
        unsafe { (self.nvrtc.destroy)(&mut self.handle) };
    }
}

impl Nvrtc {
    pub(super) fn load(paths: &[PathBuf]) -> Result<Self> {
        let remedy = "install NVIDIA's NVRTC (it comes with CUDA's PyTorch) or put its folder on \
        LD_LIBRARY_PATH";
        let (path, library) = open_first(paths, "NVRTC", remedy)?;
        let nvrtc = Self::of(library)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both are written.
        let known = unsafe { (nvrtc.version)(&mut major, &mut minor) } == 0;
        if let Some(folder) = path
            .parent()
            .filter(|folder| known && !folder.as_os_str().is_empty())
        {
            // NVRTC opens its builtins library by name only, at the first compilation, and pip's
            // folders are not on the loader's path. Once the library is loaded, that name resolves
            // to it.
            if let Ok(builtins) =
                open(&folder.join(format!("libnvrtc-builtins.so.{major}.{minor}")))
            {
                std::mem::forget(builtins);
            }
        }
        Ok(nvrtc)
    }

    /// Returns the architectures that it compiles for, as 10 x major + minor.
    pub(super) fn architectures(&self) -> Vec<c_int> {
        let mut count = 0;
        // SAFETY: the count is written, then as many numbers.
        unsafe {
            if (self.supported_count)(&mut count) != 0 {
                return Vec::new();
            }
            let mut all = vec![0; count as usize];
            if (self.supported)(all.as_mut_ptr()) == 0 {
                all
            } else {
                Vec::new()
            }
        }
    }

    /// Compiles the kernels for a capability, with so many slabs in shared memory. The result is
    /// machine code if NVRTC knows the capability, else PTX of the next older one, which the driver
    /// translates.
    pub(super) fn kernels(&self, capability: u32, stages: u32) -> Result<Vec<u8>> {
        let known = self.architectures();
        let architecture = match known
            .iter()
            .copied()
            .filter(|&known| known <= capability as c_int)
            .max()
        {
            Some(same) if same == capability as c_int => format!("sm_{same}"),
            Some(older) => format!("compute_{older}"),
            None => {
                let log = format!("it knows {known:?}");
                return Err(CudaError::Compile {
                    architecture: format!("sm_{capability}"),
                    log,
                });
            }
        };
        self.compile(&architecture, stages).map(|(image, _)| image)
    }

    /// Returns machine code or PTX, and the compiler's log. For machine code the log lists the
    /// registers and memory of each kernel.
    pub(super) fn compile(&self, architecture: &str, stages: u32) -> Result<(Vec<u8>, String)> {
        let failed = |log: String| CudaError::Compile {
            architecture: architecture.to_owned(),
            log,
        };
        let text = |text: &str| CString::new(text).expect("no zero byte in it");
        let mut options = vec![
            text(&format!("--gpu-architecture={architecture}")),
            text("--std=c++17"),
            text(&format!("-DSTAGES={stages}")),
        ];
        let machine_code = architecture.starts_with("sm_");
        if machine_code {
            options.push(text("--ptxas-options=-v"));
        }
        let (source, name) = (text(SOURCE), text("kernels.cu"));
        let mut program = Program {
            nvrtc: self,
            handle: std::ptr::null_mut(),
        };
        // SAFETY: strings end with a zero byte and outlive the calls.
        let code = unsafe {
            (self.create)(
                &mut program.handle,
                source.as_ptr(),
                name.as_ptr(),
                0,
                null(),
                null(),
            )
        };
        if code != 0 {
            return Err(failed(format!("nvrtcCreateProgram returned {code}")));
        }
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: as above; the program is one.
        let code =
            unsafe { (self.compile)(program.handle, options.len() as c_int, options.as_ptr()) };
        let log = program.read(self.log_size, self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log)
            .trim_end_matches('\0')
            .trim()
            .to_owned();
        if code != 0 {
            return Err(failed(format!(
                "nvrtcCompileProgram returned {code}: {log}"
            )));
        }
        let (size, image) = if machine_code {
            (self.cubin_size, self.cubin)
        } else {
            (self.ptx_size, self.ptx)
        };
        let image = program
            .read(size, image)
            .ok_or_else(|| failed("it gave no image".to_owned()))?;
        Ok((image, log))
    }
}

impl Program<'_> {
    /// Calls a pair of functions of which the first returns a size and the second writes as many
    /// bytes.
    fn read(
        &self,
        size: unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int,
        get: unsafe extern "C" fn(*mut c_void, *mut c_char) -> c_int,
    ) -> Option<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: as many bytes are written as were told.
        unsafe {
            if size(self.handle, &mut bytes) != 0 {
                return None;
            }
            let mut data = vec![0u8; bytes];
            (get(self.handle, data.as_mut_ptr().cast()) == 0).then_some(data)
        }
    }
}
