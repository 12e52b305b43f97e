//! Blocks of tensors to push.
use crate::{Error, Result};
use bytes::Bytes;
use half::{bf16, f16};
use superbatch_proto::{
    Checksum,
    v1::{PartHeader, TensorDtype},
};

/// A block of one tensor: the elements `start .. start + extent` of each dimension, little endian,
/// in C order.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    name: String,
    dtype: TensorDtype,
    global_shape: Vec<u64>,
    start: Vec<u64>,
    extent: Vec<u64>,
    data: Bytes,
}

impl Part {
    /// Makes a part of a whole tensor.
    pub fn whole(
        name: impl Into<String>,
        dtype: TensorDtype,
        shape: &[u64],
        data: impl Into<Bytes>,
    ) -> Result<Self> {
        Self::block(name, dtype, shape, &vec![0; shape.len()], shape, data)
    }

    /// Makes a block of a tensor of shape `global_shape`, such as one FSDP rank's shard.
    pub fn block(
        name: impl Into<String>,
        dtype: TensorDtype,
        global_shape: &[u64],
        start: &[u64],
        extent: &[u64],
        data: impl Into<Bytes>,
    ) -> Result<Self> {
        let (name, data) = (name.into(), data.into());
        let refuse = |what: String| Err(Error::invalid("parts", format!("tensor {name}: {what}")));
        let dims = global_shape.len();
        let inside = |d: usize| {
            start[d]
                .checked_add(extent[d])
                .is_some_and(|end| end <= global_shape[d])
        };
        if start.len() != dims || extent.len() != dims || !(0..dims).all(inside) {
            return refuse(format!(
                "start {start:?} and extent {extent:?} do not lie within shape {global_shape:?}"
            ));
        }
        let Some(width) = width(dtype) else {
            return refuse("it has no dtype".to_owned());
        };
        let bytes = extent
            .iter()
            .try_fold(width, |bytes, n| bytes.checked_mul(*n));
        if bytes != Some(data.len() as u64) {
            return refuse(format!(
                "{} bytes do not fill extent {extent:?} of {}",
                data.len(),
                dtype.as_str_name()
            ));
        }
        let (global_shape, start, extent) =
            (global_shape.to_vec(), start.to_vec(), extent.to_vec());
        Ok(Self {
            name,
            dtype,
            global_shape,
            start,
            extent,
            data,
        })
    }

    /// Makes a part of a whole tensor of f32.
    pub fn f32(name: impl Into<String>, shape: &[u64], values: &[f32]) -> Result<Self> {
        let data: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Self::whole(name, TensorDtype::F32, shape, data)
    }

    /// Returns the part rounded to another dtype (to nearest, ties to even).
    pub fn cast(self, dtype: TensorDtype) -> Result<Self> {
        if dtype == self.dtype {
            return Ok(self);
        }
        let (from, name) = (self.dtype, self.name.clone());
        let values = self
            .data
            .chunks_exact(width(from).unwrap_or(1) as usize)
            .map(|bytes| match (from, bytes) {
                (TensorDtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                (TensorDtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
                (TensorDtype::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
                _ => f32::NAN,
            });
        let data: Vec<u8> = match dtype {
            TensorDtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
            TensorDtype::F16 => values
                .flat_map(|value| f16::from_f32(value).to_le_bytes())
                .collect(),
            TensorDtype::Bf16 => values
                .flat_map(|value| bf16::from_f32(value).to_le_bytes())
                .collect(),
            TensorDtype::Unspecified => {
                return Err(Error::invalid(
                    "dtype",
                    format!("tensor {name}: no dtype to cast to"),
                ));
            }
        };
        Ok(Self {
            dtype,
            data: data.into(),
            ..self
        })
    }

    /// Returns the tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the bytes of this part of the tensor.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Returns the header that precedes the bytes on the wire. It hashes the bytes.
    pub(crate) fn header(&self) -> PartHeader {
        PartHeader {
            name: self.name.clone(),
            dtype: self.dtype.into(),
            global_shape: self.global_shape.clone(),
            start: self.start.clone(),
            extent: self.extent.clone(),
            xxh3: Bytes::copy_from_slice(&Checksum::of(&self.data)),
        }
    }
}

/// Returns the bytes of an element.
fn width(dtype: TensorDtype) -> Option<u64> {
    match dtype {
        TensorDtype::F32 => Some(4),
        TensorDtype::F16 | TensorDtype::Bf16 => Some(2),
        TensorDtype::Unspecified => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let dtype = TensorDtype::F32;
        assert!(Part::block("w", dtype, &[4, 2], &[2, 0], &[2, 2], vec![0; 16]).is_ok());
        assert!(Part::block("w", dtype, &[4, 2], &[3, 0], &[2, 2], vec![0; 16]).is_err());
        assert!(Part::block("w", dtype, &[4, 2], &[2], &[2], vec![0; 16]).is_err());
        assert!(Part::block("w", dtype, &[4, 2], &[u64::MAX, 0], &[2, 2], vec![0; 16]).is_err());
        assert!(Part::whole("w", dtype, &[4], vec![0; 15]).is_err());
        assert!(Part::whole("scalar", dtype, &[], vec![0; 4]).is_ok());
    }

    #[test]
    fn casts_round_to_nearest() -> Result<()> {
        let part = Part::f32("w", &[3], &[1.0, -2.5, 1.0 + 1.0 / 256.0])?;
        let narrow = part.cast(TensorDtype::Bf16)?;
        assert_eq!(narrow.data().len(), 6);
        assert_eq!(
            narrow.cast(TensorDtype::F32)?,
            Part::f32("w", &[3], &[1.0, -2.5, 1.0])?
        );
        Ok(())
    }
}
