//! From stored bytes to what a model takes: decoding, resizing, tokenizing.
pub(super) mod captions;
mod clean;
pub mod decode_pool;
pub(super) mod images;
pub mod model_inputs;
pub mod padding;
pub mod preprocess;
pub mod row;
pub mod tokenize;
mod words;
