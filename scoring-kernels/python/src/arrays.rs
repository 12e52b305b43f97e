//! Arrays of Python as slices of Rust, without a copy, through the buffer protocol.
use half::f16;
use pyo3::{
    buffer::{Element, PyBuffer},
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::PyByteArray,
};
use std::{ffi::CStr, slice};
use superbatch_kernels::Rows;

/// A half-precision value, Python's `struct` format `e`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Half(f16);

// SAFETY: every pattern of 16 bits is a half-precision number; size and alignment are checked by
// PyO3.
unsafe impl Element for Half {
    fn is_compatible_format(format: &CStr) -> bool {
        // Without a prefix, or with "@" or "=", the byte order is the machine's.
        matches!(format.to_bytes(), b"e" | b"@e" | b"=e")
    }
}

/// The memory of one tower, `[B, dim]`. Python keeps it alive and fixed in place while this value
/// lives.
pub(crate) enum Tower {
    F32(PyBuffer<f32>),
    F16(PyBuffer<Half>),
}

impl FromPyObject<'_, '_> for Tower {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        if let Ok(buffer) = PyBuffer::get(&object) {
            return Ok(Self::F32(buffer));
        }
        PyBuffer::get(&object)
            .map(Self::F16)
            .map_err(|_| PyTypeError::new_err("not an array of float32 or float16"))
    }
}

impl Tower {
    /// Returns the values, row by row.
    pub(crate) fn rows(&self) -> PyResult<Rows<'_>> {
        Ok(match self {
            Self::F32(buffer) => Rows::F32(values(buffer)?),
            Self::F16(buffer) => {
                let halves = values(buffer)?;
                // SAFETY: `Half` is transparent.
                Rows::F16(unsafe { slice::from_raw_parts(halves.as_ptr().cast(), halves.len()) })
            }
        })
    }

    /// Returns the length of a row.
    pub(crate) fn dim(&self) -> usize {
        let shape = match self {
            Self::F32(buffer) => buffer.shape(),
            Self::F16(buffer) => buffer.shape(),
        };
        shape.last().copied().unwrap_or_default()
    }
}

/// Returns all values of a C-contiguous array, row by row.
pub(crate) fn values<T: Element>(buffer: &PyBuffer<T>) -> PyResult<&[T]> {
    if !buffer.is_c_contiguous() {
        return Err(PyValueError::new_err("an array is not C-contiguous"));
    }
    if buffer.item_count() == 0 {
        return Ok(&[]);
    }
    // SAFETY: the memory holds so many values of T (PyO3 checked format, size and alignment), in
    // one piece, for as long as the buffer lives. Any bits are a valid T. As with every library
    // that computes without the GIL, Python code must not write there in the meantime; if it does,
    // the draw is from the values that were read.
    Ok(unsafe { slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.item_count()) })
}

/// Copies numbers to the writable memory of a new NumPy array.
pub(crate) fn memory<'py, T: Copy, const N: usize>(
    py: Python<'py>,
    numbers: &[T],
    bytes_of: impl Fn(T) -> [u8; N],
) -> PyResult<Bound<'py, PyByteArray>> {
    PyByteArray::new_with(py, numbers.len() * N, |bytes| {
        bytes
            .as_chunks_mut()
            .0
            .iter_mut()
            .zip(numbers)
            .for_each(|(slot, number)| *slot = bytes_of(*number));
        Ok(())
    })
}
