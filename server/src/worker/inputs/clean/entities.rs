//! HTML's character references, as Python's `html.unescape` and ftfy read them.
use super::fixed;
use std::{borrow::Cow, collections::HashMap, sync::LazyLock};

/// The names of HTML 5 without `&`, most with `;`, and the characters in hexadecimal.
const NAMES: &str = include_str!("entities.txt");
/// Characters of a name that is looked up.
const NAME_MAX: usize = 32;
/// As [`NAME_MAX`], of ftfy.
const FTFY_NAME_MAX: usize = 24;

static HTML: LazyLock<HashMap<&'static str, String>> = LazyLock::new(|| {
    let characters = |codes: &str| -> String {
        codes
            .split(' ')
            .filter_map(|code| char::from_u32(u32::from_str_radix(code, 16).ok()?))
            .collect()
    };
    let entry = |line: &'static str| {
        let (name, codes) = line.split_once(' ')?;
        Some((name, characters(codes)))
    };
    NAMES.lines().filter_map(entry).collect()
});

/// Names in capitals that HTML lacks, such as `EACUTE;`. ftfy reads them.
static CAPITALS: LazyLock<HashMap<String, String>> = LazyLock::new(|| {
    let entry = |(name, characters): (&&str, &String)| {
        let capitals = name.to_uppercase();
        let reference = format!("&{capitals}");
        let is_new = name.ends_with(';')
            && **name == name.to_lowercase()
            && unescaped(&reference) == reference;
        is_new.then(|| (capitals, characters.to_uppercase()))
    };
    HTML.iter().filter_map(entry).collect()
});

/// Returns the text with all references replaced, as a browser does: some need no semicolon.
pub(super) fn unescaped(text: &str) -> Cow<'_, str> {
    replaced(text, |rest, out| {
        let reference = reference(&rest[1..]);
        match reference.strip_prefix('#') {
            Some(number) => out.extend(character(number)),
            None => named(reference, out),
        }
        1 + reference.len()
    })
}

/// Returns the text with the places replaced that begin with an ampersand: `replace` is given the
/// text from there on, appends what stands for the place, and returns how many bytes that was.
fn replaced(text: &str, replace: impl Fn(&str, &mut String) -> usize) -> Cow<'_, str> {
    let Some(first) = text.find('&') else {
        return Cow::Borrowed(text);
    };
    let mut out = String::with_capacity(text.len());
    out.push_str(&text[..first]);
    let mut rest = &text[first..];
    while !rest.is_empty() {
        let after = &rest[replace(rest, &mut out)..];
        let next = after.find('&').unwrap_or(after.len());
        out.push_str(&after[..next]);
        rest = &after[next..];
    }
    Cow::Owned(out)
}

/// Returns what behind an ampersand is one reference: a number, or what may be a name.
fn reference(after: &str) -> &str {
    let number = |skip: usize, is_digit: fn(char) -> bool| {
        let digits = &after[skip..];
        let ends = |c: char| !is_digit(c);
        let length = digits.find(ends).unwrap_or(digits.len());
        with_semicolon(after, skip + length, length)
    };
    if after.starts_with("#x") || after.starts_with("#X") {
        return number(2, |c| c.is_ascii_hexdigit());
    }
    if after.starts_with('#') {
        return number(1, |c| c.is_ascii_digit());
    }
    let ends = |c: char| matches!(c, '\t' | '\n' | '\u{c}' | ' ' | '<' | '&' | '#' | ';');
    let length = after.find(ends).unwrap_or(after.len());
    let most = after.char_indices().nth(NAME_MAX);
    let length = length.min(most.map_or(after.len(), |(at, _)| at));
    with_semicolon(after, length, length)
}

/// Returns the first `end` bytes, with a semicolon that follows; nothing if `found` is none.
fn with_semicolon(after: &str, end: usize, found: usize) -> &str {
    if found == 0 {
        return "";
    }
    &after[..end + usize::from(after[end..].starts_with(';'))]
}

/// Appends the characters of a name, or of the longest name that it begins with.
fn named(name: &str, out: &mut String) {
    let prefixes = name
        .char_indices()
        .map(|(at, c)| at + c.len_utf8())
        .skip(1)
        .collect::<Vec<_>>();
    let known = |&end: &usize| Some((HTML.get(&name[..end])?, &name[end..]));
    match prefixes.iter().rev().find_map(known) {
        Some((characters, rest)) => {
            out.push_str(characters);
            out.push_str(rest);
        }
        None => {
            out.push('&');
            out.push_str(name);
        }
    }
}

/// Returns the character of a number, such as `x27;`, as HTML replaces those that are none.
fn character(number: &str) -> Option<char> {
    let number = number.strip_suffix(';').unwrap_or(number);
    let code = match number.strip_prefix(['x', 'X']) {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => number.parse(),
    };
    // Too large a number overflows.
    let character = code.ok().and_then(char::from_u32);
    match character {
        None | Some('\0') => Some('\u{fffd}'),
        Some(c @ '\u{80}'..='\u{9f}') => Some(fixed::windows_1252(c)),
        Some(c) if is_none(c) => None,
        Some(c) => Some(c),
    }
}

/// Returns whether HTML has nothing in the place of the character.
fn is_none(c: char) -> bool {
    matches!(c, '\u{1}'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}'
        | '\u{fdd0}'..='\u{fdef}')
        || u32::from(c) & 0xfffe == 0xfffe
}

/// Returns the text with references replaced that end in a semicolon, as ftfy does.
pub(super) fn unescaped_by_ftfy(text: &str) -> Cow<'_, str> {
    replaced(text, |rest, out| {
        let reference = &rest[..end_by_ftfy(rest).unwrap_or(1)];
        match replaced_by_ftfy(reference) {
            Some(characters) => out.push_str(&characters),
            None => out.push_str(reference),
        }
        reference.len()
    })
}

/// Returns where the reference that the text begins with ends, if it is one.
fn end_by_ftfy(text: &str) -> Option<usize> {
    let begin = if text.starts_with("&#") { 2 } else { 1 };
    let name = &text[begin..];
    let length = name.find(|c: char| !c.is_ascii_alphanumeric())?;
    let fits = (1..=FTFY_NAME_MAX).contains(&length) && name[length..].starts_with(';');
    fits.then_some(begin + length + 1)
}

fn replaced_by_ftfy(reference: &str) -> Option<String> {
    let name = reference.strip_prefix('&')?;
    if name.starts_with('#') {
        let unescaped = unescaped(reference);
        return (!unescaped.contains(';')).then(|| unescaped.into_owned());
    }
    // Those without a semicolon never are the whole of a reference here.
    HTML.get(name).or_else(|| CAPITALS.get(name)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_python_reads_them() {
        for (text, expected) in [
            ("no reference", "no reference"),
            ("a &amp; b &lt;c&gt;", "a & b <c>"),
            (
                "&ampere &notit; &notin; &nosuch; & &",
                "&ere ¬it; ∉ &nosuch; & &",
            ),
            ("&#39;&#x27;&#X27 &#; &#x; &#xg;", "''' &#; &#x; &#xg;"),
            (
                "&#0;&#128;&#129;&#1;&#xD800;&#x110000;&#99999999999;",
                "\u{fffd}€\u{81}\u{fffd}\u{fffd}\u{fffd}",
            ),
            ("&#xfffe;&#11;&#x7f;|", "|"),
            ("&CounterClockwiseContourIntegral;", "∳"),
            ("&éamp; &a", "&éamp; &a"),
        ] {
            assert_eq!(unescaped(text), expected, "{text:?}");
        }
    }

    #[test]
    fn ftfy_wants_the_semicolon_and_knows_capitals() {
        for (text, expected) in [
            ("this&not that &amp", "this&not that &amp"),
            ("P&EACUTE;REZ BUNDESSTRA&SZLIG;E", "PÉREZ BUNDESSTRASSE"),
            ("&ntilde; &Ntilde; &NTILDE; &nTILDE;", "ñ Ñ Ñ &nTILDE;"),
            ("&amp;lt; &#12ab; &#59; &#39;", "&lt; &#12ab; &#59; '"),
        ] {
            assert_eq!(unescaped_by_ftfy(text), expected, "{text:?}");
        }
    }
}
