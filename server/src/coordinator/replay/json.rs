//! Redraws and pairs as JSON: for `superbatch replay --json` and the run page.
use super::{Past, pairs::Pairs, redraw::Redrawn};
use crate::coordinator::receipts::{
    json,
    parquet::{draws_by_scores, has_scores},
};
use serde_json::{Value, json};
use superbatch_proto::{reflect::Word, v1::ChosenRow};

impl Redrawn {
    /// Returns whether the draw used scores; if not, its batch score is 0.
    pub fn has_scores(&self) -> bool {
        draws_by_scores(self.phase.policy(), self.mode)
    }

    /// Returns the whole redraw, beside what the receipt says.
    pub fn json(&self, past: &Past) -> Value {
        let (was, phase) = (&past.summary, &self.phase);
        let scored = has_scores(was);
        let rows = self.rows.iter().map(|row| {
            json!({
                "id": row.id, "source": row.source, "shard": row.shard, "row": row.row,
                "position": row.position, "chunk": row.chunk, "score": row.score,
                "weight": row.weight, "own_score": row.own_score, "was_chosen": row.was_chosen,
            })
        });
        let measured = self.measured.map(|measured| {
            json!({
                "criterion": measured.criterion.word(),
                "chosen": measured.chosen,
                "redrawn": measured.redrawn,
                "uniform": measured.uniform,
            })
        });
        json!({
            "run_id": was.run_id,
            "step": was.step,
            "generation": was.generation,
            "chosen": {
                "policy": was.policy().word(),
                "criterion": was.criterion().word(),
                "mode": was.mode().word(),
                "super_batch_size": was.super_batch_size,
                "sub_batch_size": was.sub_batch_size,
                "n_chunks": was.n_chunks,
                "seed": was.seed,
                "batch_score": scored.then_some(was.batch_score),
                "uniform_score": was.uniform_score,
            },
            "redrawn": {
                "policy": phase.policy().word(),
                "criterion": phase.criterion().word(),
                "mode": self.mode.word(),
                "super_batch_size": phase.super_batch_size,
                "sub_batch_size": phase.sub_batch_size,
                "filter_ratio": self.filter_ratio(),
                "n_chunks": self.drawn.chunks.len(),
                "gain": phase.gain,
                "seed": self.seed,
                "tuning": phase.tuning.as_ref().map(json::tuning),
                "batch_score": self.has_scores().then_some(self.drawn.batch_score),
            },
            "measured": measured,
            "missing": self.missing,
            "same_draw": self.same,
            "rows_shared": self.shared,
            "losses_differ_by": self.losses_differ_by,
            "holes": self.holes,
            "weights_version": self.learner.as_ref().map(|version| version.version),
            "device": self.device,
            "flops": self.flops,
            "seconds": { "score": self.seconds[0], "draw": self.seconds[1] },
            "rows": rows.collect::<Vec<_>>(),
        })
    }

    pub fn filter_ratio(&self) -> f64 {
        let (kept, all) = (self.phase.sub_batch_size, self.phase.super_batch_size);
        1.0 - f64::from(kept) / f64::from(all.max(1))
    }
}

impl Pairs {
    /// Returns the pairs, with values of four digits.
    pub fn json(&self, past: &Past) -> Value {
        let shown = &past.receipt.chosen[..self.rows];
        let key = |row: &ChosenRow| json!(format!("{}.{}.{}", row.source, row.shard, row.row));
        json!({
            "criterion": self.criterion.word(),
            "loss": self.loss.word(),
            "key": shown.iter().map(key).collect::<Vec<_>>(),
            "chunk": shown.iter().map(|row| row.chunk).collect::<Vec<_>>(),
            "values": self.values.iter().map(|value| rounded(*value)).collect::<Vec<_>>(),
            "chosen_total": past.receipt.chosen.len(),
            "missing": self.missing,
        })
    }
}

/// Rounds to four decimals: 65,536 numbers are sent, and a picture is made of them.
fn rounded(value: f32) -> f64 {
    (f64::from(value) * 1e4).round() / 1e4
}
