//! Errors of the client as exceptions of the Python package.
use pyo3::prelude::*;
use std::collections::HashMap;
use superbatch_client::Error;

/// The exception for an error of the client.
pub fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let message = error.to_string();
    raise(py, error.reason_name(), &message, error.metadata())
}

/// An argument that is refused before anything is sent.
pub fn invalid(py: Python<'_>, field: &str, message: &str) -> PyErr {
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
