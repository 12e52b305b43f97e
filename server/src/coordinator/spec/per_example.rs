//! The loss per example, which has no pairs: refuses what such a loss cannot do.
use super::{Asked, impossible, tuning};
use crate::{error::Result, selection};
use superbatch_kernels as kernels;
use superbatch_proto::{
    reflect::Word,
    v1::{EmbeddingDtype, Fidelity, Loss, Phase, Policy, RunSpec, Source},
};

/// Returns the default dtype of embeddings. A loss is one: rounded to f16, it would have three
/// digits, and a difference of two losses fewer.
pub(super) fn embedding_dtype(loss: Loss) -> EmbeddingDtype {
    match loss {
        Loss::PerExample => EmbeddingDtype::F32,
        _ => EmbeddingDtype::F16,
    }
}

/// Refuses a spec that asks of a loss per example what needs pairs or embeddings, and one that
/// names targets for another loss.
pub(super) fn check(spec: &RunSpec) -> Result<()> {
    for (i, source) in spec.sources.iter().enumerate() {
        targets(&format!("sources[{i}]"), source, spec.loss())?;
    }
    for (i, phase) in spec.phases.iter().enumerate() {
        token_share(&format!("phases[{i}].token_share"), spec.loss(), phase)?;
    }
    if spec.loss() != Loss::PerExample {
        return Ok(());
    }
    alike(&spec.sources)?;
    if spec.embedding_dtype() != EmbeddingDtype::F32 {
        let message = "losses are not rounded under the loss per_example; leave embedding_dtype \
                       out, or make it f32";
        return Err(impossible("embedding_dtype", message));
    }
    for (i, phase) in spec.phases.iter().enumerate() {
        let at = format!("phases[{i}]");
        drawn(&at, spec, phase)?;
        fidelity(&at, phase)?;
    }
    Ok(())
}

/// Refuses a draw by what a loss per example does not have. `at` is the path of the phase.
pub(super) fn drawn(at: &str, spec: &RunSpec, phase: &Phase) -> Result<()> {
    if spec.loss() != Loss::PerExample {
        return Ok(());
    }
    let (policy, word) = (phase.policy(), phase.policy().word());
    if selection::policy(policy).is_some_and(kernels::Policy::is_conditional) {
        let message = format!(
            "the loss per_example has no pairs, so that {word} has nothing joint to draw by \
             (without pairs it is independent at a lower temperature); use independent, top_k, \
             rank, proportional or uniform"
        );
        return Err(impossible(&format!("{at}.policy"), message));
    }
    if policy == Policy::KCenter {
        let message = "k_center spreads embeddings out, and models of the loss per_example give \
                       none; use independent, top_k, rank, proportional or uniform";
        return Err(impossible(&format!("{at}.policy"), message));
    }
    if tuning::leaves_out(phase.tuning.as_ref()) {
        let message = "clip_score_at_least, neg_clip_loss_keep and duplicates_above compare \
                       embeddings, and models of the loss per_example give none; leave them out \
                       (score_columns can leave candidates out)";
        return Err(impossible(&format!("{at}.tuning"), message));
    }
    Ok(())
}

/// Returns whether a phase chooses tokens.
pub fn has_masks(phases: &[Phase]) -> bool {
    phases.iter().any(|phase| phase.token_share.is_some())
}

/// Refuses masks in phases that are added to those that a run was opened with, if none of these has
/// masks: batches have a column for them or not, from the first step to the last.
pub(super) fn appended(opened: &[Phase], all: &[Phase]) -> Result<()> {
    let first = all.iter().position(|phase| phase.token_share.is_some());
    let Some(i) = first.filter(|_| !has_masks(opened)) else {
        return Ok(());
    };
    let message = "the run's batches have no column for masks, since no phase that it was opened \
                   with has a token_share; open another run (fork_of goes on from this one)";
    Err(impossible(&format!("phases[{i}].token_share"), message))
}

fn token_share(field: &str, loss: Loss, phase: &Phase) -> Result<()> {
    let Some(share) = phase.token_share else {
        return Ok(());
    };
    if !(share > 0.0 && share <= 1.0) {
        let message = format!("{share} is no share of tokens; it is above 0 and at most 1");
        return Err(impossible(field, message));
    }
    if loss != Loss::PerExample {
        let message = "tokens are chosen by their losses, which models of the loss per_example \
                       give; leave it out";
        return Err(impossible(field, message));
    }
    let asked = Asked::by(phase);
    if asked.learner && asked.reference_losses {
        return Ok(());
    }
    let (policy, criterion) = (phase.policy().word(), phase.criterion().word());
    let message = format!(
        "tokens are chosen by the learner's loss less the reference's, and ({policy}, \
         {criterion}) does not ask both; use the criterion learnability and a policy that draws \
         by scores, such as top_k (with a sub_batch_size of nearly super_batch_size it takes \
         nearly all rows)"
    );
    Err(impossible(field, message))
}

fn fidelity(at: &str, phase: &Phase) -> Result<()> {
    let asked = [
        ("fidelity", phase.fidelity() == Fidelity::Approximate),
        ("multi_resolution", phase.multi_resolution.is_some()),
        ("probe", phase.probe.is_some()),
        ("approximation", phase.approximation.is_some()),
    ];
    let Some((field, _)) = asked.into_iter().find(|(_, is_asked)| *is_asked) else {
        return Ok(());
    };
    let message = "models of the loss per_example are exported modules, which are run at full \
                   fidelity only; leave it out";
    Err(impossible(&format!("{at}.{field}"), message))
}

fn targets(at: &str, source: &Source, loss: Loss) -> Result<()> {
    let field = |name: &str| format!("{at}.{name}");
    let (target, text) = (&source.target_column, &source.text_column);
    if loss != Loss::PerExample {
        let named = [("target_column", target), ("text_column", text)];
        let Some((name, _)) = named.into_iter().find(|(_, column)| !column.is_empty()) else {
            return Ok(());
        };
        let message = "only models of the loss per_example read it; set loss to per_example, or \
                       name the texts with caption_column";
        return Err(impossible(&field(name), message));
    }
    if target.is_empty() {
        let message = "the loss per_example is that of an example and its target; name the column \
                       of the targets: integers (classes) or texts";
        return Err(impossible(&field("target_column"), message));
    }
    if !source.caption_column.is_empty() || source.caption_seed.is_some() {
        let message = "the loss per_example reads target_column in the place of captions; leave \
                       caption_column and caption_seed out";
        return Err(impossible(&field("caption_column"), message));
    }
    if text.is_empty() {
        return same(&field("target_column"), target, &source.image_column);
    }
    if !source.image_column.is_empty() || !source.image_root.is_empty() {
        let message = "a source has images or texts; leave image_column and image_root out, or \
                       text_column";
        return Err(impossible(&field("text_column"), message));
    }
    Ok(())
}

/// Refuses sources of texts beside sources of images: no model reads both, and a run without models
/// would check texts as images.
fn alike(sources: &[Source]) -> Result<()> {
    let is_text = |source: &Source| !source.text_column.is_empty();
    let first = sources.first().is_some_and(is_text);
    let Some(i) = sources.iter().position(|source| is_text(source) != first) else {
        return Ok(());
    };
    let message = "a run reads images or texts; name text_column in all sources, or in none";
    Err(impossible(&format!("sources[{i}].text_column"), message))
}

fn same(field: &str, target: &str, image: &str) -> Result<()> {
    if target != image {
        return Ok(());
    }
    let message = format!("'{target}' cannot be both image and target");
    Err(impossible(field, message))
}

#[cfg(test)]
mod tests;
