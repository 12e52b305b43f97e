//! Embeddings and rows of a whole super-batch.
use super::kept::Data;
use crate::{error::Result, selection::Embedded};
use std::collections::BTreeMap;
use superbatch_proto::v1::ComputeDtype;

/// One model's embeddings of all candidates.
#[derive(Debug, Clone)]
pub struct Scored {
    /// L2-normalised, in the run's dtype; zero for holes.
    pub embedded: Embedded,
    pub scale: f64,
    pub bias: Option<f64>,
    pub digest: String,
    /// BLAKE3 of the model's files except the weights, in hex.
    pub files: BTreeMap<String, String>,
    pub compute_dtype: ComputeDtype,
    pub device: String,
    pub flops: f64,
    /// The captions' part of `flops`.
    pub text_flops: f64,
    pub seconds: f64,
    /// Candidates whose embeddings are not finite.
    pub not_finite: Vec<u32>,
}

impl Scored {
    /// Leaves the losses of examples alone, if those of tokens follow them.
    pub fn of_examples(&mut self) {
        if let Some(of_examples) = self.embedded.of_examples() {
            self.embedded = of_examples;
        }
    }
}

/// Chosen rows in the order of the draw: at least the output's data columns, and each row's content
/// hash.
#[derive(Debug)]
pub struct Rows {
    pub data: Data,
    pub hashes: Vec<Vec<u8>>,
}

impl Rows {
    pub fn append(&mut self, other: Self) -> Result<()> {
        self.data.append(other.data)?;
        self.hashes.extend(other.hashes);
        Ok(())
    }
}

/// Returns a file whose digests differ, of those that both sides know.
pub fn other_file<'a>(
    a: &'a BTreeMap<String, String>,
    b: &BTreeMap<String, String>,
) -> Option<&'a str> {
    let differs =
        |(name, digest): &(&String, &String)| b.get(*name).is_some_and(|other| other != *digest);
    a.iter().find(differs).map(|(name, _)| name.as_str())
}
