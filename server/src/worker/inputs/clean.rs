//! Cleans captions as open_clip does before it tokenizes: `ftfy.fix_text`, HTML's references taken
//! out twice, then white space, punctuation and case.
//!
//! Of ftfy's repairs, the one of text that was decoded by a wrong encoding (mojibake) is left out:
//! it is a guess over many encodings. What ftfy would repair so keeps its characters.
mod entities;
mod fixed;

use crate::worker::model::open_clip_config::Clean;
use std::borrow::Cow;

/// Changes with what is cleaned, so that texts embedded before are not taken for those of now.
pub(super) const VERSION: u32 = 2;

/// Returns the caption as the tokenizer is to see it.
pub(super) fn clean(caption: &str, how: Clean) -> Cow<'_, str> {
    let basic = || {
        let fixed = fixed::fixed(caption);
        entities::unescaped(&entities::unescaped(&fixed)).into_owned()
    };
    Cow::Owned(match how {
        Clean::Nothing => return Cow::Borrowed(caption),
        Clean::Whitespace => spaced(&basic()),
        Clean::Lower => spaced(&basic()).to_lowercase(),
        Clean::Canonicalize => {
            let text = basic().replace('_', " ");
            spaced(
                &text
                    .replace(|c: char| c.is_ascii_punctuation(), "")
                    .to_lowercase(),
            )
        }
    })
}

/// Joins the words by single spaces.
fn spaced(text: &str) -> String {
    // Python's white space is Unicode's and four separators.
    let is_space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
    let words: Vec<&str> = text
        .split(is_space)
        .filter(|word| !word.is_empty())
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_are_cleaned_as_open_clip_does() {
        let caption = "  A dog\u{2019}s\u{3000}house &amp;amp; <garden>_x\r\n";
        for (how, expected) in [
            (Clean::Nothing, caption),
            (Clean::Whitespace, "A dog's house & <garden>_x"),
            (Clean::Lower, "a dog's house & <garden>_x"),
            (Clean::Canonicalize, "a dogs house garden x"),
        ] {
            assert_eq!(clean(caption, how), expected, "{how:?}");
        }
    }
}
