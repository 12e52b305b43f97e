//! The stream of a batch, of which rows are taken before tonic reads them.
//!
//! tonic joins the frames of a body in a buffer of its own, from which messages are read: a copy of
//! every row, before the one to its place in the batch. Here bytes of rows are put aside in the
//! memory in which they came, and tonic reads a message of no rows in the place of each message of
//! rows. All else is tonic's: other messages, statuses, limits and faults.
use crate::Client;
use bytes::{Buf, Bytes};
use futures::future::BoxFuture;
use http_body::{Body as HttpBody, Frame};
use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};
use superbatch_proto::{
    ARROW_IPC_KEY, MESSAGE_BYTES_MAX,
    v1::{
        SelectBatchRequest, SelectBatchResponse, select_batch_response::Message,
        selection_service_client::SelectionServiceClient,
    },
};
use superbatch_transport::Authorized;
use tonic::{
    Status, Streaming,
    body::Body,
    codegen::{
        Service,
        http::{Request, Response},
    },
    transport,
};

/// A message of no rows, as it stands in a body.
const NO_ROWS: &[u8] = &[0, 0, 0, 0, 2, ARROW_IPC_KEY, 0];

/// The answer to a request for a batch.
pub(super) struct Answer {
    messages: Streaming<SelectBatchResponse>,
    rows: Rows,
}

impl Answer {
    /// Returns the next message; `None` at the end. Of rows that were put aside it has none:
    /// [`Answer::rows`] has them.
    pub(super) async fn message(&mut self) -> Result<Option<Message>, Status> {
        while let Some(response) = self.messages.message().await? {
            if response.message.is_some() {
                return Ok(response.message);
            }
        }
        Ok(None)
    }

    /// Takes the rows of the last message that were put aside. They come before those that are in
    /// the message itself.
    pub(super) fn rows(&self) -> Vec<Bytes> {
        self.rows.take()
    }
}

/// Asks for a batch.
pub(super) async fn select(client: &Client, request: SelectBatchRequest) -> Result<Answer, Status> {
    let rows = Rows::default();
    let sifted = Sifted {
        calls: client.calls.clone(),
        rows: rows.clone(),
    };
    let mut api = SelectionServiceClient::new(sifted)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let messages = api.select_batch(request).await?.into_inner();
    Ok(Answer { messages, rows })
}

/// Bytes of rows that were put aside and not taken yet: of one message, since a body is read no
/// further than the message that is wanted.
#[derive(Clone, Default)]
struct Rows(Arc<Mutex<Vec<Bytes>>>);

impl Rows {
    fn push(&self, bytes: Bytes) {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.push(bytes);
    }

    fn take(&self) -> Vec<Bytes> {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        mem::take(&mut rows)
    }
}

/// Calls whose answers are sifted.
struct Sifted {
    calls: Authorized,
    rows: Rows,
}

impl Service<Request<Body>> for Sifted {
    type Response = Response<Sifting>;
    type Error = transport::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::<Request<Body>>::poll_ready(&mut self.calls, context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (answer, rows) = (self.calls.call(request), self.rows.clone());
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| Sifting::new(Body::new(body), rows)))
        })
    }
}

/// A body without its rows.
struct Sifting {
    body: Body,
    /// What has come of the body and is not sifted yet.
    left: Bytes,
    sieve: Sieve,
    rows: Rows,
}

impl Sifting {
    fn new(body: Body, rows: Rows) -> Self {
        Self {
            body,
            left: Bytes::new(),
            sieve: Sieve::default(),
            rows,
        }
    }
}

impl HttpBody for Sifting {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(bytes) = this.sieve.next(&mut this.left, &this.rows) {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            match ready!(Pin::new(&mut this.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.left = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
    }
}

/// Tells bytes of rows from others.
#[derive(Default)]
struct Sieve {
    /// The beginning of a message, of which more is needed to tell.
    head: Vec<u8>,
    due: Due,
}

/// What comes next in a body, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// The beginning of a message.
    #[default]
    Head,
    Rows(usize),
    /// The rest of a message that is passed on.
    Other(usize),
}

impl Sieve {
    /// Goes on in `left` until there is something to pass on, at most to the end of one message.
    /// Returns `None` when nothing is left.
    fn next(&mut self, left: &mut Bytes, rows: &Rows) -> Option<Bytes> {
        while left.has_remaining() {
            match self.due {
                Due::Head => {
                    self.head.push(left.get_u8());
                    let Some(due) = after(&self.head) else {
                        continue;
                    };
                    let head = mem::take(&mut self.head);
                    self.due = match due {
                        Due::Rows(0) | Due::Other(0) => Due::Head,
                        due => due,
                    };
                    match due {
                        Due::Rows(0) => return Some(Bytes::from_static(NO_ROWS)),
                        Due::Rows(_) | Due::Head => {}
                        Due::Other(_) => return Some(head.into()),
                    }
                }
                Due::Rows(due) => {
                    let part = left.split_to(due.min(left.len()));
                    let due = due - part.len();
                    rows.push(part);
                    if due == 0 {
                        self.due = Due::Head;
                        return Some(Bytes::from_static(NO_ROWS));
                    }
                    self.due = Due::Rows(due);
                }
                Due::Other(due) => {
                    let part = left.split_to(due.min(left.len()));
                    self.due = match due - part.len() {
                        0 => Due::Head,
                        due => Due::Other(due),
                    };
                    return Some(part);
                }
            }
        }
        None
    }
}

/// Returns what follows this beginning of a message; `None` if more of it is needed to tell. Called
/// after each byte.
fn after(head: &[u8]) -> Option<Due> {
    let (prefix, begun) = head.split_first_chunk::<5>()?;
    let [is_compressed, length @ ..] = *prefix;
    let length = u32::from_be_bytes(length) as usize;
    let other = Due::Other(length - begun.len());
    // tonic refuses what is too long.
    if is_compressed != 0 || length == 0 || length > MESSAGE_BYTES_MAX {
        return Some(other);
    }
    let (key, size) = begun.split_first()?;
    if *key != ARROW_IPC_KEY {
        return Some(other);
    }
    let mut bytes = 0_usize;
    for (byte, shift) in size.iter().zip((0_u32..).step_by(7)) {
        bytes |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            // With other fields beside them, rows are tonic's matter too.
            let is_all = begun.len() + bytes == length;
            return Some(if is_all { Due::Rows(bytes) } else { other });
        }
    }
    // No message that is taken has rows whose number of bytes takes more than four bytes.
    (size.len() == 4 || begun.len() == length).then_some(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message as it stands in a body.
    fn framed(is_compressed: u8, message: &[u8]) -> Vec<u8> {
        let mut framed = vec![is_compressed];
        framed.extend((message.len() as u32).to_be_bytes());
        framed.extend(message);
        framed
    }

    /// A message of rows, with another field behind them.
    fn rows(bytes: &[u8], behind: &[u8]) -> Vec<u8> {
        let mut message = vec![ARROW_IPC_KEY];
        let mut size = bytes.len();
        while size >= 0x80 {
            message.push(size as u8 | 0x80);
            size >>= 7;
        }
        message.push(size as u8);
        message.extend(bytes);
        message.extend(behind);
        message
    }

    /// What came out of a sieve, in order.
    #[derive(Debug, Default, PartialEq)]
    struct Out {
        /// Passed on, and how many bytes of rows were put aside before each of these bytes.
        passed: Vec<(u8, usize)>,
        rows: Vec<u8>,
    }

    impl Out {
        fn pass(&mut self, bytes: &[u8]) {
            let before = self.rows.len();
            self.passed.extend(bytes.iter().map(|byte| (*byte, before)));
        }
    }

    fn sifted(body: &[u8], frame_bytes: usize) -> Out {
        let (mut sieve, rows, mut out) = (Sieve::default(), Rows::default(), Out::default());
        for frame in body.chunks(frame_bytes) {
            let mut left = Bytes::copy_from_slice(frame);
            while let Some(passed) = sieve.next(&mut left, &rows) {
                out.rows.extend(rows.take().concat());
                out.pass(&passed);
            }
        }
        assert_eq!(sieve.due, Due::Head);
        assert!(rows.take().is_empty(), "rows come with their message");
        out
    }

    #[test]
    fn rows_are_put_aside_and_all_else_is_passed_on_in_order() {
        let (mut body, mut expected) = (Vec::new(), Out::default());
        // A header, and what is no message of rows: an empty one, a compressed one, cut ones, rows
        // beside another field, and a size of too many bytes.
        for other in [
            framed(0, &[0x0a, 3, 1, 2, 3]),
            framed(0, &[]),
            framed(1, &rows(b"packed", &[])),
            framed(0, &[ARROW_IPC_KEY]),
            framed(0, &[ARROW_IPC_KEY, 0x85]),
            framed(0, &rows(b"rows", &[0x1a, 0])),
            framed(0, &[ARROW_IPC_KEY, 0x80, 0x80, 0x80, 0x80, 0x00]),
        ] {
            expected.pass(&other);
            body.extend(other);
        }
        for size in [1, 127, 0, 128, 300, 20_000] {
            let bytes: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            body.extend(framed(0, &rows(&bytes, &[])));
            expected.rows.extend(bytes);
            expected.pass(NO_ROWS);
        }
        let trailer = framed(0, &[0x1a, 2, 8, 9]);
        expected.pass(&trailer);
        body.extend(trailer);
        for frame_bytes in [1, 2, 5, 7, 64, 1000, body.len()] {
            assert!(sifted(&body, frame_bytes) == expected, "{frame_bytes}");
        }
    }

    #[test]
    fn rows_stay_in_the_memory_in_which_they_came() {
        let (mut sieve, aside) = (Sieve::default(), Rows::default());
        let frame = Bytes::from(framed(0, &rows(&[7; 1000], &[])));
        let passed = sieve.next(&mut frame.clone(), &aside).unwrap();
        assert_eq!(passed, NO_ROWS);
        let taken = aside.take();
        assert_eq!((taken.len(), taken[0].len()), (1, 1000));
        assert_eq!(taken[0].as_ptr(), frame[8..].as_ptr(), "no copy");
    }

    #[test]
    fn a_message_above_the_limit_is_left_to_tonic() {
        let length = MESSAGE_BYTES_MAX as u32 + 1;
        let mut head = vec![0];
        head.extend(length.to_be_bytes());
        assert_eq!(after(&head), Some(Due::Other(length as usize)));
        assert_eq!(after(&head[..4]), None);
    }
}
