//! Stored reference embeddings: one immutable object for each block, shared by all runs and
//! workers.
use super::{cache::Cache, embeddings::Embeddings};
use crate::{
    error::{Error, Result},
    fidelity::Fidelity,
    origin::{FOLDER, MAGIC, Origin},
    storage::{Created, Location},
    worker::{
        inputs::preprocess::{ImageLimits, RowFault},
        model::Compute,
    },
};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::{future::Future, sync::Arc};
use superbatch_proto::v1::{BadRowReason, EmbeddingDtype};

/// Everything that the embeddings of a block depend on. A field that is missing here would let one
/// run read numbers that were computed otherwise.
#[derive(Debug, Clone)]
pub(crate) struct BlockKey<'a> {
    /// `SourceManifest::rows_digest` of the source.
    pub rows: &'a str,
    pub shard: u32,
    pub block: u32,
    pub model_digest: &'a str,
    /// Of preprocessing and tokenizer.
    pub inputs_digest: [u8; 32],
    pub fidelity: Fidelity,
    pub dtype: EmbeddingDtype,
    pub compute: Compute,
    /// Images beyond these limits are faults, and faults are stored with the embeddings.
    pub limits: ImageLimits,
}

/// The embeddings of rows of a block, in its order; rows at fault are zero. What is stored has all
/// of its rows.
#[derive(Debug, PartialEq)]
pub(crate) struct BlockEmbeddings {
    pub embeddings: Embeddings,
    /// By rising row. `EmbeddingNotFinite` is among them.
    pub faults: Vec<(u32, RowFault)>,
    /// `None` in objects of earlier builds.
    pub origin: Option<Origin>,
}

/// The shape that a block's embeddings must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub rows: usize,
    pub dim: usize,
    pub dtype: EmbeddingDtype,
}

#[derive(Serialize, Deserialize)]
struct Header {
    /// The first field: see [`Origin::of`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    of: Option<Origin>,
    rows: usize,
    dim: usize,
    dtype: String,
    holes: Vec<Hole>,
}

#[derive(Serialize, Deserialize)]
struct Hole {
    row: u32,
    reason: String,
    detail: String,
}

/// Reference embeddings in object storage, below `reference/` of the state. The ones used last are
/// kept in memory.
pub(crate) struct Sidecar {
    state: Location,
    cache: Cache<String, Arc<BlockEmbeddings>>,
}

impl BlockKey<'_> {
    /// Returns the object's key in the state.
    pub(crate) fn object(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let place = [self.shard, self.block].map(u32::to_le_bytes).concat();
        let compute = if self.compute == Compute::Bf16 {
            "bf16"
        } else {
            "f32"
        };
        let names = [&self.fidelity.name(), self.dtype.as_str_name(), compute].join(" ");
        let limits = [self.limits.pixels_max, self.limits.bytes_max]
            .map(u64::to_le_bytes)
            .concat();
        let (rows, model) = (self.rows.as_bytes(), self.model_digest.as_bytes());
        let fields = [
            rows,
            &place,
            model,
            &self.inputs_digest,
            names.as_bytes(),
            &limits,
        ];
        // Each field is preceded by its length. Without it ("ab", "c") and ("a", "bc") would have
        // the same hash.
        for field in fields {
            hash.update(&(field.len() as u64).to_le_bytes())
                .update(field);
        }
        format!("{FOLDER}/{}", hash.finalize().to_hex())
    }
}

impl Sidecar {
    /// Makes a sidecar that keeps up to `cache_bytes` in memory.
    pub(crate) fn new(state: Location, cache_bytes: usize) -> Self {
        Self {
            state,
            cache: Cache::new(cache_bytes, |block| block.embeddings.bytes()),
        }
    }

    /// Returns the bytes of embeddings in memory.
    pub(crate) fn cached_bytes(&self) -> usize {
        self.cache.used()
    }

    /// Returns the embeddings of a block: from memory, from the store, or from `compute`, whose
    /// result is stored. If two workers compute a block at once, the first to store it wins and
    /// both use its numbers. A damaged object is computed again and replaced.
    ///
    /// # Errors
    /// Those of reading and of `compute`. A failure to store is only logged: the embeddings are
    /// right, and a later call computes and stores them again.
    pub(crate) async fn get(
        &self,
        key: &str,
        shape: Shape,
        compute: impl Future<Output = Result<BlockEmbeddings>>,
    ) -> Result<Arc<BlockEmbeddings>> {
        let make = async {
            let found = self.state.find(key).await?;
            let damaged = found.is_some();
            if let Some(bytes) = found
                && let Some(block) = blocking(move || decode(&bytes, shape)).await?
            {
                return Ok(Arc::new(block));
            }
            if damaged {
                tracing::warn!(
                    object = self.state.uri_of(key),
                    "reference embeddings are damaged; computing them again"
                );
            }
            let block = compute.await?;
            // A row that was given up by its deadline may be a good one: a busy or a paused machine
            // is slow, too. Stored, it would be missing for all runs and for ever.
            if block.faults.iter().any(|(_, fault)| fault.is_passing) {
                return Ok(Arc::new(block));
            }
            Ok(Arc::new(self.store(key, shape, block, damaged).await?))
        };
        self.cache.get(&key.to_owned(), make).await
    }

    /// Returns the embeddings of a block from memory or from the store; `None` if they are not
    /// kept, or damaged, which is logged: what is computed in their place is not stored.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) async fn find(
        &self,
        key: &str,
        shape: Shape,
    ) -> Result<Option<Arc<BlockEmbeddings>>> {
        let mut is_kept = true;
        let read = async {
            if let Some(bytes) = self.state.find(key).await? {
                if let Some(block) = blocking(move || decode(&bytes, shape)).await? {
                    return Ok(Arc::new(block));
                }
                tracing::warn!(
                    object = self.state.uri_of(key),
                    "reference embeddings are damaged; the candidates' are computed for this step \
                     alone, and `superbatch embed` stores them anew"
                );
            }
            is_kept = false;
            Err(Error::internal("no reference embeddings are kept"))
        };
        match self.cache.get(&key.to_owned(), read).await {
            Err(_) if !is_kept => Ok(None),
            found => found.map(Some),
        }
    }

    async fn store(
        &self,
        key: &str,
        shape: Shape,
        block: BlockEmbeddings,
        replace: bool,
    ) -> Result<BlockEmbeddings> {
        let encoded = move || (encode(&block, shape.dtype), block);
        let (bytes, block) = blocking(encoded).await?;
        // Another worker may have stored this block in the meantime. Devices differ in the last
        // bits, so its numbers replace ours: all slices, and a step that is computed again after a
        // crash, must see the same ones. A damaged object is the exception: a create would only
        // find it again, so it is overwritten.
        let stored = if replace {
            self.state.put(key, bytes).await.map(|()| Created::Ours)
        } else {
            self.state.create(key, bytes).await
        };
        Ok(match stored {
            Ok(Created::Ours) => block,
            Ok(Created::Theirs(bytes)) => blocking(move || decode(&bytes, shape))
                .await?
                .unwrap_or(block),
            Err(error) => {
                tracing::warn!(
                    error = error.chain(),
                    "could not store reference embeddings; they serve this once"
                );
                block
            }
        })
    }
}

/// Hashes and copies megabytes off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let panicked =
        |e| Error::internal("reading or writing reference embeddings panicked").because(e);
    tokio::task::spawn_blocking(work).await.map_err(panicked)
}

/// Encodes a block: magic, length of the header (u32 le), header (JSON), image embeddings, text
/// embeddings, BLAKE3 of all that.
fn encode(block: &BlockEmbeddings, dtype: EmbeddingDtype) -> Bytes {
    let holes = block.faults.iter().map(|(row, fault)| Hole {
        row: *row,
        reason: fault.reason.as_str_name().to_owned(),
        detail: fault.detail.clone(),
    });
    let Embeddings {
        dim, image, text, ..
    } = &block.embeddings;
    let header = Header {
        of: block.origin.clone(),
        rows: block.embeddings.rows(),
        dim: *dim,
        dtype: dtype.as_str_name().to_owned(),
        holes: holes.collect(),
    };
    let header = serde_json::to_vec(&header).expect("plain data encodes");
    let mut out =
        BytesMut::with_capacity(12 + header.len() + image.len() + text.len() + blake3::OUT_LEN);
    let length = (header.len() as u32).to_le_bytes();
    for part in [MAGIC.as_slice(), &length, &header, image, text] {
        out.extend_from_slice(part);
    }
    let checksum = blake3::hash(&out);
    out.extend_from_slice(checksum.as_bytes());
    out.freeze()
}

/// Decodes a block; `None` if anything differs from what [`encode`] writes for that shape.
fn decode(bytes: &[u8], shape: Shape) -> Option<BlockEmbeddings> {
    let (body, checksum) = bytes.split_last_chunk::<{ blake3::OUT_LEN }>()?;
    if blake3::hash(body) != blake3::Hash::from_bytes(*checksum) {
        return None;
    }
    let body = body.strip_prefix(MAGIC)?;
    let (length, body) = body.split_first_chunk::<4>()?;
    let (header, data) = body.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let header: Header = serde_json::from_slice(header).ok()?;
    let dtype = EmbeddingDtype::from_str_name(&header.dtype)?;
    // The size comes from `shape`, which the caller knows, and not from the header: a damaged
    // header must not decide how much memory is taken.
    let mut embeddings = Embeddings::zeros(shape.rows, shape.dim, shape.dtype);
    let half = embeddings.image.len();
    if (Shape {
        rows: header.rows,
        dim: header.dim,
        dtype,
    }) != shape
        || data.len() != 2 * half
    {
        return None;
    }
    embeddings.image.copy_from_slice(&data[..half]);
    embeddings.text.copy_from_slice(&data[half..]);
    let fault = |hole: Hole| {
        Some((
            hole.row,
            RowFault::new(BadRowReason::from_str_name(&hole.reason)?, hole.detail),
        ))
    };
    let faults = header.holes.into_iter().map(fault).collect::<Option<_>>()?;
    Some(BlockEmbeddings {
        embeddings,
        faults,
        origin: header.of,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        origin::is_whole,
        storage::{StorageConfig, Stores},
    };

    const SHAPE: Shape = Shape {
        rows: 3,
        dim: 2,
        dtype: EmbeddingDtype::F16,
    };

    fn block(fill: u8) -> BlockEmbeddings {
        let mut embeddings = Embeddings::zeros(SHAPE.rows, SHAPE.dim, SHAPE.dtype);
        embeddings.image.fill(fill);
        embeddings.text.fill(fill + 1);
        let fault = RowFault::new(BadRowReason::ImageNull, "the image is null");
        BlockEmbeddings {
            embeddings,
            faults: vec![(1, fault)],
            origin: Some(Origin {
                rows: "r".into(),
                model: "m".into(),
            }),
        }
    }

    #[test]
    fn an_object_says_whose_it_is_by_its_beginning() {
        let bytes = encode(&block(1), SHAPE.dtype);
        assert_eq!(Origin::of(&bytes), block(1).origin);
        assert_eq!(Origin::of(&bytes[..60]), block(1).origin);
        assert!(is_whole(&bytes) && !is_whole(&bytes[1..]) && !is_whole(&bytes[..bytes.len() - 1]));
        // As earlier builds write it, and read it.
        let old = BlockEmbeddings {
            origin: None,
            ..block(1)
        };
        let bytes = encode(&old, SHAPE.dtype);
        assert_eq!(Origin::of(&bytes), None);
        assert_eq!(decode(&bytes, SHAPE), Some(old));
    }

    fn sidecar() -> (Location, Sidecar) {
        let state = Stores::new(StorageConfig::default())
            .open("memory:///state")
            .unwrap();
        (state.clone(), Sidecar::new(state, 0))
    }

    #[tokio::test]
    async fn what_was_stored_first_is_what_all_see() {
        let (_, sidecar) = sidecar();
        let first = sidecar
            .get("reference/a", SHAPE, async { Ok(block(1)) })
            .await
            .unwrap();
        let again = sidecar
            .get("reference/a", SHAPE, async { panic!("it is stored") })
            .await
            .unwrap();
        assert_eq!((&*first, &*again), (&block(1), &block(1)));
        // Another worker that computed at the same time finds the first one's when it stores its
        // own.
        assert_eq!(
            sidecar
                .store("reference/a", SHAPE, block(5), false)
                .await
                .unwrap(),
            block(1)
        );
    }

    #[tokio::test]
    async fn a_fault_that_passes_is_not_stored() {
        let (state, sidecar) = sidecar();
        let slow = || {
            let mut slow = block(1);
            let fault = RowFault::passing(BadRowReason::ImageUndecodable, "decoding did not end");
            slow.faults.push((2, fault));
            slow
        };
        let found = sidecar
            .get("reference/a", SHAPE, async { Ok(slow()) })
            .await
            .unwrap();
        assert_eq!(*found, slow());
        assert!(state.find("reference/a").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_damaged_object_is_computed_again_and_mended() {
        let (state, sidecar) = sidecar();
        let good = encode(&block(1), SHAPE.dtype);
        for at in [0, 9, 20, good.len() / 2, good.len() - 1] {
            let mut bad = good.to_vec();
            bad[at] ^= 1;
            assert_eq!(decode(&bad, SHAPE), None, "byte {at}");
        }
        assert_eq!(decode(&good[..good.len() - 1], SHAPE), None);
        assert_eq!(decode(&good, Shape { rows: 4, ..SHAPE }), None);
        state
            .put("reference/a", Bytes::from_static(b"SBREF"))
            .await
            .unwrap();
        let found = sidecar.find("reference/a", SHAPE).await.unwrap();
        assert_eq!(found, None);
        let mended = sidecar
            .get("reference/a", SHAPE, async { Ok(block(7)) })
            .await
            .unwrap();
        assert_eq!(*mended, block(7));
        assert_eq!(
            state.get("reference/a").await.unwrap(),
            encode(&block(7), SHAPE.dtype)
        );
    }

    #[test]
    fn every_field_of_a_key_counts() {
        let key = BlockKey {
            rows: "m",
            shard: 0,
            block: 0,
            model_digest: "d",
            inputs_digest: [0; 32],
            fidelity: Fidelity::Full,
            dtype: EmbeddingDtype::F16,
            compute: Compute::F32,
            limits: ImageLimits {
                pixels_max: 1,
                bytes_max: 1,
            },
        };
        let others = [
            BlockKey {
                rows: "n",
                ..key.clone()
            },
            BlockKey {
                shard: 1,
                ..key.clone()
            },
            BlockKey {
                block: 1,
                ..key.clone()
            },
            BlockKey {
                model_digest: "e",
                ..key.clone()
            },
            BlockKey {
                inputs_digest: [1; 32],
                ..key.clone()
            },
            BlockKey {
                fidelity: Fidelity::Resolution(16),
                ..key.clone()
            },
            BlockKey {
                fidelity: Fidelity::Resolution(32),
                ..key.clone()
            },
            BlockKey {
                dtype: EmbeddingDtype::F32,
                ..key.clone()
            },
            BlockKey {
                compute: Compute::Bf16,
                ..key.clone()
            },
            BlockKey {
                limits: ImageLimits {
                    pixels_max: 2,
                    bytes_max: 1,
                },
                ..key.clone()
            },
            BlockKey {
                limits: ImageLimits {
                    pixels_max: 1,
                    bytes_max: 2,
                },
                ..key.clone()
            },
        ];
        let all: std::collections::HashSet<_> =
            others.iter().chain([&key]).map(BlockKey::object).collect();
        assert_eq!(all.len(), others.len() + 1);
    }
}
