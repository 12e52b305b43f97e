//! The operator's limits on runs.
use crate::error::{Error, Result};
use std::time::Duration;
use superbatch_proto::v1::{Reason, RunSpec};

/// The operator's bounds and defaults.
#[derive(Debug, Clone)]
pub struct Limits {
    pub super_batch_size_max: u32,
    pub sub_batch_size_max: u32,
    pub push_bytes_max: u64,
    pub push_deadline: Duration,
    /// Most open runs at a time.
    pub runs_max: usize,
    /// The default for runs that give none.
    pub need_deadline_seconds: f64,
    /// Newest snapshots of each run that are kept besides those that uncommitted steps need.
    pub snapshots_kept: u64,
    /// Most candidates passed over that a receipt lists.
    pub passed_over_max: u32,
    /// How long a ticket for rows on a worker holds.
    pub ticket_life: Duration,
}

impl Limits {
    /// # Errors
    /// `RunSpecImpossible`, with the phase's field.
    pub fn check(&self, spec: &RunSpec) -> Result<()> {
        for (number, phase) in spec.phases.iter().enumerate() {
            let sizes = [
                (
                    "super_batch_size",
                    phase.super_batch_size,
                    self.super_batch_size_max,
                ),
                (
                    "sub_batch_size",
                    phase.sub_batch_size,
                    self.sub_batch_size_max,
                ),
            ];
            if let Some((size, asked, largest)) = sizes
                .into_iter()
                .find(|(_, asked, largest)| asked > largest)
            {
                let field = format!("phases[{number}].{size}");
                let message = format!(
                    "{field} is {asked}, over this service's limit of {largest} \
                    (coordinator.{size}_max)"
                );
                return Err(Error::new(Reason::RunSpecImpossible, message).with("field", field));
            }
        }
        Ok(())
    }
}
