//! The published weights of a run, for Python.
use crate::{call::Call, errors, show, slot::hashed};
use pyo3::{prelude::*, types::PyBytes};
use superbatch_client::{Run, StoredFile};

/// Returns BLAKE3 of a buffer of bytes.
#[pyfunction]
pub(crate) fn blake3_of<'py>(
    py: Python<'py>,
    data: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, hashed(data)?.as_bytes()))
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
