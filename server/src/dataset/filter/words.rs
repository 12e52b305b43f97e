//! The words of a predicate's text, each with its place.
use super::expression::Literal;

/// A word, and the number of its first character, from 1.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Word {
    pub what: What,
    pub at: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum What {
    /// A name or a keyword; `true` where it was written in quotes, and is a name in any case.
    Name(String, bool),
    Literal(Literal),
    /// An operator, a comma or a parenthesis.
    Sign(&'static str),
    End,
}

/// Longest first, so that `<=` is not read as `<`.
const SIGNS: [&str; 11] = ["<=", ">=", "<>", "!=", "==", "<", ">", "=", "(", ")", ","];

/// What is wrong with a text, and at which character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub at: usize,
    pub what: String,
}

impl Fault {
    pub(crate) fn new(at: usize, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { at, what }
    }
}

/// Returns the words of `text`, the last of which is its end.
pub(super) fn words(text: &str) -> Result<Vec<Word>, Fault> {
    let mut reader = Reader {
        rest: text,
        at: 1,
        words: Vec::new(),
    };
    loop {
        reader.skip(|c| c.is_whitespace());
        let (at, Some(first)) = (reader.at, reader.rest.chars().next()) else {
            break;
        };
        let what = match first {
            '\'' => What::Literal(Literal::Text(reader.quoted('\'')?)),
            '"' => What::Name(reader.quoted('"')?, true),
            '0'..='9' | '-' | '+' | '.' => reader.number()?,
            c if c.is_alphabetic() || c == '_' => reader.name(),
            _ => reader.sign()?,
        };
        reader.words.push(Word { what, at });
    }
    let at = reader.at;
    let end = Word {
        what: What::End,
        at,
    };
    reader.words.push(end);
    Ok(reader.words)
}

struct Reader<'a> {
    rest: &'a str,
    at: usize,
    words: Vec<Word>,
}

impl<'a> Reader<'a> {
    /// Takes characters while they are wanted.
    fn skip(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        self.take(end)
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.at += taken.chars().count();
        self.rest = rest;
        taken
    }

    /// Reads a text in quotes; two quotes stand for one.
    fn quoted(&mut self, quote: char) -> Result<String, Fault> {
        let begun = self.at;
        let mut text = String::new();
        self.take(1);
        loop {
            text.push_str(self.skip(|c| c != quote));
            if self.rest.is_empty() {
                return Err(Fault::new(begun, format!("this {quote} is never closed")));
            }
            self.take(1);
            if !self.rest.starts_with(quote) {
                return Ok(text);
            }
            self.take(1);
            text.push(quote);
        }
    }

    fn number(&mut self) -> Result<What, Fault> {
        let at = self.at;
        let signed = usize::from(self.rest.starts_with(['-', '+']));
        let digits = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
        let mut end = signed + digits_end(&self.rest[signed..], digits);
        // The sign of an exponent belongs to its number.
        if self.rest[..end].ends_with(['e', 'E']) && self.rest[end..].starts_with(['-', '+']) {
            end += 1 + digits_end(&self.rest[end + 1..], digits);
        }
        let text = self.take(end);
        let literal = match text.parse::<i64>() {
            Ok(whole) => Some(Literal::Int(whole.into())),
            Err(_) => text.parse::<i128>().ok().map(Literal::Int),
        };
        let starts = text.trim_start_matches(['-', '+', '.']);
        let real = || text.parse::<f64>().ok().filter(|real| real.is_finite());
        let is_number = starts.starts_with(|c: char| c.is_ascii_digit());
        literal
            .or_else(|| real().filter(|_| is_number).map(Literal::Float))
            .map(What::Literal)
            .ok_or_else(|| Fault::new(at, format!("'{text}' is no number")))
    }

    /// Reads a name such as `similarity` or `json[similarity]`, or a keyword.
    fn name(&mut self) -> What {
        let plain = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        let mut name = self.skip(plain).to_owned();
        if self.rest.starts_with('[')
            && let Some(end) = self.rest.find(']')
        {
            name.push_str(self.take(end + 1));
        }
        match name.to_ascii_lowercase().as_str() {
            "true" => What::Literal(Literal::Bool(true)),
            "false" => What::Literal(Literal::Bool(false)),
            _ => What::Name(name, false),
        }
    }

    fn sign(&mut self) -> Result<What, Fault> {
        let found = SIGNS.into_iter().find(|sign| self.rest.starts_with(sign));
        let Some(sign) = found else {
            let first: String = self.rest.chars().take(1).collect();
            let what = format!("'{first}' has no meaning here");
            return Err(Fault::new(self.at, what));
        };
        self.take(sign.len());
        Ok(What::Sign(sign))
    }
}

fn digits_end(text: &str, wanted: impl Fn(char) -> bool) -> usize {
    text.find(|c| !wanted(c)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<What> {
        let read = words(text).unwrap();
        read.into_iter().map(|word| word.what).collect()
    }

    #[test]
    fn texts_numbers_and_names_are_told_apart() {
        use What::{End, Literal as L, Name, Sign};
        let name = |text: &str| Name(text.to_owned(), false);
        let text = |text: &str| L(Literal::Text(text.to_owned()));
        assert_eq!(read(""), [End]);
        assert_eq!(
            read("a_b>=-1.5e-3 AND\t\"a \"\"b\"\"\"='it''s'"),
            [
                name("a_b"),
                Sign(">="),
                L(Literal::Float(-0.0015)),
                name("AND"),
                Name("a \"b\"".to_owned(), true),
                Sign("="),
                text("it's"),
                End
            ]
        );
        assert_eq!(read("json[a b] 18446744073709551615")[..2], {
            let whole = L(Literal::Int(u64::MAX.into()));
            [name("json[a b]"), whole]
        });
        assert_eq!(
            read(".5 TRUE")[..2],
            [L(Literal::Float(0.5)), L(Literal::Bool(true))]
        );
    }

    #[test]
    fn a_fault_is_told_with_its_place() {
        for (text, at, what) in [
            ("größe > 'x", 9, "never closed"),
            ("a ; b", 3, "';'"),
            ("a = 1x", 5, "'1x'"),
            ("a = -inf", 5, "'-inf'"),
            ("a = 1e999", 5, "'1e999'"),
        ] {
            let fault = words(text).unwrap_err();
            assert_eq!(fault.at, at, "{text}");
            assert!(fault.what.contains(what), "{fault:?}");
        }
    }
}
