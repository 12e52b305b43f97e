//! Entrances for fuzzing: each function takes bytes from anywhere through the code that reads them
//! in production, and panics if that breaks a promise.
//!
//! No part of the service, and hidden. It lies in this crate because most readers are private to
//! it: of them all, only these functions of bytes are public. `fuzz/` runs them on inputs that
//! coverage leads to, and `tests/tests/fuzz.rs` on those that are kept.
mod data;
mod requests;
mod state;
mod wire;

pub use data::{lists, parquet, predicate, tar, uri_pattern};
pub use requests::requests;
pub use state::{config, facts, pack, receipt, tokens};
pub use wire::{message, parts, rows, safetensors};

use crate::{
    error::{Error, Result},
    storage::{Location, StorageConfig, Stores},
};
use bytes::Bytes;
use prost::Message;
use superbatch_proto::v1::Reason;
use tonic::Status;

/// An error's text and details: peers break a connection whose headers exceed 16 KiB, and what is
/// counted here is encoded to up to three times its size.
const ERROR_BYTES_MAX: usize = 16 << 10;

/// What is left of an input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Takes a byte; 0 at the end.
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    /// Takes as many bytes as there are, up to `most`.
    fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Takes a message with its length before it; `None` if there is none, or a damaged one.
    fn message<M: Message + Default>(&mut self) -> Option<M> {
        if self.0.is_empty() {
            return None;
        }
        M::decode_length_delimited(&mut self.0).ok()
    }
}

/// Runs `work` to its end on this thread.
fn wait<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the system gives a thread what it needs");
    }
    RUNTIME.with(|runtime| runtime.block_on(work))
}

/// Returns stores that open nothing but memory.
fn stores() -> Stores {
    Stores::new(StorageConfig {
        allow_uris: vec!["memory:///".to_owned()],
        ..Default::default()
    })
}

fn opened(stores: &Stores, uri: &str) -> Location {
    stores.open(uri).expect("memory is opened by any such URI")
}

async fn put(at: &Location, key: &str, bytes: &[u8]) {
    let written = at.put(key, Bytes::copy_from_slice(bytes)).await;
    written.expect("memory takes an object");
}

/// Returns what was read of an input that is not trusted. A refusal must be for the input's fault:
/// one for the service's or the store's would be a fault here.
fn read<T>(answer: Result<T>) -> Option<T> {
    answer
        .map_err(|error| {
            let reason = error.reason();
            let is_ours = matches!(reason, Reason::Internal | Reason::StorageUnreachable);
            assert!(!is_ours, "{reason:?}: {}", error.chain());
            check_arrives(error);
        })
        .ok()
}

/// Returns what was read of the service's own state. Damage is a fault of the service's, and told.
fn read_own<T>(answer: Result<T>) -> Option<T> {
    answer
        .map_err(|error| {
            let is_stores = error.reason() == Reason::StorageUnreachable;
            assert!(!is_stores, "{}", error.chain());
            check_arrives(error);
        })
        .ok()
}

fn check_arrives(error: Error) {
    let said = error.chain();
    // As every error for a panic on another thread says it.
    let is_panic = error.reason() == Reason::Internal && said.contains(" panicked");
    assert!(!is_panic, "{said}");
    let status = Status::from(error);
    let bytes = status.message().len() + status.details().len();
    assert!(
        bytes <= ERROR_BYTES_MAX,
        "an error of {bytes} bytes: {said}"
    );
}
