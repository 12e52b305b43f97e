//! Makes CLIP's tokenizer from `vocab.json` and `merges.txt`, the files of older folders.
use crate::error::{Error, Result};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use superbatch_proto::v1::Reason;

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Returns the `tokenizer.json` that transformers would write for these files.
///
/// # Errors
/// `ModelInvalid` naming the file that is no vocabulary or no list of merges.
pub(super) fn tokenizer(vocabulary: &[u8], merges: &[u8]) -> Result<Bytes> {
    let wrong = |file: &str, what: &str| {
        Error::new(Reason::ModelInvalid, format!("{file} {what}")).with("file", file)
    };
    let vocabulary: Map<String, Value> = serde_json::from_slice(vocabulary)
        .map_err(|e| wrong("vocab.json", "is no JSON object of tokens and ids").because(e))?;
    let merges =
        std::str::from_utf8(merges).map_err(|e| wrong("merges.txt", "is no text").because(e))?;
    let merges: Vec<Vec<&str>> = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.trim().is_empty())
        .map(|line| line.split(' ').collect())
        .collect();
    if merges.iter().any(|pair| pair.len() != 2) {
        return Err(wrong("merges.txt", "has a line that is no pair of tokens"));
    }
    let id = |token: &str| {
        let missing = || wrong("vocab.json", &format!("has no token {token}"));
        vocabulary
            .get(token)
            .and_then(Value::as_u64)
            .ok_or_else(missing)
    };
    let (start, end) = (id(START)?, id(END)?);
    let special = |id: u64, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": true, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(start, START), special(end, END)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
             "use_regex": true}]},
        "post_processor": {"type": "RobertaProcessing", "sep": [END, end], "cls": [START, start],
                           "trim_offsets": false, "add_prefix_space": false},
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": END, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": false, "vocab": vocabulary,
                  "merges": merges},
    });
    let bytes = serde_json::to_vec(&tokenizer);
    bytes
        .map(Bytes::from)
        .map_err(|e| Error::internal("cannot write a tokenizer").because(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCABULARY: &str = r#"{"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4,
        "<|startoftext|>": 5, "<|endoftext|>": 6}"#;

    #[test]
    fn words_are_merged_between_start_and_end() {
        let json = tokenizer(VOCABULARY.as_bytes(), b"#version: 0.2\na b</w>\n").unwrap();
        let tokenizer = tokenizers::Tokenizer::from_bytes(&json).unwrap();
        let ids = |caption: &str| tokenizer.encode(caption, true).unwrap().get_ids().to_vec();
        assert_eq!(ids("AB  a"), [5, 4, 2, 6]);
        assert_eq!(ids(""), [5, 6]);
    }

    #[test]
    fn files_that_are_none_are_named() {
        for (vocabulary, merges, file) in [
            ("[]", "", "vocab.json"),
            ("{}", "", "vocab.json"),
            (VOCABULARY, "a b c", "merges.txt"),
        ] {
            let error = tokenizer(vocabulary.as_bytes(), merges.as_bytes()).unwrap_err();
            assert_eq!(error.value("file"), Some(file));
        }
    }
}
