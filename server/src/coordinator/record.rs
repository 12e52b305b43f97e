//! What a step was decided on, gathered while it is decided, and the receipt that comes of it.
use super::{
    facts::ModelFact,
    plan::{self, Candidate, PLAN_VERSION, SuperBatch},
    receipt::has_scores,
    run::Run,
    scoring::{Rows, Scored, Scoring},
    sizing::Work,
    spec::leaves_out,
    wasted::Spent,
    weights::Published,
};
use crate::{error::Result, metrics, storage::nonce};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use superbatch_proto::v1::{
    Accounts, BadRow, BadRowReason, ChosenRow, Fidelity, Hole, Mode, Phase, Receipt, ReceiptSummary, RunSpec,
    SelectResponse, StageSeconds, WeightsVersion,
};
use tokio::time::Instant;

/// Version of this program, as receipts name it.
pub const BUILD: &str = concat!("superbatch ", env!("CARGO_PKG_VERSION"));

/// Everything that a step's receipt will say, as far as it is known.
pub struct Decided {
    pub generation: u32,
    pub step: u64,
    pub phase: Phase,
    pub mode: Mode,
    pub holes: Vec<Hole>,
    pub candidates_scanned: usize,
    pub drawn: SelectResponse,
    pub learner: Option<WeightsVersion>,
    pub reference_digest: String,
    pub device: String,
    /// Learner scale and bias, reference scale and bias, as selection used them.
    pub scales: [f64; 4],
    /// All operations so far, until a receipt has them.
    pub spent: Spent,
    cost: Accounts,
    /// Workers that shared the candidates.
    workers: usize,
}

impl Decided {
    pub fn new(generation: u32, step: u64, phase: Phase, spent: Spent) -> Self {
        Self {
            generation,
            step,
            phase,
            mode: Mode::Normal,
            holes: Vec::new(),
            candidates_scanned: 0,
            drawn: SelectResponse::default(),
            learner: None,
            reference_digest: String::new(),
            device: String::new(),
            scales: [0.0; 4],
            spent,
            cost: Accounts { seconds: Some(StageSeconds::default()), ..Default::default() },
            workers: 0,
        }
    }

    pub fn cost_seconds(&mut self) -> &mut StageSeconds {
        self.cost.seconds.get_or_insert_default()
    }

    pub fn planned(&mut self, took: Duration) {
        self.cost_seconds().plan = took.as_secs_f64();
        metrics::stage_duration("plan").record(took.as_secs_f64());
    }

    pub fn read(&mut self, scoring: &Scoring) {
        self.workers = self.workers.max(scoring.slices());
        let (fetch, decode) = scoring.read_seconds();
        let seconds = self.cost_seconds();
        seconds.fetch += fetch;
        seconds.decode += decode;
    }

    /// What it took, with its commit.
    pub fn work(&self, committed: Duration) -> Work {
        let StageSeconds { plan, fetch, decode, embed_reference, embed_learner, .. } =
            self.cost.seconds.unwrap_or_default();
        Work {
            workers: self.workers as f64,
            scored: fetch + decode + embed_reference + embed_learner,
            learner: embed_learner,
            rest: plan + self.drawn.seconds + committed.as_secs_f64(),
        }
    }

    pub fn waited(&mut self, waited: Duration) {
        self.cost_seconds().wait_weights = waited.as_secs_f64();
        metrics::stage_duration("wait_weights").record(waited.as_secs_f64());
    }

    pub fn embedded_reference(&mut self, scored: &Scored) {
        self.spent.add(scored.flops);
        self.cost.reference_flops += scored.flops;
        self.cost_seconds().embed_reference += scored.seconds;
        self.reference_digest.clone_from(&scored.digest);
        self.device.clone_from(&scored.device);
    }

    pub fn embedded_learner(&mut self, published: &Published, scored: &Scored, fact: Option<&ModelFact>) {
        self.spent.add(scored.flops);
        self.cost.learner_flops += scored.flops;
        self.cost_seconds().embed_learner += scored.seconds;
        self.device.clone_from(&scored.device);
        let mut version = published.version.clone();
        if version.version == 0 {
            version.digest = fact.map_or_else(String::new, |f| f.weights_digest.clone());
        }
        self.learner = Some(version);
    }

    /// Notes what was spent on lost workers, and calls the reference's share thrown away where a degraded step did not use it.
    pub fn discarded(&mut self, flops: f64) {
        self.spent.add(flops);
        self.cost.discarded_flops += flops;
        if self.mode == Mode::Uniform && !leaves_out(self.phase.tuning.as_ref()) {
            self.cost.discarded_flops += std::mem::take(&mut self.cost.reference_flops);
        }
    }

    /// Rows with faults of content, and rows whose embeddings are not finite.
    pub fn add_holes(&mut self, content: impl IntoIterator<Item = Hole>, towers: &[&Option<Scored>]) {
        let mut holes: BTreeMap<u32, Hole> = BTreeMap::new();
        // The slices that share a block may both tell of a row; the one in which the block begins comes first.
        for hole in content {
            holes.entry(hole.candidate).or_insert(hole);
        }
        for candidate in towers.iter().filter_map(|t| t.as_ref()).flat_map(|t| &t.not_finite) {
            holes.entry(*candidate).or_insert_with(|| Hole {
                candidate: *candidate,
                reason: BadRowReason::EmbeddingNotFinite as i32,
                detail: "its embedding holds NaN or infinity".to_owned(),
            });
        }
        for hole in holes.values() {
            metrics::skipped(hole.reason().as_str_name().trim_start_matches("BAD_ROW_REASON_")).increment(1);
        }
        self.holes.extend(holes.into_values());
    }

    /// The draw of a uniform step: these candidates, by noise alone.
    pub fn drawn_uniformly(&mut self, indices: Vec<u32>) {
        let count = indices.len();
        self.drawn = SelectResponse {
            indices,
            chunks: vec![count as u32],
            scores: vec![0.0; count],
            weights: vec![1.0; count],
            device: "cpu".to_owned(),
            ..Default::default()
        };
    }

    pub fn hole_numbers(&self) -> Vec<u32> {
        self.holes.iter().map(|hole| hole.candidate).collect()
    }
}

/// Keys of the candidates' noise: unique over the sources of a super-batch.
pub fn noise_keys(candidates: &[Candidate]) -> Vec<u64> {
    candidates.iter().map(|c| u64::from(c.source) << 48 | c.position).collect()
}

/// The receipt of a decided step; its totals are filled when it is committed.
pub fn receipt(run: &Run, spec: &RunSpec, super_batch: &SuperBatch, decided: &Decided, rows: &Rows) -> Result<Receipt> {
    let id = |candidate: u32| plan::row_id(&run.manifest, &super_batch.candidates[candidate as usize]);
    let bad_row = |hole: &Hole| BadRow {
        id: id(hole.candidate).0,
        position: super_batch.candidates[hole.candidate as usize].position,
        reason: hole.reason,
        detail: hole.detail.clone(),
    };
    Ok(Receipt {
        summary: Some(summary(run, spec, super_batch, decided)),
        chosen: chosen(super_batch, decided, rows, id),
        bad_rows: decided.holes.iter().map(bad_row).collect(),
    })
}

fn chosen(
    super_batch: &SuperBatch,
    decided: &Decided,
    rows: &Rows,
    id: impl Fn(u32) -> (String, u64),
) -> Vec<ChosenRow> {
    let drawn = &decided.drawn;
    let chunk_of = drawn.chunks.iter().enumerate().flat_map(|(k, size)| std::iter::repeat_n(k as u32, *size as usize));
    let places = drawn.indices.iter().zip(chunk_of).enumerate();
    let row = |(place, (candidate, chunk)): (usize, (&u32, u32))| {
        let c = &super_batch.candidates[*candidate as usize];
        let (id, row) = id(*candidate);
        ChosenRow {
            id,
            source: c.source,
            shard: c.shard,
            row,
            position: c.position,
            chunk,
            score: drawn.scores[place],
            weight: drawn.weights[place],
            fidelity: Fidelity::Full as i32,
            content_hash: rows.hashes[place].clone().into(),
        }
    };
    places.map(row).collect()
}

fn summary(run: &Run, spec: &RunSpec, super_batch: &SuperBatch, decided: &Decided) -> ReceiptSummary {
    let (phase, drawn) = (&decided.phase, &decided.drawn);
    let [learner_scale, learner_bias, reference_scale, reference_bias] = decided.scales;
    ReceiptSummary {
        run_id: run.id.clone(),
        generation: decided.generation,
        chosen_in_generation: decided.generation,
        step: decided.step,
        policy: phase.policy,
        criterion: phase.criterion,
        loss: spec.loss,
        mode: decided.mode as i32,
        fidelity: Fidelity::Full as i32,
        super_batch_size: phase.super_batch_size,
        sub_batch_size: phase.sub_batch_size,
        n_chunks: drawn.chunks.len() as u32,
        gain: phase.gain,
        seed: spec.seed,
        lag_steps: decided.learner.as_ref().map_or(0, |v| decided.step as i64 - 1 - v.step),
        learner: decided.learner.clone(),
        reference_digest: decided.reference_digest.clone(),
        learner_scale,
        learner_bias,
        reference_scale,
        reference_bias,
        device: if decided.device.is_empty() { drawn.device.clone() } else { decided.device.clone() },
        build: BUILD.to_owned(),
        plan_version: PLAN_VERSION,
        dataset_manifest: run.manifest_digest.clone(),
        scanned: super_batch.spans.clone(),
        holes: decided.holes.len() as u32,
        batch_score: drawn.batch_score,
        mean_score_chosen: drawn.mean_score_chosen,
        mean_score_candidates: drawn.mean_score_candidates,
        cost: Some(cost(run, spec, decided)),
        committed_unix_ms: unix_ms(),
        selector_threads: drawn.threads,
        writer_nonce: nonce(),
        embedding_dtype: spec.embedding_dtype,
        compute_dtype: spec.compute_dtype,
        run_totals: None,
        tuning: phase.tuning,
        left_out: drawn.left_out.filter(|_| leaves_out(phase.tuning.as_ref())),
    }
}

fn cost(run: &Run, spec: &RunSpec, decided: &Decided) -> Accounts {
    let drawn = &decided.drawn;
    let per_example = match (spec.train_flops_per_example, &run.learner) {
        (given, _) if given > 0.0 => given,
        (_, Some(learner)) => 3.0 * learner.pair_flops,
        (_, None) => 0.0,
    };
    let mut cost = decided.cost;
    cost.candidates_scanned = decided.candidates_scanned as u64;
    cost.examples_selected = drawn.indices.len() as u64;
    cost.bad_rows = decided.holes.len() as u64;
    cost.selection_flops = drawn.flops;
    cost.train_flops = per_example * drawn.indices.len() as f64;
    cost.seconds.get_or_insert_default().select = drawn.seconds;
    cost
}

fn unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// `a` and `b` together.
pub fn add(a: &Accounts, b: &Accounts) -> Accounts {
    let (x, y) = (a.seconds.unwrap_or_default(), b.seconds.unwrap_or_default());
    Accounts {
        candidates_scanned: a.candidates_scanned + b.candidates_scanned,
        examples_selected: a.examples_selected + b.examples_selected,
        bad_rows: a.bad_rows + b.bad_rows,
        reference_flops: a.reference_flops + b.reference_flops,
        learner_flops: a.learner_flops + b.learner_flops,
        selection_flops: a.selection_flops + b.selection_flops,
        discarded_flops: a.discarded_flops + b.discarded_flops,
        train_flops: a.train_flops + b.train_flops,
        seconds: Some(StageSeconds {
            plan: x.plan + y.plan,
            fetch: x.fetch + y.fetch,
            decode: x.decode + y.decode,
            embed_reference: x.embed_reference + y.embed_reference,
            embed_learner: x.embed_learner + y.embed_learner,
            select: x.select + y.select,
            commit: x.commit + y.commit,
            total: x.total + y.total,
            wait_weights: x.wait_weights + y.wait_weights,
        }),
    }
}

/// How a step was decided.
pub fn mode(receipt: &Receipt) -> &'static str {
    match receipt.summary.as_ref().map(ReceiptSummary::mode) {
        Some(Mode::Stale) => "stale",
        Some(Mode::Uniform) => "uniform",
        Some(Mode::ReferenceOnly) => "reference_only",
        _ => "normal",
    }
}

/// Words that name the first bad row of a step.
pub fn first_bad(id: &str, reason: BadRowReason, detail: &str) -> String {
    let reason = reason.as_str_name().trim_start_matches("BAD_ROW_REASON_");
    format!(", the first of this step {id} ({reason}: {detail})")
}

/// Feeds the metrics with a receipt that was committed just now; `begun` is when its commit began.
pub fn count(receipt: &Receipt, begun: Instant) {
    let Some(summary) = &receipt.summary else { return };
    metrics::stage_duration("commit").record(begun.elapsed().as_secs_f64());
    metrics::steps_committed(mode(receipt)).increment(1);
    metrics::selected().increment(receipt.chosen.len() as u64);
    if has_scores(summary) {
        metrics::batch_score().record(summary.batch_score);
        metrics::mean_score("chosen").record(summary.mean_score_chosen);
        metrics::mean_score("candidates").record(summary.mean_score_candidates);
    }
    if let Some(left_out) = &summary.left_out {
        metrics::left_out("clip_score_at_least").increment(left_out.clip_score_at_least.into());
        metrics::left_out("neg_clip_loss_keep").increment(left_out.neg_clip_loss_keep.into());
        metrics::left_out("duplicates_above").increment(left_out.duplicates_above.into());
    }
    if let Some(cost) = &summary.cost {
        metrics::candidates().increment(cost.candidates_scanned);
        metrics::flops("discarded").increment(cost.discarded_flops as u64);
    }
    if summary.learner.is_some() {
        metrics::learner_staleness().record(summary.lag_steps as f64);
    }
}
