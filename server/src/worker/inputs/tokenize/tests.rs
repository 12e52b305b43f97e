use super::*;

const SHAPE: TextShape = TextShape {
    length: 5,
    pad_id: 0,
    vocab_size: 6,
    end: End::Id(2),
    clean: Clean::Nothing,
    separator: None,
};

/// Words a, b, c between <s> and </s>.
fn json(post_processor: &str) -> String {
    format!(
        r#"{{"version": "1.0", 
        "truncation": {{"direction": "Left", "max_length": 2, "strategy": "LongestFirst",
        "stride": 0}},
        "padding": null, "added_tokens": [], "normalizer": {{"type": "Lowercase"}},
        "pre_tokenizer": {{"type": "Whitespace"}},
        "post_processor": {post_processor}, "decoder": null, "model": {{"type": "WordLevel",
        "unk_token": "<pad>",
        "vocab": {{"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}}}}}}"#
    )
}

const TEMPLATE: &str = r#"{"type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}}],
    "pair": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
        "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}}"#;

#[test]
fn captions_are_cut_and_padded_to_the_models_length() {
    let tokenizer = Tokenizer::parse(json(TEMPLATE).as_bytes(), &SHAPE).unwrap();
    assert_eq!(tokenizer.encode("A b").unwrap(), [1, 3, 4, 2, 0]);
    assert_eq!(
        tokenizer.encode("a b c a b c").unwrap(),
        [1, 3, 4, 5, 2],
        "the end token is kept"
    );
    assert_eq!(tokenizer.encode("").unwrap(), [1, 2, 0, 0, 0]);
    for long in [
        "a ".repeat(CAPTION_BYTES_MAX),
        "é".repeat(CAPTION_BYTES_MAX),
    ] {
        let ids = tokenizer.encode(&long).unwrap();
        assert_eq!(
            ids.len(),
            SHAPE.length,
            "only its beginning counts, as always"
        );
    }
    let longer =
        Tokenizer::parse(json(TEMPLATE).as_bytes(), &TextShape { length: 6, ..SHAPE }).unwrap();
    assert_ne!(longer.digest(), tokenizer.digest());
}

#[test]
fn a_siglip_tokenizer_lower_cases_and_takes_punctuation_out() {
    let words = |normalizer: &str| {
        let json = json(TEMPLATE)
            .replace(r#"{"type": "Lowercase"}"#, normalizer)
            .replace(
                r#""a": 3, "b": 4, "c": 5"#,
                r#""two": 3, "dogs": 4, "here": 5"#,
            );
        Tokenizer::parse(json.as_bytes(), &TextShape { length: 6, ..SHAPE }).unwrap()
    };
    let as_saved = words(r#"{"type": "NFKC"}"#);
    let error = as_saved.check_siglip(true).unwrap_err();
    assert_eq!(error.reason(), Reason::TokenizerMismatch);
    assert!(error.to_string().contains("superbatch.siglip"), "{error}");
    let punctuation = r#"{"type": "Replace", "pattern": {"Regex": "[,!]"}, "content": ""}"#;
    let made = format!(
        r#"{{"type": "Sequence", "normalizers": [{{"type": "Lowercase"}}, {punctuation}]}}"#
    );
    words(&made).check_siglip(true).unwrap();
    // With do_lower_case false, upper case stays.
    let cased = words(punctuation);
    cased.check_siglip(false).unwrap();
    assert!(cased.check_siglip(true).is_err());
    let error = as_saved.check_siglip(false).unwrap_err();
    assert!(error.to_string().contains("punctuation"), "{error}");
}

#[test]
fn a_separator_may_be_nothing_to_the_model() {
    let shape = TextShape {
        end: End::Anywhere,
        separator: Some(2),
        ..SHAPE
    };
    let tokenizer = Tokenizer::parse(json(TEMPLATE).as_bytes(), &shape).unwrap();
    assert_eq!(tokenizer.encode("a b").unwrap(), [1, 3, 4, 0, 0]);
    let kept = Tokenizer::parse(json(TEMPLATE).as_bytes(), &SHAPE).unwrap();
    assert_ne!(tokenizer.digest(), kept.digest());
    assert!(tokenizer.described().ends_with("to 5, id 2 made 0"));
}

#[test]
fn captions_that_do_not_end_with_their_largest_id_are_refused() {
    let shape = |vocabulary: &str| {
        let json = json(TEMPLATE).replace(r#""</s>": 2, "a": 3, "b": 4, "c": 5"#, vocabulary);
        let json = json.replace(r#""ids": [2]"#, r#""ids": [5]"#);
        let largest = TextShape {
            end: End::Largest,
            ..SHAPE
        };
        Tokenizer::parse(json.as_bytes(), &largest).map(drop)
    };
    shape(r#""a": 2, "b": 3, "c": 4, "</s>": 5"#).unwrap();
    let largest = TextShape {
        end: End::Largest,
        ..SHAPE
    };
    for json in [json(TEMPLATE), json("null")] {
        let error = Tokenizer::parse(json.as_bytes(), &largest)
            .map(drop)
            .unwrap_err();
        assert_eq!(error.reason(), Reason::TokenizerMismatch);
        assert!(error.to_string().contains("largest id"), "{error}");
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let without_end = json("null");
    for (json, shape) in [
        ("{}".to_owned(), SHAPE),
        (
            json(TEMPLATE),
            TextShape {
                vocab_size: 5,
                ..SHAPE
            },
        ),
        (json(TEMPLATE), TextShape { pad_id: 6, ..SHAPE }),
        (json(TEMPLATE), TextShape { length: 1, ..SHAPE }),
        (without_end.clone(), SHAPE),
    ] {
        let error = Tokenizer::parse(json.as_bytes(), &shape)
            .map(drop)
            .unwrap_err();
        assert_eq!(error.reason(), Reason::TokenizerMismatch, "{shape:?}");
    }
    assert!(
        Tokenizer::parse(
            without_end.as_bytes(),
            &TextShape {
                end: End::Anywhere,
                ..SHAPE
            }
        )
        .is_ok()
    );
}
