//! scoring-kernels
