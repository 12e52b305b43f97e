//! URIs of storage: what they name, and whether one lies below another.
use super::hub;
use crate::error::{Error, Result};
use object_store::{ObjectStoreScheme as Scheme, path::Path};
use url::Url;

/// Which client a URI needs.
#[derive(Debug)]
pub(super) enum Kind {
    Store(Scheme),
    /// The Hugging Face hub, which `object_store` does not know.
    Hub,
}

/// Checks that a URI's store can hold state, which must be written and not only read. No connection
/// is opened.
///
/// # Errors
/// `InvalidArgument`, naming the stores that can.
pub fn can_hold_state(uri: &str) -> Result<()> {
    match parse_uri(uri)? {
        (_, Kind::Store(Scheme::Http), _) => Err(only_read(uri, "a web server")),
        (_, Kind::Hub, _) => Err(only_read(uri, "data on the Hugging Face hub")),
        _ => Ok(()),
    }
}

fn only_read(uri: &str, what: &str) -> Error {
    let message =
        format!("'{uri}' names {what}, which is only read; use file, s3, gs, az or memory");
    unusable(uri, message)
}

pub(super) fn unusable(uri: &str, message: String) -> Error {
    Error::invalid("uri", message).with("uri", uri)
}

/// Returns a URI, the client that it needs, and the path of the object in the store.
///
/// # Errors
/// `InvalidArgument` if it is no URI of a store.
pub(super) fn parse_uri(uri: &str) -> Result<(Url, Kind, Path)> {
    if let Some(at) = uri.find(['#', '?']) {
        let (sign, code) = match &uri[at..=at] {
            "#" => ("#", "%23"),
            sign => (sign, "%3F"),
        };
        let message =
            format!("'{uri}' has a '{sign}'; one that belongs to a name is written {code}");
        return Err(unusable(uri, message));
    }
    let url = Url::parse(uri).map_err(|e| {
        let message = format!(
            "'{uri}' is no URI; write file:///path, s3://bucket/prefix or memory:///name, or for \
             data https://host/path or hf://datasets/OWNER/NAME"
        );
        unusable(uri, message).because(e)
    })?;
    if let ("file" | "memory", Some(host)) = (url.scheme(), url.host_str()) {
        let meant = format!(
            "{}:///{host}{}",
            url.scheme(),
            url.path().trim_end_matches('/')
        );
        let message = format!(
            "'{uri}' names a host, {host}, and no path; write three slashes, as in {meant}"
        );
        return Err(unusable(uri, message));
    }
    if url.scheme() == "hf" {
        let path = hub::path(uri).map_err(|what| unusable(uri, what))?;
        return Ok((url, Kind::Hub, path));
    }
    match Scheme::parse(&url) {
        Ok((scheme, path)) => Ok((url, Kind::Store(scheme), path)),
        Err(e) => {
            let message = format!(
                "cannot use '{uri}'; use file, s3, gs, az or memory, or for data that is only read \
                 http, https or hf"
            );
            Err(unusable(uri, message).because(e))
        }
    }
}

/// Returns whether a URI leads out of the folder that its text shows, perhaps only after a URL
/// parser has read it: parsers drop tabs and line ends, take `\` for `/`, and decode `%2e%2e` to
/// `..`. The allow-list is compared with the text, so these must be refused before.
pub(super) fn leaves_folder(uri: &str) -> bool {
    uri.to_ascii_lowercase().contains("%2e")
        || uri.contains(['\\', '\t', '\n', '\r'])
        || uri.split('/').any(|segment| segment == "..")
}

/// Returns whether `uri` is `prefix` or lies below it, by whole path segments: `s3://data` does not
/// allow `s3://database`. A data set of the hub stands for all its revisions.
pub(super) fn below(uri: &str, prefix: &str) -> bool {
    let prefix = prefix.trim_end_matches('/');
    uri.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        || hub::is_of(uri, prefix)
}
