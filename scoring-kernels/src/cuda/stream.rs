//! A device's memory, and the queue of work on it.
use super::{
    device::{Device, Kernel},
    driver::Copy2D,
    error::Result,
};
use std::{
    ffi::{c_uint, c_void},
    marker::PhantomData,
    ptr::{null, null_mut},
};

/// Threads of a block, of every kernel.
const THREADS: usize = 256;

// Numbers of cuda.h.
const STREAM_NON_BLOCKING: c_uint = 1;
const HOST: c_uint = 1;
const DEVICE: c_uint = 2;

/// A queue of work that the device does in order.
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
        device.call("cuStreamCreate", |driver| unsafe {
            (driver.stream_create)(&mut handle, STREAM_NON_BLOCKING)
        })?;
        Ok(Self { device, handle })
    }

    /// Waits until all queued work is done.
    pub(super) fn wait(&self) -> Result<()> {
        self.device.call("cuStreamSynchronize", |driver| unsafe {
            (driver.stream_wait)(self.handle)
        })
    }

    pub(super) fn allocate<T>(&self, len: usize) -> Result<Buffer<'d, T>> {
        let (mut address, bytes) = (0, (len * size_of::<T>()).max(1));
        self.device.call("cuMemAlloc", |driver| unsafe {
            (driver.allocate)(&mut address, bytes)
        })?;
        Ok(Buffer {
            device: self.device,
            address,
            len,
            values: PhantomData,
        })
    }

    pub(super) fn clear<T>(&self, buffer: &Buffer<'_, T>) -> Result<()> {
        let bytes = buffer.len * size_of::<T>();
        self.device.call("cuMemsetD8Async", |driver| unsafe {
            (driver.set_bytes)(buffer.address, 0, bytes, self.handle)
        })
    }

    /// Writes `values` to the start of a buffer. The copy is asynchronous: the values must not
    /// change or be freed before `wait`.
    pub(super) fn upload<T>(&self, to: &Buffer<'_, T>, values: &[T]) -> Result<()> {
        assert!(values.len() <= to.len, "more values than the buffer holds");
        self.device.call("cuMemcpyHtoDAsync", |driver| unsafe {
            (driver.to_device)(
                to.address,
                values.as_ptr().cast(),
                size_of_val(values),
                self.handle,
            )
        })
    }

    /// Writes rows of `dim` values to rows that are `stride` apart, from the buffer's start; as
    /// [`Self::upload`].
    pub(super) fn upload_rows<T>(
        &self,
        to: &Buffer<'_, T>,
        values: &[T],
        dim: usize,
        stride: usize,
    ) -> Result<()> {
        let height = values.len() / dim;
        assert!(
            height * stride <= to.len && dim <= stride,
            "more rows than the buffer holds"
        );
        if dim == stride {
            return self.upload(to, values);
        }
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
        self.device.call("cuMemcpy2DAsync", |driver| unsafe {
            (driver.copy_2d)(&copy, self.handle)
        })
    }

    /// Returns the first values of a buffer, after all queued work.
    pub(super) fn download(&self, from: &Buffer<'_, f64>, len: usize) -> Result<Vec<f64>> {
        assert!(len <= from.len, "more values than the buffer holds");
        let mut values = vec![0f64; len];
        self.device.call("cuMemcpyDtoHAsync", |driver| unsafe {
            (driver.to_host)(
                values.as_mut_ptr().cast(),
                from.address,
                len * size_of::<f64>(),
                self.handle,
            )
        })?;
        self.wait()?;
        Ok(values)
    }

    /// Runs a kernel on `blocks` x `slots` blocks.
    ///
    /// # Safety
    ///
    /// `arguments` point to values of the kernel's parameter types, and what those point to on the
    /// device is large enough.
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

    /// Returns the number of blocks of a kernel with one thread for each of `items`.
    pub(super) fn blocks(items: usize) -> usize {
        items.div_ceil(THREADS)
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        // Errors here have no reader: whatever broke the stream was reported by the call that broke
        // it.
        let _ = self.wait();
        let _ = self.device.call("cuStreamDestroy", |driver| unsafe {
            (driver.stream_destroy)(self.handle)
        });
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        let _ = self
            .device
            .call("cuMemFree", |driver| unsafe { (driver.free)(self.address) });
    }
}
