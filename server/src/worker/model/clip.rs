//! CLIP (Radford et al. 2021, arXiv 2103.00020): a ViT with a class token and a causal caption
//! transformer.
use super::{
    config::{ModelConfig, Tower},
    encoder::Towers,
    entry::{Entry, Names, View},
    layers::{BlockInit, LayerNorm, Linear, Tensors, TextEmbedding, Torch, Transformer},
    naming::Naming,
    parameters::{Init, Parameters},
};
use tch::{Kind, Tensor};

/// The wrong `eos_token_id` in configurations of early versions of transformers. It means "the
/// largest id of the caption".
pub const LEGACY_EOS: i64 = 2;

/// Returns names and shapes of `transformers.CLIPModel`, with its initial distributions.
pub fn parameters(config: &ModelConfig) -> Parameters {
    let mut to = Parameters::default();
    let (vision, text) = (&config.vision, &config.text);
    let (d, patch) = (vision.tower.hidden_size, vision.patch_size);
    let embeddings = "vision_model.embeddings";
    to.add(
        format!("{embeddings}.class_embedding"),
        &[d],
        Init::lecun(d),
    );
    to.add(
        format!("{embeddings}.patch_embedding.weight"),
        &[d, 3, patch, patch],
        Init::Normal(0.02),
    );
    to.add(
        format!("{embeddings}.position_embedding.weight"),
        &[vision.grid().pow(2) + 1, d],
        Init::Normal(0.02),
    );
    // The name is misspelt in transformers, and so in every checkpoint.
    to.layer_norm("vision_model.pre_layrnorm", d);
    Transformer::parameters(
        &mut to,
        "vision_model.encoder.layers",
        &vision.tower,
        &block_init(&vision.tower),
        Naming::Transformers,
    );
    to.layer_norm("vision_model.post_layernorm", d);
    to.add(
        "visual_projection.weight",
        &[config.embedding_dim, d],
        Init::lecun(d),
    );

    let d = text.tower.hidden_size;
    let embeddings = "text_model.embeddings";
    to.add(
        format!("{embeddings}.token_embedding.weight"),
        &[text.vocab_size, d],
        Init::Normal(0.02),
    );
    to.add(
        format!("{embeddings}.position_embedding.weight"),
        &[text.max_position_embeddings, d],
        Init::Normal(0.02),
    );
    Transformer::parameters(
        &mut to,
        "text_model.encoder.layers",
        &text.tower,
        &block_init(&text.tower),
        Naming::Transformers,
    );
    to.layer_norm("text_model.final_layer_norm", d);
    to.add(
        "text_projection.weight",
        &[config.embedding_dim, d],
        Init::lecun(d),
    );
    to.add(
        "logit_scale",
        &[],
        Init::Constant(config.logit_scale_init as f32),
    );
    // A model that was trained with the sigmoid loss has a bias.
    to.add_optional("logit_bias", &[]);
    to
}

pub fn block_init(tower: &Tower) -> BlockInit {
    let (d, layers) = (tower.hidden_size as f64, tower.num_hidden_layers as f64);
    let residual = Init::Normal(d.powf(-0.5) * (2.0 * layers).powf(-0.5));
    BlockInit {
        qkv: residual,
        out: Init::Normal(d.powf(-0.5)),
        fc1: Init::Normal((2.0 * d).powf(-0.5)),
        fc2: residual,
    }
}

pub struct Clip {
    eos_token_id: i64,
    entry: Entry,
    pre_norm: LayerNorm,
    image: Transformer,
    post_norm: LayerNorm,
    image_projection: Linear,
    words: TextEmbedding,
    text: Transformer,
    final_norm: LayerNorm,
    text_projection: Linear,
}

impl Clip {
    pub fn load(config: &ModelConfig, tensors: &Tensors) -> Torch<Self> {
        let (vision, text) = (&config.vision, &config.text);
        let eps = vision.tower.layer_norm_eps;
        Ok(Self {
            eos_token_id: text.eos_token_id,
            entry: Entry::load(
                tensors,
                &Names {
                    kernel: "vision_model.embeddings.patch_embedding",
                    has_bias: false,
                    class: Some("vision_model.embeddings.class_embedding"),
                    positions: "vision_model.embeddings.position_embedding.weight",
                },
                (vision.grid(), vision.patch_size),
                config.resizes,
            )?,
            pre_norm: LayerNorm::load(tensors, "vision_model.pre_layrnorm", eps)?,
            image: Transformer::load(
                tensors,
                "vision_model.encoder.layers",
                &vision.tower,
                false,
                Naming::Transformers,
            )?,
            post_norm: LayerNorm::load(tensors, "vision_model.post_layernorm", eps)?,
            image_projection: Linear::without_bias(tensors, "visual_projection")?,
            words: TextEmbedding::load(tensors, "text_model.embeddings")?,
            text: Transformer::load(
                tensors,
                "text_model.encoder.layers",
                &text.tower,
                true,
                Naming::Transformers,
            )?,
            final_norm: LayerNorm::load(
                tensors,
                "text_model.final_layer_norm",
                text.tower.layer_norm_eps,
            )?,
            text_projection: Linear::without_bias(tensors, "text_projection")?,
        })
    }
}

impl Towers for Clip {
    fn image(&self, pixels: &Tensor, view: &View) -> Torch {
        let x = self.pre_norm.forward(&self.entry.forward(pixels, view)?)?;
        let x = self.image.first(x, view.layers)?.f_select(1, 0)?;
        self.image_projection.forward(&self.post_norm.forward(&x)?)
    }

    /// Pools the first end-of-text token. If there is none, argmax of zeros gives the first token,
    /// as in transformers.
    fn text(&self, ids: &Tensor) -> Torch {
        let x = self.text.forward(self.words.forward(ids)?)?;
        let last = if self.eos_token_id == LEGACY_EOS {
            ids.f_argmax(1, true)?
        } else {
            ids.f_eq(self.eos_token_id)?
                .f_to_kind(Kind::Int)?
                .f_argmax(1, true)?
        };
        let (n, _, d) = x.size3()?;
        let x = x
            .f_gather(1, &last.f_unsqueeze(-1)?.f_expand([n, 1, d], false)?, false)?
            .f_select(1, 0)?;
        self.text_projection.forward(&self.final_norm.forward(&x)?)
    }
}
