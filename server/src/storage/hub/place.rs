//! URIs of data sets on the hub, `hf://datasets/OWNER/NAME[@REVISION][/PATH]`, as its own client
//! writes them, and the object paths that stand for them.
use object_store::path::Path;
use std::fmt;

/// What all URIs of data sets begin with.
const ROOT: &str = "hf://datasets";
/// The revision of a URI that names none.
const DEFAULT: &str = "main";
/// Where the hub keeps what it has converted itself. A URI may write `~parquet` for it, which is no
/// name that a branch can have.
const CONVERTED: &str = "refs/convert/";
/// Signs that no revision has. They are those of git, and a brace: it would be a pattern.
const NOT_IN_REVISIONS: [char; 11] = [' ', '~', '^', ':', '?', '*', '[', '\\', '{', '}', '\x7f'];

/// A data set at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repository {
    pub owner: String,
    pub name: String,
    /// A branch, a tag or a commit, decoded: `refs/convert/parquet`.
    pub revision: String,
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.owner, self.name, self.revision)
    }
}

impl Repository {
    /// Returns the URI of what follows the data set in a URI, at a commit.
    pub(super) fn at(&self, commit: &str, rest: &str) -> String {
        format!("{ROOT}/{}/{}@{commit}{rest}", self.owner, self.name)
    }
}

/// A file or folder of a data set.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub repository: Repository,
    /// Below the data set; `""` is the whole of it.
    pub file: String,
}

impl Place {
    /// Returns the place that an object path stands for; `None` if it names no data set.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let mut parts = path.parts();
        let (owner, name) = (parts.next()?, parts.next()?);
        let (name, revision) = match name.as_ref().split_once('@') {
            // In the order in which they do not undo each other.
            Some((name, coded)) => (
                name.to_owned(),
                coded.replace("%2F", "/").replace("%25", "%"),
            ),
            None => (name.as_ref().to_owned(), DEFAULT.to_owned()),
        };
        let rest: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
        let repository = Repository {
            owner: owner.as_ref().to_owned(),
            name,
            revision,
        };
        Some(Self {
            repository,
            file: rest.join("/"),
        })
    }

    /// Returns the path at which the hub serves this file of a commit.
    ///
    /// # Errors
    /// `InvalidPath`, which no place of [`Place::of`] is.
    pub(super) fn resolved(&self, commit: &str) -> object_store::Result<Path> {
        let Repository { owner, name, .. } = &self.repository;
        let text = format!("datasets/{owner}/{name}/resolve/{commit}/{}", self.file);
        Ok(Path::parse(text)?)
    }
}

/// Returns whether a text is a whole commit id, at which files never change.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns the data set that a URI begins with, and the rest of its text: `""`, or what follows
/// with a slash before it. The rest may be a pattern.
///
/// # Errors
/// What is wrong with it, for people.
pub(super) fn split(uri: &str) -> Result<(Repository, &str), String> {
    let below = uri.strip_prefix(ROOT).and_then(|r| r.strip_prefix('/'));
    let below = below.ok_or_else(|| no_data_set(uri))?;
    let (owner, rest) = below.split_once('/').unwrap_or((below, ""));
    let (name, rest) = rest.split_at(rest.find(['@', '/']).unwrap_or(rest.len()));
    if !is_name(owner) || !is_name(name) {
        return Err(format!(
            "'{uri}' names no data set; write {ROOT}/OWNER/NAME, without a pattern, and then \
             /PATH or @REVISION/PATH"
        ));
    }
    let (coded, rest) = match rest.strip_prefix('@') {
        Some(after) => after.split_at(revision_end(after)),
        None => (DEFAULT, rest),
    };
    let revision = revision(coded).ok_or_else(|| {
        format!(
            "'{uri}' has '@{coded}' where a revision is named; write @BRANCH, @TAG or @COMMIT, \
             with %2F for a slash, or @~parquet"
        )
    })?;
    let repository = Repository {
        owner: owner.to_owned(),
        name: name.to_owned(),
        revision,
    };
    Ok((repository, rest))
}

/// Returns what is wrong with a URI of the hub that names no data set.
fn no_data_set(uri: &str) -> String {
    let of_model = uri.strip_prefix("hf://models/");
    let of_model = of_model.or_else(|| uri.strip_prefix("hf://"));
    match of_model.filter(|id| id.split('/').filter(|part| is_name(part)).count() >= 2) {
        Some(id)
            if !["spaces/", "buckets/", "kernels/"]
                .iter()
                .any(|k| id.starts_with(k)) =>
        {
            format!(
                "'{uri}' names a model of the hub, and of it only data sets are read \
                 ({ROOT}/OWNER/NAME); download the model (`hf download`) and name its folder"
            )
        }
        _ => format!("'{uri}' names no data set of the hub; write {ROOT}/OWNER/NAME/PATH"),
    }
}

/// Returns where a revision ends that is followed by a path: at the first slash, or after the third
/// word of `refs/convert/parquet` and `refs/pr/1`, which the hub's client also takes as they are.
fn revision_end(text: &str) -> usize {
    let whole = |kind: &str, fits: fn(char) -> bool| {
        let word = text.strip_prefix(kind)?;
        let word = word.split('/').next().unwrap_or_default();
        let is_word = !word.is_empty() && word.chars().all(fits);
        is_word.then_some(kind.len() + word.len())
    };
    whole(CONVERTED, is_name_sign)
        .or_else(|| whole("refs/pr/", |c| c.is_ascii_digit()))
        .or_else(|| text.find('/'))
        .unwrap_or(text.len())
}

/// Decodes a revision; `None` if it cannot be one.
fn revision(coded: &str) -> Option<String> {
    // Decodes as all paths of URIs are, and refuses `..` and empty parts.
    let decoded = Path::from_url_path(coded).ok()?;
    let decoded = decoded.as_ref();
    if let Some(kind) = decoded.strip_prefix('~') {
        return is_name(kind).then(|| format!("{CONVERTED}{kind}"));
    }
    let is_one = !decoded.is_empty() && !decoded.contains(NOT_IN_REVISIONS);
    is_one.then(|| decoded.to_owned())
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with('.') && text.chars().all(is_name_sign)
}

fn is_name_sign(sign: char) -> bool {
    sign.is_ascii_alphanumeric() || matches!(sign, '-' | '_' | '.')
}

/// Returns the object path of a URI. That of several data sets' folder (`hf://datasets/OWNER`) has
/// one too: sources may lie in two data sets.
///
/// # Errors
/// What is wrong with it, for people.
pub(in crate::storage) fn path(uri: &str) -> Result<Path, String> {
    let plain = uri.trim_end_matches('/');
    let above = plain.strip_prefix(ROOT);
    let above = above.filter(|rest| rest.is_empty() || rest.strip_prefix('/').is_some_and(is_name));
    let parsed = match above {
        Some(owner) => Path::parse(owner),
        None => {
            let (
                Repository {
                    owner,
                    name,
                    revision,
                },
                rest,
            ) = split(plain)?;
            let coded = revision.replace('%', "%25").replace('/', "%2F");
            Path::from_url_path(rest)
                .and_then(|file| Path::parse(format!("{owner}/{name}@{coded}/{file}")))
        }
    };
    parsed.map_err(|e| format!("'{uri}' cannot be read as a path: {e}"))
}

/// Returns whether `uri` is `repository`, a data set without a revision, at any revision.
pub(in crate::storage) fn is_of(uri: &str, repository: &str) -> bool {
    let is_plain = matches!(split(repository), Ok((_, ""))) && !repository.contains('@');
    let rest = uri.strip_prefix(repository).filter(|_| is_plain);
    rest.is_some_and(|rest| rest.starts_with('@'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn shown(uri: &str) -> (String, &str) {
        let (repository, rest) = split(uri).unwrap();
        (repository.to_string(), rest)
    }

    #[test]
    fn uris_are_taken_apart_as_the_hubs_client_does_it() {
        for (uri, repository, rest) in [
            ("hf://datasets/o/n", "o/n@main", ""),
            ("hf://datasets/o/n/", "o/n@main", "/"),
            ("hf://datasets/o/n/a/b.parquet", "o/n@main", "/a/b.parquet"),
            ("hf://datasets/o/n@v1.0/a", "o/n@v1.0", "/a"),
            ("hf://datasets/o/n/a@b.parquet", "o/n@main", "/a@b.parquet"),
            ("hf://datasets/o/n@b/a@b", "o/n@b", "/a@b"),
            (
                "hf://datasets/o/n@~parquet/**/*.parquet",
                "o/n@refs/convert/parquet",
                "/**/*.parquet",
            ),
            (
                "hf://datasets/o/n@refs/convert/parquet/x",
                "o/n@refs/convert/parquet",
                "/x",
            ),
            (
                "hf://datasets/o/n@refs%2Fconvert%2Fparquet/x",
                "o/n@refs/convert/parquet",
                "/x",
            ),
            ("hf://datasets/o/n@refs/pr/12/x", "o/n@refs/pr/12", "/x"),
            // A branch that is called refs, and a path that looks like the hub's own.
            ("hf://datasets/o/n@refs/pr/x/y", "o/n@refs", "/pr/x/y"),
            ("hf://datasets/o/n@dev%2Fa%25b/x", "o/n@dev/a%b", "/x"),
            (
                "hf://datasets/o/n.parquet/{0..3}.tar",
                "o/n.parquet@main",
                "/{0..3}.tar",
            ),
        ] {
            assert_eq!(shown(uri), (repository.to_owned(), rest), "{uri}");
        }
    }

    #[test]
    fn what_names_no_data_set_is_told_so() {
        for (uri, says) in [
            ("hf://o/n", "names a model"),
            ("hf://models/o/n/x.parquet", "names a model"),
            ("hf://spaces/o/n", "names no data set of the hub"),
            ("hf://datasets", "names no data set of the hub"),
            ("hf://datasetsx", "names no data set of the hub"),
            ("hf://datasets/o", "write hf://datasets/OWNER/NAME"),
            ("hf://datasets/squad/*.parquet", "without a pattern"),
            ("hf://datasets/{a,b}/n", "without a pattern"),
            ("hf://datasets/o/n*", "without a pattern"),
            ("hf://datasets/../n", "without a pattern"),
            ("hf://datasets/o%2Fx/n", "without a pattern"),
            ("hf://datasets/o/n@/x", "where a revision is named"),
            ("hf://datasets/o/n@{a,b}/x", "where a revision is named"),
            (
                "hf://datasets/o/n@a%2F..%2Fb/x",
                "where a revision is named",
            ),
            ("hf://datasets/o/n@~a%2Fb/x", "where a revision is named"),
        ] {
            let error = split(uri).unwrap_err();
            assert!(error.contains(says), "{uri}: {error}");
        }
    }

    #[test]
    fn a_path_stands_for_one_place() {
        for uri in [
            "hf://datasets/o/n/data/a%20b.parquet",
            "hf://datasets/o/n@dev%2Fa%25b/x",
            "hf://datasets/o/n@refs/convert/parquet",
            "hf://datasets/o/n@a%252Fb",
        ] {
            let (repository, rest) = split(uri).unwrap();
            let place = Place::of(&path(uri).unwrap()).unwrap();
            let file = Path::from_url_path(rest).unwrap().to_string();
            assert_eq!(place, Place { repository, file }, "{uri}");
        }
        for above in [
            "hf://datasets",
            "hf://datasets/",
            "hf://datasets/o",
            "hf://datasets/o/",
        ] {
            assert_eq!(Place::of(&path(above).unwrap()), None, "{above}");
        }
        assert!(path("hf://datasets/o/n/a/%2e%2e/b").is_err());
        let resolved = Place::of(&path("hf://datasets/o/n@x/a%20b").unwrap()).unwrap();
        let resolved = resolved.resolved(COMMIT).unwrap().to_string();
        assert_eq!(resolved, format!("datasets/o/n/resolve/{COMMIT}/a b"));
    }

    #[test]
    fn a_data_set_stands_for_all_its_revisions_and_for_no_other() {
        let all = "hf://datasets/o/n";
        assert!(is_of("hf://datasets/o/n@main/x", all));
        for (uri, prefix) in [
            ("hf://datasets/o/nn@main", all),
            ("hf://datasets/o/n@main", "hf://datasets/o/n@v1"),
            ("hf://datasets/o/n/x@y", "hf://datasets/o/n/x"),
            ("s3://b/o/n@x", "s3://b/o/n"),
        ] {
            assert!(!is_of(uri, prefix), "{uri} {prefix}");
        }
    }
}
