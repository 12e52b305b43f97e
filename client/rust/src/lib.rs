//! client/rust
