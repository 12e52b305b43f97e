//! The connection, as Python sees it.
use crate::{call::Call, errors, process::Process, run::Run, show, spec};
use pyo3::{prelude::*, types::PyDict};
use std::{path::PathBuf, time::Duration};
use superbatch_client::{self as client, ConnectConfig, Credentials, Retry};

/// A connection to a service.
#[pyclass(frozen, module = "superbatch._superbatch")]
pub struct Client {
    client: client::Client,
    process: Process,
}

/// Connects. Returns a `Client`.
#[pyfunction]
pub(crate) fn connect(
    py: Python<'_>,
    uri: String,
    timeout: f64,
    retry_attempts: u32,
    retry_seconds: f64,
    credentials: &Bound<'_, PyDict>,
) -> PyResult<Call> {
    let seconds = |field, value| {
        Duration::try_from_secs_f64(value)
            .map_err(|_| errors::invalid(py, field, "not a number of seconds"))
    };
    let timeout = seconds("timeout", timeout)?;
    let retry = Retry {
        attempts_max: retry_attempts,
        elapsed_max: seconds("retry_seconds", retry_seconds)?,
        ..Retry::default()
    };
    let config = ConnectConfig {
        connect_timeout: timeout,
        connect_wait: timeout,
        retry,
        credentials: credentials_of(credentials)?,
        ..ConnectConfig::default()
    };
    let connected = async move { client::Client::connect_with(uri, config).await };
    Call::start(connected, |py, client| {
        Ok(Py::new(
            py,
            Client {
                client,
                process: Process::this(),
            },
        )?
        .into_any())
    })
}

/// Returns what to show and to trust, from a dict without what was not given.
fn credentials_of(given: &Bound<'_, PyDict>) -> PyResult<Credentials> {
    let text = |key: &str| -> PyResult<Option<String>> {
        match given.get_item(key)? {
            Some(value) => Ok(Some(value.extract()?)),
            None => Ok(None),
        }
    };
    let path = |key: &str| Ok::<_, PyErr>(text(key)?.map(PathBuf::from));
    Ok(Credentials {
        ca: path("ca")?,
        cert: path("cert")?,
        key: path("key")?,
        server_name: text("server_name")?,
        token: text("token")?,
        token_file: path("token_file")?,
        allow_insecure: text("allow_insecure")?.is_some(),
    })
}

/// Refuses a run spec, given as a dict, that has unknown keys or values; knows nothing of the
/// service's own checks.
#[pyfunction]
pub(crate) fn check_spec(spec: &Bound<'_, PyDict>) -> PyResult<()> {
    spec::run_spec(spec).map(|_| ())
}

#[pymethods]
impl Client {
    /// Opens a run by its spec as a dict; the call's result is a `Run`.
    fn open_run(
        &self,
        run_id: String,
        spec: &Bound<'_, PyDict>,
        incarnation: String,
    ) -> PyResult<Call> {
        self.process.check()?;
        let (client, spec) = (self.client.clone(), spec::run_spec(spec)?);
        let opened = async move {
            Ok(client
                .open_run(run_id, spec)
                .await?
                .with_incarnation(incarnation))
        };
        Call::start(opened, |py, run| Ok(Py::new(py, Run::new(run))?.into_any()))
    }

    /// Returns a dict.
    fn get_run(&self, run_id: String) -> PyResult<Call> {
        self.process.check()?;
        let client = self.client.clone();
        Call::start(async move { client.get_run(run_id).await }, |py, info| {
            show::run_info(py, &info)
        })
    }

    /// Ends a run for all ranks.
    fn close_run(&self, run_id: String) -> PyResult<Call> {
        self.process.check()?;
        let client = self.client.clone();
        Call::start_unit(async move { client.close_run(run_id).await })
    }

    /// Returns a list of dicts.
    fn list_runs(&self) -> PyResult<Call> {
        self.process.check()?;
        let client = self.client.clone();
        Call::start(async move { client.list_runs().await }, |py, runs| {
            show::list(py, runs.iter().map(|run| show::run_summary(py, run)))
        })
    }
}
