//! The body of a batch's answer, in which rows go out from the memory in which they were encoded.
//!
//! tonic writes each message into a buffer: a copy of every row, into memory that is new each time.
//! Here a large part follows as it is on what precedes it in its message.
use super::answer::Answer;
use bytes::{BufMut, Bytes};
use futures::{Stream, StreamExt, stream};
use hyper::body::{Body as HttpBody, Frame};
use prost::{Message as _, encoding::encode_varint};
use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};
use superbatch_proto::{
    MESSAGE_BYTES_MAX,
    v1::{SelectBatchResponse, select_batch_response::Message},
};
use tonic::{
    Code, Status,
    body::Body,
    codegen::http::{HeaderMap, HeaderName, HeaderValue, Response},
};

/// Parts from this size on are not copied. Smaller ones are joined: a frame of a few bytes costs as
/// much as the copy.
const SHARED_BYTES_MIN: usize = 64 << 10;

/// Most bytes that a message has beside its header.
const HEADER_KEY_BYTES_MAX: usize = 16;

/// The messages of an answer, as tonic reads them.
pub type BatchStream = Pin<Box<dyn Stream<Item = Result<SelectBatchResponse, Status>> + Send>>;

/// Returns the response with the messages of `answer`, whose header has so many bytes. [`uncopied`]
/// gives it its body.
pub fn carrying(answer: Answer, header_bytes: usize) -> tonic::Response<BatchStream> {
    let messages = stream::iter(answer.clone()).map(|message| message.map(response));
    let mut response = tonic::Response::new(Box::pin(messages) as BatchStream);
    // tonic refuses a message above the limit. The header's message has its key and length besides.
    if header_bytes + HEADER_KEY_BYTES_MAX <= MESSAGE_BYTES_MAX {
        response.extensions_mut().insert(answer);
    }
    response
}

/// Replaces tonic's body of an answer by one that copies no rows, if the response carries the
/// [`Answer`] among its extensions. The bytes are the same.
pub fn uncopied(mut response: Response<Body>) -> Response<Body> {
    match response.extensions_mut().remove::<Answer>() {
        Some(answer) => response.map(|_| Body::new(Uncopied::new(answer))),
        None => response,
    }
}

struct Uncopied {
    answer: Answer,
    /// A part whose message is begun.
    part: Option<Bytes>,
    /// How the call ends, if not well.
    failure: Option<Status>,
    is_over: bool,
}

impl Uncopied {
    fn new(answer: Answer) -> Self {
        Self {
            answer,
            part: None,
            failure: None,
            is_over: false,
        }
    }

    /// Returns the next bytes; `None` after the last message.
    fn next_bytes(&mut self) -> Option<Bytes> {
        if let Some(part) = self.part.take() {
            return Some(part);
        }
        let mut joined = Vec::new();
        while self.part.is_none() && joined.len() < SHARED_BYTES_MIN {
            match self.answer.next() {
                None => break,
                Some(Err(failure)) => {
                    self.failure = Some(failure);
                    break;
                }
                Some(Ok(Message::ArrowIpc(part))) if part.len() >= SHARED_BYTES_MIN => {
                    begin_part(part.len(), &mut joined);
                    self.part = Some(part);
                }
                Some(Ok(message)) => {
                    let message = response(message).encode_to_vec();
                    begin_message(message.len(), &mut joined);
                    joined.extend(message);
                }
            }
        }
        (!joined.is_empty()).then(|| joined.into())
    }
}

impl HttpBody for Uncopied {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = match self.next_bytes() {
            Some(bytes) => Some(Frame::data(bytes)),
            None if self.is_over => None,
            None => {
                self.is_over = true;
                Some(Frame::trailers(trailers(self.failure.take())))
            }
        };
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}

/// Returns the trailers of a call that ended so.
fn trailers(failure: Option<Status>) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    match failure.map(|failure| failure.add_header(&mut trailers)) {
        Some(Ok(())) => trailers,
        // Headers that cannot be written leave the reason out; the call still fails.
        Some(Err(status)) => with_code(status.code()),
        None => with_code(Code::Ok),
    }
}

fn with_code(code: Code) -> HeaderMap {
    let status = HeaderName::from_static("grpc-status");
    HeaderMap::from_iter([(status, HeaderValue::from(code as i32))])
}

fn response(message: Message) -> SelectBatchResponse {
    SelectBatchResponse {
        message: Some(message),
    }
}

/// Writes what precedes a message of so many bytes in a body of gRPC.
fn begin_message(bytes: usize, out: &mut Vec<u8>) {
    // It is not compressed.
    out.put_u8(0);
    out.put_u32(bytes as u32);
}

/// Writes what precedes the bytes of a part: the beginning of its message, and its field's key and
/// length.
fn begin_part(bytes: usize, out: &mut Vec<u8>) {
    // Of an empty part there are the key and a length of 0, which is one byte.
    let mut head = response(Message::ArrowIpc(Bytes::new())).encode_to_vec();
    head.pop();
    encode_varint(bytes as u64, &mut head);
    begin_message(head.len() + bytes, out);
    out.extend(head);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{task::Waker, time::Duration};
    use superbatch_proto::v1::{BatchHeader, BatchTrailer};

    /// The messages of a batch with parts of these sizes.
    fn messages(sizes: &[usize]) -> Vec<Message> {
        let header = Message::Header(BatchHeader {
            rank: 3,
            world_size: 8,
            ..Default::default()
        });
        let trailer = Message::Trailer(BatchTrailer {
            rows: 9,
            xxh3: vec![5; 16].into(),
        });
        let parts = sizes.iter().zip(1_u8..);
        let parts = parts.map(|(size, fill)| Message::ArrowIpc(vec![fill; *size].into()));
        std::iter::once(header)
            .chain(parts)
            .chain([trailer])
            .collect()
    }

    fn frames(mut body: impl HttpBody<Data = Bytes> + Unpin) -> Vec<Frame<Bytes>> {
        let mut context = Context::from_waker(Waker::noop());
        let next = || match Pin::new(&mut body).poll_frame(&mut context) {
            Poll::Ready(frame) => frame?.ok(),
            Poll::Pending => panic!("all messages are there"),
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn the_bytes_are_the_messages_and_large_parts_are_shared() {
        let large = SHARED_BYTES_MIN;
        for sizes in [
            vec![],
            vec![1, 0, 200],
            vec![large - 1, large, large + 70_000],
            vec![2, large, 3, 4, large, large, 1 << 20],
        ] {
            let messages = messages(&sizes);
            let mut expected = Vec::new();
            for message in &messages {
                let bytes = response(message.clone()).encode_to_vec();
                expected.push(0);
                expected.extend((bytes.len() as u32).to_be_bytes());
                expected.extend(bytes);
            }
            let answer = Answer::new(messages.clone().into_iter());
            let mut frames = frames(Uncopied::new(answer));
            let trailers = frames.pop().unwrap().into_trailers().unwrap();
            assert_eq!(trailers["grpc-status"], "0");
            let frames = frames.into_iter().map(|frame| frame.into_data().unwrap());
            let frames: Vec<Bytes> = frames.collect();
            assert!(frames.concat() == expected, "{sizes:?}");
            for message in messages {
                if let Message::ArrowIpc(part) = message {
                    let is_sent = |frame: &Bytes| frame.as_ptr() == part.as_ptr();
                    assert_eq!(frames.iter().any(is_sent), part.len() >= large);
                }
            }
        }
    }

    #[tokio::test]
    async fn a_rank_that_was_given_up_is_told_so() {
        let (held, let_go) = tokio::sync::oneshot::channel::<()>();
        let messages = messages(&[7]).into_iter().inspect(move |_| {
            let _held = &held;
        });
        let answer = Answer::new(messages).each_within(Duration::ZERO);
        let_go.await.unwrap_err();
        let mut frames = frames(Uncopied::new(answer));
        let trailers = frames.remove(0).into_trailers().unwrap();
        let code = Code::ResourceExhausted as i32;
        assert_eq!(trailers["grpc-status"], code.to_string());
        assert!(trailers.contains_key("grpc-status-details-bin"));
        assert!(frames.is_empty());
    }

    #[test]
    fn only_a_response_with_an_answer_gets_another_body() {
        let plain = uncopied(Response::new(Body::empty()));
        assert!(frames(plain.into_body()).is_empty());
        let mut response = Response::new(Body::empty());
        let answer = Answer::new(messages(&[]).into_iter());
        response.extensions_mut().insert(answer);
        let sent = uncopied(response);
        assert!(sent.extensions().get::<Answer>().is_none());
        assert_eq!(frames(sent.into_body()).len(), 2, "messages and trailers");
    }
}
