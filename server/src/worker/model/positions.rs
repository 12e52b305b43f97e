//! Position embeddings of an image tower: a grid that is resampled for images of other sizes. Each
//! library resamples in its own way, and a model must be scored in the way it is trained.
use super::layers::Torch;
use std::{cell::RefCell, collections::HashMap};
use tch::{Kind, TchError, Tensor};

/// How a grid is resampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    pub filter: Filter,
    /// Whether the filter is widened when the grid shrinks.
    pub antialias: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// `resample_abs_pos_embed` of timm, and open_clip's.
    pub const TIMM: Self = Self {
        filter: Filter::Bicubic,
        antialias: true,
    };

    /// `[1, d, n, n]` as `[1, d, to, to]`.
    fn apply(self, grid: &Tensor, to: i64) -> Torch {
        let size = [to, to];
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
            .apply(&grid.f_contiguous()?, side)?
            .f_permute([0, 2, 3, 1])?
            .f_reshape([side * side, d])?
            .f_to_kind(self.all.f_kind()?)?;
        Tensor::f_cat(&[self.all.f_narrow(0, 0, self.prefix)?, grid], 0)
    }
}
