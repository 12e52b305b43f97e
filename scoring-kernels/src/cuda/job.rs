//! The parameters of the tiled kernels. The layout of both structs is that of kernels.cu: change
//! them together.

/// Candidates (rows) of one block of threads.
pub(super) const TILE: usize = 128;
/// Most models times directions.
pub(super) const SLOTS: usize = 4;

/// `Slot` of kernels.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Slot {
    pub ours: u64,
    pub theirs: u64,
    pub plane: u64,
    pub stride: u32,
    pub high: f32,
    pub low: f32,
    pub bias: f32,
    pub sign: f64,
}

/// `Job` of kernels.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Job {
    pub slots: [Slot; SLOTS],
    pub rows: u64,
    pub columns: u64,
    pub row_count: u32,
    pub column_count: u32,
    pub count: u32,
    pub slot_count: u32,
    pub largest: u64,
    pub sums: u64,
}
