//! Position embeddings of an image tower: a grid that is resampled for images of other sizes. Each
//! library resamples in its own way, and a model must be scored in the way it is trained.
use super::{fields::Fields, layers::Torch};
use crate::error::Result;
use serde_json::Value;
use std::{cell::RefCell, collections::HashMap};
use tch::{Kind, TchError, Tensor};

/// How a grid is resampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Resize {
    pub filter: Filter,
    /// Whether the filter is widened when the grid shrinks.
    pub antialias: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    Bilinear,
    Bicubic,
}

impl Resize {
    /// `interpolate_pos_encoding` of transformers' SigLIP and CLIP.
    pub const TRANSFORMERS: Self = Self {
        filter: Filter::Bicubic,
        antialias: false,
    };
    /// What big_vision's FlexiViT resizes kernels with.
    pub const FLEXIVIT: Self = Self {
        filter: Filter::Bilinear,
        antialias: false,
    };
    /// `resize_positional_embeddings` of transformers' NaFlex SigLIP 2.
    pub const NAFLEX: Self = Self {
        filter: Filter::Bilinear,
        antialias: true,
    };
    /// `resample_abs_pos_embed` of timm, and open_clip's; `resample_patch_embed` of timm.
    pub const TIMM: Self = Self {
        filter: Filter::Bicubic,
        antialias: true,
    };

    /// Returns `[r, d, n, n]` as `[r, d, rows, columns]`.
    pub(super) fn apply(self, grid: &Tensor, size: [i64; 2]) -> Torch {
        match (self.filter, self.antialias) {
            (Filter::Bilinear, false) => grid.f_upsample_bilinear2d(size, false, None, None),
            (Filter::Bilinear, true) => {
                grid.f_internal_upsample_bilinear2d_aa(size, false, None, None)
            }
            (Filter::Bicubic, false) => grid.f_upsample_bicubic2d(size, false, None, None),
            (Filter::Bicubic, true) => {
                grid.f_internal_upsample_bicubic2d_aa(size, false, None, None)
            }
        }
    }
}

/// How a model's tensors are resampled for images and patches of other sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resizes {
    /// The grid of position embeddings.
    pub positions: Resize,
    /// The kernel of the patch embedding.
    pub kernel: Resize,
}

impl Resizes {
    /// transformers resizes no kernel, so the kernel's way is the paper's.
    pub const TRANSFORMERS: Self = Self {
        positions: Resize::TRANSFORMERS,
        kernel: Resize::FLEXIVIT,
    };
    /// Its patches have one size, so no kernel is resized.
    pub const NAFLEX: Self = Self {
        positions: Resize::NAFLEX,
        kernel: Resize::FLEXIVIT,
    };
    pub const TIMM: Self = Self {
        positions: Resize::TIMM,
        kernel: Resize::TIMM,
    };
    /// open_clip's own ViT.
    pub const OPEN_CLIP: Self = Self {
        positions: Resize::TIMM,
        kernel: Resize::FLEXIVIT,
    };
}

impl Resizes {
    /// The file of a model folder that says how its trainer resizes, if not as its library does.
    pub const FILE: &str = "resize.json";

    /// Reads the file. What it leaves out stays as in `self`.
    ///
    /// # Errors
    /// `ModelInvalid` naming the file, and the field that is not known or malformed.
    pub fn changed(self, json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json).unwrap_or(Value::Null);
        let fields = Fields::root_of(Self::FILE, &value)?;
        const KNOWN: [&str; 4] = [
            "position_filter",
            "position_antialias",
            "kernel_filter",
            "kernel_antialias",
        ];
        if let Some(other) = fields.keys().find(|key| !KNOWN.contains(key)) {
            let problem = format!("is not known, only {}", KNOWN.join(", "));
            return Err(fields.invalid(other, &problem));
        }
        let filter = |key, own: Filter| match fields.text(key, own.name())? {
            "bilinear" => Ok(Filter::Bilinear),
            "bicubic" => Ok(Filter::Bicubic),
            _ => Err(fields.invalid(key, "is neither bilinear nor bicubic")),
        };
        Ok(Self {
            positions: Resize {
                filter: filter("position_filter", self.positions.filter)?,
                antialias: fields.flag("position_antialias", self.positions.antialias)?,
            },
            kernel: Resize {
                filter: filter("kernel_filter", self.kernel.filter)?,
                antialias: fields.flag("kernel_antialias", self.kernel.antialias)?,
            },
        })
    }
}

impl Filter {
    fn name(self) -> &'static str {
        match self {
            Self::Bilinear => "bilinear",
            Self::Bicubic => "bicubic",
        }
    }
}

/// As `bicubic with antialiasing`.
impl std::fmt::Display for Resize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let with = if self.antialias { "with" } else { "without" };
        write!(f, "{} {with} antialiasing", self.filter.name())
    }
}

/// `[prefix + n², d]`: the embeddings of prefix tokens (a class token), then a grid of n by n.
pub struct Positions {
    all: Tensor,
    prefix: i64,
    side: i64,
    resize: Resize,
    /// By side of the grid.
    resampled: RefCell<HashMap<i64, Tensor>>,
}

impl Positions {
    pub fn new(all: Tensor, prefix: usize, side: usize, resize: Resize) -> Self {
        Self {
            all,
            prefix: prefix as i64,
            side: side as i64,
            resize,
            resampled: RefCell::default(),
        }
    }

    /// Returns the embeddings of a grid of `side` by `side` patches, `[prefix + side², d]`.
    pub fn at(&self, side: i64) -> Torch {
        if side == self.side {
            return Ok(self.all.shallow_clone());
        }
        if let Some(known) = self.resampled.borrow().get(&side) {
            return Ok(known.shallow_clone());
        }
        let made = self.resample(side)?;
        self.resampled
            .borrow_mut()
            .insert(side, made.shallow_clone());
        Ok(made)
    }

    /// Resamples in f32, whatever arithmetic the model uses: in bf16 the filter's sums would be
    /// rounded at each step.
    fn resample(&self, side: i64) -> Torch {
        let (rows, d) = self.all.size2()?;
        if rows != self.prefix + self.side * self.side {
            return Err(TchError::Shape(format!(
                "{rows} position embeddings are no grid of {}",
                self.side
            )));
        }
        let grid = self
            .all
            .f_narrow(0, self.prefix, rows - self.prefix)?
            .f_to_kind(Kind::Float)?
            .f_reshape([1, self.side, self.side, d])?
            .f_permute([0, 3, 1, 2])?;
        let grid = self
            .resize
            .apply(&grid.f_contiguous()?, [side, side])?
            .f_permute([0, 2, 3, 1])?
            .f_reshape([side * side, d])?
            .f_to_kind(self.all.f_kind()?)?;
        Tensor::f_cat(&[self.all.f_narrow(0, 0, self.prefix)?, grid], 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_how_a_trainer_resizes() {
        let of = |json: &str| Resizes::TIMM.changed(json.as_bytes());
        assert_eq!(of("{}").unwrap(), Resizes::TIMM);
        let flexi = of(r#"{"kernel_filter": "bilinear", "kernel_antialias": false}"#).unwrap();
        assert_eq!(
            (flexi.kernel, flexi.positions),
            (Resize::FLEXIVIT, Resize::TIMM)
        );
        for (json, field) in [
            (r#"{"kernel_filter": "lanczos"}"#, Some("kernel_filter")),
            (
                r#"{"position_antialias": "no"}"#,
                Some("position_antialias"),
            ),
            (r#"{"kernel": "bilinear"}"#, Some("kernel")),
            ("bilinear", None),
        ] {
            let error = of(json).unwrap_err();
            assert_eq!(
                (error.value("file"), error.value("field")),
                (Some("resize.json"), field)
            );
        }
    }
}
