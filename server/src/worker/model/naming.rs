//! How libraries name the tensors of a transformer's layer.
use super::{
    layers::{Linear, Tensors, Torch},
    parameters::{Init, Parameters},
};

/// How a library names the tensors of a transformer's layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    Transformers,
    OpenClip,
    Timm,
}

impl Naming {
    pub(super) fn norms(self) -> [&'static str; 2] {
        match self {
            Self::Transformers => ["layer_norm1", "layer_norm2"],
            Self::OpenClip => ["ln_1", "ln_2"],
            Self::Timm => ["norm1", "norm2"],
        }
    }

    pub(super) fn out(self) -> &'static str {
        match self {
            Self::Transformers => "self_attn.out_proj",
            Self::OpenClip => "attn.out_proj",
            Self::Timm => "attn.proj",
        }
    }

    pub(super) fn mlp(self) -> [&'static str; 2] {
        match self {
            Self::OpenClip => ["c_fc", "c_proj"],
            _ => ["fc1", "fc2"],
        }
    }

    /// Queries, keys and values as one layer.
    pub(super) fn qkv(self, tensors: &Tensors, at: &str) -> Torch<Linear> {
        match self {
            Self::Transformers => Linear::fused(
                tensors,
                &["q", "k", "v"].map(|part| format!("{at}.self_attn.{part}_proj")),
            ),
            Self::OpenClip => Linear::named(
                tensors,
                &format!("{at}.attn.in_proj_weight"),
                &format!("{at}.attn.in_proj_bias"),
            ),
            Self::Timm => Linear::load(tensors, &format!("{at}.attn.qkv")),
        }
    }

    pub(super) fn add_qkv(self, to: &mut Parameters, at: &str, d: usize, init: Init) {
        match self {
            Self::Transformers => {
                for part in ["q_proj", "k_proj", "v_proj"] {
                    to.linear(&format!("{at}.self_attn.{part}"), d, d, init);
                }
            }
            Self::OpenClip => {
                to.add(format!("{at}.attn.in_proj_weight"), &[3 * d, d], init);
                let bias = Init::Constant(0.0);
                to.add(format!("{at}.attn.in_proj_bias"), &[3 * d], bias);
            }
            Self::Timm => to.linear(&format!("{at}.attn.qkv"), d, 3 * d, init),
        }
    }
}
