//! The form of a run's state, so that a build refuses what a newer one wrote instead of misreading
//! it.
use crate::{
    error::{Error, Result},
    storage::Location,
};
use serde::Deserialize;
use superbatch_proto::v1::Reason;

/// What this build writes. It rises when an older build would misread the state of a newer one;
/// what an older build wrote is always read. States of form 1 do not say their form: specs are
/// protobuf in hex there.
pub(super) const FORMAT: u32 = 2;

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
    if format <= FORMAT {
        return Ok(());
    }
    let message = format!(
        "{} has state of form {format}, and this build reads forms up to {FORMAT}: a newer build \
         opened this run; serve it with that build or a later one",
        location.uri()
    );
    Err(Error::new(Reason::Unimplemented, message)
        .with("feature", format!("state of form {format}")))
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
            "torn",
        ] {
            check(&location, read.as_bytes()).unwrap();
        }
        // A newer build may have changed all the rest.
        let refused = check(&location, br#"{"format": 3, "specs": []}"#).unwrap_err();
        assert_eq!(refused.reason(), Reason::Unimplemented);
        let said = refused.to_string();
        assert!(said.contains("runs/r has state of form 3"), "{said}");
    }
}
