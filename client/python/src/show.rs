//! Messages of the protocol as Python dicts, with the protocol's field names. Enums are lower case,
//! without prefix.
use arrow::pyarrow::ToPyArrow;
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict, PyList},
};
use superbatch_client::{Batch, v1};
use superbatch_proto::reflect::{self, DynamicMessage, FieldDescriptor, Kind, Value};

type Shown = PyResult<Py<PyAny>>;
type Dict<'py> = PyResult<Bound<'py, PyDict>>;

/// Returns a dict with all fields of a message; `None` for what is not set.
fn message<'py>(py: Python<'py>, message: &DynamicMessage) -> Dict<'py> {
    let dict = PyDict::new(py);
    for (field, given) in reflect::fields(message) {
        let shown = given.map(|given| value(py, &field, &given)).transpose()?;
        dict.set_item(field.name(), shown)?;
    }
    Ok(dict)
}

fn value<'py>(
    py: Python<'py>,
    field: &FieldDescriptor,
    value: &Value,
) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
        Value::I32(value) => value.into_pyobject(py)?.into_any(),
        Value::I64(value) => value.into_pyobject(py)?.into_any(),
        Value::U32(value) => value.into_pyobject(py)?.into_any(),
        Value::U64(value) => value.into_pyobject(py)?.into_any(),
        Value::F32(value) => value.into_pyobject(py)?.into_any(),
        Value::F64(value) => value.into_pyobject(py)?.into_any(),
        Value::String(value) => value.into_pyobject(py)?.into_any(),
        Value::Bytes(value) => PyBytes::new(py, value).into_any(),
        Value::EnumNumber(number) => match enum_word(field, *number) {
            Some(word) => word.into_pyobject(py)?.into_any(),
            None => number.into_pyobject(py)?.into_any(),
        },
        Value::Message(inner) => message(py, inner)?.into_any(),
        Value::List(items) => {
            let items = items.iter().map(|item| self::value(py, field, item));
            PyList::new(py, items.collect::<PyResult<Vec<_>>>()?)?.into_any()
        }
        // Keys of the protocol's maps are text.
        Value::Map(entries) => {
            let dict = PyDict::new(py);
            for (key, item) in entries {
                dict.set_item(key.as_str(), self::value(py, field, item)?)?;
            }
            dict.into_any()
        }
    })
}

fn enum_word(field: &FieldDescriptor, number: i32) -> Option<String> {
    match field.kind() {
        Kind::Enum(of) => reflect::word(&of, number),
        _ => None,
    }
}

pub(crate) fn list(py: Python<'_>, items: impl Iterator<Item = Shown>) -> Shown {
    Ok(PyList::new(py, items.collect::<PyResult<Vec<_>>>()?)?
        .into_any()
        .unbind())
}

pub(crate) fn batch(py: Python<'_>, batch: &Batch) -> Shown {
    let record_batch = batch.record_batch.to_pyarrow(py)?;
    let receipt = receipt_summary(py, &batch.receipt)?;
    Ok((
        record_batch,
        receipt,
        batch.step,
        batch.rank,
        batch.world_size,
    )
        .into_pyobject(py)?
        .into_any()
        .unbind())
}

pub(crate) fn dataset(py: Python<'_>, opened: &v1::OpenRunResponse) -> Shown {
    let dict = PyDict::new(py);
    dict.set_item("dataset_rows", opened.dataset_rows)?;
    dict.set_item("steps_total", opened.steps_total)?;
    dict.set_item("dataset_manifest", &opened.dataset_manifest)?;
    Ok(dict.into_any().unbind())
}

pub(crate) fn weights_version(py: Python<'_>, version: &v1::WeightsVersion) -> Shown {
    let shown = message(py, &reflect::dynamic(version))?;
    Ok(shown.into_any().unbind())
}

pub(crate) fn kept_weights(py: Python<'_>, kept: &v1::KeptWeights) -> Shown {
    let shown = message(py, &reflect::dynamic(kept))?;
    Ok(shown.into_any().unbind())
}

pub(crate) fn tensor_digest(py: Python<'_>, tensor: &v1::TensorDigest) -> Shown {
    let shown = message(py, &reflect::dynamic(tensor))?;
    Ok(shown.into_any().unbind())
}

pub(crate) fn run_summary(py: Python<'_>, run: &v1::RunSummary) -> Shown {
    let shown = message(py, &reflect::dynamic(run))?;
    Ok(shown.into_any().unbind())
}

pub(crate) fn run_info(py: Python<'_>, run: &v1::RunInfo) -> Shown {
    let shown = message(py, &reflect::dynamic(run))?;
    Ok(shown.into_any().unbind())
}

pub(crate) fn run_spec(py: Python<'_>, spec: &v1::RunSpec) -> Shown {
    let shown = message(py, &reflect::dynamic(spec))?;
    Ok(shown.into_any().unbind())
}

/// Returns whether the step was drawn by scores; if not, the protocol's zeros stand for none.
fn has_scores(summary: &v1::ReceiptSummary) -> bool {
    let reads_no_loss = matches!(summary.policy(), v1::Policy::Uniform | v1::Policy::KCenter);
    !reads_no_loss && summary.mode() != v1::Mode::Uniform
}

fn receipt_summary<'py>(py: Python<'py>, summary: &v1::ReceiptSummary) -> Dict<'py> {
    let shown = message(py, &reflect::dynamic(summary))?;
    amend(&shown, summary)?;
    Ok(shown)
}

/// Takes out of a shown summary what it does not tell.
fn amend(shown: &Bound<'_, PyDict>, summary: &v1::ReceiptSummary) -> PyResult<()> {
    // The run's sums are what a coordinator resumes from; `get_run` shows them to people.
    shown.del_item("run_totals")?;
    if !has_scores(summary) {
        for score in ["batch_score", "mean_score_chosen", "mean_score_candidates"] {
            shown.set_item(score, shown.py().None())?;
        }
    }
    Ok(())
}

pub(crate) fn receipt(py: Python<'_>, receipt: &v1::Receipt) -> Shown {
    let shown = message(py, &reflect::dynamic(receipt))?;
    if let Some(summary) = &receipt.summary {
        let inner = shown.as_any().get_item("summary")?;
        amend(inner.cast::<PyDict>()?, summary)?;
    }
    Ok(shown.into_any().unbind())
}
