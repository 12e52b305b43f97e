//! HTTP/2's limits, which both ends of every connection with rows or weights have.
use crate::PART_BYTES;
use tonic::transport::{Endpoint, Server};

/// Bytes of a stream that may be under way before the receiver has taken them. With HTTP/2's
/// default of 64 KiB a stream could carry only 64 KiB for each round trip; several parts keep a
/// long line full.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// The same of all streams of a connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Largest frame that either side accepts: a part with what its message says of it, so that a part
/// is one frame. With HTTP/2's default of 16 KiB it is 65, each with a system call of its own.
pub const FRAME_BYTES_MAX: u32 = PART_BYTES as u32 + (1 << 10);

/// Gives these limits to the connection that a client makes.
pub fn client(endpoint: Endpoint) -> Endpoint {
    endpoint
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
}

/// Gives these limits to the connections that a server takes.
pub fn server(server: Server) -> Server {
    server
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
}
