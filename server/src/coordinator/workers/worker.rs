//! One scoring worker, from its coordinator's side.
use superbatch_proto::{MESSAGE_BYTES_MAX, v1::worker_service_client::WorkerServiceClient};
use superbatch_transport::Authorized;

/// A connection to one worker. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Worker {
    pub address: String,
    /// Id of the worker's process: another process may take over the same address.
    pub incarnation: String,
    pub device: String,
    pub channel: Authorized,
}

impl Worker {
    /// Returns whether both are the same process.
    pub fn is(&self, other: &Self) -> bool {
        (&self.address, &self.incarnation) == (&other.address, &other.incarnation)
    }

    pub fn client(&self) -> WorkerServiceClient<Authorized> {
        WorkerServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}
