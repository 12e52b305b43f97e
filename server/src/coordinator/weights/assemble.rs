//! Joins a push's parts to one snapshot: a safetensors file whose bytes depend on the weights only,
//! and not on how ranks cut them. So equal weights have equal digests.
use super::{
    ModelShape,
    ahead::Known,
    part::Part,
    staging::{Staged, refused},
};
use crate::{
    error::{Error, Result},
    pushed::{self, Pushed, first_not_finite},
};
use bytes::Bytes;
use safetensors::{Dtype, SafeTensorError, View, tensor::Metadata};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};
use superbatch_proto::v1::Reason;

impl Staged {
    /// Returns the learner's tensors and the parts of each.
    fn into_parts(self) -> (Arc<ModelShape>, BTreeMap<String, Vec<Part>>) {
        let parts = self
            .tensors
            .into_iter()
            .map(|(name, parts)| (name, parts.into_values().collect()));
        (self.shape, parts.collect())
    }
}

/// Joins the parts by tensor. Whole tensors are not copied. It reads all weights, so it must run
/// off the async threads.
///
/// # Errors
/// `WeightsRefused`, naming the first tensor (by name) that is not covered or holds NaN or
/// infinity.
pub(crate) fn assemble(staged: Staged) -> Result<Pushed> {
    join(staged, None)
}

/// As [`assemble`], without looking at the values once more if they are known.
pub(super) fn join(staged: Staged, known: Option<Known>) -> Result<Pushed> {
    let known = known.filter(|known| known.is_of(&staged.dtypes()));
    let (shape, mut parts) = staged.into_parts();
    let (mut tensors, optional) = (BTreeMap::<&str, Tensor>::new(), &shape.optional);
    for (name, shape) in &shape.tensors {
        let own = parts.remove(name).unwrap_or_default();
        if own.is_empty() && optional.contains(name) {
            continue;
        }
        let (have, all) = (
            own.iter().map(Part::elements).sum::<u64>(),
            shape.iter().product::<u64>(),
        );
        // Every part was checked when it was staged: it lies inside the tensor and overlaps no
        // other. So the tensor is covered exactly if the numbers of elements add up.
        if have != all || own.is_empty() {
            let others = tensors.keys().copied();
            let hint = match have {
                0 => frozen(name, others.chain(parts.keys().map(String::as_str))),
                _ => String::new(),
            };
            return Err(refused(
                name,
                format!("{name} is not whole: {have} of {all} elements were pushed{hint}"),
            ));
        }
        let shape: Result<Vec<usize>, _> = shape.iter().map(|&n| usize::try_from(n)).collect();
        let shape = shape.map_err(|e| refused(name, format!("{name} is too large")).because(e))?;
        let tensor = Tensor { shape, parts: own };
        if known.is_none()
            && let Some(value) = tensor.not_finite()
        {
            return Err(refused(
                name,
                format!("{name} holds {value}; the weights diverged or were overwritten"),
            ));
        }
        tensors.insert(name.as_str(), tensor);
    }
    let mut pushed = file(tensors).map_err(|e| {
        Error::new(
            Reason::WeightsRefused,
            "cannot write the weights as safetensors",
        )
        .because(e)
    })?;
    let known = known.filter(|known| known.has_header(&pushed.header));
    pushed.digest = known.map_or_else(|| digest(&pushed), |known| known.digest);
    Ok(pushed)
}

/// Returns what to do where nothing of a tower was pushed, but `others` were: as if the trainer
/// pushed what it trains, and the tower is frozen (LiT). Empty if it is otherwise.
fn frozen<'a>(name: &str, mut others: impl Iterator<Item = &'a str>) -> String {
    let Some((tower, _)) = name.split_once('.') else {
        return String::new();
    };
    let is_inside = |other: &str| {
        other
            .strip_prefix(tower)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    let first = others.next();
    if first.is_none_or(is_inside) || others.any(is_inside) {
        return String::new();
    }
    format!(
        "; nothing of '{tower}.' was pushed: if it is frozen, push the whole model.state_dict() \
         first, and then what is trained with base_version"
    )
}

/// Returns the BLAKE3 of the file, in hex.
fn digest(pushed: &Pushed) -> String {
    let mut hasher = blake3::Hasher::new();
    for piece in pushed.pieces() {
        hasher.update(&piece);
    }
    hasher.finalize().to_hex().to_string()
}

/// Returns the file's header, then the tensors in the header's order, and no digest yet. The pieces
/// are never joined: a copy of all weights would double the memory of a push.
fn file(mut tensors: BTreeMap<&str, Tensor>) -> Result<Pushed, SafeTensorError> {
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut header = safetensors::serialize(
        tensors
            .iter()
            .map(|(name, tensor)| (*name, Described(tensor))),
        Some(format),
    )?;
    // `serialize` reserved memory for the tensors' data, of which it got none.
    header.shrink_to_fit();
    let placed: Metadata = serde_json::from_slice(&header[size_of::<u64>()..])
        .map_err(SafeTensorError::InvalidHeaderDeserialization)?;
    let names = placed.offset_keys();
    let data = names.into_iter().filter_map(|name| {
        let tensor = tensors.remove(name.as_str())?;
        Some(pushed::Tensor {
            name,
            dtype: tensor.dtype(),
            shape: tensor.shape.clone(),
            bytes: tensor.data(),
        })
    });
    Ok(Pushed {
        header: header.into(),
        tensors: data.collect(),
        digest: String::new(),
    })
}

#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub shape: Vec<usize>,
    /// At least one part.
    pub parts: Vec<Part>,
}

/// A tensor as the header describes it, without its data.
struct Described<'a>(&'a Tensor);

impl View for Described<'_> {
    fn dtype(&self) -> Dtype {
        self.0.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&[])
    }

    fn data_len(&self) -> usize {
        self.0.bytes()
    }
}

impl Tensor {
    fn dtype(&self) -> Dtype {
        self.parts[0].dtype
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().bitsize() / 8
    }

    /// Returns its bytes: those of its only part, or of all parts joined.
    pub(super) fn data(&self) -> Bytes {
        match &self.pieces()[..] {
            [whole] => whole.clone(),
            pieces => pieces.concat().into(),
        }
    }

    /// Returns its bytes in order: the parts themselves if each has whole rows of the first
    /// dimension, as FSDP cuts; else one piece, in which all are joined.
    pub(super) fn pieces(&self) -> Vec<Bytes> {
        let has_whole_rows = |part: &Part| {
            let extent = part.extent.iter().skip(1).copied();
            extent.eq(self.shape.iter().skip(1).map(|&n| n as u64))
        };
        if self.parts.len() == 1 || self.parts.iter().all(has_whole_rows) {
            let mut parts: Vec<&Part> = self.parts.iter().collect();
            parts.sort_by_key(|part| part.start.first());
            return parts.into_iter().map(|part| part.bytes.clone()).collect();
        }
        let mut out = vec![0; self.bytes()];
        for part in &self.parts {
            place(&mut out, &self.shape, part);
        }
        vec![out.into()]
    }

    /// Returns the first value that is not finite.
    pub(super) fn not_finite(&self) -> Option<f32> {
        self.parts.iter().find_map(not_finite)
    }
}

/// Copies a part into the tensor `out` of `shape`, in the longest runs that are contiguous in both.
fn place(out: &mut [u8], shape: &[usize], part: &Part) {
    let width = part.dtype.bitsize() / 8;
    let extent: Vec<usize> = part.extent.iter().map(|&n| n as usize).collect();
    let start: Vec<usize> = part.start.iter().map(|&n| n as usize).collect();
    let mut strides = vec![width; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    // All dimensions after `outer` are covered completely, so a contiguous run spans `outer` and
    // all of them.
    let outer = (0..shape.len())
        .rev()
        .find(|&d| extent[d] != shape[d])
        .unwrap_or(0);
    let run = extent.iter().skip(outer).product::<usize>() * width;
    if part.bytes.is_empty() {
        return;
    }
    let first: usize = start
        .iter()
        .zip(&strides)
        .map(|(s, stride)| s * stride)
        .sum();
    for (mut index, bytes) in part.bytes.chunks_exact(run).enumerate() {
        let mut at = first;
        for d in (0..outer).rev() {
            at += index % extent[d] * strides[d];
            index /= extent[d];
        }
        out[at..at + run].copy_from_slice(bytes);
    }
}

/// Returns the first value that is not finite: all bits of its exponent are set.
fn not_finite(part: &Part) -> Option<f32> {
    let (width, mask) = match part.dtype {
        Dtype::F16 => (2, 0x7c00),
        Dtype::BF16 => (2, 0x7f80),
        _ => (4, 0x7f80),
    };
    let at = first_not_finite(&part.bytes, width, mask)? * width;
    let value = part.bytes.get(at..at + width)?;
    Some(match (part.dtype, value) {
        (Dtype::F16, &[low, high]) => half::f16::from_le_bytes([low, high]).to_f32(),
        (Dtype::BF16, &[low, high]) => half::bf16::from_le_bytes([low, high]).to_f32(),
        (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(dtype: Dtype, start: &[u64], extent: &[u64], bytes: Vec<u8>) -> Part {
        Part {
            dtype,
            start: start.to_vec(),
            extent: extent.to_vec(),
            bytes: bytes.into(),
        }
    }

    #[test]
    fn a_tower_that_is_left_out_may_be_frozen() {
        let hint = |others: &[&'static str]| frozen("image.a", others.iter().copied());
        let left_out = hint(&["logit_scale", "text.a", "images.b"]);
        assert!(left_out.contains("nothing of 'image.'"), "{left_out}");
        for others in [&[][..], &["image.b"], &["logit_scale", "image.b"]] {
            assert_eq!(hint(others), "", "{others:?}");
        }
        assert_eq!(frozen("logit_scale", ["text.a"].into_iter()), "");
    }

    #[test]
    fn blocks_land_where_they_belong_in_any_dimension() {
        // Every way to cut a 3 x 4 x 2 tensor in two along one dimension.
        let shape = [3usize, 4, 2];
        let whole: Vec<u8> = (0..48).collect();
        for (axis, cut) in
            (0..3).flat_map(|axis| (0..=shape[axis] as u64).map(move |cut| (axis, cut)))
        {
            let parts = [(0, cut), (cut, shape[axis] as u64)].map(|(from, to)| {
                let (mut start, mut extent) = ([0; 3], shape.map(|n| n as u64));
                (start[axis], extent[axis]) = (from, to - from);
                let inside = |i: &usize| {
                    let index = [i / 8, i / 2 % 4, i % 2];
                    (from..to).contains(&(index[axis] as u64))
                };
                let bytes = (0..24)
                    .filter(inside)
                    .flat_map(|i| [whole[2 * i], whole[2 * i + 1]])
                    .collect();
                part(Dtype::F16, &start, &extent, bytes)
            });
            let tensor = Tensor {
                shape: shape.to_vec(),
                parts: parts.into(),
            };
            assert_eq!(tensor.data(), whole, "axis {axis}, cut at {cut}");
            let pieces = tensor.pieces();
            assert_eq!(pieces.concat(), whole, "axis {axis}, cut at {cut}");
            assert_eq!(pieces.len(), if axis == 0 { 2 } else { 1 });
            let turned = Tensor {
                parts: tensor.parts.iter().rev().cloned().collect(),
                ..tensor
            };
            assert_eq!(turned.data(), whole, "axis {axis}, cut at {cut}");
        }
    }

    #[test]
    fn the_file_is_what_the_library_writes() {
        let tensor = |dtype, n: u8, shape: &[usize]| {
            let bytes: Vec<u8> = (0..n).collect();
            let extent: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
            Tensor {
                shape: shape.to_vec(),
                parts: vec![part(dtype, &vec![0; shape.len()], &extent, bytes)],
            }
        };
        let tensors = || {
            BTreeMap::from([
                ("b.half", tensor(Dtype::F16, 12, &[3, 2])),
                ("a.scale", tensor(Dtype::F32, 4, &[])),
                ("c.half", tensor(Dtype::BF16, 2, &[1])),
                ("d.weight", tensor(Dtype::F32, 24, &[2, 3])),
            ])
        };
        struct Whole(Tensor);
        impl View for Whole {
            fn dtype(&self) -> Dtype {
                self.0.dtype()
            }
            fn shape(&self) -> &[usize] {
                &self.0.shape
            }
            fn data(&self) -> Cow<'_, [u8]> {
                Cow::Borrowed(&self.0.parts[0].bytes)
            }
            fn data_len(&self) -> usize {
                self.0.bytes()
            }
        }
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let whole = tensors()
            .into_iter()
            .map(|(name, tensor)| (name, Whole(tensor)));
        let expected = safetensors::serialize(whole, Some(format)).unwrap();
        let pieces: Vec<Bytes> = file(tensors()).unwrap().pieces().collect();
        assert_eq!(pieces.concat(), expected);
    }

    #[test]
    fn nan_and_infinity_are_seen_in_every_dtype() {
        let f32s = |x: f32| {
            part(
                Dtype::F32,
                &[0],
                &[2],
                [1.0f32.to_le_bytes(), x.to_le_bytes()].concat(),
            )
        };
        let f16s = |x: f32| {
            part(
                Dtype::F16,
                &[0],
                &[1],
                half::f16::from_f32(x).to_le_bytes().to_vec(),
            )
        };
        let bf16s = |x: f32| {
            part(
                Dtype::BF16,
                &[0],
                &[1],
                half::bf16::from_f32(x).to_le_bytes().to_vec(),
            )
        };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for part in [f32s(bad), f16s(bad), bf16s(bad)] {
                assert!(not_finite(&part).is_some(), "{bad} as {:?}", part.dtype);
            }
        }
        for good in [0.0, -1.5, 60_000.0, 1e-8] {
            for part in [f32s(good), f16s(good), bf16s(good)] {
                assert_eq!(not_finite(&part), None, "{good} as {:?}", part.dtype);
            }
        }
    }
}
