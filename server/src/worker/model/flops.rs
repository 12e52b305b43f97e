//! The cost of a forward pass: 2 FLOPs for each multiply-add of every matrix product, attention
//! included (a causal mask saves nothing here). Operations that are linear in the activations count
//! as nothing.
use super::{
    config::{Family, ModelConfig, Tower},
    open_clip_config::VisionForm,
};
use crate::fidelity::ImageTower;

/// Returns the sizes and costs of a model's image tower.
pub fn image_tower(config: &ModelConfig) -> ImageTower {
    let (vision, layers) = (&config.vision, config.vision.tower.num_hidden_layers);
    if let Some(exported) = &config.exported {
        return ImageTower {
            image_size: vision.image_size as u32,
            constant: exported.flops[0],
            ..Default::default()
        };
    }
    let [constant, per_patch, per_patch_pair] = parabola(|n| image_of(config, layers, n));
    let layer = |n| image_of(config, layers, n) - image_of(config, layers - 1, n);
    let [layer_constant, layer_per_patch, layer_per_patch_pair] = parabola(layer);
    ImageTower {
        image_size: vision.image_size as u32,
        patch_size: vision.patch_size as u32,
        layers: layers as u32,
        constant,
        per_patch,
        per_patch_pair,
        layer_constant,
        layer_per_patch,
        layer_per_patch_pair,
        per_pixel: 2.0 * 3.0 * vision.tower.hidden_size as f64,
        max_patches: vision.max_patches.unwrap_or(0) as u32,
    }
}

/// Returns the coefficients of a parabola, which is known by three of its points.
fn parabola(of: impl Fn(f64) -> f64) -> [f64; 3] {
    let [none, one, two] = [0.0, 1.0, 2.0].map(of);
    let square = (two - 2.0 * one + none) / 2.0;
    [none, one - none - square, square]
}

/// What a caption of t tokens costs: `constant + per_token * t + per_token_pair * t²` FLOPs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TextTower {
    constant: f64,
    per_token: f64,
    per_token_pair: f64,
}

impl TextTower {
    pub fn of(config: &ModelConfig) -> Self {
        let [constant, per_token, per_token_pair] = parabola(|tokens| text_of(config, tokens));
        Self {
            constant,
            per_token,
            per_token_pair,
        }
    }

    /// Returns the FLOPs to embed one caption of so many tokens.
    pub fn flops(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        self.constant + self.per_token * tokens + self.per_token_pair * tokens * tokens
    }
}

/// Returns the FLOPs to embed one image at full fidelity.
pub fn image(config: &ModelConfig) -> f64 {
    if let Some(exported) = &config.exported {
        return exported.flops[0];
    }
    let depth = config.vision.tower.num_hidden_layers;
    image_of(config, depth, config.vision.patches() as f64)
}

/// Returns the FLOPs of one image of so many patches, through so many layers.
fn image_of(config: &ModelConfig, depth: usize, patches: f64) -> f64 {
    let tower = &Tower {
        num_hidden_layers: depth,
        ..config.vision.tower.clone()
    };
    let patch = config.vision.patch_size as f64;
    let d = tower.hidden_size as f64;
    let embed = patches * 3.0 * patch * patch * d;
    let rest = match config.family {
        Family::Siglip => layers(tower, patches) + pooling(tower, patches),
        Family::Clip => layers(tower, patches + 1.0) + d * config.embedding_dim as f64,
        Family::OpenClip(form) => match form.vision {
            VisionForm::Vit { .. } => {
                layers(tower, patches + 1.0) + d * config.embedding_dim as f64
            }
            VisionForm::Timm { projection } => {
                let projection = projection.map_or(0.0, |_| d * config.embedding_dim as f64);
                layers(tower, patches) + pooling(tower, patches) + projection
            }
        },
        Family::Exported => 0.0,
    };
    2.0 * (embed + rest)
}

/// Returns the FLOPs to embed one caption of the model's whole length.
pub fn text(config: &ModelConfig) -> f64 {
    text_of(config, config.text.max_position_embeddings as f64)
}

fn text_of(config: &ModelConfig, tokens: f64) -> f64 {
    if let Some(exported) = &config.exported {
        return exported.flops[1];
    }
    let tower = &config.text.tower;
    let projection = (tower.hidden_size * config.embedding_dim) as f64;
    2.0 * (layers(tower, tokens) + projection)
}

/// Returns multiply-adds of all layers over `t` tokens: four projections, scores and their weighted
/// sum, two MLP layers.
fn layers(tower: &Tower, t: f64) -> f64 {
    let (d, inner) = (tower.hidden_size as f64, tower.intermediate_size as f64);
    tower.num_hidden_layers as f64 * (4.0 * t * d * d + 2.0 * t * t * d + 2.0 * t * d * inner)
}

/// Returns multiply-adds of SigLIP's pooling head: one query, keys and values of `t` tokens, one
/// MLP.
fn pooling(tower: &Tower, t: f64) -> f64 {
    let (d, inner) = (tower.hidden_size as f64, tower.intermediate_size as f64);
    2.0 * d * d + 2.0 * t * d * d + 2.0 * t * d + 2.0 * d * inner
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fidelity::Fidelity, worker::model::config::VisionConfig};

    fn config(json: &str) -> ModelConfig {
        ModelConfig::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_small_siglip_by_hand() {
        let small = r#"{"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 2"#;
        let json = format!(
            r#"{{"model_type": "siglip",
                "vision_config": {small}, "image_size": 5, "patch_size": 2}},
                "text_config": {small}, "max_position_embeddings": 3, "vocab_size": 9}}}}"#
        );
        let config = config(&json);
        // Four patches of 12 numbers. A layer: q, k, v, out 4·(4·4·4); scores and sum 2·(4·4·4);
        // MLP 2·(4·4·6).
        let (embed, layer) = (4 * 12 * 4, 4 * 64 + 2 * 64 + 2 * 96);
        // The head: query and out 2·16; keys and values 2·(4·16); scores and sum 2·(4·4); MLP 2·24.
        let head = 32 + 128 + 32 + 48;
        assert_eq!(image(&config), f64::from(2 * (embed + layer + head)));
        // Three tokens, then the head of the last one.
        assert_eq!(
            text(&config),
            f64::from(2 * (4 * 48 + 2 * 36 + 2 * 72 + 16))
        );
    }

    #[test]
    fn smaller_images_cost_what_their_patches_do() {
        let small = r#""hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2"#;
        for family in ["siglip", "clip"] {
            let of = |side: usize| {
                config(&format!(
                    r#"{{"model_type": "{family}", "projection_dim": 16,
                        "vision_config": {{{small}, "image_size": {side}, "patch_size": 4}},
                        "text_config": {{{small}}}}}"#
                ))
            };
            let whole = TextTower::of(&of(32)).flops(of(32).text.max_position_embeddings);
            assert!((whole / text(&of(32)) - 1.0).abs() < 1e-12, "{family}");
            let tower = image_tower(&of(32));
            for side in [4, 16, 32] {
                let found = tower.flops(Fidelity::Resolution(side as u32));
                let wanted = image(&of(side));
                assert!((found / wanted - 1.0).abs() < 1e-12, "{family} {side}");
            }
            let shallow = ModelConfig {
                vision: VisionConfig {
                    tower: Tower {
                        num_hidden_layers: 5,
                        ..of(32).vision.tower
                    },
                    ..of(32).vision
                },
                ..of(32)
            };
            let found = tower.flops(Fidelity::Layers(5));
            assert!((found / image(&shallow) - 1.0).abs() < 1e-12, "{family}");
            let larger = ModelConfig {
                vision: VisionConfig {
                    patch_size: 8,
                    ..of(32).vision
                },
                ..of(32)
            };
            let found = tower.flops(Fidelity::Patch(8));
            assert!((found / image(&larger) - 1.0).abs() < 1e-12, "{family}");
        }
    }

    #[test]
    fn an_image_of_any_shape_costs_what_all_of_its_patches_do() {
        let small = r#""hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2"#;
        let of = |more: &str| {
            config(&format!(
                r#"{{"model_type": "{more}, "patch_size": 4}},
                    "text_config": {{{small}}}}}"#
            ))
        };
        let fixed = of(&format!(
            r#"siglip", "vision_config": {{{small}, "image_size": 40"#
        ));
        let mut naflex = of(&format!(
            r#"siglip2", "vision_config": {{{small}, "num_patches": 16"#
        ));
        naflex
            .take_max_patches(br#"{"max_num_patches": 100}"#)
            .unwrap();
        // A linear layer on a patch costs what the convolution does.
        assert_eq!(image(&naflex), image(&fixed));
        let found = image_tower(&naflex).flops(Fidelity::Full);
        assert!((found / image(&fixed) - 1.0).abs() < 1e-12, "{found}");
    }

    #[test]
    fn clip_vit_b_32_costs_what_is_published() {
        // ViT-B/32 at 224 pixels: 4.4 G multiply-adds for the image, 2.9 G for the caption.
        let config = config(r#"{"model_type": "clip"}"#);
        assert!(
            (image(&config) / 2e9 - 4.4).abs() < 0.1,
            "{}",
            image(&config)
        );
        assert!((text(&config) / 2e9 - 3.0).abs() < 0.1, "{}", text(&config));
    }

    /// Image full, image low, caption, caption when scored, in GFLOPs; and the price of a step of
    /// Flexi-JEST by both towers, as docs/flexi.md has them.
    fn priced(json: &str, low: u32, tokens: usize) -> [f64; 5] {
        let config = config(json);
        let tower = image_tower(&config);
        let [full, low] = [Fidelity::Full, Fidelity::Resolution(low)].map(|at| tower.flops(at));
        let (whole, cut) = (text(&config), TextTower::of(&config).flops(tokens));
        let of_full = |part: f64| part / (full + whole);
        let price = price(of_full(low + whole), of_full(low + cut));
        [full / 1e9, low / 1e9, whole / 1e9, cut / 1e9, price]
    }

    /// A step's price in uniform steps where four fifths are left out and half of the batch is
    /// trained low: `trained` and `scored` are the shares of a full forward pass that a low one
    /// costs.
    fn price(trained: f64, scored: f64) -> f64 {
        (3.0 * (1.0 + trained) / 2.0 + scored / (1.0 - 0.8)) / 3.0
    }

    #[test]
    fn prices_are_those_of_the_docs() {
        let b16 = r#"{"model_type": "clip", "vision_config": {"patch_size": 16}}"#;
        let large = r#""num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "patch_size": 14"#;
        let text = r#""num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072"#;
        let l14 = format!(
            r#"{{"model_type": "clip", "projection_dim": 768, "vision_config": {{{large}}},
                "text_config": {{{text}}}}}"#
        );
        let siglip = r#"{"model_type": "siglip", "vision_config": {"image_size": 256}}"#;
        let b32 = r#"{"model_type": "clip"}"#;
        for (name, json, low, tokens, expected) in [
            ("B/16", b16, 112, 77, [35.1, 8.6, 6.0, 6.0, 1.27]),
            ("B/16, short", b16, 112, 24, [35.1, 8.6, 6.0, 1.8, 1.10]),
            ("SigLIP", siglip, 128, 64, [46.8, 11.3, 11.0, 11.0, 1.33]),
            (
                "L/14",
                l14.as_str(),
                112,
                77,
                [162.0, 39.8, 13.3, 13.3, 1.16],
            ),
            ("B/32", b32, 96, 77, [8.8, 1.7, 6.0, 6.0, 1.63]),
        ] {
            let found = priced(json, low, tokens);
            for (found, (expected, unit)) in found
                .into_iter()
                .zip(expected.into_iter().zip([0.1, 0.1, 0.1, 0.1, 0.01]))
            {
                let rounded = (found / unit).round() * unit;
                assert!(
                    (rounded - expected).abs() < 1e-6,
                    "{name}: {found}, {expected}"
                );
            }
        }
        // The paper's own, of the image tower alone.
        assert!((price(0.28, 0.28) - 1.11).abs() < 0.005);
    }
}
