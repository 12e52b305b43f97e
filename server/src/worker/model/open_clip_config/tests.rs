use super::*;
use superbatch_proto::v1::Reason;

const SIGLIP: &str = r#"{"model_cfg": {
    "embed_dim": 768, "init_logit_bias": -10, "custom_text": true,
    "vision_cfg": {"image_size": 224, "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": false, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"context_length": 64, "vocab_size": 32000, "hf_tokenizer_name":
        "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 768, "heads": 12, "layers": 12,
        "no_causal_mask": true, "proj_bias": true, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6}}}}"#;

fn form(config: &ModelConfig) -> OpenClipForm {
    match config.family {
        Family::OpenClip(form) => form,
        other => panic!("{other:?}"),
    }
}

#[test]
fn defaults_are_open_clips() {
    let config = parse(br#"{"model_cfg": {"embed_dim": 512}}"#).unwrap();
    let (vision, text) = (&config.vision, &config.text);
    assert_eq!((vision.image_size, vision.patch_size), (224, 16));
    assert_eq!(vision.tower.num_attention_heads, 12);
    assert_eq!(vision.tower.hidden_act, Activation::Gelu);
    assert_eq!(
        (text.max_position_embeddings, text.vocab_size),
        (77, 49_408)
    );
    assert_eq!(
        (text.tower.hidden_size, text.tower.layer_norm_eps),
        (512, 1e-5)
    );
    let form = form(&config);
    assert_eq!((form.pool, form.clean), (TextPool::Argmax, Clean::Lower));
    assert!(form.causal && !form.custom_text);
    let quick = parse(br#"{"model_cfg": {"embed_dim": 512, "quick_gelu": true}}"#).unwrap();
    assert_eq!(quick.text.tower.hidden_act, Activation::QuickGelu);
}

#[test]
fn siglip_is_a_trunk_of_timm() {
    let config = parse(SIGLIP.as_bytes()).unwrap();
    let form = form(&config);
    assert_eq!(form.vision, VisionForm::Timm { projection: None });
    assert_eq!(
        (form.pool, form.clean),
        (TextPool::Last, Clean::Canonicalize)
    );
    assert_eq!(form.text_projection, TextProjection::Linear);
    assert_eq!((config.vision.patch_size, config.vision.grid()), (16, 14));
    assert_eq!(config.vision.tower.layer_norm_eps, 1e-6);
}

#[test]
fn clipa_strips_the_separator() {
    let of = |kwargs: &str| {
        let json = format!(
            r#"{{"model_cfg": {{"text_cfg": {{"hf_tokenizer_name": "bert-base-uncased",
            "tokenizer_kwargs": {kwargs}}}}}}}"#
        );
        form(&parse(json.as_bytes()).unwrap())
    };
    let clipa = of(r#"{"strip_sep_token": true}"#);
    assert!(clipa.strips_separator);
    assert_eq!(clipa.clean, Clean::Whitespace);
    assert!(!of("{}").strips_separator);
}

#[test]
fn towers_that_are_not_known_are_refused_by_name() {
    for (part, field, says) in [
        (
            r#""vision_cfg": {"layers": [3, 4, 6, 3]}"#,
            "vision_cfg.layers",
            "ResNet",
        ),
        (
            r#""vision_cfg": {"timm_model_name": "convnext_base"}"#,
            "vision_cfg.timm_model_name",
            "convnext_base",
        ),
        (
            r#""vision_cfg": {"attentional_pool": true}"#,
            "vision_cfg.attentional_pool",
            "CoCa",
        ),
        (
            r#""vision_cfg": {"ls_init_value": 0.1}"#,
            "vision_cfg.ls_init_value",
            "layer scale",
        ),
        (
            r#""vision_cfg": {"depth": 3}"#,
            "vision_cfg.depth",
            "not known",
        ),
        (
            r#""text_cfg": {"hf_model_name": "roberta-base"}"#,
            "text_cfg.hf_model_name",
            "transformers",
        ),
        (
            r#""text_cfg": {"embed_cls": true}"#,
            "text_cfg.embed_cls",
            "CoCa",
        ),
        (
            r#""multimodal_cfg": {"layers": 3}"#,
            "model_cfg.multimodal_cfg",
            "CoCa",
        ),
        (
            r#""text_cfg": {"tokenizer_mode": "clips"}"#,
            "text_cfg.tokenizer_mode",
            "special tokens",
        ),
        (
            r#""text_cfg": {"tokenizer_kwargs": {"reduction_mask": "random"}}"#,
            "tokenizer_kwargs.reduction_mask",
            "not known",
        ),
        (
            r#""text_cfg": {"norm_kwargs": {"bias": false}}"#,
            "norm_kwargs.bias",
            "not known",
        ),
        (
            r#""vision_cfg": {"act_kwargs": {"inplace": true}}"#,
            "act_kwargs.inplace",
            "not known",
        ),
    ] {
        let json = format!(r#"{{"model_cfg": {{"embed_dim": 512, {part}}}}}"#);
        let error = parse(json.as_bytes()).unwrap_err();
        assert_eq!(
            (error.reason(), error.value("field")),
            (Reason::ModelInvalid, Some(field))
        );
        assert_eq!(error.value("file"), Some(FILE));
        assert!(error.to_string().contains(says), "{error}");
        assert!(error.to_string().contains("as TorchScript"), "{error}");
    }
    for part in [
        r#""vision_cfg": {"attentional_pool": false, "ls_init_value": null}"#,
        r#""text_cfg": {"tokenizer_mode": null}"#,
        r#""text_cfg": {"tokenizer_mode": "", "block_type": "default"}"#,
    ] {
        parse(format!(r#"{{"model_cfg": {{{part}}}}}"#).as_bytes()).unwrap();
    }
}
