//! Errors of the client as exceptions of the Python package.
use pyo3::prelude::*;
use std::collections::HashMap;
use superbatch_client::Error;

/// Returns the exception for an error of the client.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let message = error.to_string();
    raise(py, error.reason_name(), &message, error.metadata())
}

/// Returns the error for an argument that is refused before anything is sent.
pub(crate) fn invalid(py: Python<'_>, field: &str, message: &str) -> PyErr {
    let metadata = HashMap::from([("field".to_owned(), field.to_owned())]);
    raise(
        py,
        "INVALID_ARGUMENT",
        &format!("{field}: {message}"),
        metadata,
    )
}

fn raise(py: Python<'_>, reason: &str, message: &str, metadata: HashMap<String, String>) -> PyErr {
    let made = py
        .import("superbatch._errors")
        .and_then(|module| module.getattr("from_reason"));
    match made.and_then(|from_reason| from_reason.call1((reason, message, metadata))) {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}
