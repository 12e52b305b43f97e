//! Scores by LibTorch, on any device: matrix products and reductions over tiles of candidates.
use crate::{
    engine::{Engine, Spread},
    error::Result,
    problem::{Problem, SignedModel},
    types::{Loss, ModelEmbeddings, Rows},
};
use tch::{Device, Kind, Tensor};

/// Logits computed at a time: 16 MiB as f32. The whole matrix of a large super-batch fits no
/// device.
const TILE_VALUES: usize = 1 << 22;

/// One model's embeddings on the device, f32 `[B, dim]`. LibTorch would round products of f16
/// matrices to f16.
struct DeviceModel {
    sign: f64,
    image: Tensor,
    text: Tensor,
    scale: f64,
    bias: f64,
}

pub(crate) struct TorchEngine<'a> {
    problem: &'a Problem<'a>,
    device: Device,
    models: Vec<DeviceModel>,
    /// Unconditional scores without gain, f64 `[B]`.
    own: Tensor,
    /// The terms with absorbed examples, f64 `[B]` each. Sigmoid: one signed sum. Softmax: a
    /// log-sum-exp for each model and direction.
    running: Vec<Tensor>,
    flops: f64,
}

impl<'a> TorchEngine<'a> {
    pub(crate) fn new(problem: &'a Problem<'a>, device: Device) -> Result<Self> {
        let models: Vec<_> = problem
            .models
            .iter()
            .map(|model| upload(model, device))
            .collect::<Result<_>>()?;
        let own = Tensor::f_zeros([problem.count as i64], (Kind::Double, device))?;
        let mut engine = Self {
            problem,
            device,
            models,
            own,
            running: Vec::new(),
            flops: 0.0,
        };
        engine.own = engine.own_scores(None)?;
        engine.flops = engine
            .models
            .iter()
            .map(|model| 2.0 * model.image.numel() as f64)
            .sum();
        Ok(engine)
    }

    /// Returns the signed losses of the candidates' own pairs, f64: of all, or of those in `index`.
    fn own_scores(&self, index: Option<&Tensor>) -> Result<Tensor> {
        self.sum_over_models(index, |model, logits| match self.problem.loss {
            Loss::Sigmoid => Ok(logits.f_neg()?.f_softplus()?),
            Loss::Softmax => Ok(logits.f_neg()?.f_add_scalar(model.bias)?),
        })
    }

    fn sum_over_models(
        &self,
        index: Option<&Tensor>,
        loss: impl Fn(&DeviceModel, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut total = self.own.f_zeros_like()?;
        if let Some(index) = index {
            total = total.f_index_select(0, index)?;
        }
        for model in &self.models {
            let products = match index {
                None => model.image.f_mul(&model.text)?,
                Some(index) => model
                    .image
                    .f_index_select(0, index)?
                    .f_mul(&model.text.f_index_select(0, index)?)?,
            };
            let cosines = products.f_sum_dim_intlist(&[1i64][..], false, Kind::Double)?;
            let logits = cosines
                .f_mul_scalar(model.scale)?
                .f_add_scalar(model.bias)?;
            total = total.f_add(&loss(model, &logits)?.f_mul_scalar(model.sign)?)?;
        }
        Ok(total)
    }

    /// Returns for each row of `ours`, in f64, the sum of softplus(logit) or the log-sum-exp of the
    /// logits against all of `theirs`.
    fn reduce(&mut self, ours: &Tensor, theirs: &Tensor, scale: f64, bias: f64) -> Result<Tensor> {
        let (rows, dim) = ours.size2()?;
        let columns = theirs.size2()?.0;
        let transposed = theirs.f_tr()?;
        let height = (TILE_VALUES as i64 / columns).clamp(1, rows);
        let mut tiles = Vec::new();
        for start in (0..rows).step_by(height as usize) {
            let tile = ours.f_narrow(0, start, height.min(rows - start))?;
            let logits = tile.f_mm(&transposed)?.f_mul_scalar_(scale)?;
            tiles.push(match self.problem.loss {
                Loss::Sigmoid => {
                    let losses = logits.f_add_scalar(bias)?.f_softplus()?;
                    losses.f_sum_dim_intlist(&[1i64][..], false, Kind::Double)?
                }
                Loss::Softmax => logits
                    .f_logsumexp(&[1i64][..], false)?
                    .f_to_kind(Kind::Double)?,
            });
        }
        self.flops += 2.0 * rows as f64 * columns as f64 * dim as f64;
        Ok(Tensor::f_cat(&tiles, 0)?)
    }

    /// [`Self::reduce`] of rows of one model (all, or those in `index`) against the examples in
    /// `drawn`, in one direction.
    fn against(
        &mut self,
        m: usize,
        direction: usize,
        index: Option<&Tensor>,
        drawn: &Tensor,
    ) -> Result<Tensor> {
        let DeviceModel {
            image,
            text,
            scale,
            bias,
            ..
        } = &self.models[m];
        let (ours, theirs) = if direction == 0 {
            (image, text)
        } else {
            (text, image)
        };
        let theirs = theirs.f_index_select(0, drawn)?;
        let ours = match index {
            None => ours.f_alias()?,
            Some(index) => ours.f_index_select(0, index)?,
        };
        let (scale, bias) = (*scale, *bias);
        self.reduce(&ours, &theirs, scale, bias)
    }

    fn absorb_sigmoid(&mut self, drawn: &Tensor) -> Result<()> {
        let mut sum = match self.running.pop() {
            Some(sum) => sum,
            None => self.own.f_zeros_like()?,
        };
        for (m, direction) in slots(self.models.len()) {
            let terms = self.against(m, direction, None, drawn)?;
            sum = sum.f_add(&terms.f_mul_scalar(self.models[m].sign)?)?;
        }
        self.running.push(sum);
        Ok(())
    }

    fn absorb_softmax(&mut self, drawn: &Tensor) -> Result<()> {
        let mut running = Vec::new();
        for (slot, (m, direction)) in slots(self.models.len()).enumerate() {
            let logits = self.against(m, direction, None, drawn)?;
            running.push(match self.running.get(slot) {
                Some(before) => before.f_logaddexp(&logits)?,
                None => logits,
            });
        }
        self.running = running;
        Ok(())
    }

    /// Returns own scores plus half of each model's two log-sum-exps.
    fn softmax_scores(&self, own: &Tensor, running: &[Tensor]) -> Result<Tensor> {
        let mut scores = own.f_alias()?;
        for (logits, (m, _)) in running.iter().zip(slots(self.models.len())) {
            scores = scores.f_add(&logits.f_mul_scalar(0.5 * self.models[m].sign)?)?;
        }
        Ok(scores)
    }
}

impl Engine for TorchEngine<'_> {
    fn scores(&mut self) -> Result<Vec<f64>> {
        let scores = match (self.problem.loss, self.running.first()) {
            (_, None) => self.own.f_alias()?,
            (Loss::Sigmoid, Some(sum)) => self.own.f_add(sum)?,
            (Loss::Softmax, Some(_)) => self.softmax_scores(&self.own, &self.running)?,
        };
        let scores = scores
            .f_mul_scalar(self.problem.gain)?
            .f_to_device(Device::Cpu)?;
        let mut values = vec![0.0; self.problem.count];
        scores.f_copy_data(&mut values, self.problem.count)?;
        Ok(values)
    }

    fn absorb(&mut self, chunk: &[u32]) -> Result<()> {
        let drawn = indices(chunk, self.device)?;
        match self.problem.loss {
            Loss::Sigmoid => self.absorb_sigmoid(&drawn),
            Loss::Softmax => self.absorb_softmax(&drawn),
        }
    }

    fn inner(&mut self, chosen: &[u32]) -> Result<f64> {
        if self.problem.loss == Loss::Sigmoid && chosen.len() == 1 {
            return Ok(0.0);
        }
        let index = indices(chosen, self.device)?;
        if self.problem.loss == Loss::Softmax {
            let mut running = Vec::new();
            for (m, direction) in slots(self.models.len()) {
                running.push(self.against(m, direction, Some(&index), &index)?);
            }
            let own = self.own_scores(Some(&index))?;
            return Ok(self
                .softmax_scores(&own, &running)?
                .f_sum(Kind::Double)?
                .f_double_value(&[])?);
        }
        // One direction covers every ordered pair (i, j) once; both would count each twice. It also
        // covers (i, i), as if that were a negative, so those terms are subtracted first.
        let mut total = self
            .sum_over_models(Some(&index), |_, logits| Ok(logits.f_softplus()?))?
            .f_neg()?;
        for m in 0..self.models.len() {
            let terms = self.against(m, 0, Some(&index), &index)?;
            total = total.f_add(&terms.f_mul_scalar(self.models[m].sign)?)?;
        }
        Ok(total.f_sum(Kind::Double)?.f_double_value(&[])?)
    }

    fn flops(&self) -> f64 {
        self.flops
    }
}

/// Returns (model, direction), in the order of `TorchEngine::running`.
fn slots(models: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..models).flat_map(|m| [(m, 0), (m, 1)])
}

/// K-center by LibTorch.
pub(crate) struct TorchSpread {
    /// f32 `[B, dim]`.
    images: Tensor,
    /// For each candidate, the cosine with the nearest chosen example, f32 `[B]`.
    nearest: Tensor,
}

impl TorchSpread {
    pub(crate) fn new(embeddings: &ModelEmbeddings<'_>, device: Device) -> Result<Self> {
        let images = tower(&embeddings.image, embeddings.dim, device)?;
        let nearest = Tensor::f_full(
            [images.size2()?.0],
            f64::NEG_INFINITY,
            (Kind::Float, device),
        )?;
        Ok(Self { images, nearest })
    }
}

impl Spread for TorchSpread {
    fn absorb(&mut self, chunk: &[u32], left: &[u32]) -> Result<Vec<f32>> {
        let transposed = self
            .images
            .f_index_select(0, &indices(chunk, self.images.device())?)?
            .f_tr()?;
        let rows = self.images.size2()?.0;
        let height = (TILE_VALUES / chunk.len()).clamp(1, rows as usize);
        let mut tiles = Vec::new();
        for start in (0..rows).step_by(height) {
            let tile = self
                .images
                .f_narrow(0, start, (height as i64).min(rows - start))?;
            tiles.push(tile.f_mm(&transposed)?.f_amax(&[1i64][..], false)?);
        }
        self.nearest = self.nearest.f_maximum(&Tensor::f_cat(&tiles, 0)?)?;
        let nearest = self
            .nearest
            .f_index_select(0, &indices(left, self.images.device())?)?
            .f_to_device(Device::Cpu)?;
        let mut values = vec![0.0; left.len()];
        nearest.f_copy_data(&mut values, left.len())?;
        Ok(values)
    }
}

fn indices(rows: &[u32], device: Device) -> Result<Tensor> {
    let rows: Vec<i64> = rows.iter().map(|&row| i64::from(row)).collect();
    Ok(Tensor::f_from_slice(&rows)?.f_to_device(device)?)
}

/// Returns f32 `[B, dim]` on the device.
fn tower(rows: &Rows<'_>, dim: usize, device: Device) -> Result<Tensor> {
    let values = match rows {
        Rows::F32(values) => Tensor::f_from_slice(values)?,
        Rows::F16(values) => Tensor::f_from_slice(values)?,
    };
    Ok(values
        .f_to_device(device)?
        .f_to_kind(Kind::Float)?
        .f_reshape([-1, dim as i64])?)
}

fn upload(model: &SignedModel<'_>, device: Device) -> Result<DeviceModel> {
    let ModelEmbeddings {
        image,
        text,
        dim,
        scale,
        bias,
    } = &model.embeddings;
    Ok(DeviceModel {
        sign: model.sign,
        image: tower(image, *dim, device)?,
        text: tower(text, *dim, device)?,
        scale: *scale,
        bias: *bias,
    })
}
