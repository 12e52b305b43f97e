//! Source URIs: one Parquet file, a folder, or a pattern with `{00000..00041}` ranges, `{a,b}`
//! lists and `*`.
use crate::error::{Error, Result};

/// Files that one pattern's braces may name.
const EXPANSION_MAX: usize = 1_000_000;

/// A source URI taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    /// The folder that shard paths are relative to.
    pub root_uri: String,
    pub keys: Keys,
}

/// What is wanted below the root.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// Every `.parquet` file.
    Folder,
    /// These files; each has to exist.
    Exact(Vec<String>),
    /// Whatever matches one of these.
    Globs(Vec<String>),
}

/// Takes `uri` apart; a plain URI is a file where it ends in `.parquet`, else a folder.
///
/// # Errors
/// `InvalidArgument` for a brace that is not closed, a range that runs backwards, or far too many
/// files.
pub(super) fn parse(uri: &str) -> Result<Pattern> {
    let literal = uri.find(['{', '*']).unwrap_or(uri.len());
    if literal == uri.len() && !uri.ends_with(".parquet") {
        return Ok(Pattern {
            root_uri: uri.to_owned(),
            keys: Keys::Folder,
        });
    }
    let Some(slash) = uri[..literal].rfind('/') else {
        return Err(bad(uri, "it has no folder before its pattern"));
    };
    let mut keys = Vec::new();
    expand(uri, &uri[slash + 1..], &mut keys)?;
    keys.sort();
    keys.dedup();
    let keys = if keys.iter().any(|key| key.contains('*')) {
        Keys::Globs(keys)
    } else {
        Keys::Exact(keys)
    };
    let root = &uri[..slash];
    // "memory:///x" has its root at "memory:///": that slash is no separator.
    let root_uri = if root.ends_with('/') {
        &uri[..=slash]
    } else {
        root
    };
    Ok(Pattern {
        root_uri: root_uri.to_owned(),
        keys,
    })
}

fn bad(uri: &str, what: &str) -> Error {
    let message =
        format!("cannot use the pattern '{uri}': {what}; write {{00000..00041}}, {{a,b}} or *");
    Error::invalid("sources", message).with("uri", uri)
}

/// Pushes `text` with its first brace replaced by each of its alternatives, recursively.
fn expand(uri: &str, text: &str, out: &mut Vec<String>) -> Result<()> {
    let Some(open) = text.find('{') else {
        out.push(text.to_owned());
        return if out.len() > EXPANSION_MAX {
            Err(bad(uri, "it names over a million files"))
        } else {
            Ok(())
        };
    };
    let Some(close) = text[open..].find('}').map(|n| open + n) else {
        return Err(bad(uri, "a { is not closed"));
    };
    let (head, body, tail) = (&text[..open], &text[open + 1..close], &text[close + 1..]);
    let mut one = |middle: &str| expand(uri, &format!("{head}{middle}{tail}"), out);
    let Some((first, last)) = body.split_once("..") else {
        return body.split(',').try_for_each(one);
    };
    let (Ok(from), Ok(to)) = (first.parse::<u64>(), last.parse::<u64>()) else {
        return Err(bad(uri, &format!("'{body}' is no range of numbers")));
    };
    if from > to {
        return Err(bad(uri, &format!("the range '{body}' runs backwards")));
    }
    let width = if first.starts_with('0') {
        first.len()
    } else {
        0
    };
    (from..=to).try_for_each(|n| one(&format!("{n:0width$}")))
}

/// Whether `path` is matched by `glob`, where `*` stands for any characters but `/`.
pub(super) fn matches(glob: &str, path: &str) -> bool {
    let (mut globs, mut paths) = (glob.split('/'), path.split('/'));
    loop {
        match (globs.next(), paths.next()) {
            (None, None) => return true,
            (Some(glob), Some(segment)) if segment_matches(glob, segment) => {}
            _ => return false,
        }
    }
}

fn segment_matches(glob: &str, segment: &str) -> bool {
    let Some((head, tail)) = glob.split_once('*') else {
        return glob == segment;
    };
    let Some(mut rest) = segment.strip_prefix(head) else {
        return false;
    };
    let mut pieces: Vec<&str> = tail.split('*').collect();
    let last = pieces.pop().unwrap_or_default();
    for piece in pieces {
        let Some(at) = rest.find(piece) else {
            return false;
        };
        rest = &rest[at + piece.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::Reason;

    fn exact(uri: &str) -> (String, Vec<String>) {
        match parse(uri).unwrap() {
            Pattern {
                root_uri,
                keys: Keys::Exact(keys),
            } => (root_uri, keys),
            other => panic!("{uri}: {other:?}"),
        }
    }

    #[test]
    fn ranges_keep_their_width_and_lists_are_taken() {
        let (root, keys) = exact("s3://b/d/{08..11}.parquet");
        assert_eq!(root, "s3://b/d");
        assert_eq!(
            keys,
            ["08.parquet", "09.parquet", "10.parquet", "11.parquet"]
        );
        assert_eq!(
            exact("s3://b/{9..10}/x.parquet").1,
            ["10/x.parquet", "9/x.parquet"]
        );
        assert_eq!(exact("s3://b/{b,a}{0..1}").1, ["a0", "a1", "b0", "b1"]);
        assert_eq!(
            exact("memory:///one.parquet"),
            ("memory:///".into(), vec!["one.parquet".into()])
        );
    }

    #[test]
    fn folders_and_globs_are_told_apart() {
        assert_eq!(parse("file:///d/x").unwrap().keys, Keys::Folder);
        let globs = parse("file:///d/x-*/{0..1}.parquet").unwrap();
        assert_eq!(globs.root_uri, "file:///d");
        assert_eq!(
            globs.keys,
            Keys::Globs(vec!["x-*/0.parquet".into(), "x-*/1.parquet".into()])
        );
    }

    #[test]
    fn what_cannot_be_expanded_is_refused() {
        for uri in [
            "s3://b/{0..",
            "s3://b/{2..1}",
            "s3://b/{a..z}",
            "s3://b/{0..9999999}",
            "{0..1}",
        ] {
            assert_eq!(
                parse(uri).unwrap_err().reason(),
                Reason::InvalidArgument,
                "{uri}"
            );
        }
    }

    #[test]
    fn a_star_stays_within_its_segment() {
        for (glob, path, expected) in [
            ("*.parquet", "a.parquet", true),
            ("*.parquet", "a/b.parquet", false),
            ("train-*-of-*.parquet", "train-00-of-02.parquet", true),
            ("train-*-of-*.parquet", "train-00.parquet", false),
            ("*/a*a", "x/a", false),
            ("*/a*a", "x/aba", true),
            ("*", "", true),
        ] {
            assert_eq!(matches(glob, path), expected, "{glob} {path}");
        }
    }
}
