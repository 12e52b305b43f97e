//! The token that a call carries.
use crate::files::Error;
use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

/// A channel whose calls carry a token.
pub type Authorized = InterceptedService<Channel, Bearer>;

/// How old the token read from a file may be before the file is read again. Short, since an
/// operator who replaces a token expects clients to follow; not zero, since every call would read
/// the disk.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// Adds `authorization: Bearer …` to calls, or nothing if it holds no token. Cheap to clone; its
/// `Debug` form hides the token.
#[derive(Clone, Default)]
pub struct Bearer(Option<Arc<Source>>);

struct Source {
    file: Option<PathBuf>,
    known: Mutex<(MetadataValue<Ascii>, Instant)>,
}

impl Bearer {
    /// # Errors
    /// If it cannot be sent: it is empty, or holds other than visible ASCII.
    pub fn new(token: &str) -> Result<Self, Error> {
        Self::of(None, header(token, "the token")?)
    }

    /// Reads the token from a file, and reads it again while the file may have changed.
    ///
    /// # Errors
    /// As [`Bearer::new`], and if the file cannot be read.
    pub fn file(path: PathBuf) -> Result<Self, Error> {
        let read = read(&path)?;
        Self::of(Some(path), read)
    }

    fn of(file: Option<PathBuf>, header: MetadataValue<Ascii>) -> Result<Self, Error> {
        let known = Mutex::new((header, Instant::now()));
        Ok(Self(Some(Arc::new(Source { file, known }))))
    }
}

impl Source {
    fn header(&self) -> MetadataValue<Ascii> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = self
            .file
            .as_ref()
            .filter(|_| known.1.elapsed() > READ_AGAIN)
        {
            // The time is set before the read, so that a file that cannot be read is tried once
            // every [`READ_AGAIN`] and not by every call: each call waits for this lock.
            known.1 = Instant::now();
            match read(path) {
                Ok(header) => known.0 = header,
                // The token read before may still be valid: an operator may be replacing the file
                // at this moment. If it is not valid any more, the service answers UNAUTHENTICATED,
                // which says more than a failure here.
                Err(error) => tracing::warn!(%error, "cannot read the token again"),
            }
        }
        known.0.clone()
    }
}

fn read(path: &PathBuf) -> Result<MetadataValue<Ascii>, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Unreadable {
        path: path.clone(),
        source,
    })?;
    header(text.trim(), &format!("the token in {}", path.display()))
}

fn header(token: &str, what: &str) -> Result<MetadataValue<Ascii>, Error> {
    let is_visible = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    let made = is_visible
        .then(|| {
            format!("Bearer {token}")
                .parse::<MetadataValue<Ascii>>()
                .ok()
        })
        .flatten();
    let mut header = made.ok_or_else(|| {
        let message =
            format!("{what} cannot be one: it is empty, or holds spaces or other letters");
        Error::Unusable(message)
    })?;
    // A sensitive header is not printed with the request, and HPACK does not keep it in its tables.
    header.set_sensitive(true);
    Ok(header)
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(source) = &self.0 {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", source.header());
        }
        Ok(request)
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Bearer(hidden)"
        } else {
            "Bearer(none)"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(bearer: &Bearer) -> Option<String> {
        let request = bearer.clone().call(Request::new(())).unwrap();
        let header = request.metadata().get("authorization")?;
        Some(header.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_token_is_sent_and_never_shown() {
        let bearer = Bearer::new("sb_secret").unwrap();
        assert_eq!(sent(&bearer).as_deref(), Some("Bearer sb_secret"));
        assert!(!format!("{bearer:?}").contains("secret"));
        let request = bearer.clone().call(Request::new(())).unwrap();
        assert!(!format!("{request:?}").contains("secret"), "{request:?}");
        assert_eq!(sent(&Bearer::default()), None);
    }

    #[test]
    fn what_cannot_be_sent_is_refused_without_being_shown() {
        for token in ["", "two words", "gr\u{fc}n", "line\n"] {
            let error = Bearer::new(token).map(drop).unwrap_err().to_string();
            assert!(error.starts_with("the token cannot be one"), "{error}");
            assert!(token.is_empty() || !error.contains(token));
        }
    }

    #[test]
    fn a_file_may_end_with_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "sb_a\n").unwrap();
        assert_eq!(
            sent(&Bearer::file(path).unwrap()).as_deref(),
            Some("Bearer sb_a")
        );
        let gone = Bearer::file(folder.path().join("gone")).map(drop);
        assert!(gone.unwrap_err().to_string().contains("gone"));
    }
}
