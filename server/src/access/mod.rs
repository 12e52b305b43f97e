//! Who may do what: tokens and their scopes, the layer that asks for them, and the audit log.
//!
//! A call passes [`layer`] first: [`scope`] says what its method needs, [`decide`] whether its
//! token holds that. What the call then is about (its run) is known only once its message is read,
//! so that the service asks its [`Caller`].
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

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Peer {
    pub address: Option<SocketAddr>,
}
