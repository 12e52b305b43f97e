//! Scores on a CUDA device, by this crate's kernels.
use super::{
    device::Device,
    error::{CudaError, Result as CudaResult},
    job::{Job, SLOTS, Slot, TILE},
    memory::{DEPTH, Needed, needed, planes},
    rows::upload_rows,
    stream::{Buffer, Stream},
};
use crate::{
    engine::Engine,
    error::Result,
    native::{own_as_negative, own_scores},
    problem::{Problem, SignedModel},
    types::{Loss, Rows},
};
use std::ffi::c_void;

/// Both towers of a model as halves, `[planes, B, stride]` each.
struct Towers<'d> {
    image: Buffer<'d, u16>,
    text: Buffer<'d, u16>,
}

/// The terms with all absorbed examples, by slot and candidate: see `Job` of kernels.cu.
struct Running<'d> {
    largest: Buffer<'d, f64>,
    sums: Buffer<'d, f64>,
}

pub(crate) struct CudaEngine<'a> {
    problem: &'a Problem<'a>,
    /// Unconditional scores without gain, by candidate; 0 for holes.
    own: Vec<f64>,
    /// The candidates left, rising.
    left: Vec<u32>,
    absorbed: bool,
    flops: f64,
    /// Each model's images against texts, then each model's texts against images. This order lets a
    /// sigmoid batch score use the first half alone, see `inner`.
    slots: [Slot; SLOTS],
    // Fields are dropped in this order: memory is freed before the stream that works on it.
    running: Running<'a>,
    /// Sums for a batch score.
    inner: Running<'a>,
    rows: Buffer<'a, u32>,
    columns: Buffer<'a, u32>,
    out: Buffer<'a, f64>,
    _towers: Vec<Towers<'a>>,
    stream: Stream<'a>,
}

impl<'a> CudaEngine<'a> {
    /// The needed memory is checked up front, so that a selection which cannot fit fails with both
    /// numbers before it has taken memory that LibTorch's models may need.
    pub(super) fn new(problem: &'a Problem<'a>, device: &'a Device) -> CudaResult<Self> {
        let count = problem.count;
        let Needed { inputs, above } =
            needed(count, problem.models.iter().map(|model| model.embeddings));
        let free = device.free_bytes()?;
        if inputs + above > free {
            return Err(CudaError::Memory {
                needed: inputs + above,
                free,
            });
        }
        let stream = Stream::new(device)?;
        let towers = problem
            .models
            .iter()
            .map(|model| upload(&stream, model, count))
            .collect::<CudaResult<Vec<_>>>()?;
        let mut slots = [Slot::default(); SLOTS];
        let forth = problem
            .models
            .iter()
            .zip(&towers)
            .map(|(model, towers)| slot(model, count, towers));
        let forth: Vec<Slot> = forth.collect();
        let back = forth.iter().map(|slot| Slot {
            ours: slot.theirs,
            theirs: slot.ours,
            ..*slot
        });
        slots
            .iter_mut()
            .zip(forth.iter().copied().chain(back))
            .for_each(|(slot, filled)| *slot = filled);
        let mut own = vec![0.0; count];
        let scores = own_scores(problem, &problem.offered);
        problem
            .offered
            .iter()
            .zip(scores)
            .for_each(|(&index, score)| own[index as usize] = score);
        let values = 2 * problem.models.len() * count;
        let running = || {
            CudaResult::Ok(Running {
                largest: stream.allocate(values)?,
                sums: stream.allocate(values)?,
            })
        };
        let dims: usize = problem
            .models
            .iter()
            .map(|model| model.embeddings.dim)
            .sum();
        let engine = Self {
            problem,
            own,
            left: problem.offered.clone(),
            absorbed: false,
            flops: 2.0 * problem.offered.len() as f64 * dims as f64,
            slots,
            running: running()?,
            inner: running()?,
            rows: stream.allocate(count)?,
            columns: stream.allocate(count)?,
            out: stream.allocate(count)?,
            _towers: towers,
            stream,
        };
        engine.stream.clear(&engine.running.sums)?;
        Ok(engine)
    }

    fn job(&self, running: &Running<'_>, rows: usize, columns: usize, slots: usize) -> Job {
        Job {
            slots: self.slots,
            rows: self.rows.address,
            columns: self.columns.address,
            row_count: rows as u32,
            column_count: columns as u32,
            count: self.problem.count as u32,
            slot_count: slots as u32,
            largest: running.largest.address,
            sums: running.sums.address,
        }
    }

    /// Adds to the running sums of `rows` their terms with `columns`, in the first `slots`. Returns
    /// the operations it took.
    fn add(
        &self,
        running: &Running<'_>,
        rows: &[u32],
        columns: &[u32],
        slots: usize,
    ) -> CudaResult<f64> {
        if rows.is_empty() || columns.is_empty() {
            return Ok(0.0);
        }
        self.stream.upload(&self.rows, rows)?;
        self.stream.upload(&self.columns, columns)?;
        let mut job = self.job(running, rows.len(), columns.len(), slots);
        let kernel = self.stream.device.sums(self.problem.loss == Loss::Softmax);
        let (grid, shared) = (
            [rows.len().div_ceil(TILE), slots],
            self.stream.device.tile_bytes,
        );
        // SAFETY: a `Job` is the kernel's parameter; its lists hold indices below B, and sums and
        // towers are of B.
        unsafe {
            self.stream
                .launch(kernel, grid, shared, &mut [(&raw mut job).cast::<c_void>()])
        }?;
        self.stream.wait()?;
        let dims: usize = self
            .problem
            .models
            .iter()
            .map(|model| model.embeddings.dim)
            .cycle()
            .take(slots)
            .sum();
        Ok(2.0 * rows.len() as f64 * columns.len() as f64 * dims as f64)
    }

    /// Returns what running sums add to the scores of `rows`, in their order.
    fn added(&self, running: &Running<'_>, rows: &[u32], slots: usize) -> CudaResult<Vec<f64>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.stream.upload(&self.rows, rows)?;
        let mut job = self.job(running, rows.len(), 0, slots);
        let (mut softmax, mut out) = (
            u32::from(self.problem.loss == Loss::Softmax),
            self.out.address,
        );
        let mut arguments = [
            (&raw mut job).cast::<c_void>(),
            (&raw mut softmax).cast(),
            (&raw mut out).cast(),
        ];
        let grid = [Stream::blocks(rows.len()), 1];
        // SAFETY: the kernel's parameters; it writes as many values as there are rows.
        unsafe {
            self.stream
                .launch(self.stream.device.added(), grid, 0, &mut arguments)
        }?;
        self.stream.download(&self.out, rows.len())
    }

    /// Returns the number of models times directions.
    fn all_slots(&self) -> usize {
        2 * self.problem.models.len()
    }
}

impl Engine for CudaEngine<'_> {
    fn scores(&mut self) -> Result<Vec<f64>> {
        let mut scores = self.own.clone();
        if self.absorbed {
            let added = self.added(&self.running, &self.left, self.all_slots())?;
            self.left
                .iter()
                .zip(added)
                .for_each(|(&index, added)| scores[index as usize] += added);
        }
        scores
            .iter_mut()
            .for_each(|score| *score *= self.problem.gain);
        Ok(scores)
    }

    fn absorb(&mut self, chunk: &[u32]) -> Result<()> {
        let mut drawn = vec![false; self.problem.count];
        chunk.iter().for_each(|&index| drawn[index as usize] = true);
        self.left.retain(|&index| !drawn[index as usize]);
        self.flops += self.add(&self.running, &self.left, chunk, self.all_slots())?;
        self.absorbed = true;
        Ok(())
    }

    fn inner(&mut self, chosen: &[u32]) -> Result<f64> {
        let sigmoid = self.problem.loss == Loss::Sigmoid;
        if sigmoid && chosen.len() == 1 {
            return Ok(0.0);
        }
        // Under the sigmoid loss one direction covers every ordered pair (i, j) once; both
        // directions would count each twice. It also covers (i, i), as if that were a negative.
        // `own_as_negative` is subtracted for it below.
        let slots = if sigmoid {
            self.problem.models.len()
        } else {
            self.all_slots()
        };
        self.stream.clear(&self.inner.sums)?;
        self.flops += self.add(&self.inner, chosen, chosen, slots)?;
        let added = self.added(&self.inner, chosen, slots)?;
        let of = |(&index, added): (&u32, f64)| {
            if sigmoid {
                added - own_as_negative(self.problem, index)
            } else {
                self.own[index as usize] + added
            }
        };
        Ok(chosen.iter().zip(added).map(of).sum())
    }

    fn flops(&self) -> f64 {
        self.flops
    }
}

fn upload<'d>(
    stream: &Stream<'d>,
    model: &SignedModel<'_>,
    count: usize,
) -> CudaResult<Towers<'d>> {
    let embeddings = &model.embeddings;
    let (shape, planes) = (
        [count, embeddings.dim],
        planes(&[embeddings.image, embeddings.text]),
    );
    let tower = |rows: &Rows<'_>| upload_rows(stream, rows, shape, planes);
    Ok(Towers {
        image: tower(&embeddings.image)?,
        text: tower(&embeddings.text)?,
    })
}

fn slot(model: &SignedModel<'_>, count: usize, towers: &Towers<'_>) -> Slot {
    let embeddings = &model.embeddings;
    let stride = embeddings.dim.next_multiple_of(DEPTH);
    // The processor has a fast 2^x and no fast e^x, so logits are kept in units of ln 2. The factor
    // is split into two f32: one alone has a relative error of up to 2^-25, the same in every term,
    // which a sum over thousands of terms does not average out.
    let scale = embeddings.scale * std::f64::consts::LOG2_E;
    let high = scale as f32;
    Slot {
        ours: towers.image.address,
        theirs: towers.text.address,
        plane: if planes(&[embeddings.image, embeddings.text]) == 2 {
            (count * stride) as u64
        } else {
            0
        },
        stride: stride as u32,
        high,
        low: (scale - f64::from(high)) as f32,
        bias: (embeddings.bias * std::f64::consts::LOG2_E) as f32,
        sign: model.sign,
    }
}
