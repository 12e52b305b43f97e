//! What a step was decided on, gathered while it is decided, and the receipt that comes of it.
use super::columns::Columns;
use crate::{
    coordinator::{
        facts::run::ModelFact,
        receipts::wasted::Spent,
        score::{scored::Scored, super_batch::Scoring},
        spec::{leaves_out, scores_at},
        trainer::sizing::Work,
        weights::Published,
    },
    metrics,
    selection::judged::Judged,
};
use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};
use superbatch_proto::v1::{
    Accounts, BadRowReason, Hole, Mode, Phase, ProbeResult, SelectResponse, StageSeconds,
    WeightsVersion,
};

/// Version of this program, as written into receipts.
pub(crate) const BUILD: &str = concat!("superbatch ", env!("CARGO_PKG_VERSION"));

/// Everything that a step's receipt will hold, as far as it is known.
pub(crate) struct Decided {
    pub generation: u32,
    pub step: u64,
    pub phase: Phase,
    pub mode: Mode,
    pub holes: Vec<Hole>,
    pub candidates_scanned: usize,
    /// The candidates that were read, if not all were: of the others nobody knows if they are bad.
    pub looked_at: Option<Vec<u32>>,
    pub drawn: SelectResponse,
    pub learner: Option<WeightsVersion>,
    pub reference_digest: String,
    pub device: String,
    /// Learner scale and bias, reference scale and bias, as selection used them.
    pub scales: [f64; 4],
    /// All FLOPs so far. If the step is discarded, they are charged to a later one.
    pub spent: Spent,
    pub cost: Accounts,
    /// Each candidate's own score and losses, if the step is drawn by scores.
    pub judged: Option<Judged>,
    /// Of each drawn row which tokens are to be trained, if the phase chooses tokens.
    pub token_masks: Vec<Vec<bool>>,
    /// What the fidelity probe found, where one was due.
    pub probe: Option<ProbeResult>,
    /// The phase's score columns.
    pub columns: Columns,
    /// Workers that shared the candidates.
    workers: usize,
}

impl Decided {
    pub(crate) fn new(generation: u32, step: u64, phase: Phase, spent: Spent) -> Self {
        Self {
            generation,
            step,
            phase,
            mode: Mode::Normal,
            holes: Vec::new(),
            candidates_scanned: 0,
            looked_at: None,
            drawn: SelectResponse::default(),
            learner: None,
            reference_digest: String::new(),
            device: String::new(),
            scales: [0.0; 4],
            spent,
            cost: Accounts {
                seconds: Some(StageSeconds::default()),
                ..Default::default()
            },
            judged: None,
            token_masks: Vec::new(),
            probe: None,
            columns: Columns::default(),
            workers: 0,
        }
    }

    pub(crate) fn cost_seconds(&mut self) -> &mut StageSeconds {
        self.cost.seconds.get_or_insert_default()
    }

    pub(crate) fn planned(&mut self, took: Duration) {
        self.cost_seconds().plan = took.as_secs_f64();
        metrics::stage_duration("plan").record(took.as_secs_f64());
    }

    pub(crate) fn read(&mut self, scoring: &Scoring) {
        self.workers = self.workers.max(scoring.slices());
        let (fetch, decode) = scoring.read_seconds();
        let seconds = self.cost_seconds();
        seconds.fetch += fetch;
        seconds.decode += decode;
    }

    /// Returns the time that the step took, with its commit.
    pub(crate) fn work(&self, committed: Duration) -> Work {
        let StageSeconds {
            plan,
            fetch,
            decode,
            embed_reference,
            embed_learner,
            ..
        } = self.cost.seconds.unwrap_or_default();
        Work {
            workers: self.workers as f64,
            scored: fetch + decode + embed_reference + embed_learner,
            learner: embed_learner,
            rest: plan + self.drawn.seconds + committed.as_secs_f64(),
        }
    }

    pub(crate) fn record_wait(&mut self, waited: Duration) {
        self.cost_seconds().wait_weights = waited.as_secs_f64();
        metrics::stage_duration("wait_weights").record(waited.as_secs_f64());
    }

    pub(crate) fn embedded_reference(&mut self, scored: &Scored) {
        self.spent.add(scored.flops);
        self.cost.reference_flops += scored.flops;
        self.scored_by(scored);
        self.cost_seconds().embed_reference += scored.seconds;
        self.reference_digest.clone_from(&scored.digest);
        self.device.clone_from(&scored.device);
    }

    pub(crate) fn embedded_learner(
        &mut self,
        published: &Published,
        scored: &Scored,
        fact: Option<&ModelFact>,
    ) {
        self.spent.add(scored.flops);
        self.cost.learner_flops += scored.flops;
        self.scored_by(scored);
        self.cost_seconds().embed_learner += scored.seconds;
        self.device.clone_from(&scored.device);
        let mut version = published.version.clone();
        if version.version == 0 {
            version.digest = fact.map_or_else(String::new, |f| f.weights_digest.clone());
        }
        self.learner = Some(version);
    }

    /// Adds scoring that the fidelity probe alone needed.
    pub(crate) fn probe_spent(&mut self, flops: f64) {
        self.spent.add(flops);
        self.cost.probe_flops += flops;
    }

    fn scored_by(&mut self, scored: &Scored) {
        let by_tower = self.cost.scoring.get_or_insert_default();
        let image = scored.flops - scored.text_flops;
        match scores_at(&self.phase) {
            Some(_) => by_tower.image_approximate += image,
            None => by_tower.image_full += image,
        }
        by_tower.text += scored.text_flops;
    }

    /// Notes FLOPs spent on lost workers. If a degraded step did not use the reference's
    /// embeddings, their cost is moved to the discarded FLOPs.
    pub(crate) fn record_discarded(&mut self, flops: f64) {
        self.spent.add(flops);
        self.cost.discarded_flops += flops;
        if self.mode == Mode::Uniform && !leaves_out(self.phase.tuning.as_ref()) {
            self.cost.discarded_flops += std::mem::take(&mut self.cost.reference_flops);
            self.cost.scoring = None;
        }
    }

    /// Adds the holes: rows with faults of content, and rows whose embeddings are not finite.
    pub(crate) fn add_holes(
        &mut self,
        content: impl IntoIterator<Item = Hole>,
        towers: &[&Option<Scored>],
    ) {
        let mut holes: BTreeMap<u32, Hole> = BTreeMap::new();
        // Two slices that share a block may both report a row. The first report wins, which is that
        // of the slice in which the block begins: so the receipt does not depend on which worker
        // was faster.
        for hole in content {
            holes.entry(hole.candidate).or_insert(hole);
        }
        for candidate in towers
            .iter()
            .filter_map(|t| t.as_ref())
            .flat_map(|t| &t.not_finite)
        {
            holes.entry(*candidate).or_insert_with(|| Hole {
                candidate: *candidate,
                reason: BadRowReason::EmbeddingNotFinite as i32,
                detail: "its embedding holds NaN or infinity".to_owned(),
            });
        }
        for hole in holes.values() {
            metrics::skipped(
                hole.reason()
                    .as_str_name()
                    .trim_start_matches("BAD_ROW_REASON_"),
            )
            .increment(1);
        }
        self.holes.extend(holes.into_values());
    }

    /// Takes the draw of a step that needs no model: these candidates of an order of all.
    pub(crate) fn drawn_of(&mut self, order: &SelectResponse, indices: Vec<u32>) {
        let count = indices.len();
        let numbered = order.indices.iter().zip(0_usize..);
        let places: HashMap<u32, usize> = numbered.map(|(index, n)| (*index, n)).collect();
        let of = |all: &[f64]| -> Vec<f64> {
            let place = |index| places.get(index).and_then(|place| all.get(*place));
            indices
                .iter()
                .map(|index| place(index).copied().unwrap_or_default())
                .collect()
        };
        let (scores, weights) = (of(&order.scores), of(&order.weights));
        // They are relative to the largest of those that are served.
        let largest = weights.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let mean = scores.iter().sum::<f64>() / count.max(1) as f64;
        self.drawn = SelectResponse {
            indices,
            chunks: vec![count as u32],
            scores,
            weights: weights.iter().map(|weight| weight / largest).collect(),
            batch_score: mean,
            mean_score_chosen: mean,
            mean_score_candidates: order.mean_score_candidates,
            device: "cpu".to_owned(),
            ..Default::default()
        };
    }

    /// Candidates that may not be chosen: holes, and what the columns leave out. Rising.
    pub(crate) fn unusable(&self) -> Vec<u32> {
        let mut all = self.hole_numbers();
        all.extend_from_slice(&self.columns.left_out);
        all.sort_unstable();
        all.dedup();
        all
    }

    pub(crate) fn hole_numbers(&self) -> Vec<u32> {
        self.holes.iter().map(|hole| hole.candidate).collect()
    }
}
