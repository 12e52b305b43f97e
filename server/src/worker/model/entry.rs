//! Where pixels enter an image tower: patches, their positions, and the patches that are left out.
use super::{
    layers::{Linear, Tensors, Torch},
    positions::{Positions, Resize, Resizes},
};
use std::{cell::RefCell, collections::HashMap};
use tch::{Device, Kind, Tensor};

/// How an image tower is run; by default whole.
#[derive(Debug, Default)]
pub struct View {
    /// Side of a patch in pixels, if not the model's own.
    pub patch: Option<i64>,
    /// The patches of each image that are left, `[n, kept]`, by their place in the grid.
    pub kept: Option<Tensor>,
    /// So many layers, if not all.
    pub layers: Option<usize>,
    /// Rows and columns of patches of each image; only of models that take images of any shape.
    pub grids: Vec<[u32; 2]>,
}

/// The first part of a ViT.
pub(super) struct Entry {
    kernel: Kernel,
    /// `[1, 1, d]`: a token before the patches.
    class: Option<Tensor>,
    positions: Positions,
}

/// The names of an entry's tensors.
pub(super) struct Names<'a> {
    pub kernel: &'a str,
    pub has_bias: bool,
    pub class: Option<&'a str>,
    pub positions: &'a str,
}

impl Entry {
    /// Loads an entry of `grid` by `grid` patches of `patch` pixels.
    pub(super) fn load(
        tensors: &Tensors,
        names: &Names<'_>,
        (grid, patch): (usize, usize),
        resizes: Resizes,
    ) -> Torch<Self> {
        let class = names
            .class
            .map(|name| tensors.get(name)?.f_reshape([1, 1, -1]));
        let class = class.transpose()?;
        let positions = tensors.get(names.positions)?;
        // timm's have a dimension of one before the tokens.
        let positions = match positions.dim() {
            3 => positions.f_squeeze_dim(0)?,
            _ => positions,
        };
        let prefix = usize::from(class.is_some());
        Ok(Self {
            kernel: Kernel::load(tensors, names, patch as i64, resizes.kernel)?,
            class,
            positions: Positions::new(positions, prefix, grid, resizes.positions),
        })
    }

    /// Returns normalised pixels `[n, side, side, 3]` as tokens `[n, t, d]`.
    pub(super) fn forward(&self, pixels: &Tensor, view: &View) -> Torch {
        let patch = view.patch.unwrap_or(self.kernel.patch);
        let grid = pixels.size4()?.1 / patch;
        let x = self.kernel.at(patch)?.forward(&patches(pixels, patch)?)?;
        let x = match &self.class {
            Some(class) => {
                let class = class.f_expand([x.size3()?.0, -1, -1], false)?;
                Tensor::f_cat(&[class, x], 1)?
            }
            None => x,
        };
        let x = x.f_add(&self.positions.at(grid)?)?;
        match &view.kept {
            Some(kept) => self.keep(&x, kept),
            None => Ok(x),
        }
    }

    /// Returns the tokens before the patches, and the patches that are kept.
    fn keep(&self, x: &Tensor, kept: &Tensor) -> Torch {
        let prefix = i64::from(self.class.is_some());
        let ((n, _, d), (_, count)) = (x.size3()?, kept.size2()?);
        let places = kept
            .f_add_scalar(prefix)?
            .f_unsqueeze(-1)?
            .f_expand([n, count, d], false)?;
        let left = x.f_gather(1, &places, false)?;
        Tensor::f_cat(&[x.f_narrow(1, 0, prefix)?, left], 1)
    }
}

/// Cuts `[n, side, side, 3]` pixels into `[n, grid², 3 * patch²]`, channels first in each patch.
/// One matrix product with the flattened kernel is then the strided convolution, on every device
/// with the same (never TF32) arithmetic.
fn patches(pixels: &Tensor, patch: i64) -> Torch {
    let (n, side, _, _) = pixels.size4()?;
    let grid = side / patch;
    let whole = pixels
        .f_narrow(1, 0, grid * patch)?
        .f_narrow(2, 0, grid * patch)?;
    let cut = whole
        .f_reshape([n, grid, patch, grid, patch, 3])?
        .f_permute([0, 1, 3, 5, 2, 4])?;
    cut.f_reshape([n, grid * grid, 3 * patch * patch])
}

/// The patch convolution as a linear layer on [`patches`], at the model's own patch and resized.
struct Kernel {
    own: Linear,
    patch: i64,
    resize: Resize,
    /// By side of a patch.
    resized: RefCell<HashMap<i64, Linear>>,
}

impl Kernel {
    fn load(tensors: &Tensors, names: &Names<'_>, patch: i64, resize: Resize) -> Torch<Self> {
        let weight = tensors.get(&format!("{}.weight", names.kernel))?;
        let bias = if names.has_bias {
            Some(tensors.get(&format!("{}.bias", names.kernel))?)
        } else {
            None
        };
        Ok(Self {
            own: Linear::new(weight.f_flatten(1, -1)?, bias),
            patch,
            resize,
            resized: RefCell::default(),
        })
    }

    fn at(&self, patch: i64) -> Torch<Linear> {
        if patch == self.patch {
            return Ok(self.own.shallow_clone());
        }
        if let Some(known) = self.resized.borrow().get(&patch) {
            return Ok(known.shallow_clone());
        }
        let made = self.own.with_weight(self.weight_at(patch)?);
        self.resized
            .borrow_mut()
            .insert(patch, made.shallow_clone());
        Ok(made)
    }

    /// Resizes the kernel so that its products with patches stay what they are: with R the resizing
    /// of a patch, `<x, w> = <R x, w'>` for `w' = pinv(Rᵀ) w`, exactly if R enlarges (FlexiViT,
    /// Beyer et al. 2022, arXiv 2212.08013, section 3.4).
    fn weight_at(&self, patch: i64) -> Torch {
        let weight = &self.own.weight();
        let (d, _) = weight.size2()?;
        let to = inverse(self.resize, self.patch, patch)?.f_to_device(weight.device())?;
        let kernels = weight
            .f_to_kind(Kind::Double)?
            .f_reshape([d * 3, self.patch, self.patch])?;
        to.f_matmul(&kernels)?
            .f_matmul(&to.f_transpose(0, 1)?)?
            .f_reshape([d, 3 * patch * patch])?
            .f_to_kind(weight.f_kind()?)
    }
}

/// Inverses that are kept, each of a few hundred numbers squared at most.
const INVERSES_MAX: usize = 32;

thread_local! {
    /// By resizing, own side and side. Every push makes new kernels, of the same few sides. Kept by
    /// thread, since the device has one.
    static INVERSES: RefCell<HashMap<(Resize, i64, i64), Tensor>> = RefCell::default();
}

/// Returns pinv(Aᵀ), `[patch, own]`, of the matrix A that resizes a line of `own` pixels to
/// `patch`.
///
/// Resizing is separable: a patch's R is the Kronecker product of A with itself, and the
/// pseudo-inverse of a Kronecker product is that of its factors. So no matrix of whole patches is
/// made, which of large ones takes gigabytes.
fn inverse(resize: Resize, own: i64, patch: i64) -> Torch {
    let key = (resize, own, patch);
    if let Some(known) = INVERSES.with_borrow(|kept| kept.get(&key).map(Tensor::shallow_clone)) {
        return Ok(known);
    }
    // Image i is the i-th pixel of a line, in all columns. Resizing leaves columns that are alike
    // as they are, so that each column of the result is the line, resized.
    let lines = Tensor::f_eye(own, (Kind::Double, Device::Cpu))?
        .f_reshape([own, 1, own, 1])?
        .f_expand([own, 1, own, own], false)?
        .f_contiguous()?;
    let resized = resize.apply(&lines, [patch, patch])?;
    let transposed = resized.f_select(3, 0)?.f_reshape([own, patch])?;
    let made = transposed.f_linalg_pinv(RANK_TOLERANCE, false)?;
    INVERSES.with_borrow_mut(|kept| {
        if kept.len() >= INVERSES_MAX {
            kept.clear();
        }
        kept.insert(key, made.shallow_clone());
    });
    Ok(made)
}

/// Singular values below this share of the largest count as zero.
const RANK_TOLERANCE: f64 = 1e-15;

/// Returns the patches of each image that are kept, `[rows, kept]` in rising order: `kept` of
/// `patches`, drawn by the row's key alone.
pub(super) fn drawn(keys: &[u64], patches: usize, kept: usize) -> Vec<i64> {
    let mut all = Vec::with_capacity(keys.len() * kept);
    for key in keys {
        let mut places: Vec<(u64, i64)> = (0..patches as u64)
            .map(|place| {
                (
                    mixed(key.wrapping_add((place + 1).wrapping_mul(STEP))),
                    place as i64,
                )
            })
            .collect();
        places.sort_unstable();
        places.truncate(kept);
        let mut places: Vec<i64> = places.into_iter().map(|(_, place)| place).collect();
        places.sort_unstable();
        all.extend(places);
    }
    all
}

/// The golden ratio's fraction, by which SplitMix64 (Steele et al. 2014) steps.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Applies SplitMix64's output function.
fn mixed(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_draws_the_same_patches_and_others_draw_others() {
        let of = |key| drawn(&[key], 64, 32);
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
        assert_eq!(drawn(&[7, 8], 64, 32), [of(7), of(8)].concat());
        assert!(of(7).is_sorted() && of(7).iter().all(|place| (0..64).contains(place)));
        assert_eq!(drawn(&[3], 4, 4), [0, 1, 2, 3]);
    }

    #[test]
    fn each_patch_is_kept_as_often_as_the_share_says() {
        let keys: Vec<u64> = (0..4000).collect();
        let mut counts = [0_u32; 16];
        for place in drawn(&keys, 16, 4) {
            counts[place as usize] += 1;
        }
        // 1,000 expected, with a standard deviation of 27.
        assert!(counts.iter().all(|n| (850..1150).contains(n)), "{counts:?}");
    }

    /// What a resized kernel is by definition: by the pseudo-inverse of whole patches.
    fn by_patches(kernel: &Kernel, patch: i64) -> Tensor {
        let (own, weight) = (kernel.patch, kernel.own.weight());
        let basis = Tensor::eye(own * own, (Kind::Double, Device::Cpu));
        let resized = kernel
            .resize
            .apply(&basis.reshape([-1, 1, own, own]), [patch, patch]);
        let transposed = resized.unwrap().reshape([own * own, patch * patch]);
        let to = transposed.linalg_pinv(RANK_TOLERANCE, false);
        let kernels = weight.reshape([-1, own * own]);
        kernels
            .matmul(&to.transpose(0, 1))
            .reshape([weight.size()[0], -1])
    }

    #[test]
    fn lines_and_columns_give_what_whole_patches_give() {
        tch::manual_seed(5);
        for resize in [Resize::FLEXIVIT, Resize::TIMM, Resize::TRANSFORMERS] {
            let kernel = Kernel {
                own: Linear::new(
                    Tensor::randn([5, 3 * 49], (Kind::Double, Device::Cpu)),
                    None,
                ),
                patch: 7,
                resize,
                resized: RefCell::default(),
            };
            for patch in [4, 6, 8, 14] {
                let wanted = by_patches(&kernel, patch);
                let found = kernel.weight_at(patch).unwrap();
                let apart = (found - &wanted).abs().max().double_value(&[]);
                let most = 1e-9 * wanted.abs().max().double_value(&[]);
                assert!(apart < most, "{resize:?} {patch}: {apart}");
            }
        }
    }

    #[test]
    fn a_large_patch_takes_the_memory_of_its_kernel_alone() {
        let kernel = Kernel {
            own: Linear::new(Tensor::ones([1, 3 * 256], (Kind::Float, Device::Cpu)), None),
            patch: 16,
            resize: Resize::FLEXIVIT,
            resized: RefCell::default(),
        };
        // By whole patches: a matrix of 2 GB, and hours for its pseudo-inverse.
        let found = kernel.weight_at(1024).unwrap();
        assert_eq!(found.size(), [1, 3 * 1024 * 1024]);
        assert!(bool::try_from(found.isfinite().all()).unwrap());
    }

    /// A resized kernel gives the enlarged patch the value that the kernel gives the patch.
    #[test]
    fn enlarging_keeps_every_product() {
        tch::manual_seed(3);
        let (kind, own) = ((Kind::Double, tch::Device::Cpu), 4);
        let weight = Tensor::randn([5, 3, own, own], kind);
        for resize in [Resize::FLEXIVIT, Resize::TIMM] {
            let kernel = Kernel {
                own: Linear::new(weight.flatten(1, -1), None),
                patch: own,
                resize,
                resized: RefCell::default(),
            };
            let x = Tensor::randn([2, 3, own, own], kind);
            let larger = resize.apply(&x, [8, 8]).unwrap();
            let of = |x: &Tensor, patch| {
                kernel
                    .at(patch)
                    .unwrap()
                    .forward(&x.flatten(1, -1))
                    .unwrap()
            };
            let apart = (of(&x, own) - of(&larger, 8)).abs().max().double_value(&[]);
            assert!(apart < 1e-9, "{resize:?}: {apart}");
        }
    }
}
