//! Access control: tokens and their scopes, the layer that checks them, and the audit log.
//!
//! A call passes [`layer`] first: [`scope`] says what its method needs, and [`decide`] whether its
//! token has it. The run of the call is known only after its message is read, so the service checks
//! the run by its [`Caller`].
pub mod audit;
mod caller;
mod decide;
mod failures;
mod layer;
mod pattern;
pub mod reload;
pub mod scope;
pub mod tokens;

pub use self::{
    caller::Caller,
    layer::{Access, AccessLayer},
};
use std::net::SocketAddr;

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Peer {
    pub address: Option<SocketAddr>,
}
