//! Draws a step's sub-batch anew, and measures it beside the one that was chosen.
use super::{
    Change, Past, Replayer,
    embed::{Embedded, Weights},
    measure::{can_measure, decided, measuring, still_usable},
};
use crate::{
    blocking::blocking,
    coordinator::{
        losses::Losses,
        plan::rows::row_id,
        score::scored::Scored,
        spec::Asked,
        step::{columns, decided::Decided, draw::asking, uniform::served},
    },
    error::{Error, Result},
    selection::{
        is_scored,
        judged::{Judged, judge},
        probed::score_of,
    },
};
use std::collections::HashSet;
use superbatch_proto::v1::{
    Criterion, Mode, Phase, Policy, Reason, RunSpec, SelectBegin, SelectResponse, WeightsVersion,
};
use tokio::time::Instant;

/// A sub-batch drawn anew.
pub struct Redrawn {
    /// The settings of the draw.
    pub phase: Phase,
    pub seed: u64,
    pub mode: Mode,
    /// In the order of the draw.
    pub rows: Vec<Row>,
    pub drawn: SelectResponse,
    /// Whether these are the receipt's rows, in its order.
    pub same: bool,
    /// Rows that the receipt has too.
    pub shared: usize,
    pub measured: Option<Measured>,
    /// Returns why there is no measure.
    pub missing: Option<String>,
    /// Candidates that could not be used.
    pub holes: usize,
    /// The largest difference between a loss in the receipt and the one that was computed now: 0
    /// where the arithmetic is the same.
    pub losses_differ_by: Option<f64>,
    pub learner: Option<WeightsVersion>,
    pub device: String,
    pub flops: f64,
    /// Reading and scoring; drawing and measuring.
    pub seconds: [f64; 2],
}

/// A row of the redrawn sub-batch.
pub struct Row {
    pub id: String,
    pub source: u32,
    pub shard: u32,
    pub row: u64,
    pub position: u64,
    pub chunk: u32,
    pub score: f64,
    pub weight: f64,
    pub own_score: Option<f64>,
    /// Whether the receipt has it.
    pub was_chosen: bool,
}

/// Batch scores by one criterion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    pub criterion: Criterion,
    pub chosen: f64,
    pub redrawn: f64,
    /// Expected of a uniform draw of the redrawn size.
    pub uniform: Option<f64>,
}

/// What both sub-batches are measured by, owned by the thread that does it.
struct Measurement {
    measure: Option<SelectBegin>,
    learner: Option<Scored>,
    reference: Option<Scored>,
}

impl Replayer {
    /// Draws the sub-batch of `past` with the differences of `change`.
    ///
    /// # Errors
    /// Those of [`Change`]; `WeightsMissing` if the draw needs a learner whose weights were
    /// deleted; `RowChanged` if a row that was chosen can no longer be used; those of scoring
    /// and drawing.
    pub async fn redraw(&self, past: &Past, change: &Change) -> Result<Redrawn> {
        let spec = change.apply(&past.facts.spec, &past.phase)?;
        let mut decided = self.decided(past, &spec, change).await?;
        let weights = Weights::find(past).await?;
        let needs = needs(&decided);
        let measure = measured_by(&decided, past, &weights);
        let measures = measure.map(|criterion| Asked::by_draw(Policy::Joint, criterion, None));
        let of_measure = |asked: fn(Asked) -> bool| measures.is_some_and(asked);
        let wants_learner = needs.learner || of_measure(|asked| asked.learner);
        let wants_reference = needs.reference || of_measure(|asked| asked.reference);
        let learner = wants_learner.then(|| weights.required()).transpose()?;
        let begun = Instant::now();
        let candidates = &past.super_batch.candidates;
        let scored = self.embed(past, candidates, learner, wants_reference);
        let Embedded {
            learner,
            reference,
            holes,
            device,
        } = scored.await?;
        let scored_for = begun.elapsed().as_secs_f64();
        let mut flops: f64 = [&learner, &reference].map(spent_on).iter().sum();
        decided.add_holes(
            past.holes().into_iter().chain(holes),
            &[&reference, &learner],
        );
        let was = past.chosen()?;
        let mut holes = decided.holes.iter();
        let lost = holes.find(|hole| was.contains(&hole.candidate));
        still_usable(past, candidates, lost)?;
        let drawing = Instant::now();
        let pair = [&learner, &reference];
        let drawn = self.drawn(past, &spec, &mut decided, needs, pair);
        let drawn = drawn.await?;
        let begin = match measure {
            Some(criterion) => {
                let pair = [&learner, &reference];
                Some(measuring(past, &spec, &decided, criterion, pair)?)
            }
            None => None,
        };
        let measurement = Measurement {
            measure: begin,
            learner,
            reference,
        };
        let sets = [was.clone(), drawn.indices.clone()];
        let measure = move || Ok(measurement.judge_and_measure(&sets));
        let (judged, measured) = blocking("measuring a draw", measure).await?;
        let (measured, spent) = measured?;
        flops += drawn.flops + spent;
        let chosen: HashSet<u32> = was.iter().copied().collect();
        Ok(Redrawn {
            rows: rows(past, &drawn, judged.as_ref(), &chosen),
            shared: shared(&drawn.indices, &chosen),
            same: drawn.indices == was,
            losses_differ_by: judged.and_then(|judged| drift(past, &was, &judged)),
            missing: unmeasured(measured.as_ref(), &weights, past),
            measured,
            holes: decided.holes.len(),
            learner: past.summary.learner.clone().filter(|_| weights.kept()),
            phase: decided.phase.clone(),
            seed: spec.seed,
            mode: decided.mode,
            drawn,
            device,
            flops,
            seconds: [scored_for, drawing.elapsed().as_secs_f64()],
        })
    }

    /// Returns the step as it is to be decided now.
    async fn decided(&self, past: &Past, spec: &RunSpec, change: &Change) -> Result<Decided> {
        let (summary, phase) = (&past.summary, spec.phases[0].clone());
        let mut decided = decided(past, phase);
        decided.mode = change.mode(summary.mode());
        let (candidates, asked) = (&past.super_batch.candidates, &decided.phase.score_columns);
        // What was reported by now: what was known then is in receipts, of some rows only.
        let losses = Losses::new(past.run.clone());
        let (scores, manifest) = (&self.scores, &past.manifest);
        decided.columns = columns::read(scores, &losses, manifest, candidates, asked).await?;
        Ok(decided)
    }

    /// Draws as the step itself is drawn.
    async fn drawn(
        &self,
        past: &Past,
        spec: &RunSpec,
        decided: &mut Decided,
        needs: Asked,
        [learner, reference]: [&Option<Scored>; 2],
    ) -> Result<SelectResponse> {
        let [learner, reference] = [(learner, needs.learner), (reference, needs.reference)]
            .map(|(scored, needed)| scored.clone().filter(|_| needed));
        let (mut begin, _) = asking(
            spec,
            &past.super_batch,
            decided,
            learner.as_ref(),
            reference.as_ref(),
        )?;
        if !Asked::by(&decided.phase).asks_no_model() {
            let drawn = self.selector.select(begin, learner, reference).await;
            return drawn.map_err(|error| error.about(format!("step {}", decided.step)));
        }
        // Such a step orders all candidates and finds holes as it reads.
        let holes: HashSet<u32> = decided.holes.iter().map(|hole| hole.candidate).collect();
        begin.holes.clone_from(&decided.columns.left_out);
        begin.sub_batch_size = (begin.positions.len() - begin.holes.len()) as u32;
        let order = self.selector.select(begin, None, None).await?;
        let wanted = decided.phase.sub_batch_size as usize;
        let Some(indices) = served(&order.indices, wanted, &holes) else {
            let message = format!(
                "of {} candidates fewer than {wanted} can be used; give a smaller sub-batch",
                order.indices.len()
            );
            return Err(Error::new(Reason::TooManyBadRows, message));
        };
        decided.drawn_of(&order, indices);
        Ok(std::mem::take(&mut decided.drawn))
    }
}

/// Returns the models that the draw reads: those of the mode to which the step was degraded, if it
/// was.
fn needs(decided: &Decided) -> Asked {
    let phase = &decided.phase;
    let (policy, criterion) = match decided.mode {
        Mode::Uniform => (Policy::Uniform, phase.criterion()),
        Mode::ReferenceOnly => (phase.policy(), Criterion::Easy),
        _ => (phase.policy(), phase.criterion()),
    };
    Asked::by_draw(policy, criterion, phase.tuning.as_ref())
}

/// Returns the criterion by which both sub-batches are measured: the draw's, else the step's, else
/// learnability, of those whose models are available.
fn measured_by(decided: &Decided, past: &Past, weights: &Weights) -> Option<Criterion> {
    let of_draw = (decided.phase.policy(), decided.phase.criterion());
    let of_step = (past.summary.policy(), past.summary.criterion());
    let scored = [of_draw, of_step]
        .into_iter()
        .filter(|(policy, _)| is_scored(*policy));
    let mut asked = scored
        .map(|(_, criterion)| criterion)
        .chain([Criterion::Learnability]);
    asked.find(|criterion| can_measure(*criterion, weights.kept(), past.has_reference()))
}

impl Measurement {
    /// Judges the candidates, and measures both sub-batches.
    fn judge_and_measure(
        self,
        sets: &[Vec<u32>; 2],
    ) -> (Option<Judged>, Result<(Option<Measured>, f64)>) {
        let Some(begin) = self.measure else {
            return (None, Ok((None, 0.0)));
        };
        let pair =
            [&self.learner, &self.reference].map(|scored| scored.as_ref().map(|s| &s.embedded));
        let [learner, reference] = pair;
        let judged = judge(&begin, learner, reference);
        let score = |set: &[u32]| score_of(&begin, pair, set);
        let measured = score(&sets[0]).and_then(|(chosen, first)| {
            let (redrawn, second) = score(&sets[1])?;
            let measured = Measured {
                criterion: begin.criterion(),
                chosen,
                redrawn,
                uniform: judged.as_ref().and_then(|judged| judged.uniform_score),
            };
            let spent = judged.as_ref().map_or(0.0, |judged| judged.flops);
            Ok((Some(measured), first + second + spent))
        });
        (judged, measured)
    }
}

fn spent_on(scored: &Option<Scored>) -> f64 {
    scored.as_ref().map_or(0.0, |scored| scored.flops)
}

fn shared(drawn: &[u32], chosen: &HashSet<u32>) -> usize {
    drawn.iter().filter(|n| chosen.contains(n)).count()
}

/// Returns why there is no measure.
fn unmeasured(measured: Option<&Measured>, weights: &Weights, past: &Past) -> Option<String> {
    if measured.is_some() {
        return None;
    }
    let why = weights.missing().map(str::to_owned);
    Some(why.unwrap_or_else(|| format!("{}; learnability needs one", past.no_reference())))
}

fn rows(
    past: &Past,
    drawn: &SelectResponse,
    judged: Option<&Judged>,
    chosen: &HashSet<u32>,
) -> Vec<Row> {
    let chunks = drawn.chunks.iter().zip(0_u32..);
    let chunks = chunks.flat_map(|(size, chunk)| std::iter::repeat_n(chunk, *size as usize));
    let row = |(place, (number, chunk)): (usize, (&u32, u32))| {
        let candidate = &past.super_batch.candidates[*number as usize];
        let (id, row) = row_id(&past.manifest, candidate);
        Row {
            id,
            source: candidate.source,
            shard: candidate.shard,
            row,
            position: candidate.position,
            chunk,
            score: drawn.scores[place],
            weight: drawn.weights[place],
            own_score: judged.map(|judged| judged.own[*number as usize]),
            was_chosen: chosen.contains(number),
        }
    };
    drawn
        .indices
        .iter()
        .zip(chunks)
        .enumerate()
        .map(row)
        .collect()
}

/// Returns the largest difference of a loss from that of the receipt.
fn drift(past: &Past, was: &[u32], judged: &Judged) -> Option<f64> {
    let of_row = |(row, number): (&superbatch_proto::v1::ChosenRow, &u32)| {
        let pairs = [row.learner_loss, row.reference_loss].into_iter();
        let differences = pairs
            .zip(&judged.losses)
            .filter_map(|(then, now)| Some((then? - now.as_ref()?.get(*number as usize)?).abs()));
        differences.collect::<Vec<f64>>()
    };
    let all = past.receipt.chosen.iter().zip(was).flat_map(of_row);
    all.reduce(f64::max)
}
