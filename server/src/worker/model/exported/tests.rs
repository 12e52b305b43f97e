use super::*;

const JSON: &str = r#"{"image_size": 8, "embedding_dim": 4, "text_length": 5,
    "vocab_size": 9, "image_flops": 1, "text_flops": 1}"#;

#[test]
fn only_what_the_operator_names_is_loaded() {
    assert_eq!(allowed(&[]).unwrap_err().value("file"), Some(MODULE));
    let module = Bytes::from_static(b"code");
    let error = config(JSON.as_bytes(), module.clone(), &["0".repeat(64)]).unwrap_err();
    let sha256 = "5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b";
    assert!(error.to_string().contains(sha256), "{error}");
    // It is looked into only now, and is none.
    let error = config(JSON.as_bytes(), module, &[sha256.to_owned()]).unwrap_err();
    assert!(
        error.to_string().contains("no TorchScript module"),
        "{error}"
    );
}

#[test]
fn sizes_are_bounded_before_anything_is_made_of_them() {
    let module = Bytes::from_static(b"code");
    let sha256 = ["5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b".into()];
    for (name, most) in [
        ("image_size", IMAGE_SIZE_MAX),
        ("embedding_dim", EMBEDDING_DIM_MAX),
        ("text_length", TEXT_LENGTH_MAX),
        ("vocab_size", VOCABULARY_MAX),
    ] {
        let field = |size: usize| {
            let mut json: Value = serde_json::from_str(JSON).unwrap();
            json[name] = size.into();
            let json = json.to_string();
            let error = config(json.as_bytes(), module.clone(), &sha256).unwrap_err();
            error.value("field").map(str::to_owned)
        };
        assert_eq!(field(most + 1).as_deref(), Some(name));
        assert_ne!(field(most).as_deref(), Some(name));
    }
}

#[test]
fn what_is_missing_is_named() {
    let (module, sha256) = (
        Bytes::from_static(b"code"),
        "5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b".to_owned(),
    );
    let names = [
        "image_size",
        "embedding_dim",
        "text_length",
        "vocab_size",
        "image_flops",
        "text_flops",
    ];
    for name in names {
        let mut json: Value = serde_json::from_str(JSON).unwrap();
        json.as_object_mut().unwrap().remove(name);
        let json = json.to_string();
        let error = config(
            json.as_bytes(),
            module.clone(),
            std::slice::from_ref(&sha256),
        )
        .unwrap_err();
        assert_eq!(error.value("field"), Some(name));
    }
}

const LOSSES: &str = r#"{"gives": "loss_per_example", "input": "text", "target": "class",
    "classes": 3, "text_length": 5, "vocab_size": 9, "flops": 1}"#;

/// What is refused of a changed `module.json`, before the module is looked into.
fn refused(change: impl Fn(&mut Value)) -> Option<String> {
    let mut json: Value = serde_json::from_str(LOSSES).unwrap();
    change(&mut json);
    let error = described_by(&json).err()?;
    Some(error.value("field").unwrap_or_default().to_owned())
}

fn described_by(json: &Value) -> Result<Described> {
    described(&Fields::root_of(FILE, json)?)
}

#[test]
fn what_a_module_of_losses_takes_is_read_and_bounded() {
    let json: Value = serde_json::from_str(LOSSES).unwrap();
    let (config, flops, form) = described_by(&json).unwrap();
    // Five tokens, then the class, and whatever either is lies below 9.
    let text = &config.text;
    assert_eq!(
        (
            text.max_position_embeddings,
            text.vocab_size,
            config.embedding_dim
        ),
        (6, 9, LossForm::WIDTH)
    );
    assert_eq!((config.vision.image_size, flops), (0, [0.0, 1.0]));
    assert_eq!(form.unwrap().to_string(), "text and one of 3 classes");
    for field in [
        "input",
        "target",
        "classes",
        "text_length",
        "vocab_size",
        "flops",
    ] {
        let missing = refused(|json| {
            json.as_object_mut().unwrap().remove(field);
        });
        assert_eq!(missing.as_deref(), Some(field));
    }
    for (field, value) in [
        ("gives", Value::from("logits")),
        ("input", "audio".into()),
        ("target", "box".into()),
        ("classes", (1_u64 << 25).into()),
        ("classes", 0.into()),
        ("text_length", (TEXT_LENGTH_MAX + 1).into()),
        ("vocab_size", (VOCABULARY_MAX + 1).into()),
    ] {
        let found = refused(|json| json[field] = value.clone());
        assert_eq!(found.as_deref(), Some(field), "{value}");
    }
}

#[test]
fn losses_of_tokens_are_those_of_a_text() {
    let mut json: Value = serde_json::from_str(LOSSES).unwrap();
    json["gives"] = "loss_per_token".into();
    json["tokens"] = 4.into();
    let field = |json: &Value| {
        let error = described_by(json).err()?;
        error.value("field").map(str::to_owned)
    };
    assert_eq!(field(&json).as_deref(), Some("target"), "a class has none");
    json["target"] = "text".into();
    let (config, _, form) = described_by(&json).unwrap();
    assert_eq!(config.embedding_dim, LossForm::WIDTH + 4);
    assert_eq!(form.unwrap().method(), "loss_per_token");
    for tokens in [0, 1 << 14] {
        json["tokens"] = tokens.into();
        assert_eq!(field(&json).as_deref(), Some("tokens"), "{tokens}");
    }
}

#[test]
fn a_classifier_of_images_needs_no_words() {
    let json = serde_json::json!({
        "gives": "loss_per_example", "input": "image", "image_size": 8, "target": "class",
        "classes": 3, "flops": 2
    });
    let (config, flops, form) = described_by(&json).unwrap();
    assert_eq!((config.vision.image_size, flops), (8, [2.0, 0.0]));
    assert!(!form.unwrap().has_text());
}
