//! Values read from files that change while the process runs: tokens, certificates.
use crate::{error::Result, metrics};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

/// How often the files are compared. A revoked token ends within this time.
const EACH: Duration = Duration::from_secs(1);

type Seen = Vec<Option<blake3::Hash>>;

/// The newest usable content of some files. Content that cannot be used is logged, and the content
/// before it stays in force.
pub struct Reloading<T> {
    now: RwLock<Arc<T>>,
    seen: Mutex<Seen>,
    source: Source<T>,
}

struct Source<T> {
    what: &'static str,
    files: Vec<PathBuf>,
    build: Box<dyn Fn() -> Result<T> + Send + Sync>,
}

impl<T: Send + Sync + 'static> Reloading<T> {
    /// Reads the files by `build`, and again whenever one of them changes, for as long as the
    /// result is held.
    ///
    /// # Errors
    /// Those of `build`, the first time.
    pub fn start(
        what: &'static str,
        files: Vec<PathBuf>,
        build: impl Fn() -> Result<T> + Send + Sync + 'static,
    ) -> Result<Arc<Self>> {
        let source = Source {
            what,
            files,
            build: Box::new(build),
        };
        let this = Arc::new(Self::read(source)?);
        let follower = Arc::downgrade(&this);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(EACH).await;
                let Some(this) = follower.upgrade() else {
                    return;
                };
                this.refresh();
            }
        });
        Ok(this)
    }

    fn read(source: Source<T>) -> Result<Self> {
        // The digests are taken before `build` reads the files. If a file changes in between, the
        // digest is of the old content, so the next comparison reads the file again. In the other
        // order the change would never be seen.
        let seen = Mutex::new(look_at_files(&source.files));
        let now = RwLock::new(Arc::new((source.build)()?));
        Ok(Self { now, seen, source })
    }

    pub fn get(&self) -> Arc<T> {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        now.clone()
    }

    /// Reads the files again if one has changed.
    fn refresh(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let found = look_at_files(&self.source.files);
        if *seen == found {
            return;
        }
        *seen = found;
        let what = self.source.what;
        match (self.source.build)() {
            Ok(new) => {
                *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
                metrics::reloads(what, "ok").increment(1);
                tracing::info!(what, "read again, since it changed");
            }
            Err(error) => {
                metrics::reloads(what, "error").increment(1);
                let error = error.chain();
                tracing::error!(
                    what,
                    error,
                    "it changed and cannot be used; the old one serves on"
                );
            }
        }
    }
}

/// Returns a digest of each file; `None` if it cannot be read. Modification times do not serve
/// here: Kubernetes replaces a mounted secret by switching a link, and a copy may keep the old
/// time. The files are small.
fn look_at_files(files: &[PathBuf]) -> Seen {
    let digest = |path: &PathBuf| Some(blake3::hash(&std::fs::read(path).ok()?));
    files.iter().map(digest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn what_changes_is_read_again_and_what_is_wrong_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        std::fs::write(&path, "1").unwrap();
        let of = |path: PathBuf| Source {
            what: "number",
            files: vec![path.clone()],
            build: Box::new(move || {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                text.parse::<u32>()
                    .map_err(|_| Error::invalid("number", "no number"))
            }),
        };
        let number = Reloading::read(of(path.clone())).unwrap();
        assert_eq!(*number.get(), 1);
        for (text, expected) in [("2", 2), ("two", 2), ("3", 3)] {
            std::fs::write(&path, text).unwrap();
            number.refresh();
            assert_eq!(*number.get(), expected, "{text}");
        }
        std::fs::remove_file(&path).unwrap();
        number.refresh();
        assert_eq!(*number.get(), 3);
        assert!(Reloading::read(of(path)).is_err());
    }
}
