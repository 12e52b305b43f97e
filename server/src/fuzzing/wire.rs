//! What comes off the wire in parts: weights, rows, and any message.
use super::{Input, opened, put, read, read_own, stores, wait};
use crate::{
    coordinator::{
        score::table::Table,
        weights::{
            ModelShape, TensorFile,
            assemble::assemble,
            by_uri,
            staging::{Receiving, Staged},
        },
    },
    error::Result,
    pushed::Pushed,
};
use arrow::array::Array;
use bytes::Bytes;
use futures::StreamExt;
use prost::Message as _;
use safetensors::SafeTensors;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};
use superbatch_proto::{
    reflect::{self, DynamicMessage, ReflectMessage},
    v1::{OpenRunRequest, PushWeightsRequest, push_weights_request::Message},
};

/// Bytes of a push.
const PUSH_BYTES_MAX: u64 = 1 << 20;

/// A checkpoint in storage, pushed whole by its URI.
pub fn safetensors(bytes: &[u8]) {
    let stores = stores();
    let at = opened(&stores, "memory:///weights/w.safetensors");
    wait(async {
        put(&at, "", bytes).await;
        let Some(Some(file)) = read(TensorFile::open(at, PUSH_BYTES_MAX).await) else {
            return;
        };
        // With its digest, so that every byte is read.
        let digest = Bytes::copy_from_slice(blake3::hash(bytes).as_bytes());
        let messages = by_uri::messages(async { Ok(file) }, digest);
        let messages: Vec<_> = messages.collect().await;
        let messages = messages.into_iter().map(|m| m.expect("the file is whole"));
        let messages: Vec<Message> = messages.filter_map(|m| m.message).collect();
        let mut tensors = BTreeMap::new();
        for message in &messages {
            if let Message::Part(part) = message {
                tensors.insert(part.name.clone(), part.global_shape.clone());
            }
        }
        let mut staged = staged(tensors, BTreeSet::new());
        let mut open = None;
        for message in messages {
            if read(take(&mut staged, 0, &mut open, message)).is_none() {
                return;
            }
        }
        // What the library refuses and this reader does not is pushed all the same.
        if let (Some(pushed), Ok(theirs)) =
            (read(assemble(staged)), SafeTensors::deserialize(bytes))
        {
            let is_same = |name: &str, data: &[u8]| theirs.tensor(name).map(|t| t.data() == data);
            check_pushed(&pushed, |name, data| is_same(name, data).unwrap_or(false));
        }
    });
}

fn staged(tensors: BTreeMap<String, Vec<u64>>, optional: BTreeSet<String>) -> Staged {
    let shape = ModelShape {
        tensors,
        optional,
        logit_scale: 1.0,
        logit_bias: None,
    };
    Staged::new(Arc::new(shape), 0, PUSH_BYTES_MAX)
}

/// The part of a stream whose bytes are awaited.
type Open = Option<Receiving>;

/// Takes one message of a stream, as its member does.
fn take(staged: &mut Staged, stream: u64, open: &mut Open, message: Message) -> Result<()> {
    match message {
        Message::Part(header) => {
            if let Some(part) = open.take() {
                staged.add_received(part)?;
            }
            *open = Some(staged.reserve(stream, header)?.unchecked());
        }
        Message::Data(data) => {
            if let Some(part) = open {
                part.take(&data)?;
            }
        }
        Message::Start(_) => {}
    }
    match open.take_if(|part| part.is_full()) {
        Some(part) => staged.add_received(part),
        None => Ok(()),
    }
}

/// The file of a push is one that safetensors reads, and has what was pushed.
fn check_pushed(pushed: &Pushed, is_right: impl Fn(&str, &[u8]) -> bool) {
    let file: Vec<u8> = pushed.pieces().collect::<Vec<_>>().concat();
    assert_eq!(pushed.digest, blake3::hash(&file).to_hex().as_str());
    let tensors = SafeTensors::deserialize(&file).expect("what was joined is a whole file");
    for (name, tensor) in tensors.tensors() {
        assert!(is_right(&name, tensor.data()), "{name}");
    }
}

/// Messages of a push, each after a byte that says of which stream, for a learner of a few tensors.
pub fn parts(bytes: &[u8]) {
    const ENDS: u8 = 0xff;
    let tensors = [
        ("encoder.weight", vec![3, 4]),
        ("encoder.bias", vec![4]),
        ("logit_scale", vec![]),
        ("logit_bias", vec![1]),
        ("pool.ids", vec![2, 0]),
    ];
    let tensors: BTreeMap<_, _> = tensors.map(|(name, shape)| (name.to_owned(), shape)).into();
    let bytes_of = |shape: &Vec<u64>| shape.iter().product::<u64>() as usize;
    let sizes: HashMap<String, usize> = tensors
        .iter()
        .map(|(name, shape)| (name.clone(), bytes_of(shape)))
        .collect();
    let mut staged = staged(tensors, BTreeSet::from(["logit_bias".to_owned()]));
    let mut open: [Open; 4] = Default::default();
    let mut input = Input(bytes);
    while !input.0.is_empty() {
        let stream = input.byte();
        if stream == ENDS {
            let stream = usize::from(input.byte()) % open.len();
            open[stream] = None;
            staged.drop_stream(stream as u64);
            continue;
        }
        let stream = usize::from(stream) % open.len();
        let Some(PushWeightsRequest { message }) = input.message() else {
            break;
        };
        let Some(message) = message else { continue };
        // A refusal ends the push.
        if read(take(&mut staged, stream as u64, &mut open[stream], message)).is_none() {
            return;
        }
    }
    read::<()>(Err(staged.incomplete("0")));
    let is_over = open.iter().flatten().all(|part| part.may_end());
    if !is_over || !staged.is_whole() {
        return;
    }
    if let Some(pushed) = read(assemble(staged)) {
        check_pushed(&pushed, |name, data| {
            let elements = sizes[name];
            data.len() == 4 * elements || data.len() == 2 * elements
        });
    }
}

/// Rows of a worker's answer, after a byte for the number of rows that are due: an Arrow stream in
/// two parts.
pub fn rows(bytes: &[u8]) {
    let mut input = Input(bytes);
    let due = usize::from(input.byte());
    let cut = usize::from(input.byte()) * input.0.len() / 256;
    let (a, b) = input.0.split_at(cut);
    let parts = [a, b].map(Bytes::copy_from_slice).to_vec();
    // Only a worker is to blame, and another one is asked.
    let Some(table) = read_own(wait(Table::of_answer(parts, due))) else {
        return;
    };
    assert_eq!(table.rows(), due);
    let all: Vec<usize> = (0..due).collect();
    for name in ["image", "caption", "n"] {
        if let Some(column) = read_own(table.column(name, &all)) {
            assert_eq!(column.len(), due);
            let valid = column.to_data().validate_full();
            valid.expect("an array that was read is a valid one");
        }
    }
}

/// A message after a byte that says of which kind: any of the protocol's, by its description. It
/// comes back from its own bytes, and can be shown.
pub fn message(bytes: &[u8]) {
    let mut input = Input(bytes);
    let known = reflect::dynamic(&OpenRunRequest::default());
    let pool = known.descriptor().parent_pool().clone();
    let kinds: Vec<_> = pool
        .all_messages()
        .filter(|kind| kind.full_name().starts_with("superbatch."))
        .collect();
    let kind = kinds[usize::from(input.byte()) % kinds.len()].clone();
    let Ok(message) = DynamicMessage::decode(kind.clone(), input.0) else {
        return;
    };
    let written = message.encode_to_vec();
    let again = DynamicMessage::decode(kind, written.as_slice()).expect("it was written just now");
    assert_eq!(again.encoded_len(), written.len());
    for (field, value) in reflect::fields(&again) {
        if let Some(value) = value {
            reflect::plain(&field, &value);
        }
    }
}
