//! Layers that both families share. Shapes: n rows, t tokens, d hidden size, h heads.
use super::{
    config::{Activation, Tower},
    naming::Naming,
    parameters::{Init, Parameters},
};
use std::collections::HashMap;
use tch::{TchError, Tensor};

pub type Torch<T = Tensor> = std::result::Result<T, TchError>;

/// A model's tensors on the device, in the dtype of its arithmetic.
pub struct Tensors(pub HashMap<String, Tensor>);

impl Tensors {
    /// Returns the tensor of that name. Weights are checked against [`Parameters`] before, so it
    /// exists.
    pub fn get(&self, name: &str) -> Torch {
        let missing = || TchError::Torch(format!("tensor '{name}' was never loaded"));
        self.0
            .get(name)
            .map(Tensor::shallow_clone)
            .ok_or_else(missing)
    }
}

pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(super) fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    pub(super) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Returns the layer with another weight and the same bias.
    pub(super) fn with_weight(&self, weight: Tensor) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Self { weight, bias }
    }

    pub(super) fn shallow_clone(&self) -> Self {
        self.with_weight(self.weight.shallow_clone())
    }

    pub fn load(tensors: &Tensors, at: &str) -> Torch<Self> {
        Ok(Self {
            weight: tensors.get(&format!("{at}.weight"))?,
            bias: Some(tensors.get(&format!("{at}.bias"))?),
        })
    }

    pub fn without_bias(tensors: &Tensors, at: &str) -> Torch<Self> {
        Ok(Self {
            weight: tensors.get(&format!("{at}.weight"))?,
            bias: None,
        })
    }

    /// Makes `x @ at`, of a matrix `[inputs, outputs]`.
    pub fn transposed(tensors: &Tensors, at: &str) -> Torch<Self> {
        Ok(Self {
            weight: tensors.get(at)?.f_transpose(0, 1)?.f_contiguous()?,
            bias: None,
        })
    }

    pub(super) fn named(tensors: &Tensors, weight: &str, bias: &str) -> Torch<Self> {
        Ok(Self {
            weight: tensors.get(weight)?,
            bias: Some(tensors.get(bias)?),
        })
    }

    /// Joins several layers of the same input to one layer, with their outputs one after the other:
    /// one matrix product instead of three.
    pub(super) fn fused(tensors: &Tensors, at: &[String]) -> Torch<Self> {
        let all = |end: &str| -> Torch {
            let parts = at
                .iter()
                .map(|at| tensors.get(&format!("{at}.{end}")))
                .collect::<Torch<Vec<_>>>()?;
            Tensor::f_cat(&parts, 0)
        };
        Ok(Self {
            weight: all("weight")?,
            bias: Some(all("bias")?),
        })
    }

    pub fn forward(&self, x: &Tensor) -> Torch {
        x.f_linear(&self.weight, self.bias.as_ref())
    }
}

pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub fn load(tensors: &Tensors, at: &str, eps: f64) -> Torch<Self> {
        Ok(Self {
            weight: tensors.get(&format!("{at}.weight"))?,
            bias: tensors.get(&format!("{at}.bias"))?,
            eps,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Torch {
        x.f_layer_norm(
            self.weight.size(),
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
            true,
        )
    }
}

pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
    act: Activation,
}

impl Mlp {
    pub fn load(tensors: &Tensors, at: &str, act: Activation) -> Torch<Self> {
        Self::of(tensors, at, ["fc1", "fc2"], act)
    }

    fn of(tensors: &Tensors, at: &str, names: [&str; 2], act: Activation) -> Torch<Self> {
        Ok(Self {
            fc1: Linear::load(tensors, &format!("{at}.{}", names[0]))?,
            fc2: Linear::load(tensors, &format!("{at}.{}", names[1]))?,
            act,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Torch {
        let x = self.fc1.forward(x)?;
        let x = match self.act {
            Activation::Gelu => x.f_gelu("none")?,
            Activation::GeluTanh => x.f_gelu("tanh")?,
            Activation::QuickGelu => x.f_mul_scalar(1.702)?.f_sigmoid()?.f_mul(&x)?,
        };
        self.fc2.forward(&x)
    }
}

/// Which keys are attended to. Models that have a mask are not causal.
#[derive(Clone, Copy)]
enum Seen<'a> {
    All,
    /// No token's own successors.
    Causal,
    /// Those that `[n, 1, 1, t]` says true of.
    Masked(&'a Tensor),
}

/// Returns softmax(q kᵀ / √(d/h)) v over `[n, h, t, d/h]`, as `[n, t, d]`.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, seen: Seen<'_>) -> Torch {
    let (mask, causal) = match seen {
        Seen::All => (None, false),
        Seen::Causal => (None, true),
        Seen::Masked(mask) => (Some(mask), false),
    };
    let out = Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, false)?;
    let (n, h, t, width) = out.size4()?;
    out.f_transpose(1, 2)?.f_reshape([n, t, h * width])
}

/// Returns `[n, t, parts * d]` as `parts` tensors of `[n, h, t, d/h]`.
fn split_heads(x: &Tensor, parts: i64, heads: i64) -> Torch<Vec<Tensor>> {
    let (n, t, width) = x.size3()?;
    let x = x
        .f_reshape([n, t, parts, heads, width / parts / heads])?
        .f_permute([2, 0, 3, 1, 4])?;
    (0..parts).map(|part| x.f_select(0, part)).collect()
}

/// A pre-norm transformer layer.
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    mlp: Mlp,
    heads: i64,
}

impl Block {
    fn load(tensors: &Tensors, at: &str, tower: &Tower, naming: Naming) -> Torch<Self> {
        let (eps, [norm1, norm2]) = (tower.layer_norm_eps, naming.norms());
        let mlp = format!("{at}.mlp");
        Ok(Self {
            norm1: LayerNorm::load(tensors, &format!("{at}.{norm1}"), eps)?,
            qkv: naming.qkv(tensors, at)?,
            out: Linear::load(tensors, &format!("{at}.{}", naming.out()))?,
            norm2: LayerNorm::load(tensors, &format!("{at}.{norm2}"), eps)?,
            mlp: Mlp::of(tensors, &mlp, naming.mlp(), tower.hidden_act)?,
            heads: tower.num_attention_heads as i64,
        })
    }

    fn forward(&self, x: &Tensor, seen: Seen<'_>) -> Torch {
        let qkv = split_heads(&self.qkv.forward(&self.norm1.forward(x)?)?, 3, self.heads)?;
        let x = x.f_add(
            &self
                .out
                .forward(&attention(&qkv[0], &qkv[1], &qkv[2], seen)?)?,
        )?;
        x.f_add(&self.mlp.forward(&self.norm2.forward(&x)?)?)
    }
}

/// The initial distributions of a transformer's layers.
pub struct BlockInit {
    pub qkv: Init,
    pub out: Init,
    pub fc1: Init,
    pub fc2: Init,
}

/// The layers `{at}.*` of one transformer.
pub struct Transformer {
    blocks: Vec<Block>,
    causal: bool,
}

impl Transformer {
    pub fn parameters(
        to: &mut Parameters,
        at: &str,
        tower: &Tower,
        init: &BlockInit,
        naming: Naming,
    ) {
        let (d, inner) = (tower.hidden_size, tower.intermediate_size);
        let ([norm1, norm2], [fc1, fc2]) = (naming.norms(), naming.mlp());
        for layer in 0..tower.num_hidden_layers {
            let at = format!("{at}.{layer}");
            naming.add_qkv(to, &at, d, init.qkv);
            to.linear(&format!("{at}.{}", naming.out()), d, d, init.out);
            to.layer_norm(&format!("{at}.{norm1}"), d);
            to.layer_norm(&format!("{at}.{norm2}"), d);
            to.linear(&format!("{at}.mlp.{fc1}"), d, inner, init.fc1);
            to.linear(&format!("{at}.mlp.{fc2}"), inner, d, init.fc2);
        }
    }

    pub fn load(
        tensors: &Tensors,
        at: &str,
        tower: &Tower,
        causal: bool,
        naming: Naming,
    ) -> Torch<Self> {
        let load = |layer| Block::load(tensors, &format!("{at}.{layer}"), tower, naming);
        Ok(Self {
            blocks: (0..tower.num_hidden_layers)
                .map(load)
                .collect::<Torch<_>>()?,
            causal,
        })
    }

    pub fn forward(&self, x: Tensor) -> Torch {
        self.first(x, None)
    }

    /// Returns the first so many layers; `None` is all of them.
    pub fn first(&self, mut x: Tensor, layers: Option<usize>) -> Torch {
        let seen = if self.causal { Seen::Causal } else { Seen::All };
        for block in self.blocks.iter().take(layers.unwrap_or(usize::MAX)) {
            x = block.forward(&x, seen)?;
        }
        Ok(x)
    }

    /// Returns all layers where the tokens are seen that `mask`, `[n, 1, 1, t]`, says true of.
    pub(super) fn masked(&self, mut x: Tensor, mask: &Tensor) -> Torch {
        for block in &self.blocks {
            x = block.forward(&x, Seen::Masked(mask))?;
        }
        Ok(x)
    }
}

/// Token and position embeddings `{at}.*` of a caption.
pub struct TextEmbedding {
    pub tokens: Tensor,
    pub positions: Tensor,
}

impl TextEmbedding {
    pub fn load(tensors: &Tensors, at: &str) -> Torch<Self> {
        Ok(Self {
            tokens: tensors.get(&format!("{at}.token_embedding.weight"))?,
            positions: tensors.get(&format!("{at}.position_embedding.weight"))?,
        })
    }

    /// Embeds `ids` `[n, t]` as `[n, t, d]`; t may be less than the model's length.
    pub fn forward(&self, ids: &Tensor) -> Torch {
        let positions = self.positions.f_narrow(0, 0, ids.size2()?.1)?;
        Tensor::f_embedding(&self.tokens, ids, -1, false, false)?.f_add(&positions)
    }
}

/// Attention pooling: a learnt probe attends to all tokens. `torch.nn.MultiheadAttention` with a
/// packed projection inside.
pub struct PoolingHead {
    /// The probe's query `[1, h, 1, d/h]`; it is the same for every row.
    query: Tensor,
    kv: Linear,
    out: Linear,
    norm: LayerNorm,
    mlp: Mlp,
    heads: i64,
}

impl PoolingHead {
    pub fn load(tensors: &Tensors, at: &str, tower: &Tower) -> Torch<Self> {
        let (d, count) = (tower.hidden_size as i64, tower.num_attention_heads as i64);
        let weight = tensors.get(&format!("{at}.attention.in_proj_weight"))?;
        let bias = tensors.get(&format!("{at}.attention.in_proj_bias"))?;
        let part = |start, length| -> Torch<Linear> {
            Ok(Linear {
                weight: weight.f_narrow(0, start, length)?,
                bias: Some(bias.f_narrow(0, start, length)?),
            })
        };
        let query = part(0, d)?.forward(&tensors.get(&format!("{at}.probe"))?)?;
        Ok(Self {
            query: Self::query(&query, count)?,
            kv: part(d, 2 * d)?,
            out: Linear::load(tensors, &format!("{at}.attention.out_proj"))?,
            norm: LayerNorm::load(tensors, &format!("{at}.layernorm"), tower.layer_norm_eps)?,
            mlp: Mlp::load(tensors, &format!("{at}.mlp"), tower.hidden_act)?,
            heads: count,
        })
    }

    /// Reads timm's `AttentionPoolLatent`.
    pub fn of_timm(tensors: &Tensors, at: &str, tower: &Tower) -> Torch<Self> {
        let count = tower.num_attention_heads as i64;
        let query = Linear::load(tensors, &format!("{at}.q"))?;
        let query = query.forward(&tensors.get(&format!("{at}.latent"))?)?;
        Ok(Self {
            query: Self::query(&query, count)?,
            kv: Linear::load(tensors, &format!("{at}.kv"))?,
            out: Linear::load(tensors, &format!("{at}.proj"))?,
            norm: LayerNorm::load(tensors, &format!("{at}.norm"), tower.layer_norm_eps)?,
            mlp: Mlp::load(tensors, &format!("{at}.mlp"), tower.hidden_act)?,
            heads: count,
        })
    }

    /// Returns `[1, 1, d]` by heads.
    fn query(query: &Tensor, heads: i64) -> Torch {
        let d = query.size3()?.2;
        query.f_reshape([1, 1, heads, d / heads])?.f_transpose(1, 2)
    }

    /// Returns `[n, t, d]` as `[n, d]`; of a `mask`, as [`Transformer::masked`].
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Torch {
        let kv = split_heads(&self.kv.forward(x)?, 2, self.heads)?;
        let query = self.query.f_expand([x.size3()?.0, -1, -1, -1], false)?;
        let seen = mask.map_or(Seen::All, Seen::Masked);
        let pooled = self
            .out
            .forward(&attention(&query, &kv[0], &kv[1], seen)?)?;
        pooled
            .f_add(&self.mlp.forward(&self.norm.forward(&pooled)?)?)?
            .f_select(1, 0)
    }
}
