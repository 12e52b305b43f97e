//! How this project's processes and clients reach each other: TLS towards others, from files that
//! may change, and bearer tokens.
//!
//! Nothing here knows what is said over the connection. Files are read anew for every connection,
//! so that a renewed certificate needs no restart.
mod bearer;
mod connect;
mod fault;
mod files;
#[doc(hidden)]
pub mod testing;

pub use bearer::{Authorized, Bearer};
pub use connect::Dialer;
pub use files::{Error, Trust, certificates, pinned, private_key, provider, roots};
