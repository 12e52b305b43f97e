//! The wire protocol of Superbatch: messages, services, ids and the closed set of error reasons.
//!
//! The comments in `superbatch/v1/*.proto` are the API's documentation.
pub mod arrow_stream;
mod checksum;
pub mod columns;
mod error;
pub mod http2;
pub mod ids;
pub mod reflect;

pub use checksum::Checksum;
pub use error::{DOMAIN, Failure, ParseFailure, name as reason_name, some_of};

/// Generated messages, clients and servers of `superbatch.v1`.
#[allow(clippy::all, clippy::too_many_lines, clippy::unwrap_used, missing_docs)]
pub mod v1 {
    tonic::include_proto!("superbatch.v1");

    /// Encoded `FileDescriptorSet`, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/superbatch.binpb"));
}

/// Key in the metadata of an error: how long the service has tried again before it gave up. A
/// client counts that time as its own, so that the patience of the two does not multiply.
pub const RETRIED_SECONDS: &str = "retried_seconds";
/// Keys in the metadata of NOT_OWNER: the address of the coordinator that owns the run, and which
/// of the processes at that address it is.
pub const OWNER: &str = "owner";
pub const INSTANCE: &str = "instance";

/// Largest message that either side accepts, in bytes. Payloads are cut into parts of
/// [`PART_BYTES`], far below it.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Most candidates of a super-batch. Counts off the wire are compared with it before they size
/// memory.
pub const SUPER_BATCH_SIZE_MAX: u32 = 1 << 22;
/// Key of `SelectBatchResponse.arrow_ipc` on the wire: its number, and that its length follows.
pub const ARROW_IPC_KEY: u8 = (2 << 3) | 2;
/// Size of the parts into which Arrow streams, tensors and embeddings are cut, in bytes.
pub const PART_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::{ARROW_IPC_KEY, v1};
    use prost::Message;

    #[test]
    fn the_key_of_rows_is_that_of_the_protocol() {
        let rows = v1::SelectBatchResponse {
            message: Some(v1::select_batch_response::Message::ArrowIpc(
                vec![7, 8].into(),
            )),
        };
        assert_eq!(rows.encode_to_vec(), [ARROW_IPC_KEY, 2, 7, 8]);
    }
}
