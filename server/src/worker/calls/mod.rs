//! One module for each call of the worker plane, and what they share.
pub mod ahead;
pub mod answers;
pub mod chosen;
pub mod embed;
pub mod fetch;
pub mod messages;
pub mod rows;
pub mod score;
pub mod select;
pub mod slice;
pub mod survey;
