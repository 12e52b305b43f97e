use super::*;
use superbatch_proto::v1::Reason;

fn parse(uri: &str) -> Result<Pattern> {
    super::parse(uri, parts(uri))
}

fn keys(uri: &str) -> (String, Keys) {
    let Pattern {
        root_uri,
        mut parts,
    } = parse(uri).unwrap();
    assert_eq!(parts.len(), 1, "{uri}");
    (root_uri, parts.remove(0).keys)
}

fn exact(uri: &str) -> (String, Vec<String>) {
    match keys(uri) {
        (root_uri, Keys::Exact(keys)) => (root_uri, keys),
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
        exact("s3://b/{a,{b,c{0..1}}}.tar").1,
        ["a.tar", "b.tar", "c0.tar", "c1.tar"]
    );
    assert_eq!(
        exact("s3://b/{0..10..5}.tar").1,
        ["0.tar", "10.tar", "5.tar"]
    );
    assert_eq!(
        exact("memory:///one.parquet"),
        ("memory:///".into(), vec!["one.parquet".into()])
    );
}

#[test]
fn encoded_names_are_decoded_once() {
    let (root, names) = exact("file:///my%20data/train%200%25.parquet");
    assert_eq!(
        (root.as_str(), names),
        ("file:///my%20data", vec!["train 0%.parquet".to_owned()])
    );
    assert_eq!(exact("s3://b/100%.tar").1, ["100%.tar"]);
    assert_eq!(
        exact("s3://b/%E4%BD%A0{0..1}.tar").1,
        ["你0.tar", "你1.tar"]
    );
    let Keys::Globs(globs) = keys("s3://b/%5Bx%5D*%2a.tar").1 else {
        panic!("a glob");
    };
    assert!(matches(&globs[0], "[x]1*.tar") && !matches(&globs[0], "x1*.tar"));
    assert!(!matches(&globs[0], "[x]1.tar"));
}

#[test]
fn folders_and_globs_are_told_apart() {
    assert_eq!(keys("file:///d/x").1, Keys::Folder);
    let (root, globs) = keys("file:///d/x-*/{0..1}.parquet");
    assert_eq!(root, "file:///d");
    assert_eq!(
        globs,
        Keys::Globs(vec!["x-*/0.parquet".into(), "x-*/1.parquet".into()])
    );
}

#[test]
fn what_is_joined_has_one_root() {
    let found =
        parse("s3://b/data/a/{0..1}.tar::s3://b/data/b c%20d::s3://b/data/x?/*.tar").unwrap();
    assert_eq!(found.root_uri, "s3://b/data");
    let folders: Vec<_> = found
        .parts
        .iter()
        .map(|part| part.folder.as_str())
        .collect();
    assert_eq!(folders, ["a", "b c d", ""]);
    assert_eq!(found.parts[1].keys, Keys::Folder);
    // "ab" is not below "a".
    assert_eq!(parse("s3://b/a::s3://b/ab").unwrap().root_uri, "s3://b");
    let error = parse("s3://b/a::s3://c/a").unwrap_err();
    assert!(error.to_string().contains("different stores"), "{error}");
    // With a slash at the end or without, and with slashes that follow each other.
    let found = parse("s3://b/a/::s3://b/a").unwrap();
    assert_eq!(found.root_uri, "s3://b/a/");
    let found = parse("memory:///a.tar::memory://b.tar").unwrap();
    assert_eq!(found.parts[1].folder, "");
    let found = parse("s3://b/a::s3://b/c////d/{x//y,z}.tar").unwrap();
    assert_eq!(found.parts[1].folder, "c/d");
    assert_eq!(
        found.parts[1].keys,
        Keys::Exact(vec!["x/y.tar".into(), "z.tar".into()])
    );
    let found = parse("file:///a/x::file:///b/y").unwrap();
    assert_eq!(
        (found.root_uri.as_str(), found.parts[1].folder.as_str()),
        ("file:///", "b/y")
    );
}

#[test]
fn what_cannot_be_used_is_refused() {
    for (uri, says) in [
        ("s3://b/{0..", "not closed"),
        ("s3://b/{2..1}", "backwards"),
        ("s3://b/{a..z}", "no range"),
        ("s3://b/{0..9999999}", "a million"),
        ("s3://b/{0..999999}::s3://b/x{0..999999}", "a million"),
        (
            &format!("s3://b/{}{{0..999999}}", "x".repeat(4000)),
            "too long for so many",
        ),
        ("s3://b/{0..5000}*", "over 4096 patterns"),
        ("{0..1}", "no folder"),
        ("s3://b/[0.tar", "%5B"),
        ("s3://b/a**/x.tar", "between slashes"),
        ("file:///data/pool#clean", "%23clean"),
        ("s3://b/x.parquet?versionId=7", "query"),
        ("s3://b/a%2F..%2Fb.tar", "slash"),
        ("s3://b/%ff.tar", "UTF-8"),
        // Lists in files have lines of any length, and a number's width is one of formatting.
        (&format!("s3://b/{}.tar", "{a}".repeat(1000)), "1000 braces"),
        (
            &format!("s3://b/{{{}..1}}.tar", "0".repeat(70_000)),
            "at most 8192",
        ),
    ] {
        let error = parse(uri).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument, "{uri}");
        assert!(error.to_string().contains(says), "{uri}: {error}");
    }
}

#[test]
fn globs_match_as_in_fsspec() {
    for (glob, path, expected) in [
        ("*.parquet", "a.parquet", true),
        ("*.parquet", "a/b.parquet", false),
        ("train-*-of-*.parquet", "train-00-of-02.parquet", true),
        ("train-*-of-*.parquet", "train-00.parquet", false),
        ("*/a*a", "x/a", false),
        ("*/a*a", "x/aba", true),
        ("*", "", true),
        ("**/*.tar", "a.tar", true),
        ("**/*.tar", "x/y/a.tar", true),
        ("x/**/a.tar", "x/a.tar", true),
        ("x/**/a.tar", "y/a.tar", false),
        ("x/**", "x/y/z", true),
        ("x/**", "x", false),
        ("**", "x", true),
        ("**/**", "x", true),
        // Tried one by one, this would take longer than the sun lasts.
        (
            &format!("{}y", "**/".repeat(1000)),
            &"x/".repeat(1000),
            false,
        ),
        ("?.tar", "é.tar", true),
        ("?.tar", "ab.tar", false),
        ("[0-2a].tar", "1.tar", true),
        ("[0-2a].tar", "a.tar", true),
        ("[0-2a].tar", "3.tar", false),
        ("[!0-2].tar", "3.tar", true),
        ("[]].tar", "].tar", true),
        ("[a-].tar", "-.tar", true),
    ] {
        assert_eq!(matches(glob, path), expected, "{glob} {path}");
    }
}
