//! The extension module under the Python package `superbatch`: the Rust client, and nothing that
//! selects.
//!
//! Every call to the service is a [`call::Call`]: Python waits for it with the GIL released and
//! signals checked, or hands it to asyncio. The public classes are Python's, in
//! `python/superbatch`.
mod call;
mod client;
mod errors;
mod process;
mod run;
mod show;
mod slot;
mod spec;
mod weights;

/// The extension module.
#[pyo3::pymodule]
mod _superbatch {
    #[pymodule_export]
    use crate::{
        call::Call,
        client::{Client, check_spec, connect},
        run::{Batches, Run},
        slot::Slot,
        weights::blake3_of,
    };
}
