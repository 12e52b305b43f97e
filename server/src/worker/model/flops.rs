//! The cost of a forward pass: 2 FLOPs for each multiply-add of every matrix product, attention
//! included (a causal mask saves nothing here). Operations that are linear in the activations count
//! as nothing.
use super::{
    config::{Family, ModelConfig, Tower},
    open_clip_config::VisionForm,
};

/// The sizes that an image tower takes, and the cost of one image of n patches: `constant +
/// per_patch * n + per_patch_pair * n²` FLOPs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ImageTower {
    /// Side in pixels at full fidelity.
    pub image_size: usize,
    pub patch_size: usize,
    pub layers: usize,
    pub constant: f64,
    pub per_patch: f64,
    pub per_patch_pair: f64,
}

impl ImageTower {
    pub fn of(config: &ModelConfig) -> Self {
        let vision = &config.vision;
        // A parabola is known by three of its points.
        let [none, one, two] = [0.0, 1.0, 2.0].map(|patches| image_of(config, patches));
        let per_patch_pair = (two - 2.0 * one + none) / 2.0;
        Self {
            image_size: vision.image_size,
            patch_size: vision.patch_size,
            layers: vision.tower.num_hidden_layers,
            constant: none,
            per_patch: one - none - per_patch_pair,
            per_patch_pair,
        }
    }

    /// FLOPs to embed one image of that side.
    pub fn flops(&self, side: usize) -> f64 {
        let patches = ((side / self.patch_size.max(1)) as f64).powi(2);
        self.constant + self.per_patch * patches + self.per_patch_pair * patches * patches
    }
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
        let [none, one, two] = [0.0, 1.0, 2.0].map(|tokens| text_of(config, tokens));
        let per_token_pair = (two - 2.0 * one + none) / 2.0;
        Self {
            constant: none,
            per_token: one - none - per_token_pair,
            per_token_pair,
        }
    }

    /// FLOPs to embed one caption of so many tokens.
    pub fn flops(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        self.constant + self.per_token * tokens + self.per_token_pair * tokens * tokens
    }
}

/// FLOPs to embed one image at full fidelity.
pub fn image(config: &ModelConfig) -> f64 {
    image_of(config, (config.vision.grid() as f64).powi(2))
}

fn image_of(config: &ModelConfig, patches: f64) -> f64 {
    let (tower, patch) = (&config.vision.tower, config.vision.patch_size as f64);
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
    };
    2.0 * (embed + rest)
}

/// FLOPs to embed one caption of the model's whole length.
pub fn text(config: &ModelConfig) -> f64 {
    text_of(config, config.text.max_position_embeddings as f64)
}

fn text_of(config: &ModelConfig, tokens: f64) -> f64 {
    let tower = &config.text.tower;
    let projection = (tower.hidden_size * config.embedding_dim) as f64;
    2.0 * (layers(tower, tokens) + projection)
}

/// Multiply-adds of all layers over `t` tokens: four projections, scores and their weighted sum,
/// two MLP layers.
fn layers(tower: &Tower, t: f64) -> f64 {
    let (d, inner) = (tower.hidden_size as f64, tower.intermediate_size as f64);
    tower.num_hidden_layers as f64 * (4.0 * t * d * d + 2.0 * t * t * d + 2.0 * t * d * inner)
}

/// Multiply-adds of SigLIP's pooling head: one query, keys and values of `t` tokens, one MLP.
fn pooling(tower: &Tower, t: f64) -> f64 {
    let (d, inner) = (tower.hidden_size as f64, tower.intermediate_size as f64);
    2.0 * d * d + 2.0 * t * d * d + 2.0 * t * d + 2.0 * d * inner
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> ModelConfig {
        ModelConfig::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_small_siglip_by_hand() {
        let small = r#"{"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2"#;
        let json = format!(
            r#"{{"model_type": "siglip", "vision_config": {small}, "image_size": 5, "patch_size": 2}},
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
            let tower = ImageTower::of(&of(32));
            for side in [4, 16, 32] {
                let (found, wanted) = (tower.flops(side), image(&of(side)));
                assert!((found / wanted - 1.0).abs() < 1e-12, "{family} {side}");
            }
        }
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
}
