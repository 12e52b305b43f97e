//! One module for each call of the worker plane, and what they share.
pub(super) mod ahead;
pub(super) mod answers;
pub(super) mod beside;
pub(super) mod chosen;
pub(super) mod embed;
pub(super) mod extent;
pub(super) mod fetch;
pub(super) mod hand;
pub(super) mod messages;
pub(super) mod rows;
pub(super) mod score;
pub(super) mod select;
pub(super) mod slice;
pub(super) mod survey;
pub(super) mod ticket;
