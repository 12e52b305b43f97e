//! Room for one push, as Python fills it.
use crate::{errors, spec};
use bytes::Bytes;
use pyo3::{
    buffer::PyBuffer,
    exceptions::{PyBufferError, PyRuntimeError},
    prelude::*,
};
use std::sync::{Mutex, PoisonError};
use superbatch_client::{self as client, Part, Push};

/// Room for one push, which is filled part by part.
#[pyclass(frozen, module = "superbatch._superbatch")]
pub struct Slot {
    state: Mutex<Option<Reserved>>,
}

/// What a push is made of.
pub(crate) struct Reserved {
    slot: client::Slot,
    step: i64,
    rank: u32,
    parts: Vec<Part>,
}

impl Reserved {
    pub(crate) fn new(slot: client::Slot, step: i64, rank: u32) -> Self {
        Self {
            slot,
            step,
            rank,
            parts: Vec::new(),
        }
    }
}

impl Slot {
    pub(crate) fn of(reserved: Reserved) -> Self {
        Self {
            state: Mutex::new(Some(reserved)),
        }
    }
}

#[pymethods]
impl Slot {
    /// Adds a block of a tensor: `data` is a buffer of bytes in one dimension, little endian. It is
    /// kept until it is sent, and not copied: it must be the push's own.
    #[expect(clippy::too_many_arguments, reason = "the parts of one header")]
    fn add(
        &self,
        py: Python<'_>,
        name: String,
        dtype: &str,
        global_shape: Vec<u64>,
        start: Vec<u64>,
        extent: Vec<u64>,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let dtype = spec::tensor_dtype(py, dtype)?;
        let part = Part::block(name, dtype, &global_shape, &start, &extent, kept(data)?)
            .map_err(|error| errors::exception(py, &error))?;
        match &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(reserved) => reserved.parts.push(part),
            None => return Err(is_submitted_error()),
        }
        Ok(())
    }

    /// Queues the push, and returns without waiting for it. Nothing more can be added.
    fn submit(
        &self,
        push_id: Option<String>,
        expected_parts: u32,
        base_version: Option<u64>,
    ) -> PyResult<()> {
        let state = self
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Reserved {
            slot,
            step,
            rank,
            parts,
        } = state.ok_or_else(is_submitted_error)?;
        slot.push(Push {
            step,
            parts,
            push_id,
            expected_parts,
            rank,
            base_version,
            file: None,
        });
        Ok(())
    }
}

/// The memory of a Python object that nobody else uses.
struct Owned {
    /// Keeps the memory where it is. A reference is given back by any thread, without the GIL and
    /// after the interpreter's end, as that of a buffer is not; the memory itself is freed when
    /// Python enters the extension the next time.
    _object: Py<PyAny>,
    start: *const u8,
    len: usize,
}

// SAFETY: the memory is only read, and lives as long as the object.
unsafe impl Send for Owned {}

// SAFETY: as above.
unsafe impl Sync for Owned {}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `kept` has checked that the object has so many bytes in a row from `start` on. It
        // is an array that the package made for this push alone (`_weights.add`): it is neither
        // written to nor resized.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

/// Returns the bytes of a buffer, without a copy.
fn kept(data: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let buffer = PyBuffer::<u8>::get(data)?;
    if buffer.dimensions() != 1 || !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the bytes do not lie in a row"));
    }
    if buffer.len_bytes() == 0 {
        return Ok(Bytes::new());
    }
    Ok(Bytes::from_owner(Owned {
        _object: data.clone().unbind(),
        start: buffer.buf_ptr().cast::<u8>().cast_const(),
        len: buffer.len_bytes(),
    }))
}

fn is_submitted_error() -> PyErr {
    PyRuntimeError::new_err("this push was submitted already")
}
