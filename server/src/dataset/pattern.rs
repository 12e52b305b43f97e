//! Parses source URIs as people write them: a file, a folder, `{00000..00041}` ranges, `{a,b}`
//! lists, `*`, `?`, `[…]`, `**`, and several of these joined by `::`.
mod globs;

use crate::{
    bounds::{BRACES_MAX, EXPANSION_BYTES_MAX, EXPANSION_MAX, GLOBS_MAX, URI_BYTES_MAX},
    error::{Error, Result},
};

pub(crate) use globs::matches;
use globs::tokens;

/// The endings by which a plain URI is a file and not a folder.
pub(super) const SHARD_ENDINGS: [&str; 2] = [".parquet", ".tar"];

/// A parsed source URI: one root folder, and the files wanted below it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    /// The folder that shard paths are relative to.
    pub root_uri: String,
    pub parts: Vec<Part>,
}

/// One of the URIs of a source.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Below the root: `""` or a path.
    pub folder: String,
    pub keys: Keys,
}

/// The files wanted below a part's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Keys {
    /// Every shard.
    Folder,
    /// These files, each of which must exist.
    Exact(Vec<String>),
    /// All files that match one of these.
    Globs(Vec<String>),
}

/// Returns the URIs of a source, which are joined by `::`.
pub fn parts(uri: &str) -> impl Iterator<Item = &str> {
    uri.split("::").map(str::trim)
}

impl Keys {
    /// Returns how many names or globs they are.
    fn count(&self) -> usize {
        match self {
            Self::Folder => 1,
            Self::Exact(keys) | Self::Globs(keys) => keys.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Folder => 0,
            Self::Exact(keys) | Self::Globs(keys) => keys.iter().map(String::len).sum(),
        }
    }
}

/// Takes the URIs of the source `uri` apart; a plain one is a file if it ends in `.parquet` or
/// `.tar`, else a folder.
///
/// # Errors
/// `InvalidArgument` for what is no pattern, names far too many files, or lies in two stores.
pub(crate) fn parse<'a>(uri: &str, parts: impl Iterator<Item = &'a str>) -> Result<Pattern> {
    let (mut names, mut bytes) = (0, 0);
    let parts = parts
        .map(|part| {
            let (root, keys) = one(uri, part)?;
            (names, bytes) = (names + keys.count(), bytes + keys.bytes());
            if names > EXPANSION_MAX || bytes > EXPANSION_BYTES_MAX {
                Err(too_many(uri))
            } else {
                Ok((root, keys))
            }
        })
        .collect::<Result<Vec<_>>>()?;
    check_globs(uri, &parts)?;
    let mut root_uri = parts
        .first()
        .map(|(root, _)| root.clone())
        .unwrap_or_default();
    for (other, _) in &parts {
        while !is_below(other, &root_uri) {
            root_uri = parent(&root_uri).ok_or_else(|| {
                bad(
                    uri,
                    "its URIs lie in different stores; name each as a source of its own",
                )
            })?;
        }
    }
    // Roots may end in a slash or not.
    let above = root_uri.trim_end_matches('/').len();
    let part = |(root, keys): (String, Keys)| {
        let folder = decoded(uri, root[above..].trim_matches('/'))?;
        Ok(Part { folder, keys })
    };
    let parts = parts.into_iter().map(part).collect::<Result<Vec<_>>>()?;
    Ok(Pattern { root_uri, parts })
}

fn too_many(uri: &str) -> Error {
    bad(
        uri,
        "it names over a million files, or names too long for so many",
    )
}

/// Checks how many globs there are: each is compared with every file of its folder.
fn check_globs(uri: &str, parts: &[(String, Keys)]) -> Result<()> {
    let globs = parts
        .iter()
        .filter(|(_, keys)| matches!(keys, Keys::Globs(_)));
    if globs.map(|(_, keys)| keys.count()).sum::<usize>() > GLOBS_MAX {
        Err(bad(
            uri,
            &format!("it makes over {GLOBS_MAX} patterns with *, ? or []; write fewer braces"),
        ))
    } else {
        Ok(())
    }
}

/// Returns the parent folder, within one store.
fn parent(uri: &str) -> Option<String> {
    let (parent, _) = uri.trim_end_matches('/').rsplit_once('/')?;
    match parent {
        // Stores without a host.
        "file://" | "memory://" => Some(format!("{parent}/")),
        _ if parent.ends_with(":/") || parent.ends_with(':') => None,
        _ => Some(parent.to_owned()),
    }
}

fn is_below(uri: &str, root: &str) -> bool {
    let root = root.trim_end_matches('/');
    uri.strip_prefix(root)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Returns the folder and keys of one URI.
fn one(uri: &str, part: &str) -> Result<(String, Keys)> {
    // A list in a file has lines of any length.
    if part.len() > URI_BYTES_MAX {
        let bytes = part.len();
        let what = format!("it has a URI of {bytes} bytes; give at most {URI_BYTES_MAX}");
        return Err(bad(uri, &what));
    }
    let braces = part.matches('{').count();
    if braces > BRACES_MAX {
        let what = format!("it has a URI with {braces} braces; give at most {BRACES_MAX}");
        return Err(bad(uri, &what));
    }
    if let Some(at) = part.find('#') {
        let meant = part[at..].replace('#', "%23");
        let what = format!("'#' begins a fragment, which storage has not; write {meant}");
        return Err(bad(uri, &what));
    }
    if is_query(part) {
        let what = "it ends in a query, such as a version of an object, which is not read; write \
        a ? \
                    that belongs to a name as %3F";
        return Err(bad(uri, what));
    }
    let literal = part.find(['{', '*', '?', '[']).unwrap_or(part.len());
    let is_file = SHARD_ENDINGS.iter().any(|ending| part.ends_with(ending));
    if literal == part.len() && !is_file {
        return Ok((part.to_owned(), Keys::Folder));
    }
    let Some(slash) = part[..literal].rfind('/') else {
        return Err(bad(uri, "it has no folder before its pattern"));
    };
    let mut texts = Vec::new();
    expand(uri, &part[slash + 1..], &mut texts)?;
    let keys = if texts.iter().any(|text| text.contains(['*', '?', '['])) {
        let globs = texts.iter().map(|text| glob(uri, text));
        Keys::Globs(sorted(globs.collect::<Result<_>>()?))
    } else {
        let keys = texts.iter().map(|text| decoded(uri, text));
        Keys::Exact(sorted(keys.collect::<Result<_>>()?))
    };
    let root = &part[..slash];
    // "memory:///x" has its root at "memory:///": that slash is no separator.
    let root = if root.ends_with('/') {
        &part[..=slash]
    } else {
        root
    };
    Ok((root.to_owned(), keys))
}

fn sorted(mut keys: Vec<String>) -> Vec<String> {
    keys.sort();
    keys.dedup();
    keys
}

/// Returns whether the text after the last `?` looks like `name=value`.
fn is_query(uri: &str) -> bool {
    let tail = uri.rsplit_once('?').map(|(_, tail)| tail);
    let name = tail
        .and_then(|tail| tail.split_once('='))
        .map(|(name, _)| name);
    name.is_some_and(|name| {
        let mut letters = name.chars();
        letters.next().is_some_and(|c| c.is_ascii_alphabetic())
            && letters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
    })
}

fn bad(uri: &str, what: &str) -> Error {
    let message = format!(
        "cannot use the source '{uri}': {what} (patterns are {{00000..00041}}, {{a,b}}, *, ?, \
        [0-9] \
         and **; several URIs are joined by ::)"
    );
    Error::invalid("sources", message).with("uri", uri)
}

/// Decodes the path of a URI. Slashes that follow each other are one: stores list what lies there
/// so.
pub(super) fn decoded(uri: &str, text: &str) -> Result<String> {
    let bytes = percent_decoded(text);
    let name = String::from_utf8(bytes).map_err(|_| bad(uri, "its % signs encode no UTF-8"))?;
    let slashes = |text: &str| text.matches('/').count();
    if slashes(&name) == slashes(text) && name.split('/').all(|segment| segment != "..") {
        if !name.contains("//") {
            return Ok(name);
        }
        let segments = name.split('/').filter(|segment| !segment.is_empty());
        Ok(segments.collect::<Vec<_>>().join("/"))
    } else {
        Err(bad(
            uri,
            "a % sign encodes a slash, or '..' leaves its folder",
        ))
    }
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let (mut rest, mut out) = (text.as_bytes(), Vec::with_capacity(text.len()));
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let hex = hex.filter(|two| two.bytes().all(|byte| byte.is_ascii_hexdigit()));
        match hex.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) if *first == b'%' => {
                out.push(byte);
                rest = &after[2..];
            }
            _ => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

/// Makes a glob over names. Encoded characters stand for themselves and not for wildcards.
fn glob(uri: &str, text: &str) -> Result<String> {
    let mut escaped = text.to_owned();
    for (sign, code) in [("[", "%5b"), ("*", "%2a"), ("?", "%3f")] {
        for code in [code.to_owned(), code.to_uppercase()] {
            escaped = escaped.replace(&code, &format!("[{sign}]"));
        }
    }
    let glob = decoded(uri, &escaped)?;
    if glob
        .split('/')
        .any(|segment| segment != "**" && segment.contains("**"))
    {
        return Err(bad(
            uri,
            "** stands for whole folders; write it between slashes",
        ));
    }
    if glob.split('/').all(|segment| tokens(segment).is_some()) {
        Ok(glob)
    } else {
        Err(bad(
            uri,
            "a [ is not closed; one that belongs to a name is written %5B",
        ))
    }
}

/// Pushes `text` with its first brace replaced by each of its alternatives, recursively.
fn expand(uri: &str, text: &str, out: &mut Vec<String>) -> Result<()> {
    let Some(open) = text.find('{') else {
        out.push(text.to_owned());
        // Names of one pattern are about as long as each other.
        let bytes = out.len() * text.len();
        return if out.len() > EXPANSION_MAX || bytes > EXPANSION_BYTES_MAX {
            Err(too_many(uri))
        } else {
            Ok(())
        };
    };
    let Some(close) = closing(&text[open..]).map(|n| open + n) else {
        return Err(bad(uri, "a { is not closed"));
    };
    let (head, body, tail) = (&text[..open], &text[open + 1..close], &text[close + 1..]);
    let mut one = |middle: &str| expand(uri, &format!("{head}{middle}{tail}"), out);
    let alternatives = alternatives(body);
    let range = body
        .split_once("..")
        .filter(|_| alternatives.len() == 1 && !body.contains('{'));
    let Some((first, last)) = range else {
        return alternatives.into_iter().try_for_each(one);
    };
    let (last, step) = last.split_once("..").unwrap_or((last, "1"));
    let (Ok(from), Ok(to), Ok(step)) = (first.parse(), last.parse(), step.parse()) else {
        return Err(bad(uri, &format!("'{body}' is no range of numbers")));
    };
    let (from, to): (u64, u64) = (from, to);
    if from > to || step == 0 {
        return Err(bad(
            uri,
            &format!("the range '{body}' runs backwards or stands still"),
        ));
    }
    let width = if first.starts_with('0') {
        first.len()
    } else {
        0
    };
    (from..=to)
        .step_by(step)
        .try_for_each(|n| one(&format!("{n:0width$}")))
}

/// Returns where the brace at the beginning of `text` is closed.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, sign) in text.char_indices() {
        match sign {
            '{' => depth += 1,
            '}' if depth == 1 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Splits a brace's body at its commas, but not at commas inside inner braces.
fn alternatives(body: &str) -> Vec<&str> {
    let (mut depth, mut from, mut found) = (0, 0, Vec::new());
    for (at, sign) in body.char_indices() {
        match sign {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(&body[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    found.push(&body[from..]);
    found
}

#[cfg(test)]
mod tests;
