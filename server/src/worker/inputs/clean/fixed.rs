//! `ftfy.fix_text` without its repair of wrong encodings.
use super::entities;
use std::borrow::Cow;
use tokenizers::NormalizedString;

/// Rounds over a line until nothing changes. Each undoes one level of `&amp;amp;`; nobody writes so
/// many, and a caption made of them must not cost a worker's time.
const ROUNDS_MAX: usize = 16;

/// Returns the text with what ftfy mends mended.
pub(super) fn fixed(text: &str) -> Cow<'_, str> {
    let is_plain = |b: u8| matches!(b, b'\t' | b'\n' | b'\x0c' | b' '..=b'~') && b != b'&';
    if text.bytes().all(is_plain) {
        return Cow::Borrowed(text);
    }
    // From the first line with a tag on, ftfy takes references for meant.
    let mut unescapes = true;
    let line = |line: &str| {
        unescapes &= !line.contains('<');
        line_fixed(line, unescapes)
    };
    Cow::Owned(text.split_inclusive('\n').map(line).collect())
}

fn line_fixed(line: &str, unescapes: bool) -> String {
    let mut text = line.to_owned();
    for _ in 0..ROUNDS_MAX {
        let before = text.clone();
        if unescapes {
            text = entities::unescaped_by_ftfy(&text).into_owned();
        }
        text = characters_replaced(&text);
        text = text
            .replace("\r\n", "\n")
            .replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        text = without_terminal_escapes(&text);
        text.retain(|c| !is_control(c));
        if !text.is_ascii() {
            let mut composed = NormalizedString::from(text);
            composed.nfc();
            text = composed.get().to_owned();
        }
        if text == before {
            break;
        }
    }
    text
}

/// Replaces C1 controls, ligatures, wide characters and curled quotes.
fn characters_replaced(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars().map(windows_1252) {
        if let Some(letters) = letters(c) {
            out.extend(letters.chars().map(straight));
        } else if matches!(c, '\u{ff01}'..='\u{ffef}') {
            let mut narrow = NormalizedString::from(c.to_string());
            narrow.nfkc();
            out.push_str(narrow.get());
        } else if c == '\u{3000}' {
            out.push(' ');
        } else {
            out.push(straight(c));
        }
    }
    out
}

/// Returns what a control character of Latin-1 is in Windows-1252, where it is a character.
pub(super) fn windows_1252(c: char) -> char {
    const CHARACTERS: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž',
        '\u{8f}', '\u{90}', '\u{2018}', '\u{2019}', '\u{201c}', '\u{201d}', '•', '–', '—', '˜',
        '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    match c {
        '\u{80}'..='\u{9f}' => CHARACTERS[c as usize - 0x80],
        _ => c,
    }
}

/// Returns the letters of a ligature.
fn letters(c: char) -> Option<&'static str> {
    Some(match c {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "\u{2bc}n",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        _ => return None,
    })
}

/// Returns a curled quote straight.
fn straight(c: char) -> char {
    match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        _ => c,
    }
}

/// Takes out sequences such as those that colour text in a terminal.
fn without_terminal_escapes(text: &str) -> String {
    const START: &str = "\u{1b}[";
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(START) {
        let inner = &rest[at + START.len()..];
        let ends = |c: char| !c.is_ascii_digit() && c != ';';
        let end = inner.find(ends).unwrap_or(inner.len());
        match inner[end..].chars().next() {
            Some(c) if c.is_ascii_alphabetic() => {
                out.push_str(&rest[..at]);
                rest = &inner[end + 1..];
            }
            _ => {
                out.push_str(&rest[..at + START.len()]);
                rest = inner;
            }
        }
    }
    out.push_str(rest);
    out
}

fn is_control(c: char) -> bool {
    matches!(c, '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffc}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_mended_as_ftfy_does() {
        for (text, expected) in [
            ("plain text", "plain text"),
            (
                "\u{201c}it\u{2019}s\u{201d} \u{2bc}n \u{201e}low",
                "\"it's\" 'n \"low",
            ),
            ("ﬂuﬃeﬆ ŉ Ǆ", "fluffiest 'n DŽ"),
            ("ＬＯＵＤ\u{3000}ﾀ！", "LOUD タ!"),
            ("e\u{301} \u{85} \u{93}", "é … \""),
            ("a\r\nb\rc\u{2028}d", "a\nb\nc\nd"),
            ("\u{1b}[36;44mblue\u{1b}[0m \u{1b}[x\u{7}\u{feff}", "blue "),
            ("&amp;amp;lt;", "<"),
            ("a &amp; b\n<i> &amp;\n&amp;", "a & b\n<i> &amp;\n&amp;"),
        ] {
            assert_eq!(fixed(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_caption_of_nested_references_ends() {
        let deep = format!("&{}", "amp;".repeat(16_000));
        assert!(fixed(&deep).len() < deep.len());
    }
}
