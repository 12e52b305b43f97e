//! The form of a run's state, so that a build refuses what a newer one wrote instead of misreading
//! it.
use crate::{
    error::{Error, Result},
    storage::Location,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use superbatch_proto::v1::Reason;

/// What a run is opened with. It rises when an older build would misread the state of a newer one;
/// what an older build wrote is always read. States of form 1 do not say their form: specs are
/// protobuf in hex there.
pub(super) const FORMAT: u32 = 2;

/// As [`FORMAT`], of a run whose receipts may be packed: to a build that knows no packs, steps that
/// are packed would not be committed, and it would decide them again.
const PACKED: u32 = 3;

/// Returns the form of states that do not say it.
pub(super) fn first() -> u32 {
    1
}

#[derive(Deserialize)]
struct Form {
    #[serde(default = "first")]
    format: u32,
}

/// Refuses the state of a newer build. A file that is not JSON is reported by the reader of the
/// fact.
///
/// # Errors
/// `Unimplemented`.
pub(super) fn check(location: &Location, run_json: &[u8]) -> Result<()> {
    let format = serde_json::from_slice::<Form>(run_json).map_or(FORMAT, |form| form.format);
    if format <= PACKED {
        return Ok(());
    }
    let message = format!(
        "{} has state of form {format}, and this build reads forms up to {PACKED}: a newer build \
         wrote this run; serve it with that build or a later one",
        location.uri()
    );
    Err(Error::new(Reason::Unimplemented, message)
        .with("feature", format!("state of form {format}")))
}

/// Says in `run.json` that receipts of the run may be packed. Builds that know no packs refuse the
/// run from then on, by name.
///
/// It is the one fact that is written twice, since those builds look nowhere else. Whoever does it
/// writes the same, and no more than the form differs.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if the fact cannot be read.
pub async fn allow_packs(location: &Location) -> Result<()> {
    let bytes = location.get("run.json").await?;
    match packed(location, &bytes)? {
        Some(fact) => location.put("run.json", fact.into()).await,
        None => Ok(()),
    }
}

/// Returns `run.json` as of a run whose receipts may be packed; `None` if it is of one already.
///
/// # Errors
/// `Internal` if it is no fact.
fn packed(location: &Location, run_json: &[u8]) -> Result<Option<Vec<u8>>> {
    let damaged = |e: serde_json::Error| {
        let uri = location.uri_of("run.json");
        Error::internal(format!("{uri} is no fact of this version")).because(e)
    };
    // Field by field and not by `RunFact`: fields that this build does not know stay.
    let mut fact: Map<String, Value> = serde_json::from_slice(run_json).map_err(damaged)?;
    let form = fact.get("format").and_then(Value::as_u64);
    if form.is_some_and(|form| form >= u64::from(PACKED)) {
        return Ok(None);
    }
    fact.insert("format".to_owned(), PACKED.into());
    Ok(Some(
        serde_json::to_vec_pretty(&fact).expect("plain data encodes"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    #[test]
    fn only_newer_forms_are_refused() {
        let location = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        for read in [
            r#"{"spec": "00"}"#,
            r#"{"format": 1}"#,
            r#"{"format": 2}"#,
            r#"{"format": 3}"#,
            "torn",
        ] {
            check(&location, read.as_bytes()).unwrap();
        }
        // A newer build may have changed all the rest.
        let refused = check(&location, br#"{"format": 4, "specs": []}"#).unwrap_err();
        assert_eq!(refused.reason(), Reason::Unimplemented);
        let said = refused.to_string();
        assert!(said.contains("runs/r has state of form 4"), "{said}");
    }

    #[test]
    fn a_run_becomes_one_of_packs_once_and_keeps_its_fields() {
        let location = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        for old in [
            r#"{"spec": "00", "unheard": 0.1}"#,
            r#"{"format": 2, "spec": "00", "unheard": 0.1}"#,
        ] {
            let new = packed(&location, old.as_bytes()).unwrap().unwrap();
            let fact: Value = serde_json::from_slice(&new).unwrap();
            let expected = serde_json::json!({"format": 3, "spec": "00", "unheard": 0.1});
            assert_eq!(fact, expected);
            check(&location, &new).unwrap();
            assert_eq!(packed(&location, &new).unwrap(), None);
        }
        let torn = packed(&location, b"torn").unwrap_err();
        assert_eq!(torn.reason(), Reason::Internal);
    }
}
