//! Embeddings on a device, in halves.
use super::{
    error::Result,
    memory::{DEPTH, STAGING_BYTES},
    stream::{Buffer, Stream},
};
use crate::types::Rows;
use half::slice::HalfFloatSliceExt;
use std::ffi::c_void;

/// Copies a tower to the device: `[planes, B, stride]` halves. Padding is zero, and so is the
/// second plane of f16 values, which do not need it.
pub(super) fn upload_rows<'d>(
    stream: &Stream<'d>,
    rows: &Rows<'_>,
    [count, dim]: [usize; 2],
    planes: usize,
) -> Result<Buffer<'d, u16>> {
    let stride = dim.next_multiple_of(DEPTH);
    let buffer = stream.allocate(planes * count * stride)?;
    match rows {
        Rows::F16(values) => {
            stream.clear(&buffer)?;
            stream.upload_rows(&buffer, values.reinterpret_cast(), dim, stride)?;
            stream.wait()?;
        }
        Rows::F32(values) => split(stream, values, [count, dim, stride], &buffer)?,
    }
    Ok(buffer)
}

/// Splits every value into two halves, a stretch of rows at a time, so that the f32 values never
/// need more than a small buffer on the device.
fn split(
    stream: &Stream<'_>,
    values: &[f32],
    [count, dim, stride]: [usize; 3],
    to: &Buffer<'_, u16>,
) -> Result<()> {
    let height = (STAGING_BYTES / (dim * size_of::<f32>())).clamp(1, count);
    let staging: Buffer<'_, f32> = stream.allocate(height * dim)?;
    for (stretch, first) in values.chunks(height * dim).zip((0..).step_by(height)) {
        stream.upload(&staging, stretch)?;
        let rows = stretch.len() / dim;
        let mut from = staging.address;
        let mut to = to.address + (first * stride * size_of::<u16>()) as u64;
        let mut plane = (count * stride) as u64;
        let (mut rows_of, mut dim_of, mut stride_of) = (rows as u32, dim as u32, stride as u32);
        let mut arguments: [*mut c_void; 6] = [
            (&raw mut from).cast(),
            (&raw mut to).cast(),
            (&raw mut plane).cast(),
            (&raw mut rows_of).cast(),
            (&raw mut dim_of).cast(),
            (&raw mut stride_of).cast(),
        ];
        let grid = [Stream::blocks(rows * stride), 1];
        // SAFETY: the kernel's parameters; it reads the stretch, and writes its rows of both
        // planes.
        unsafe { stream.launch(stream.device.split(), grid, 0, &mut arguments) }?;
        stream.wait()?;
    }
    Ok(())
}
