//! Computes the digest that the service gives a whole push, to compare it with the published one.
use bytes::Bytes;
use superbatch_proto::v1::{PartHeader, TensorDtype};

/// Returns BLAKE3, in hex, of the safetensors file that the service makes of whole tensors. `None`
/// if it cannot be computed here: a tensor has several parts, or JSON escapes a name. It hashes all
/// weights.
pub(crate) fn digest(parts: &[(PartHeader, Bytes)]) -> Option<String> {
    let tensors = in_order(parts)?;
    let header = header(&tensors);
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&(header.len() as u64).to_le_bytes())
        .update(header.as_bytes());
    for (_, data) in tensors {
        hasher.update(data);
    }
    Some(hasher.finalize().to_hex().to_string())
}

/// Sorts tensors in the order of safetensors: by falling alignment of the dtype, then by name.
fn in_order(parts: &[(PartHeader, Bytes)]) -> Option<Vec<&(PartHeader, Bytes)>> {
    let place = |header: &PartHeader| dtype(header).map(|(place, _)| place);
    let simple = |name: &str| {
        name.chars()
            .all(|c| !matches!(c, '"' | '\\') && !c.is_control())
    };
    let mut tensors: Vec<_> = parts.iter().collect();
    tensors.sort_by(|(a, _), (b, _)| place(a).cmp(&place(b)).then_with(|| a.name.cmp(&b.name)));
    let known = |(header, _): &&(PartHeader, Bytes)| {
        place(header).is_some() && simple(&header.name) && header.extent == header.global_shape
    };
    let mut names: Vec<_> = parts.iter().map(|(header, _)| &header.name).collect();
    names.sort();
    names.dedup();
    (tensors.iter().all(known) && names.len() == parts.len()).then_some(tensors)
}

/// Returns the rank of a dtype in that order, and its name.
fn dtype(header: &PartHeader) -> Option<(u8, &'static str)> {
    match header.dtype() {
        TensorDtype::F32 => Some((0, "F32")),
        TensorDtype::Bf16 => Some((1, "BF16")),
        TensorDtype::F16 => Some((2, "F16")),
        TensorDtype::Unspecified => None,
    }
}

/// Returns the JSON before the data, padded to 8 bytes.
fn header(tensors: &[&(PartHeader, Bytes)]) -> String {
    let mut text = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
    let mut start = 0;
    for (header, data) in tensors {
        let shape: Vec<_> = header.global_shape.iter().map(u64::to_string).collect();
        let (end, name, shape) = (start + data.len(), &header.name, shape.join(","));
        let dtype = dtype(header).map_or("", |(_, name)| name);
        text += &format!(
            r#","{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}"#
        );
        start = end;
    }
    text.push('}');
    let padding = text.len().next_multiple_of(8) - text.len();
    text + &" ".repeat(padding)
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
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
            r#""z":{"dtype":"F32","shape":[],"data_offsets":[8,12]},"#,
            r#""a":{"dtype":"F16","shape":[1,2],"data_offsets":[12,16]}}"#
        );
        let tensors = in_order(&parts).expect("whole tensors with simple names");
        let written = header(&tensors);
        assert_eq!((written.trim_end(), written.len() % 8), (text, 0));
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
        assert_eq!(digest(&sent(&[Part::f32("\"", &[1], &[0.0])?])), None);
        assert!(digest(&sent(&[Part::f32("w", &[1], &[0.0])?])).is_some());
        Ok(())
    }
}
