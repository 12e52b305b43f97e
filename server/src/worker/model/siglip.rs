//! SigLIP (Zhai et al. 2023, arXiv 2303.15343): a ViT with attention pooling and a bidirectional
//! caption transformer; and SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786), which is the same
//! where images have one size, and has another entry for images of any shape.
use super::{
    config::{ModelConfig, Tower},
    encoder::Towers,
    entry::{Entry, Names, View},
    layers::{
        BlockInit, LayerNorm, Linear, PoolingHead, Tensors, TextEmbedding, Torch, Transformer,
    },
    naflex::NaflexEntry,
    naming::Naming,
    parameters::{Init, Parameters},
};
use tch::Tensor;

/// Returns names and shapes of `transformers.SiglipModel` or `Siglip2Model`, with their initial
/// distributions (truncated normals are plain here, and the biases of the MLPs, 1e-6 there, are
/// zero).
pub fn parameters(config: &ModelConfig) -> Parameters {
    let mut to = Parameters::default();
    let (vision, text) = (&config.vision, &config.text);
    let (d, patch) = (vision.tower.hidden_size, vision.patch_size);
    let embeddings = "vision_model.embeddings";
    // Patches of images of any shape come cut and flattened, to a linear layer.
    let kernel = match vision.max_patches {
        Some(_) => vec![d, 3 * patch * patch],
        None => vec![d, 3, patch, patch],
    };
    to.add(
        format!("{embeddings}.patch_embedding.weight"),
        &kernel,
        Init::lecun(3 * patch * patch),
    );
    to.add(
        format!("{embeddings}.patch_embedding.bias"),
        &[d],
        Init::Constant(0.0),
    );
    to.add(
        format!("{embeddings}.position_embedding.weight"),
        &[vision.grid().pow(2), d],
        Init::lecun(d),
    );
    Transformer::parameters(
        &mut to,
        "vision_model.encoder.layers",
        &vision.tower,
        &block_init(&vision.tower),
        Naming::Transformers,
    );
    to.layer_norm("vision_model.post_layernorm", d);
    pooling_parameters(&mut to, &vision.tower);

    let d = text.tower.hidden_size;
    let embeddings = "text_model.embeddings";
    to.add(
        format!("{embeddings}.token_embedding.weight"),
        &[text.vocab_size, d],
        Init::lecun(d),
    );
    to.add(
        format!("{embeddings}.position_embedding.weight"),
        &[text.max_position_embeddings, d],
        Init::lecun(d),
    );
    Transformer::parameters(
        &mut to,
        "text_model.encoder.layers",
        &text.tower,
        &block_init(&text.tower),
        Naming::Transformers,
    );
    to.layer_norm("text_model.final_layer_norm", d);
    to.linear("text_model.head", d, config.embedding_dim, Init::lecun(d));
    to.add(
        "logit_scale",
        &[1],
        Init::Constant(config.logit_scale_init as f32),
    );
    to.add("logit_bias", &[1], Init::Constant(0.0));
    to
}

/// Adds the parameters of the head that pools patches by attention.
fn pooling_parameters(to: &mut Parameters, tower: &Tower) {
    let d = tower.hidden_size;
    let head = "vision_model.head";
    to.add(format!("{head}.probe"), &[1, 1, d], Init::xavier(d, d));
    to.add(
        format!("{head}.attention.in_proj_weight"),
        &[3 * d, d],
        Init::xavier(d, 3 * d),
    );
    to.add(
        format!("{head}.attention.in_proj_bias"),
        &[3 * d],
        Init::Constant(0.0),
    );
    to.linear(&format!("{head}.attention.out_proj"), d, d, Init::lecun(d));
    to.layer_norm(&format!("{head}.layernorm"), d);
    let inner = tower.intermediate_size;
    to.linear(&format!("{head}.mlp.fc1"), d, inner, Init::xavier(d, inner));
    to.linear(&format!("{head}.mlp.fc2"), inner, d, Init::xavier(d, inner));
}

fn block_init(tower: &Tower) -> BlockInit {
    let (d, inner) = (tower.hidden_size, tower.intermediate_size);
    let (square, mlp) = (Init::xavier(d, d), Init::xavier(d, inner));
    BlockInit {
        qkv: square,
        out: square,
        fc1: mlp,
        fc2: mlp,
    }
}

enum ImageEntry {
    OneSize(Entry),
    AnyShape(NaflexEntry),
}

impl ImageEntry {
    fn load(config: &ModelConfig, tensors: &Tensors) -> Torch<Self> {
        let vision = &config.vision;
        let (kernel, positions) = (
            "vision_model.embeddings.patch_embedding",
            "vision_model.embeddings.position_embedding.weight",
        );
        if vision.max_patches.is_some() {
            return Ok(Self::AnyShape(NaflexEntry::load(
                Linear::load(tensors, kernel)?,
                &tensors.get(positions)?,
                vision.grid(),
                config.resizes.positions,
            )?));
        }
        Ok(Self::OneSize(Entry::load(
            tensors,
            &Names {
                kernel,
                has_bias: true,
                class: None,
                positions,
            },
            (vision.grid(), vision.patch_size),
            config.resizes,
        )?))
    }
}

pub struct Siglip {
    entry: ImageEntry,
    image: Transformer,
    post_norm: LayerNorm,
    pool: PoolingHead,
    words: TextEmbedding,
    text: Transformer,
    final_norm: LayerNorm,
    head: Linear,
}

impl Siglip {
    pub fn load(config: &ModelConfig, tensors: &Tensors) -> Torch<Self> {
        let (vision, text) = (&config.vision, &config.text);
        Ok(Self {
            entry: ImageEntry::load(config, tensors)?,
            image: Transformer::load(
                tensors,
                "vision_model.encoder.layers",
                &vision.tower,
                false,
                Naming::Transformers,
            )?,
            post_norm: LayerNorm::load(
                tensors,
                "vision_model.post_layernorm",
                vision.tower.layer_norm_eps,
            )?,
            pool: PoolingHead::load(tensors, "vision_model.head", &vision.tower)?,
            words: TextEmbedding::load(tensors, "text_model.embeddings")?,
            text: Transformer::load(
                tensors,
                "text_model.encoder.layers",
                &text.tower,
                false,
                Naming::Transformers,
            )?,
            final_norm: LayerNorm::load(
                tensors,
                "text_model.final_layer_norm",
                text.tower.layer_norm_eps,
            )?,
            head: Linear::load(tensors, "text_model.head")?,
        })
    }
}

impl Towers for Siglip {
    fn image(&self, pixels: &Tensor, view: &View) -> Torch {
        let (x, mask) = match &self.entry {
            ImageEntry::OneSize(entry) => {
                let x = entry.forward(pixels, view)?;
                (self.image.first(x, view.layers)?, None)
            }
            ImageEntry::AnyShape(entry) => {
                let (x, mask) = entry.forward(pixels, &view.grids)?;
                (self.image.masked(x, &mask)?, Some(mask))
            }
        };
        self.pool
            .forward(&self.post_norm.forward(&x)?, mask.as_ref())
    }

    /// Pools the last token, which may be padding: that is how the model was trained.
    fn text(&self, ids: &Tensor) -> Torch {
        let x = self
            .text
            .forward(self.words.forward(ids)?)?
            .f_select(1, -1)?;
        self.head.forward(&self.final_norm.forward(&x)?)
    }
}
