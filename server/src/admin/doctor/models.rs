//! Whether a model's folder can be read.
use crate::{config::Config, error::Result, storage::Stores};

/// Reads the folder as a worker does.
#[cfg(feature = "torch")]
pub(super) async fn check(config: &Config, stores: &Stores, uri: &str) -> Result<String> {
    use crate::worker::{inputs::model_inputs::Inputs, model::ModelFolder};
    use std::sync::Arc;

    let (location, modules) = (stores.open_allowed(uri)?, &config.worker.exported_modules);
    let folder = Arc::new(ModelFolder::fetch_allowing(&location, modules).await?);
    Inputs::of(&folder)?;
    Ok(if folder.has_weights().await? {
        "its files can be read, and it has weights (`superbatch inspect` checks them)".into()
    } else {
        "its files can be read; it has no weights, so that only a learner with first_push can be \
         of it"
            .into()
    })
}

/// Looks whether there is something to read: this build has no LibTorch, and reads no models.
#[cfg(not(feature = "torch"))]
pub(super) async fn check(_config: &Config, stores: &Stores, uri: &str) -> Result<String> {
    use crate::error::Error;
    use superbatch_proto::v1::Reason;

    let objects = stores.open_allowed(uri)?.list("").await?;
    if objects.is_empty() {
        let message = format!("there is nothing below {uri}");
        return Err(Error::new(Reason::ModelInvalid, message));
    }
    Ok(format!(
        "{} objects; `superbatch doctor` of a build with LibTorch reads them",
        objects.len()
    ))
}
