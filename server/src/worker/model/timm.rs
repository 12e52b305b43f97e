//! The image trunks of timm that open_clip's configurations name: ViTs with attention pooling, as
//! in SigLIP.
use super::{
    config::{Activation, ModelConfig, Tower, VisionConfig},
    entry::{Entry, Names, View},
    layers::{BlockInit, LayerNorm, PoolingHead, Tensors, Torch, Transformer},
    naming::Naming,
    parameters::{Init, Parameters},
};
use tch::Tensor;

/// Where a trunk's tensors are in open_clip's state dict.
const AT: &str = "visual.trunk";

/// Returns the sizes of a trunk by its name, such as `vit_base_patch16_siglip_224`; `None` if the
/// name is not known. The part after a dot names weights and is ignored.
pub fn trunk(name: &str) -> Option<VisionConfig> {
    let name = name.split('.').next()?;
    let (size, rest) = name.strip_prefix("vit_")?.split_once("_patch")?;
    let (patch, image) = rest.split_once("_siglip_")?;
    let (patch_size, image_size): (usize, usize) = (patch.parse().ok()?, image.parse().ok()?);
    let (width, layers, heads, mlp_ratio) = match size {
        "base" => (768, 12, 12, 4.0),
        "large" => (1024, 24, 16, 4.0),
        "so400m" => (1152, 27, 16, 3.7362),
        "giantopt" => (1536, 40, 16, 4.0),
        _ => return None,
    };
    // timm chose the activation for each model by hand, so there is no rule to derive it from.
    let is_tanh = matches!(
        (size, patch_size, image_size),
        ("base", 32, _) | ("large", _, 512) | ("so400m", 16, _) | ("giantopt", _, _)
    );
    (1..=image_size)
        .contains(&patch_size)
        .then_some(VisionConfig {
            tower: Tower {
                hidden_size: width,
                intermediate_size: (width as f64 * mlp_ratio) as usize,
                num_hidden_layers: layers,
                num_attention_heads: heads,
                layer_norm_eps: 1e-6,
                hidden_act: if is_tanh {
                    Activation::GeluTanh
                } else {
                    Activation::Gelu
                },
            },
            image_size,
            patch_size,
            max_patches: None,
        })
}

/// Adds its tensors, without open_clip's projection.
pub fn parameters(to: &mut Parameters, vision: &VisionConfig, init: &BlockInit) {
    let (d, inner) = (vision.tower.hidden_size, vision.tower.intermediate_size);
    let patch = vision.patch_size;
    let inputs = 3 * patch * patch;
    let positions = [1, vision.grid().pow(2), d];
    to.add(format!("{AT}.pos_embed"), &positions, Init::Normal(0.02));
    let kernel = format!("{AT}.patch_embed.proj");
    to.add(
        format!("{kernel}.weight"),
        &[d, 3, patch, patch],
        Init::lecun(inputs),
    );
    to.add(format!("{kernel}.bias"), &[d], Init::Constant(0.0));
    Transformer::parameters(
        to,
        &format!("{AT}.blocks"),
        &vision.tower,
        init,
        Naming::Timm,
    );
    to.layer_norm(&format!("{AT}.norm"), d);
    let pool = format!("{AT}.attn_pool");
    to.add(format!("{pool}.latent"), &[1, 1, d], Init::lecun(d));
    to.linear(&format!("{pool}.q"), d, d, Init::lecun(d));
    to.linear(&format!("{pool}.kv"), d, 2 * d, Init::lecun(d));
    to.linear(&format!("{pool}.proj"), d, d, Init::lecun(d));
    to.layer_norm(&format!("{pool}.norm"), d);
    to.linear(&format!("{pool}.mlp.fc1"), d, inner, Init::lecun(d));
    to.linear(&format!("{pool}.mlp.fc2"), inner, d, Init::lecun(inner));
}

pub struct Trunk {
    entry: Entry,
    image: Transformer,
    norm: LayerNorm,
    pool: PoolingHead,
}

impl Trunk {
    pub fn load(config: &ModelConfig, tensors: &Tensors) -> Torch<Self> {
        let (vision, tower) = (&config.vision, &config.vision.tower);
        Ok(Self {
            entry: Entry::load(
                tensors,
                &Names {
                    kernel: &format!("{AT}.patch_embed.proj"),
                    has_bias: true,
                    class: None,
                    positions: &format!("{AT}.pos_embed"),
                },
                (vision.grid(), vision.patch_size),
                config.resizes,
            )?,
            image: Transformer::load(tensors, &format!("{AT}.blocks"), tower, false, Naming::Timm)?,
            norm: LayerNorm::load(tensors, &format!("{AT}.norm"), tower.layer_norm_eps)?,
            pool: PoolingHead::of_timm(tensors, &format!("{AT}.attn_pool"), tower)?,
        })
    }

    /// Returns normalised pixels `[n, side, side, 3]` as `[n, d]`.
    pub fn forward(&self, pixels: &Tensor, view: &View) -> Torch {
        let x = self.entry.forward(pixels, view)?;
        let x = self.image.first(x, view.layers)?;
        self.pool.forward(&self.norm.forward(&x)?, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_sizes() {
        let base = trunk("vit_base_patch16_siglip_224.webli").unwrap();
        assert_eq!(
            (base.tower.hidden_size, base.patch_size, base.image_size),
            (768, 16, 224)
        );
        assert_eq!(base.tower.hidden_act, Activation::Gelu);
        let large = trunk("vit_so400m_patch16_siglip_512").unwrap();
        assert_eq!((large.tower.intermediate_size, large.grid()), (4304, 32));
        assert_eq!(large.tower.hidden_act, Activation::GeluTanh);
        for other in [
            "convnext_base",
            "vit_base_patch16_224",
            "vit_base_patch16_siglip_gap_224",
        ] {
            assert_eq!(trunk(other), None, "{other}");
        }
    }
}
