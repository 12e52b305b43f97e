//! Finds the id with which a tokenizer pads captions. Models that pool the last token depend on it,
//! and their configurations often leave it out. transformers then takes the default of the
//! configuration's class, which differs from the tokenizer's id.
use serde_json::Value;

/// Returns the padding id that the tokenizer's files name: in `tokenizer.json`, or by its token in
/// `tokenizer_config.json`. If neither names one and `by_name` is set, returns the id of the token
/// `<pad>`.
pub fn declared(tokenizer: &[u8], config: Option<&[u8]>, by_name: bool) -> Option<i64> {
    let tokenizer: Value = serde_json::from_slice(tokenizer).ok()?;
    if let Some(id) = tokenizer.pointer("/padding/pad_id").and_then(Value::as_i64) {
        return Some(id);
    }
    let config: Option<Value> = config.and_then(|config| serde_json::from_slice(config).ok());
    let token = config
        .as_ref()
        .and_then(|config| named(config, "pad_token"));
    match token {
        Some(token) => id_of(&tokenizer, token),
        None if by_name => id_of(&tokenizer, "<pad>"),
        None => None,
    }
}

/// Returns the id of the separator that the tokenizer's files name; by default BERT's `[SEP]`.
pub fn separator(tokenizer: &[u8], config: Option<&[u8]>) -> Option<i64> {
    let tokenizer: Value = serde_json::from_slice(tokenizer).ok()?;
    let config: Option<Value> = config.and_then(|config| serde_json::from_slice(config).ok());
    let token = config
        .as_ref()
        .and_then(|config| named(config, "sep_token"));
    id_of(&tokenizer, token.unwrap_or("[SEP]"))
}

/// Returns the class of transformers that the tokenizer was saved from.
pub fn class(config: Option<&[u8]>) -> Option<String> {
    let config: Value = serde_json::from_slice(config?).ok()?;
    config.get("tokenizer_class")?.as_str().map(str::to_owned)
}

/// Returns whether the class of transformers lower-cases texts, as `SiglipTokenizer` does unless
/// `do_lower_case` says otherwise.
pub fn lowers(config: Option<&[u8]>) -> bool {
    let config: Option<Value> = config.and_then(|config| serde_json::from_slice(config).ok());
    let said = config
        .as_ref()
        .and_then(|config| config.get("do_lower_case"));
    said.and_then(Value::as_bool).unwrap_or(true)
}

/// Returns a special token of `tokenizer_config.json`.
fn named<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    let token = config.get(key)?;
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn id_of(tokenizer: &Value, token: &str) -> Option<i64> {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array);
    let added = added.into_iter().flatten();
    let mut named =
        added.filter(|known| known.get("content").and_then(Value::as_str) == Some(token));
    if let Some(id) = named.next().and_then(|known| known.get("id")?.as_i64()) {
        return Some(id);
    }
    match tokenizer.pointer("/model/vocab")? {
        // Unigram: tokens with their scores, by id.
        Value::Array(tokens) => {
            let is_it = |entry: &Value| entry.get(0).and_then(Value::as_str) == Some(token);
            tokens.iter().position(is_it).map(|id| id as i64)
        }
        vocabulary => vocabulary.get(token)?.as_i64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_says_what_it_pads_with() {
        let unigram = br#"{"added_tokens": [{"id": 7, "content": "</s>"}],
            "model": {"vocab": [["<pad>", 0.0], ["a", -1.0]]}}"#;
        let of = |config: &str, by_name| declared(unigram, Some(config.as_bytes()), by_name);
        assert_eq!(of(r#"{"pad_token": "</s>"}"#, true), Some(7));
        assert_eq!(of(r#"{"pad_token": {"content": "<pad>"}}"#, false), Some(0));
        assert_eq!(of("{}", true), Some(0));
        assert_eq!(of("{}", false), None);
        let own = br#"{"padding": {"pad_id": 4}, "model": {"vocab": {"<pad>": 1}}}"#;
        assert_eq!(declared(own, None, true), Some(4));
        assert_eq!(
            declared(br#"{"model": {"vocab": {"<pad>": 1}}}"#, None, true),
            Some(1)
        );
    }

    #[test]
    fn a_siglip_tokenizer_lower_cases_unless_it_says_otherwise() {
        assert!(lowers(None) && lowers(Some(b"{}")) && lowers(Some(br#"{"do_lower_case": true}"#)));
        assert!(!lowers(Some(br#"{"do_lower_case": false}"#)));
    }

    #[test]
    fn the_separator_is_found_by_its_name() {
        let bert = br#"{"added_tokens": [{"id": 102, "content": "[SEP]"}],
            "model": {"vocab": {"[SEP]": 102, "<end>": 7}}}"#;
        assert_eq!(separator(bert, None), Some(102));
        assert_eq!(separator(bert, Some(br#"{"sep_token": "<end>"}"#)), Some(7));
        assert_eq!(separator(bert, Some(br#"{"sep_token": "</s>"}"#)), None);
    }
}
