//! A push of a checkpoint that lies in storage: its file is read, and its tensors are staged like
//! the parts that a trainer sends.
use super::{
    file::{Placed, TensorFile, pieces},
    staging::refused,
};
use crate::{
    blocking::blocking,
    bounds::{URI_BYTES_MAX, check_bytes},
    error::{Error, Result},
};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use std::{collections::VecDeque, ops::Range};
use superbatch_proto::{
    PART_BYTES,
    v1::{PartHeader, PushStart, PushWeightsRequest, push_weights_request::Message},
};
use tonic::Status;

/// Checks what a start says of the file, before it is opened.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn check(start: &PushStart) -> Result<()> {
    check_bytes("snapshot_uri", &start.snapshot_uri, URI_BYTES_MAX)?;
    if !matches!(start.snapshot_blake3.len(), 0 | 32) {
        let message = "snapshot_blake3 has 32 bytes, or none";
        return Err(Error::invalid("snapshot_blake3", message));
    }
    if start.expected_parts != 0 {
        let message = "a push by snapshot_uri is one rank's and brings all; leave expected_parts 0";
        return Err(Error::invalid("expected_parts", message));
    }
    Ok(())
}

/// The file of a push, before and after it is opened.
enum Reading<F> {
    Unopened(F, Bytes),
    Opened(Box<Opened>),
}

struct Opened {
    file: TensorFile,
    left: VecDeque<Placed>,
    /// What is still to be read of the tensor that was begun, and whether it is a weight.
    pieces: VecDeque<Range<u64>>,
    is_weight: bool,
    /// `None` if the file is named without its digest.
    hasher: Option<blake3::Hasher>,
    expected: Bytes,
}

type Messages = Vec<Message>;

/// Returns the messages of a push of a file, after its start. It is opened when the first of them
/// is asked for: a push that may not come reads nothing. Their parts have no checksums. The last
/// message is an error if the file is not the one that was named by its digest.
pub(crate) fn messages<F>(
    open: F,
    expected: Bytes,
) -> impl Stream<Item = Result<PushWeightsRequest, Status>> + Send + Unpin
where
    F: Future<Output = Result<TensorFile>> + Send + 'static,
{
    let read = stream::unfold(
        Some(Reading::Unopened(open, expected)),
        async |reading| match next(reading?).await {
            Ok((messages, rest)) => {
                let messages = messages.into_iter().map(|message| {
                    Ok(PushWeightsRequest {
                        message: Some(message),
                    })
                });
                Some((messages.collect::<Vec<_>>(), rest))
            }
            Err(error) => Some((vec![Err(Status::from(error))], None)),
        },
    );
    read.map(stream::iter).flatten().boxed()
}

/// Returns the next messages, which may be none, and what is left.
async fn next<F>(reading: Reading<F>) -> Result<(Messages, Option<Reading<F>>)>
where
    F: Future<Output = Result<TensorFile>> + Send + 'static,
{
    let mut opened = match reading {
        Reading::Unopened(open, expected) => {
            let opened = Opened::new(open.await?, expected);
            return Ok((Vec::new(), Some(Reading::Opened(Box::new(opened)))));
        }
        Reading::Opened(opened) => opened,
    };
    let messages = match (opened.pieces.pop_front(), opened.left.pop_front()) {
        (Some(piece), next) => {
            next.into_iter()
                .for_each(|next| opened.left.push_front(next));
            opened.read(piece).await?
        }
        (None, Some(tensor)) => opened.begin(tensor),
        (None, None) => return opened.check_digest().map(|()| (Vec::new(), None)),
    };
    Ok((messages, Some(Reading::Opened(opened))))
}

impl Opened {
    fn new(file: TensorFile, expected: Bytes) -> Self {
        let hasher = (!expected.is_empty()).then(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&file.head);
            hasher
        });
        Self {
            left: file.tensors.iter().cloned().collect(),
            pieces: VecDeque::new(),
            is_weight: false,
            file,
            hasher,
            expected,
        }
    }

    fn begin(&mut self, tensor: Placed) -> Messages {
        let kind = tensor.kind();
        self.is_weight = kind.is_some();
        // What is no weight is read only if the digest is asked for.
        if self.is_weight || self.hasher.is_some() {
            self.pieces = pieces(&tensor.range).collect();
        }
        let header = kind.map(|kind| PartHeader {
            name: tensor.name,
            dtype: kind.into(),
            start: vec![0; tensor.shape.len()],
            extent: tensor.shape.clone(),
            global_shape: tensor.shape,
            xxh3: Bytes::new(),
        });
        header.map(Message::Part).into_iter().collect()
    }

    async fn read(&mut self, piece: Range<u64>) -> Result<Messages> {
        let bytes = self.file.range(piece).await?;
        if let Some(mut hasher) = self.hasher.take() {
            let hashed = bytes.clone();
            // Off the async threads: a piece takes milliseconds.
            let hashing = blocking("hashing a file of weights", move || {
                hasher.update(&hashed);
                Ok(hasher)
            });
            self.hasher = Some(hashing.await?);
        }
        if !self.is_weight {
            return Ok(Vec::new());
        }
        let cuts = (0..bytes.len()).step_by(PART_BYTES);
        let cuts = cuts.map(|at| bytes.slice(at..bytes.len().min(at + PART_BYTES)));
        Ok(cuts.map(Message::Data).collect())
    }

    fn check_digest(&self) -> Result<()> {
        let Some(found) = self.hasher.as_ref().map(blake3::Hasher::finalize) else {
            return Ok(());
        };
        if self.expected == found.as_bytes()[..] {
            return Ok(());
        }
        let uri = self.file.uri();
        let message = format!(
            "{uri} has the BLAKE3 {}, not the one that was given",
            found.to_hex()
        );
        Err(refused("", message).with("uri", uri))
    }
}
