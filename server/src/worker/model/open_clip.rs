//! open_clip's dual encoders: its own ViT or a trunk of timm for images, its own transformer for
//! captions, with the names of its state dict.
use super::{
    clip::block_init,
    config::ModelConfig,
    encoder::Towers,
    entry::{Entry, Names, View},
    layers::{LayerNorm, Linear, Tensors, TextEmbedding, Torch, Transformer},
    naming::Naming,
    open_clip_config::{OpenClipForm, TextPool, TextProjection, VisionForm},
    parameters::{Init, Parameters},
    timm::{self, Trunk},
};
use tch::{Kind, Tensor};

/// Returns names and shapes of open_clip's `CLIP` and `CustomTextCLIP`. The logit bias is optional,
/// since only the trainer's loss decides whether there is one.
pub fn parameters(config: &ModelConfig, form: &OpenClipForm) -> Parameters {
    let mut to = Parameters::default();
    image_parameters(&mut to, config, form);
    let (text, dim) = (&config.text, config.embedding_dim);
    let (d, at) = (text.tower.hidden_size, prefix(form));
    to.add(
        format!("{at}token_embedding.weight"),
        &[text.vocab_size, d],
        Init::Normal(0.02),
    );
    let positions = [text.max_position_embeddings, d];
    to.add(
        format!("{at}positional_embedding"),
        &positions,
        Init::Normal(0.01),
    );
    let layers = format!("{at}transformer.resblocks");
    let init = block_init(&text.tower);
    Transformer::parameters(&mut to, &layers, &text.tower, &init, Naming::OpenClip);
    to.layer_norm(&format!("{at}ln_final"), d);
    let projection = format!("{at}text_projection");
    match form.text_projection {
        TextProjection::None => {}
        TextProjection::Matrix => to.add(projection, &[d, dim], Init::lecun(d)),
        TextProjection::Linear => to.linear(&projection, d, dim, Init::lecun(d)),
    }
    let logits: &[usize] = if form.logits_are_vectors { &[1] } else { &[] };
    let scale = Init::Constant(config.logit_scale_init as f32);
    to.add("logit_scale", logits, scale);
    match config.logit_bias_init {
        Some(bias) => to.add("logit_bias", logits, Init::Constant(bias as f32)),
        // A trainer may learn a bias even if the configuration has none (`open_clip_train
        // --siglip`).
        None => to.add_optional("logit_bias", logits),
    }
    to
}

fn image_parameters(to: &mut Parameters, config: &ModelConfig, form: &OpenClipForm) {
    let (vision, dim) = (&config.vision, config.embedding_dim);
    let (d, patch) = (vision.tower.hidden_size, vision.patch_size);
    let init = block_init(&vision.tower);
    match form.vision {
        VisionForm::Timm { projection } => {
            timm::parameters(to, vision, &init);
            let at = "visual.head.proj";
            match projection {
                Some(true) => to.linear(at, d, dim, Init::lecun(d)),
                Some(false) => to.add(format!("{at}.weight"), &[dim, d], Init::lecun(d)),
                None => {}
            }
        }
        VisionForm::Vit { pre_norm, .. } => {
            to.add("visual.class_embedding", &[d], Init::lecun(d));
            let positions = [vision.grid().pow(2) + 1, d];
            to.add("visual.positional_embedding", &positions, Init::lecun(d));
            let kernel = [d, 3, patch, patch];
            to.add(
                "visual.conv1.weight",
                &kernel,
                Init::lecun(3 * patch * patch),
            );
            if pre_norm {
                to.layer_norm("visual.ln_pre", d);
            }
            let layers = "visual.transformer.resblocks";
            Transformer::parameters(to, layers, &vision.tower, &init, Naming::OpenClip);
            to.layer_norm("visual.ln_post", d);
            to.add("visual.proj", &[d, dim], Init::lecun(d));
        }
    }
}

fn prefix(form: &OpenClipForm) -> &'static str {
    if form.custom_text { "text." } else { "" }
}

pub struct OpenClip {
    image: Image,
    words: TextEmbedding,
    text: Transformer,
    final_norm: LayerNorm,
    text_projection: Option<Linear>,
    pool: TextPool,
}

enum Image {
    Vit(Vit),
    Timm(Trunk, Option<Linear>),
}

impl OpenClip {
    pub fn load(config: &ModelConfig, form: &OpenClipForm, tensors: &Tensors) -> Torch<Self> {
        let (text, at) = (&config.text, prefix(form));
        let image = match form.vision {
            VisionForm::Timm { projection } => {
                let at = "visual.head.proj";
                let projection = match projection {
                    Some(true) => Some(Linear::load(tensors, at)?),
                    Some(false) => Some(Linear::without_bias(tensors, at)?),
                    None => None,
                };
                Image::Timm(Trunk::load(config, tensors)?, projection)
            }
            VisionForm::Vit {
                pre_norm,
                average,
                norm_after_pool,
            } => {
                let vit = Vit::load(config, tensors, pre_norm)?;
                Image::Vit(Vit {
                    average,
                    norm_after_pool,
                    ..vit
                })
            }
        };
        let projection = format!("{at}text_projection");
        let layers = format!("{at}transformer.resblocks");
        let eps = text.tower.layer_norm_eps;
        Ok(Self {
            image,
            words: TextEmbedding {
                tokens: tensors.get(&format!("{at}token_embedding.weight"))?,
                positions: tensors.get(&format!("{at}positional_embedding"))?,
            },
            text: Transformer::load(tensors, &layers, &text.tower, form.causal, Naming::OpenClip)?,
            final_norm: LayerNorm::load(tensors, &format!("{at}ln_final"), eps)?,
            text_projection: match form.text_projection {
                TextProjection::None => None,
                TextProjection::Matrix => Some(Linear::transposed(tensors, &projection)?),
                TextProjection::Linear => Some(Linear::load(tensors, &projection)?),
            },
            pool: form.pool,
        })
    }
}

impl Towers for OpenClip {
    fn image(&self, pixels: &Tensor, view: &View) -> Torch {
        match &self.image {
            Image::Vit(vit) => vit.forward(pixels, view),
            Image::Timm(trunk, None) => trunk.forward(pixels, view),
            Image::Timm(trunk, Some(projection)) => {
                projection.forward(&trunk.forward(pixels, view)?)
            }
        }
    }

    fn text(&self, ids: &Tensor) -> Torch {
        let x = self.text.forward(self.words.forward(ids)?)?;
        let x = match self.pool {
            TextPool::First => x.f_select(1, 0)?,
            TextPool::Last => x.f_select(1, -1)?,
            TextPool::Argmax => row_at(&x, &ids.f_argmax(1, true)?)?,
            TextPool::Eos(eos) => {
                let is_eos = ids.f_eq(eos)?.f_to_kind(Kind::Int)?;
                row_at(&x, &is_eos.f_argmax(1, true)?)?
            }
        };
        let x = self.final_norm.forward(&x)?;
        match &self.text_projection {
            Some(projection) => projection.forward(&x),
            None => Ok(x),
        }
    }
}

/// Returns each row's token at `place` `[n, 1]`, from `[n, t, d]`.
fn row_at(x: &Tensor, place: &Tensor) -> Torch {
    let (n, _, d) = x.size3()?;
    let place = place.f_unsqueeze(-1)?.f_expand([n, 1, d], false)?;
    x.f_gather(1, &place, false)?.f_select(1, 0)
}

/// open_clip's own image tower.
struct Vit {
    entry: Entry,
    pre_norm: Option<LayerNorm>,
    layers: Transformer,
    post_norm: LayerNorm,
    average: bool,
    norm_after_pool: bool,
    projection: Linear,
}

impl Vit {
    fn load(config: &ModelConfig, tensors: &Tensors, pre_norm: bool) -> Torch<Self> {
        let vision = &config.vision;
        let (tower, eps) = (&vision.tower, vision.tower.layer_norm_eps);
        let layers = "visual.transformer.resblocks";
        Ok(Self {
            entry: Entry::load(
                tensors,
                &Names {
                    kernel: "visual.conv1",
                    has_bias: false,
                    class: Some("visual.class_embedding"),
                    positions: "visual.positional_embedding",
                },
                (vision.grid(), vision.patch_size),
                config.resizes,
            )?,
            pre_norm: if pre_norm {
                Some(LayerNorm::load(tensors, "visual.ln_pre", eps)?)
            } else {
                None
            },
            layers: Transformer::load(tensors, layers, tower, false, Naming::OpenClip)?,
            post_norm: LayerNorm::load(tensors, "visual.ln_post", eps)?,
            average: false,
            norm_after_pool: false,
            projection: Linear::transposed(tensors, "visual.proj")?,
        })
    }

    fn forward(&self, pixels: &Tensor, view: &View) -> Torch {
        let x = self.entry.forward(pixels, view)?;
        let x = match &self.pre_norm {
            Some(norm) => norm.forward(&x)?,
            None => x,
        };
        let x = self.layers.first(x, view.layers)?;
        let pooled = match (self.average, self.norm_after_pool) {
            // A layer norm reads one token only, so for a single token it may come before or after
            // pooling.
            (false, _) => self.post_norm.forward(&x.f_select(1, 0)?)?,
            (true, true) => self.post_norm.forward(&mean(&x)?)?,
            (true, false) => mean(&self.post_norm.forward(&x)?)?,
        };
        self.projection.forward(&pooled)
    }
}

/// Returns the mean of all patches. The first token is the class token and is left out.
fn mean(x: &Tensor) -> Torch {
    let patches = x.size3()?.1 - 1;
    x.f_narrow(1, 1, patches)?
        .f_mean_dim(1_i64, false, None::<Kind>)
}
