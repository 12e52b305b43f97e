//! The cursor of a source before a step, by arithmetic. Replaying all earlier steps would make a
//! resume at step one million slow.
use superbatch_proto::v1::Phase;

/// The next place of a source that is not scanned yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    pub epoch: u64,
    pub place: u64,
}

impl Cursor {
    /// Returns the steps that the rest of this epoch serves.
    fn fits(self, rows: u64, share: u64) -> u64 {
        rows.saturating_sub(self.place)
            .checked_div(share)
            .unwrap_or(0)
    }

    /// Returns the cursor after `steps` steps of `share` rows each. Requires 0 < share <= rows if
    /// the steps leave the epoch.
    pub(super) fn advance(self, rows: u64, share: u64, steps: u64) -> Self {
        let fits = self.fits(rows, share);
        if steps <= fits {
            return Self {
                place: self.place + steps * share,
                ..self
            };
        }
        let per_epoch = (rows / share.max(1)).max(1);
        // Counted from the last step, so that the cursor stays at the end of an epoch that is just
        // used up. The next phase may have a smaller share that still fits there.
        let last = steps - fits - 1;
        Self {
            epoch: self
                .epoch
                .saturating_add(1)
                .saturating_add(last / per_epoch),
            place: (last % per_epoch + 1) * share,
        }
    }

    /// Returns where the next step begins: in the next epoch if the rest of this one is shorter
    /// than a share.
    pub(super) fn settle(self, rows: u64, share: u64) -> Self {
        if self.fits(rows, share) > 0 {
            self
        } else {
            Self {
                epoch: self.epoch.saturating_add(1),
                place: 0,
            }
        }
    }

    /// Returns the steps of `share` rows before epoch `epochs` would begin.
    pub(super) fn left(self, rows: u64, share: u64, epochs: u64) -> u64 {
        if self.epoch >= epochs {
            return 0;
        }
        let per_epoch = rows.checked_div(share).unwrap_or(0);
        self.fits(rows, share)
            .saturating_add((epochs - 1 - self.epoch).saturating_mul(per_epoch))
    }
}

/// Returns each phase's (super_batch_size, first step, step after its last). The last phase has
/// `None` as its end.
pub(super) fn spans(phases: &[Phase]) -> impl Iterator<Item = (u32, u64, Option<u64>)> {
    phases.iter().enumerate().map(|(i, phase)| {
        (
            phase.super_batch_size,
            phase.from_step,
            phases
                .get(i + 1)
                .map(|next| next.from_step.max(phase.from_step)),
        )
    })
}

/// Divides `super_batch_size` by weight. Rows left over by rounding go to the largest remainders;
/// equal ones in the order of the sources.
pub(super) fn shares(weights: &[f64], super_batch_size: u32) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights
        .iter()
        .map(|weight| f64::from(super_batch_size) * weight / total)
        .collect();
    let mut shares: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
    let missing = u64::from(super_batch_size).saturating_sub(shares.iter().sum());
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|a, b| {
        exact[*b]
            .fract()
            .total_cmp(&exact[*a].fract())
            .then(a.cmp(b))
    });
    for source in by_remainder.into_iter().cycle().take(missing as usize) {
        shares[source] += 1;
    }
    shares
}
