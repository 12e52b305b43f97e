//! Reads a safetensors file in storage tensor by tensor: a version's weights, or a checkpoint that
//! is pushed by its URI. Nothing of it is held but one tensor.
use super::staging::refused;
use crate::{
    bounds::{PARTS_MAX, TENSOR_DIMENSIONS_MAX, TENSOR_NAME_BYTES_MAX, check_bytes, check_count},
    error::{Error, Result},
    storage::Location,
};
use bytes::Bytes;
use object_store::{GetOptions, GetRange};
use safetensors::{Dtype, tensor::Metadata};
use std::ops::Range;
use superbatch_proto::v1::{Reason, TensorDtype};

/// The longest header that is read, as safetensors itself has it.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes of one request to the store.
const READ_BYTES: u64 = 16 << 20;

/// A tensor and where it lies in the file.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub range: Range<u64>,
}

impl Placed {
    /// Returns the dtype as the protocol has it; `None` if the tensor is no weight, such as
    /// position ids.
    pub(super) fn kind(&self) -> Option<TensorDtype> {
        match self.dtype {
            Dtype::F32 => Some(TensorDtype::F32),
            Dtype::F16 => Some(TensorDtype::F16),
            Dtype::BF16 => Some(TensorDtype::Bf16),
            _ => None,
        }
    }
}

/// A safetensors file in storage, whose header was read and checked.
#[derive(Debug, Clone)]
pub(crate) struct TensorFile {
    at: Location,
    etag: Option<String>,
    /// The length of the header and the header, as stored.
    pub(super) head: Bytes,
    /// In the order of their bytes, without a gap up to the end of the file.
    pub(super) tensors: Vec<Placed>,
}

impl TensorFile {
    /// Opens the file at `at`; `None` if the object does not exist.
    ///
    /// # Errors
    /// `WeightsRefused` if it is no safetensors file, with the `uri`; `MessageTooLarge` if it is
    /// larger than `bytes_max`; `StorageUnreachable`.
    pub(crate) async fn open(at: Location, bytes_max: u64) -> Result<Option<Self>> {
        let Some(meta) = at.head("").await? else {
            return Ok(None);
        };
        let mut file = Self {
            at,
            etag: meta.e_tag,
            head: Bytes::new(),
            tensors: Vec::new(),
        };
        let length = file.range(0..8.min(meta.size)).await?;
        let header_bytes = length.as_ref().try_into().map(u64::from_le_bytes);
        let data = header_bytes.ok().and_then(|n| n.checked_add(8));
        let data = data.filter(|data| *data <= meta.size && *data <= HEADER_BYTES_MAX);
        let data = data.ok_or_else(|| file.broken("its header has an impossible length"))?;
        if meta.size - data > bytes_max {
            let (uri, bytes) = (file.at.uri(), meta.size - data);
            let message = format!(
                "{uri} has {bytes} bytes of weights, and coordinator.push_bytes_max is \
                {bytes_max}; raise it"
            );
            return Err(Error::new(Reason::MessageTooLarge, message).with("uri", uri));
        }
        file.head = file.range(0..data).await?;
        file.tensors = file.placed(meta.size)?;
        Ok(Some(file))
    }

    pub(crate) fn uri(&self) -> &str {
        self.at.uri()
    }

    fn placed(&self, size: u64) -> Result<Vec<Placed>> {
        let data = self.head.len() as u64;
        let described: Metadata =
            serde_json::from_slice(&self.head[8..]).map_err(|e| self.broken(&e.to_string()))?;
        let names = described.offset_keys();
        check_count("tensors", names.len(), PARTS_MAX)?;
        let mut tensors = Vec::with_capacity(names.len());
        let mut end = data;
        for name in names {
            check_bytes("name", &name, TENSOR_NAME_BYTES_MAX)?;
            let Some(info) = described.info(&name) else {
                continue;
            };
            check_count("shape", info.shape.len(), TENSOR_DIMENSIONS_MAX)?;
            let at = |offset: usize| data.checked_add(offset as u64);
            let (Some(start), Some(stop)) = (at(info.data_offsets.0), at(info.data_offsets.1))
            else {
                return Err(self.broken(&format!("{name} lies outside of it")));
            };
            // The bytes are read in this order, so that each of them is read once.
            if stop > size {
                return Err(self.broken(&format!("it is cut off before the end of {name}")));
            }
            if start != end || stop < start {
                return Err(self.broken(&format!("{name} lies over another tensor")));
            }
            end = stop;
            tensors.push(Placed {
                dtype: info.dtype,
                shape: info.shape.iter().map(|&n| n as u64).collect(),
                range: start..stop,
                name,
            });
        }
        if end == size {
            Ok(tensors)
        } else {
            Err(self.broken("it has bytes behind its tensors"))
        }
    }

    fn broken(&self, why: &str) -> Error {
        let message = format!("{} is no whole safetensors file: {why}", self.at.uri());
        refused("", message).with("uri", self.at.uri())
    }

    /// Reads some bytes of the file.
    ///
    /// # Errors
    /// `WeightsRefused` if the file has been replaced since it was opened; `StorageUnreachable`.
    pub(super) async fn range(&self, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: self.etag.clone(),
            ..Default::default()
        };
        let path = self.at.path("");
        let read = async {
            let found = self.at.store().get_opts(&path, options).await?;
            found.bytes().await
        };
        read.await.map_err(|cause| match cause {
            object_store::Error::Precondition { .. } => {
                let message = format!("{} was replaced while it was read", self.at.uri());
                refused("", message).with("uri", self.at.uri())
            }
            cause => self.at.error("read", "", cause),
        })
    }

    /// Reads a tensor whole.
    ///
    /// # Errors
    /// As of a push by this file: `WeightsRefused`, `StorageUnreachable`.
    pub(super) async fn read(&self, tensor: &Placed) -> Result<Vec<u8>> {
        let size = tensor.range.end - tensor.range.start;
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        for piece in pieces(&tensor.range) {
            bytes.extend_from_slice(&self.range(piece).await?);
        }
        Ok(bytes)
    }

    /// Returns the BLAKE3 of a tensor's bytes as they lie there.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub(super) async fn digest(&self, tensor: &Placed) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        for piece in pieces(&tensor.range) {
            let bytes = self.range(piece).await?;
            // Off the async threads: a piece takes milliseconds.
            let hashing = tokio::task::spawn_blocking(move || {
                hasher.update(&bytes);
                hasher
            });
            hasher = hashing
                .await
                .map_err(|e| Error::internal("hashing a tensor failed").because(e))?;
        }
        Ok(hasher.finalize())
    }
}

/// Cuts a range of bytes into those that are read at a time.
pub(super) fn pieces(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    (range.start..end)
        .step_by(READ_BYTES as usize)
        .map(move |at| at..end.min(at + READ_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    async fn opened(bytes: Vec<u8>) -> Result<Option<TensorFile>> {
        let stores = Stores::new(StorageConfig::default());
        let at = stores.open("memory:///w.safetensors").unwrap();
        at.put("", bytes.into()).await.unwrap();
        TensorFile::open(at, 1 << 20).await
    }

    fn written(header: &str, data: &[u8]) -> Vec<u8> {
        let length = (header.len() as u64).to_le_bytes();
        [&length[..], header.as_bytes(), data].concat()
    }

    const TWO: &str = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[4,12]}}"#;

    #[tokio::test]
    async fn tensors_are_read_where_they_lie() {
        let data: Vec<u8> = (0..12).collect();
        let file = opened(written(TWO, &data)).await.unwrap().unwrap();
        let kinds: Vec<_> = file.tensors.iter().map(Placed::kind).collect();
        assert_eq!(kinds, [Some(TensorDtype::F32), None]);
        assert_eq!(file.read(&file.tensors[0]).await.unwrap(), data[..4]);
        let digest = file.digest(&file.tensors[1]).await.unwrap();
        assert_eq!(digest, blake3::hash(&data[4..]));
    }

    #[tokio::test]
    async fn what_is_no_whole_file_is_refused_by_name() {
        let overlapping = TWO.replace("[4,12]", "[0,8]");
        let endless = [u64::MAX.to_le_bytes().to_vec(), b"{}".to_vec()].concat();
        for bytes in [
            Vec::new(),
            b"abc".to_vec(),
            endless,
            written("{", &[]),
            written(TWO, &[0; 11]),
            written(TWO, &[0; 13]),
            written(&overlapping, &[0; 12]),
            written(&TWO.replace("[1]", "[2]"), &[0; 12]),
        ] {
            let error = opened(bytes).await.unwrap_err();
            assert_eq!(error.reason(), Reason::WeightsRefused);
            assert_eq!(error.value("uri"), Some("memory:///w.safetensors"));
        }
    }

    #[tokio::test]
    async fn a_file_that_is_too_large_is_refused_before_it_is_read() {
        let stores = Stores::new(StorageConfig::default());
        let at = stores.open("memory:///w.safetensors").unwrap();
        assert!(TensorFile::open(at.clone(), 1).await.unwrap().is_none());
        at.put("", written(TWO, &[0; 12]).into()).await.unwrap();
        assert!(TensorFile::open(at.clone(), 12).await.unwrap().is_some());
        let error = TensorFile::open(at, 11).await.unwrap_err();
        assert_eq!(error.reason(), Reason::MessageTooLarge);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(0u8.., 0..200)) {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let Ok(Some(file)) = opened(bytes).await else { return };
                for tensor in &file.tensors {
                    file.read(tensor).await.unwrap();
                }
            });
        }
    }
}
