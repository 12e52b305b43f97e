//! Where patches enter the image tower of a NaFlex SigLIP 2: those of images of any shape, with the
//! grid of position embeddings resampled for each.
use super::{
    layers::{Linear, Torch},
    positions::Resize,
};
use std::collections::{HashMap, hash_map::Entry};
use tch::{Kind, TchError, Tensor};

pub(super) struct NaflexEntry {
    patches: Linear,
    /// `[1, d, side, side]`, in f32: in bf16 the filter's sums would be rounded at each step.
    positions: Tensor,
    resize: Resize,
    /// That of the model's arithmetic.
    kind: Kind,
}

impl NaflexEntry {
    /// Makes the entry of a grid `[side², d]` of position embeddings.
    pub(super) fn load(
        patches: Linear,
        positions: &Tensor,
        side: usize,
        resize: Resize,
    ) -> Torch<Self> {
        let side = side as i64;
        Ok(Self {
            patches,
            positions: positions
                .f_to_kind(Kind::Float)?
                .f_reshape([1, side, side, -1])?
                .f_permute([0, 3, 1, 2])?
                .f_contiguous()?,
            resize,
            kind: positions.f_kind()?,
        })
    }

    /// Returns normalised pixels `[n, t, patch², 3]` as tokens `[n, t, d]`, and which of them are
    /// patches of their image and not padding, `[n, 1, 1, t]`. The patches of an image come first,
    /// row by row.
    pub(super) fn forward(&self, pixels: &Tensor, grids: &[[u32; 2]]) -> Torch<(Tensor, Tensor)> {
        let (n, t, _, _) = pixels.size4()?;
        if grids.len() as i64 != n {
            let message = format!("{} grids of patches for {n} images", grids.len());
            return Err(TchError::Shape(message));
        }
        let x = self.patches.forward(&pixels.f_flatten(2, -1)?)?;
        let x = x.f_add(&self.positions(grids, t)?)?;
        Ok((x, self.mask(grids, t)?))
    }

    /// Returns the position embeddings of each image, `[n, t, d]`; those of padding are zero. Only
    /// images of one micro-batch share them: kept for all grids that may come, they would take more
    /// memory than the model, and they cost nothing beside its layers.
    fn positions(&self, grids: &[[u32; 2]], t: i64) -> Torch {
        let mut made = HashMap::new();
        for grid in grids {
            if let Entry::Vacant(place) = made.entry(*grid) {
                place.insert(self.resampled(*grid, t)?);
            }
        }
        let all: Vec<&Tensor> = grids.iter().map(|grid| &made[grid]).collect();
        Tensor::f_stack(&all, 0)
    }

    /// Returns the position embeddings of one grid, `[t, d]`.
    fn resampled(&self, grid: [u32; 2], t: i64) -> Torch {
        let [rows, columns] = grid.map(i64::from);
        let count = rows * columns;
        if !(1..=t).contains(&count) {
            let message = format!("an image of {rows} x {columns} patches, where {t} are taken");
            return Err(TchError::Shape(message));
        }
        self.resize
            .apply(&self.positions, [rows, columns])?
            .f_reshape([-1, count])?
            .f_transpose(0, 1)?
            .f_constant_pad_nd([0, 0, 0, t - count])?
            .f_to_kind(self.kind)
    }

    fn mask(&self, grids: &[[u32; 2]], t: i64) -> Torch {
        let device = self.positions.device();
        let count = |[rows, columns]: &[u32; 2]| i64::from(*rows) * i64::from(*columns);
        let counts: Vec<i64> = grids.iter().map(count).collect();
        let counts = Tensor::f_from_slice(&counts)?
            .f_reshape([-1, 1, 1, 1])?
            .f_to_device(device)?;
        Tensor::f_arange(t, (Kind::Int64, device))?.f_lt_tensor(&counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn entry() -> NaflexEntry {
        let on = (Kind::Float, Device::Cpu);
        let patches = Linear::new(Tensor::zeros([1, 12], on), None);
        // Position 2 r + c of row r and column c.
        let positions = Tensor::from_slice(&[0.0_f32, 1.0, 2.0, 3.0]).reshape([4, 1]);
        NaflexEntry::load(patches, &positions, 2, Resize::NAFLEX).unwrap()
    }

    #[test]
    fn each_image_has_the_positions_of_its_own_grid() {
        let pixels = Tensor::zeros([4, 4, 4, 3], (Kind::Float, Device::Cpu));
        let (x, mask) = entry()
            .forward(&pixels, &[[2, 2], [1, 2], [1, 1], [1, 4]])
            .unwrap();
        let found = Vec::<Vec<f32>>::try_from(x.squeeze_dim(2)).unwrap();
        // A row of two is the mean of both rows, a single patch that of all four; a row of four is
        // wider than the grid, so its columns lie at -1/4, 1/4, 3/4 and 5/4, held at the borders.
        let wanted = [
            [0.0, 1.0, 2.0, 3.0],
            [1.0, 2.0, 0.0, 0.0],
            [1.5, 0.0, 0.0, 0.0],
            [1.0, 1.25, 1.75, 2.0],
        ];
        for (found, wanted) in found.iter().zip(wanted) {
            for (found, wanted) in found.iter().zip(wanted) {
                assert!((found - wanted).abs() < 1e-6, "{found} for {wanted}");
            }
        }
        assert_eq!(mask.size(), [4, 1, 1, 4]);
        let sums = mask
            .flatten(1, -1)
            .sum_dim_intlist(1_i64, false, Kind::Int64);
        let sums = Vec::<i64>::try_from(sums).unwrap();
        assert_eq!(sums, [4, 2, 1, 4]);
    }

    #[test]
    fn grids_that_do_not_fit_are_refused() {
        let pixels = Tensor::zeros([1, 4, 4, 3], (Kind::Float, Device::Cpu));
        for grids in [&[][..], &[[2, 3]][..], &[[0, 2]][..]] {
            assert!(entry().forward(&pixels, grids).is_err(), "{grids:?}");
        }
    }
}
