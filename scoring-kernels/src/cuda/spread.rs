//! K-center on a CUDA device, by this crate's kernels.
use super::{
    device::Device,
    error::{CudaError, Result as CudaResult},
    job::{Job, SLOTS, Slot, TILE},
    memory::{DEPTH, Needed, needed_to_spread, planes},
    rows::upload_rows,
    stream::{Buffer, Stream},
};
use crate::{engine::Spread, error::Result, types::ModelEmbeddings};

pub(crate) struct CudaSpread<'a> {
    count: usize,
    slot: Slot,
    // Fields are dropped in this order: memory is freed before the stream that works on it.
    rows: Buffer<'a, u32>,
    columns: Buffer<'a, u32>,
    /// For each candidate, the cosine with the nearest chosen example, and whether there is one:
    /// see `Job` of kernels.cu.
    nearest: Buffer<'a, f64>,
    known: Buffer<'a, f64>,
    _images: Buffer<'a, u16>,
    stream: Stream<'a>,
}

impl<'a> CudaSpread<'a> {
    pub(super) fn new(
        embeddings: &ModelEmbeddings<'_>,
        count: usize,
        device: &'a Device,
    ) -> CudaResult<Self> {
        let (dim, planes) = (embeddings.dim, planes(&[embeddings.image]));
        let Needed { inputs, above } = needed_to_spread(count, embeddings);
        let free = device.free_bytes()?;
        if inputs + above > free {
            return Err(CudaError::Memory {
                needed: inputs + above,
                free,
            });
        }
        let stream = Stream::new(device)?;
        let images = upload_rows(&stream, &embeddings.image, [count, dim], planes)?;
        let stride = dim.next_multiple_of(DEPTH);
        let plane = if planes == 2 {
            (count * stride) as u64
        } else {
            0
        };
        // With a scale of 1 and no bias the kernels' logits are the cosines.
        let slot = Slot {
            ours: images.address,
            theirs: images.address,
            plane,
            stride: stride as u32,
            high: 1.0,
            ..Slot::default()
        };
        let spread = Self {
            count,
            slot,
            rows: stream.allocate(count)?,
            columns: stream.allocate(count)?,
            nearest: stream.allocate(count)?,
            known: stream.allocate(count)?,
            _images: images,
            stream,
        };
        spread.stream.clear(&spread.known)?;
        Ok(spread)
    }

    fn add(&self, rows: &[u32], columns: &[u32]) -> CudaResult<Vec<f64>> {
        self.stream.upload(&self.rows, rows)?;
        self.stream.upload(&self.columns, columns)?;
        let mut slots = [Slot::default(); SLOTS];
        slots[0] = self.slot;
        let mut job = Job {
            slots,
            rows: self.rows.address,
            columns: self.columns.address,
            row_count: rows.len() as u32,
            column_count: columns.len() as u32,
            count: self.count as u32,
            slot_count: 1,
            largest: self.nearest.address,
            sums: self.known.address,
        };
        let (kernel, shared) = (self.stream.device.largest(), self.stream.device.tile_bytes);
        // SAFETY: a `Job` is the kernel's parameter; its lists hold indices below B, and what it
        // writes is of B.
        unsafe {
            self.stream.launch(
                kernel,
                [rows.len().div_ceil(TILE), 1],
                shared,
                &mut [(&raw mut job).cast()],
            )
        }?;
        self.stream.download(&self.nearest, self.count)
    }
}

impl Spread for CudaSpread<'_> {
    fn absorb(&mut self, chunk: &[u32], left: &[u32]) -> Result<Vec<f32>> {
        if left.is_empty() || chunk.is_empty() {
            return Ok(Vec::new());
        }
        let nearest = self.add(left, chunk)?;
        Ok(left
            .iter()
            .map(|&index| nearest[index as usize] as f32)
            .collect())
    }
}
