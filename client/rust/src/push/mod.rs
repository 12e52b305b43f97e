//! Pushes of weights: their parts, their announcement, one push as a stream, and the queue in the
//! background.
pub(crate) mod announce;
mod digest;
mod part;
mod pusher;

pub use part::Part;
pub use pusher::{Pusher, Slot};

use crate::{Error, Result, Run, retry};
use announce::Announced;
use bytes::Bytes;
use superbatch_proto::{
    PART_BYTES,
    v1::{
        PartHeader, PushStart, PushWeightsRequest, WeightsVersion, push_weights_request::Message,
    },
};
use tonic::Status;

/// One push of weights, or one rank's share of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Push {
    /// The step just trained; -1 for initial weights.
    pub step: i64,
    /// The tensors, or the parts of them that this rank holds.
    pub parts: Vec<Part>,
    /// The same for all ranks of one push. If absent, it is made from (generation, step).
    pub push_id: Option<String>,
    /// Parts of the whole push, over all ranks. 0: these are all.
    pub expected_parts: u32,
    /// The rank that pushes.
    pub rank: u32,
    /// Tensors of which no rank pushes a part are those of this version.
    pub base_version: Option<u64>,
    /// A file that lies in storage, in place of parts.
    pub file: Option<StoredFile>,
}

/// A safetensors file that the service reads by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// It must be on the operator's allow-list.
    pub uri: String,
    /// BLAKE3 of the file. The push is refused if the file has another.
    pub blake3: Option<[u8; 32]>,
}

impl Push {
    /// Makes a push that contains all parts.
    pub fn whole(step: i64, parts: Vec<Part>) -> Self {
        Self {
            step,
            parts,
            push_id: None,
            expected_parts: 0,
            rank: 0,
            base_version: None,
            file: None,
        }
    }

    /// Makes a push of a file that lies in storage.
    pub fn stored(step: i64, file: StoredFile) -> Self {
        Self {
            file: Some(file),
            ..Self::whole(step, Vec::new())
        }
    }
}

/// Pushes weights, again from the start if the stream breaks. A repeated push id is published once.
///
/// A push of a step that is published already changes nothing; the answer is the published version.
/// If its digest is not that of these weights (whole pushes only), the run remembers it.
///
/// The generation is that of the announcement. If the run was rewound since, it is not the current
/// one, and the service refuses the push.
pub(crate) async fn push(run: &Run, push: Push, announced: Announced) -> Result<WeightsVersion> {
    let generation = announced.generation();
    // Only of whole pushes, whose bytes are all here, can the digest be told.
    let brings_all = push.expected_parts == 0 && push.base_version.is_none() && push.file.is_none();
    let start = start(run, &push, generation);
    // A step that was not committed when the run was opened cannot have had weights before, so the
    // costly comparison of digests is needed only for repeated steps.
    let step = push.step;
    let repeated = step < i64::try_from(run.next_step()).unwrap_or(i64::MAX)
        || run.has_published(generation, step);
    let compared = repeated && brings_all;
    let parts = push.parts;
    let hashed = tokio::task::spawn_blocking(move || {
        let parts = parts.into_iter();
        let mut parts: Vec<_> = parts
            .map(|part| (part.header(), part.data().clone()))
            .collect();
        // The service hashes the file that it makes of them while they arrive, so they come in the
        // file's order.
        parts.sort_by(|(a, _), (b, _)| digest::in_file(a, b));
        parts
    });
    let parts = hashed.await.map_err(|_| Error::Stopped)?;
    let mut tried = 0;
    let attempt = || {
        let start = PushStart {
            attempt: tried,
            ..start.clone()
        };
        tried += 1;
        let again = start.attempt > 0;
        let (mut api, stream) = (
            run.client.api(),
            futures::stream::iter(messages(start, parts.clone())),
        );
        async move {
            if again {
                run.announce_again().await;
            }
            let response = api.push_weights(stream).await?.into_inner();
            response.published.ok_or_else(|| {
                Error::from(Status::internal("PushWeights answered without a version"))
            })
        }
    };
    let version = retry::call(&run.client, attempt).await?;
    announced.published();
    if compared && !version.digest.is_empty() {
        let digest = tokio::task::spawn_blocking(move || digest::digest(&parts))
            .await
            .map_err(|_| Error::Stopped)?;
        if digest.is_some_and(|digest| digest != version.digest) {
            run.drop_push(step);
        }
    }
    Ok(version)
}

/// Returns the first message of a push's first stream.
fn start(run: &Run, push: &Push, generation: u32) -> PushStart {
    let file = push.file.as_ref();
    let made_id = || format!("g{generation}-s{}", push.step);
    PushStart {
        run_id: run.run_id().to_owned(),
        generation,
        step: push.step,
        push_id: push.push_id.clone().unwrap_or_else(made_id),
        expected_parts: push.expected_parts,
        base_version: push.base_version,
        rank: push.rank,
        incarnation: run.incarnation().to_owned(),
        snapshot_uri: file.map(|file| file.uri.clone()).unwrap_or_default(),
        snapshot_blake3: file
            .and_then(|file| file.blake3)
            .map(|blake3| Bytes::copy_from_slice(&blake3))
            .unwrap_or_default(),
        sender: rand::random(),
        attempt: 0,
    }
}

/// Returns the messages of a push: its start, then each part's header and its bytes in messages of
/// at most [`PART_BYTES`].
fn messages(
    start: PushStart,
    parts: Vec<(PartHeader, Bytes)>,
) -> impl Iterator<Item = PushWeightsRequest> + Send {
    let parts = parts.into_iter().flat_map(|(header, data)| {
        let pieces = (0..data.len()).step_by(PART_BYTES);
        let pieces =
            pieces.map(move |at| Message::Data(data.slice(at..data.len().min(at + PART_BYTES))));
        std::iter::once(Message::Part(header)).chain(pieces)
    });
    std::iter::once(Message::Start(start))
        .chain(parts)
        .map(|message| PushWeightsRequest {
            message: Some(message),
        })
}
