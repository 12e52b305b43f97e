//! Weights as safetensors: read, checked against what the model needs, and written.
use super::parameters::{Parameter, Parameters};
use crate::{
    error::{Error, Result},
    pushed::{Pushed, first_not_finite},
};
use bytes::Bytes;
use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::TensorView};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::OnceLock,
};
use superbatch_proto::{some_of, v1::Reason};

/// One set of weights, not yet on a device: the files' bytes, and the place of each tensor in them.
#[derive(Debug)]
pub struct Snapshot {
    files: Vec<Bytes>,
    tensors: BTreeMap<String, Entry>,
    /// Whether this process has found all values finite before.
    is_finite: bool,
    /// Computed when it is asked for, which takes a pass over all bytes.
    digest: OnceLock<String>,
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    file: usize,
    bytes: Range<usize>,
}

/// A tensor as stored: little endian, row-major.
#[derive(Debug)]
pub struct Stored<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// Why weights are refused. It becomes `WeightsRefused` for a push and `ModelInvalid` for a model
/// folder.
#[derive(Debug)]
pub struct Refusal {
    /// The first bad tensor, if one is at fault.
    pub tensor: Option<String>,
    pub message: String,
    cause: Option<SafeTensorError>,
}

impl Refusal {
    pub(super) fn of(tensor: &str, problem: impl std::fmt::Display) -> Self {
        Self {
            tensor: Some(tensor.to_owned()),
            message: format!("tensor '{tensor}' {problem}"),
            cause: None,
        }
    }

    pub(super) fn of_all(message: String) -> Self {
        Self {
            tensor: None,
            message,
            cause: None,
        }
    }

    /// Returns an error about the weights at `source`.
    pub fn into_error(self, reason: Reason, source: &str) -> Error {
        let mut error = Error::new(reason, format!("weights of {source}: {}", self.message));
        if let Some(tensor) = &self.tensor {
            error = error.with("tensor", tensor);
        }
        match self.cause {
            Some(cause) => error.because(cause),
            None => error,
        }
    }
}

impl Snapshot {
    /// Reads the headers of one file, or of all shards of a folder.
    pub fn parse(files: Vec<Bytes>) -> Result<Self, Refusal> {
        let mut tensors = BTreeMap::new();
        for (file, bytes) in files.iter().enumerate() {
            let (header, metadata) = SafeTensors::read_metadata(bytes)
                .map_err(|cause| unreadable(bytes.len(), cause))?;
            let start = header + size_of::<u64>();
            for (stored, info) in metadata.tensors() {
                let Some(name) = canonical(&stored) else {
                    continue;
                };
                let (from, to) = info.data_offsets;
                let entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    file,
                    bytes: start + from..start + to,
                };
                if tensors.insert(name.to_owned(), entry).is_some() {
                    return Err(Refusal::of(name, "is there twice"));
                }
            }
        }
        Ok(Self {
            digest: OnceLock::new(),
            is_finite: false,
            files,
            tensors,
        })
    }

    /// Takes a file that is in memory already, without reading or hashing it. The coordinator has
    /// looked at its values.
    pub fn of_pushed(pushed: Pushed) -> Self {
        let mut snapshot = Self {
            files: Vec::with_capacity(pushed.tensors.len()),
            tensors: BTreeMap::new(),
            is_finite: true,
            digest: pushed.digest.into(),
        };
        for (file, tensor) in pushed.tensors.into_iter().enumerate() {
            let entry = Entry {
                dtype: tensor.dtype,
                shape: tensor.shape,
                file,
                bytes: 0..tensor.bytes.len(),
            };
            snapshot.files.push(tensor.bytes);
            snapshot.tensors.insert(tensor.name, entry);
        }
        snapshot
    }

    /// Returns BLAKE3 of the file in hex; of the shards' BLAKE3s in order if there are several.
    pub fn digest(&self) -> &str {
        self.digest.get_or_init(|| digest(&self.files))
    }

    pub fn get(&self, name: &str) -> Option<Stored<'_>> {
        let entry = self.tensors.get(name)?;
        let bytes = self.files.get(entry.file)?.get(entry.bytes.clone())?;
        Some(Stored {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes,
        })
    }

    /// Checks that these are exactly the tensors of a model, in f64, f32, f16 or bf16, and finite.
    ///
    /// # Errors
    /// The first bad tensor in order of name, with what was expected and what was found, and how
    /// many others are missing or of another model.
    pub fn check(&self, parameters: &Parameters) -> Result<(), Refusal> {
        let found = self.tensors.keys().map(String::as_str);
        let names: BTreeSet<&str> = parameters
            .iter()
            .map(|(name, _)| name)
            .chain(found)
            .collect();
        names.into_iter().try_for_each(|name| {
            check(parameters.get(name), self.get(name), self.is_finite)
                .map_err(|problem| Refusal::of(name, problem + &self.other_names(parameters, name)))
        })
    }
}

/// What wrappers put before names, and what takes it away.
const WRAPPERS: [&str; 3] = ["module.", "_orig_mod.", "model."];
/// Names that an error tells beside the first.
const TOLD: usize = 3;

impl Snapshot {
    /// Of names that do not fit, beside the first: their common prefix, or how many there are.
    fn other_names(&self, parameters: &Parameters, first: &str) -> String {
        let is_missing =
            |(name, of): &(&str, &Parameter)| !of.optional && !self.tensors.contains_key(*name);
        let missing: Vec<&str> = parameters
            .iter()
            .filter(is_missing)
            .map(|(name, _)| name)
            .collect();
        let unknown = self.tensors.keys().map(String::as_str);
        let unknown: Vec<&str> = unknown
            .filter(|name| parameters.get(name).is_none())
            .collect();
        let all = |prefix: &str| {
            let inner = |name: &&str| name.strip_prefix(prefix).and_then(|n| parameters.get(n));
            !unknown.is_empty() && unknown.iter().all(|name| inner(name).is_some())
        };
        if let Some(prefix) = WRAPPERS.iter().find(|prefix| all(prefix)) {
            return format!(
                "; all names begin with '{prefix}': save the state_dict() of the model inside"
            );
        }
        let mut others: Vec<&str> = missing.iter().chain(&unknown).copied().collect();
        others.retain(|name| *name != first);
        if others.is_empty() {
            return String::new();
        }
        let (count, total) = (missing.len(), unknown.len());
        others.truncate(TOLD);
        format!(
            "; in all {count} tensors are missing and {total} are not this model's, such as {}",
            some_of(&others)
        )
    }
}

/// Checks a tensor; its values only if it is not known that they are finite.
fn check(
    expected: Option<&Parameter>,
    found: Option<Stored>,
    is_finite: bool,
) -> Result<(), String> {
    let (expected, found) = match (expected, found) {
        (Some(expected), Some(found)) => (expected, found),
        (Some(expected), None) if expected.optional => return Ok(()),
        (Some(expected), None) => {
            return Err(format!("is missing; expected shape {:?}", expected.shape));
        }
        (None, _) => {
            return Err(
                "is not one of this model's; save or push model.state_dict() of the model that the \
                 configuration describes"
                    .into(),
            );
        }
    };
    // A scalar may be stored as `[]` or `[1]`: libraries differ in this for the logit scale, and
    // the bytes are the same.
    let is_one = |shape: &[usize]| shape.iter().product::<usize>() == 1 && shape.len() < 2;
    let same = is_one(&expected.shape) && is_one(found.shape);
    if expected.shape != found.shape && !same {
        return Err(format!(
            "has shape {:?}; expected {:?}",
            found.shape, expected.shape
        ));
    }
    let bad = match found.dtype {
        Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 if is_finite => None,
        Dtype::F32 => first_not_finite(found.bytes, 4, 0x7f80),
        Dtype::BF16 => first_not_finite(found.bytes, 2, 0x7f80),
        Dtype::F16 => first_not_finite(found.bytes, 2, 0x7c00),
        Dtype::F64 => first_not_finite(found.bytes, 8, 0x7ff0),
        other => {
            return Err(format!(
                "has dtype {other:?}; expected F64, F32, F16 or BF16: save model.float()"
            ));
        }
    };
    let count: usize = found.shape.iter().product();
    bad.map_or(Ok(()), |at| {
        Err(format!(
            "is not finite: element {at} of {count} is NaN or infinite; expected finite values"
        ))
    })
}

/// Returns the name of a stored tensor in the library's `state_dict`; `None` for a buffer, which
/// holds nothing learnt.
fn canonical(stored: &str) -> Option<&str> {
    if stored.rsplit('.').next() == Some("position_ids") {
        None
    } else {
        Some(stored)
    }
}

fn unreadable(length: usize, cause: SafeTensorError) -> Refusal {
    use SafeTensorError as E;
    let (tensor, message) = match &cause {
        E::HeaderTooSmall => (
            None,
            format!("{length} bytes are too few for a safetensors file: empty or truncated"),
        ),
        E::InvalidHeaderLength => (
            None,
            format!(
                "the header reaches past the end of {length} bytes: truncated, or no safetensors"
            ),
        ),
        E::MetadataIncompleteBuffer => (
            None,
            format!("the tensors do not fill the {length} bytes: truncated, or written over"),
        ),
        E::InvalidOffset(name) => (
            Some(name.clone()),
            format!("tensor '{name}' overlaps another or leaves a gap: corrupt header"),
        ),
        E::TensorInvalidInfo => (
            None,
            "a tensor's bytes do not fit its shape and dtype: corrupt header".into(),
        ),
        E::HeaderTooLarge => (
            None,
            "the header is over 100 MB: corrupt, or no safetensors".into(),
        ),
        _ => (
            None,
            "the header is corrupt, or this is no safetensors file".into(),
        ),
    };
    Refusal {
        tensor,
        message,
        cause: Some(cause),
    }
}

fn digest(files: &[Bytes]) -> String {
    let digest = match files {
        [file] => blake3::hash(file),
        shards => {
            let mut hasher = blake3::Hasher::new();
            for shard in shards {
                hasher.update(blake3::hash(shard).as_bytes());
            }
            hasher.finalize()
        }
    };
    digest.to_hex().to_string()
}

/// Writes (name, dtype, shape, little-endian bytes) as one safetensors file, in safetensors' own
/// order.
///
/// # Errors
/// `Internal` if bytes do not fit their shape and dtype.
pub fn write<'a>(
    tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
) -> Result<Bytes> {
    let views: std::result::Result<Vec<_>, SafeTensorError> = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((name, TensorView::new(dtype, shape.to_vec(), bytes)?))
        })
        .collect();
    let file = views.and_then(|views| safetensors::serialize(views, None));
    file.map(Bytes::from)
        .map_err(|e| Error::internal("cannot write safetensors").because(e))
}

#[cfg(test)]
mod tests;
