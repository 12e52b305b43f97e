//! The published weights of a run, for Python.
use crate::{call::Call, errors, show};
use pyo3::{
    buffer::PyBuffer,
    prelude::*,
    types::{PyBytes, PyMemoryView, PySlice},
};
use superbatch_client::{Run, StoredFile};

/// Bytes copied, to be hashed, with the GIL held: a millisecond's worth.
const COPIED_BYTES: usize = 4 << 20;

/// Returns BLAKE3 of a buffer of bytes. Weights are gigabytes, so they are copied piece by piece,
/// and other threads of Python run while a piece is hashed.
#[pyfunction]
pub(crate) fn blake3_of<'py>(
    py: Python<'py>,
    data: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    let (mut hasher, mut room) = (blake3::Hasher::new(), Vec::new());
    let view = PyMemoryView::from(data)?;
    let len = view.len()?;
    for start in (0..len).step_by(COPIED_BYTES) {
        let end = len.min(start + COPIED_BYTES);
        let piece = view.get_item(PySlice::new(py, start as isize, end as isize, 1))?;
        room.resize(end - start, 0);
        PyBuffer::<u8>::get(&piece)?.copy_to_slice(py, &mut room)?;
        py.detach(|| {
            hasher.update(&room);
        });
    }
    Ok(PyBytes::new(py, hasher.finalize().as_bytes()))
}

pub(crate) fn push_uri(
    py: Python<'_>,
    run: Run,
    uri: String,
    step: i64,
    blake3: Option<&str>,
) -> PyResult<Call> {
    let blake3 = blake3
        .map(|hex| blake3::Hash::from_hex(hex).map(Into::into))
        .transpose()
        .map_err(|_| errors::invalid(py, "blake3", "give 64 hexadecimal digits"))?;
    let file = StoredFile { uri, blake3 };
    Call::start(
        async move { run.push_uri(step, file).await },
        |py, version| show::weights_version(py, &version),
    )
}

pub(crate) fn list(run: Run, newest: u32) -> PyResult<Call> {
    Call::start(async move { run.weights(newest).await }, |py, kept| {
        show::list(py, kept.iter().map(|kept| show::kept_weights(py, kept)))
    })
}

pub(crate) fn digests(run: Run, version: Option<u64>) -> PyResult<Call> {
    let asked = async move { run.weights_digests(version).await };
    Call::start(asked, |py, (version, tensors)| {
        let tensors = tensors.iter().map(|tensor| show::tensor_digest(py, tensor));
        let shown = (
            show::weights_version(py, &version)?,
            show::list(py, tensors)?,
        );
        Ok(shown.into_pyobject(py)?.into_any().unbind())
    })
}

pub(crate) fn roll_back(run: Run, version: u64) -> PyResult<Call> {
    Call::start(
        async move { run.roll_back_weights(version).await },
        |py, done| show::weights_version(py, &done.version.unwrap_or_default()),
    )
}
