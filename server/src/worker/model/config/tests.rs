use super::*;
use superbatch_proto::v1::Reason;

#[test]
fn absent_keys_take_transformers_defaults() {
    let config = ModelConfig::parse(
        br#"{"model_type": "siglip", "text_config": {"projection_size": null}}"#,
    )
    .unwrap();
    assert_eq!(
        (
            config.vision.image_size,
            config.vision.patch_size,
            config.embedding_dim
        ),
        (224, 16, 768)
    );
    assert_eq!(
        (config.text.vocab_size, config.text.max_position_embeddings),
        (32_000, 64)
    );
    assert_eq!(
        (
            config.text.tower.layer_norm_eps,
            config.text.tower.hidden_act
        ),
        (1e-6, Activation::GeluTanh)
    );
    let config = ModelConfig::parse(br#"{"model_type": "clip"}"#).unwrap();
    assert_eq!(
        (
            config.vision.patch_size,
            config.vision.tower.hidden_size,
            config.embedding_dim
        ),
        (32, 768, 512)
    );
    assert_eq!(
        (
            config.text.tower.hidden_size,
            config.text.tower.num_attention_heads
        ),
        (512, 8)
    );
    assert_eq!(
        (
            config.text.eos_token_id,
            config.text.max_position_embeddings
        ),
        (49_407, 77)
    );
    assert_eq!(
        (config.text.tower.hidden_act, config.logit_scale_init),
        (Activation::QuickGelu, 2.6592)
    );
}

#[test]
fn what_is_not_supported_is_refused_by_field() {
    for (json, field) in [
        (r#"{"model_type": "coca"}"#, "model_type"),
        (
            r#"{"model_type": "siglip2", "vision_config": {"model_type": "siglip_vision_model"}}"#,
            "vision_config.model_type",
        ),
        (
            r#"{"model_type": "siglip2", "vision_config": {"num_patches": 200}}"#,
            "vision_config.num_patches",
        ),
        (
            r#"{"model_type": "siglip2", "vision_config": {"vision_use_head": false}}"#,
            "vision_config.vision_use_head",
        ),
        (
            r#"{"model_type": "siglip", "vision_config": {"model_type": "siglip2_vision_model"}}"#,
            "vision_config.model_type",
        ),
        (
            r#"{"model_type": "siglip", "vision_config": {"hidden_size": "x"}}"#,
            "vision_config.hidden_size",
        ),
        (
            r#"{"model_type": "siglip", "vision_config": {"vision_use_head": false}}"#,
            "vision_config.vision_use_head",
        ),
        (
            r#"{"model_type": "siglip", "text_config": {"projection_size": 64}}"#,
            "text_config.projection_size",
        ),
        (
            r#"{"model_type": "clip", "text_config": {"hidden_act": "relu"}}"#,
            "text_config.hidden_act",
        ),
        (
            r#"{"model_type": "clip", "vision_config": {"num_attention_heads": 7}}"#,
            "vision_config.num_attention_heads",
        ),
        (
            r#"{"model_type": "clip", "vision_config": {"patch_size": 225}}"#,
            "vision_config.patch_size",
        ),
        (
            r#"{"model_type": "clip", "vision_config": 3}"#,
            "vision_config",
        ),
    ] {
        let error = ModelConfig::parse(json.as_bytes()).unwrap_err();
        assert_eq!(
            (error.reason(), error.value("field")),
            (Reason::ModelInvalid, Some(field)),
            "{json}"
        );
    }
    assert_eq!(
        ModelConfig::parse(b"{").unwrap_err().value("file"),
        Some("config.json")
    );
}

#[test]
fn a_naflex_siglip2_has_positions_in_the_place_of_a_size() {
    let json = br#"{"model_type": "siglip2", "vision_config": {"num_patches": 196,
        "patch_size": 14}}"#;
    let mut config = ModelConfig::parse(json).unwrap();
    assert_eq!(config.model_type(), "siglip2");
    assert_eq!((config.vision.grid(), config.vision.image_size), (14, 196));
    assert_eq!(config.resizes, Resizes::NAFLEX);
    // How many patches an image has is not how many positions there are.
    config.take_max_patches(b"{}").unwrap();
    assert_eq!(config.vision.patches(), 256);
    config
        .take_max_patches(br#"{"max_num_patches": 1024}"#)
        .unwrap();
    assert_eq!((config.vision.patches(), config.vision.grid()), (1024, 14));
    let parameters = config.parameters();
    let shape = |name: &str| parameters.get(name).unwrap().shape.clone();
    let at = "vision_model.embeddings";
    let (patches, positions) = ("patch_embedding.weight", "position_embedding.weight");
    assert_eq!(shape(&format!("{at}.{patches}")), [768, 14 * 14 * 3]);
    assert_eq!(shape(&format!("{at}.{positions}")), [196, 768]);
    for (json, field) in [
        (&b"[]"[..], None),
        (&br#"{"max_num_patches": 0}"#[..], Some("max_num_patches")),
    ] {
        let error = config.take_max_patches(json).unwrap_err();
        assert_eq!(
            (error.value("file"), error.value("field")),
            (Some("preprocessor_config.json"), field)
        );
    }
    let fixed = br#"{"model_type": "siglip", "text_config": {"model_type": "siglip2_text_model"}}"#;
    let mut fixed = ModelConfig::parse(fixed).unwrap();
    fixed.take_max_patches(b"[]").unwrap();
    assert_eq!(
        (fixed.model_type(), fixed.vision.patches()),
        ("siglip", 196)
    );
}

#[test]
fn old_clip_sections_replace_the_new_ones_whole() {
    // As transformers reads the configurations that OpenAI's checkpoints came with.
    let json = br#"{"model_type": "clip",
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        "text_config": {"hidden_size": 768, "eos_token_id": 2, "num_hidden_layers": 3},
        "vision_config_dict": null,
        "vision_config": {"num_hidden_layers": 5}}"#;
    let config = ModelConfig::parse(json).unwrap();
    assert_eq!(
        (
            config.text.tower.hidden_size,
            config.text.tower.num_hidden_layers
        ),
        (768, 12)
    );
    assert_eq!(
        (
            config.text.eos_token_id,
            config.vision.tower.num_hidden_layers
        ),
        (49_407, 5)
    );
}
