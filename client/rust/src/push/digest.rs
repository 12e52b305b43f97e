//! Computes the digest that the service gives a whole push, to compare it with the published one.
use bytes::Bytes;
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
};
use superbatch_proto::v1::{PartHeader, TensorDtype};

/// Returns BLAKE3, in hex, of the safetensors file that the service makes of whole tensors. `None`
/// if it cannot be computed here: a tensor has several parts. It hashes all weights.
pub(crate) fn digest(parts: &[(PartHeader, Bytes)]) -> Option<String> {
    let tensors = in_order(parts)?;
    let header = header(&tensors)?;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&(header.len() as u64).to_le_bytes())
        .update(&header);
    for (_, data) in tensors {
        hasher.update(data);
    }
    Some(hasher.finalize().to_hex().to_string())
}

/// Compares parts by the order of safetensors: by falling alignment of the dtype, then by name; and
/// those of one tensor by where they begin.
pub(crate) fn in_file(a: &PartHeader, b: &PartHeader) -> Ordering {
    let tensors = dtype(b).cmp(&dtype(a)).then_with(|| a.name.cmp(&b.name));
    tensors.then_with(|| a.start.cmp(&b.start))
}

/// Returns whole tensors in the order of safetensors.
fn in_order(parts: &[(PartHeader, Bytes)]) -> Option<Vec<&(PartHeader, Bytes)>> {
    let is_whole = |(header, _): &&(PartHeader, Bytes)| {
        dtype(header).is_some() && header.extent == header.global_shape
    };
    let mut tensors: Vec<_> = parts.iter().filter(is_whole).collect();
    tensors.sort_by(|(a, _), (b, _)| in_file(a, b));
    let names: HashSet<_> = tensors.iter().map(|(header, _)| &header.name).collect();
    (names.len() == parts.len()).then_some(tensors)
}

fn dtype(header: &PartHeader) -> Option<Dtype> {
    match header.dtype() {
        TensorDtype::F32 => Some(Dtype::F32),
        TensorDtype::Bf16 => Some(Dtype::BF16),
        TensorDtype::F16 => Some(Dtype::F16),
        TensorDtype::Unspecified => None,
    }
}

/// Returns the JSON before the data, padded to 8 bytes. safetensors itself writes it only together
/// with a copy of the data.
fn header(tensors: &[&(PartHeader, Bytes)]) -> Option<Vec<u8>> {
    let mut infos = Vec::with_capacity(tensors.len());
    let mut start = 0;
    for (header, data) in tensors {
        let shape = header.global_shape.iter().map(|&side| side as usize);
        let info = TensorInfo {
            dtype: dtype(header)?,
            shape: shape.collect(),
            data_offsets: (start, start + data.len()),
        };
        start += data.len();
        infos.push((header.name.clone(), info));
    }
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(about), infos).ok()?;
    let mut bytes = serde_json::to_vec(&metadata).ok()?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Part, Result};

    fn sent(parts: &[Part]) -> Vec<(PartHeader, Bytes)> {
        parts
            .iter()
            .map(|part| (part.header(), part.data().clone()))
            .collect()
    }

    #[test]
    fn a_file_is_written_as_safetensors_does() -> Result<()> {
        let half = Part::whole("a", TensorDtype::F16, &[1, 2], vec![1, 2, 3, 4])?;
        let parts = sent(&[
            half,
            Part::f32("z", &[], &[1.0])?,
            Part::f32("b", &[2], &[0.0, 2.0])?,
        ]);
        let text = concat!(
            r#"{"__metadata__":{"format":"pt"},"#,
            r#""b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
            r#""z":{"dtype":"F32","shape":[],"data_offsets":[8,12]},"#,
            r#""a":{"dtype":"F16","shape":[1,2],"data_offsets":[12,16]}}"#
        );
        let tensors = in_order(&parts).expect("whole tensors with simple names");
        let written = header(&tensors).expect("a header");
        assert_eq!(
            (written.trim_ascii_end(), written.len() % 8),
            (text.as_bytes(), 0)
        );
        let data: Vec<u8> = tensors.iter().flat_map(|(_, data)| data.to_vec()).collect();
        assert_eq!(
            data,
            [
                &[0; 4][..],
                &2f32.to_le_bytes(),
                &1f32.to_le_bytes(),
                &[1, 2, 3, 4]
            ]
            .concat()
        );
        Ok(())
    }

    #[test]
    fn what_cannot_be_told_is_not() -> Result<()> {
        let block = |start| Part::block("w", TensorDtype::F32, &[2], &[start], &[1], vec![0; 4]);
        assert_eq!(digest(&sent(&[block(0)?, block(1)?])), None);
        let escaped = digest(&sent(&[Part::f32("\"", &[1], &[0.0])?]));
        assert!(escaped.is_some(), "JSON escapes it on both sides");
        assert!(digest(&sent(&[Part::f32("w", &[1], &[0.0])?])).is_some());
        Ok(())
    }
}
