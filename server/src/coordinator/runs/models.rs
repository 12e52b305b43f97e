//! The models of a run as `ModelRef`s for workers, and the checks of what workers report about
//! them.
pub use super::verifier::shape;
use crate::{
    bounds::MASKED_TOKENS_MAX,
    coordinator::{
        facts::run::ModelFact,
        score::scored::{Scored, other_file},
        spec::{Asked, scores_at},
        weights::Published,
    },
    error::{Error, Result},
    fidelity::Fidelity,
    selection::{
        LOSSES_OF_IMAGES, LOSSES_OF_TEXTS, TOKEN_LOSSES_OF_IMAGES, TOKEN_LOSSES_OF_TEXTS,
        tokens::tokens_of,
    },
};
use superbatch_proto::v1::{
    Fallback, LearnerSpec, Loss, ModelRef, Reason, ReferenceSpec, RunSpec, Source,
    learner_spec::Initial,
};

/// Returns the reference of a run.
pub fn reference_ref(
    spec: &RunSpec,
    reference: &ReferenceSpec,
    fact: Option<&ModelFact>,
) -> ModelRef {
    ModelRef {
        model_uri: reference.model_uri.clone(),
        snapshot_uri: String::new(),
        snapshot_digest: fact.map_or_else(String::new, |f| f.weights_digest.clone()),
        random_seed: None,
        compute_dtype: spec.compute_dtype,
    }
}

/// Returns the learner of a run before any push: version 0.
pub fn initial_ref(spec: &RunSpec, learner: &LearnerSpec, fact: Option<&ModelFact>) -> ModelRef {
    let (snapshot_uri, random_seed) = match &learner.initial {
        Some(Initial::SnapshotUri(uri)) if *uri != learner.model_uri => (uri.clone(), None),
        Some(Initial::SnapshotUri(_)) => (String::new(), None),
        Some(Initial::RandomSeed(seed)) => (String::new(), Some(*seed)),
        // Only its shape is needed: the weights come with the first push.
        Some(Initial::FirstPush(_)) | None => (String::new(), Some(0)),
    };
    ModelRef {
        model_uri: learner.model_uri.clone(),
        snapshot_uri,
        snapshot_digest: fact
            .filter(|_| random_seed.is_none())
            .map_or_else(String::new, |f| f.weights_digest.clone()),
        random_seed,
        compute_dtype: spec.compute_dtype,
    }
}

/// Returns the learner with a published version of its weights.
pub fn published_ref(
    spec: &RunSpec,
    learner: &LearnerSpec,
    published: &Published,
    fact: Option<&ModelFact>,
) -> ModelRef {
    if published.version.version == 0 {
        return initial_ref(spec, learner, fact);
    }
    ModelRef {
        model_uri: learner.model_uri.clone(),
        snapshot_uri: published.snapshot_uri.clone(),
        snapshot_digest: published.version.digest.clone(),
        random_seed: None,
        compute_dtype: spec.compute_dtype,
    }
}

/// Checks that every phase of `spec` that scores by the sigmoid loss finds a bias in each model
/// that it asks.
///
/// # Errors
/// `BiasMissing`.
pub fn check_biases(
    spec: &RunSpec,
    reference: Option<&ModelFact>,
    learner: Option<&ModelFact>,
) -> Result<()> {
    if spec.loss() != Loss::Sigmoid {
        return Ok(());
    }
    let any = |asks: fn(Asked) -> bool| spec.phases.iter().any(|phase| asks(Asked::by(phase)));
    let asks_learner = any(|asked| asked.learner);
    // A phase that needs only the learner also needs the reference if it may fall back to it.
    let degrades = asks_learner && spec.fallback() == Fallback::ReferenceOnly;
    let asks_reference = any(|asked| asked.reference_losses) || degrades;
    if let (Some(fact), Some(asked)) = (reference.filter(|_| asks_reference), &spec.reference) {
        sigmoid_bias(fact.logit_bias, asked.logit_bias, "reference")?;
    }
    if let (Some(fact), Some(asked)) = (learner.filter(|_| asks_learner), &spec.learner) {
        sigmoid_bias(fact.logit_bias, asked.logit_bias, "learner")?;
    }
    Ok(())
}

/// Checks that a model of this type gives what the run's loss is made of, and takes what its
/// sources hold.
///
/// # Errors
/// `RunSpecImpossible`, naming the field that should be another.
pub fn check_gives(spec: &RunSpec, model_type: &str, uri: &str) -> Result<()> {
    let of_images = [LOSSES_OF_IMAGES, TOKEN_LOSSES_OF_IMAGES].contains(&model_type);
    let of_texts = [LOSSES_OF_TEXTS, TOKEN_LOSSES_OF_TEXTS].contains(&model_type);
    let gives_losses = of_images || of_texts;
    let other = |source: &Source| source.text_column.is_empty() != of_images;
    let (field, message) = match (spec.loss(), gives_losses) {
        (Loss::PerExample, false) => (
            "loss".to_owned(),
            format!(
                "{uri} is a dual encoder ({model_type}), which gives embeddings of pairs; the loss \
                 per_example needs an exported module with loss_per_example (docs/models.md)"
            ),
        ),
        (Loss::PerExample, true) => match spec.sources.iter().position(other) {
            None => return Ok(()),
            Some(i) if of_images => (
                format!("sources[{i}].text_column"),
                format!("{uri} reads images; leave text_column out"),
            ),
            Some(i) => (
                format!("sources[{i}].text_column"),
                format!("{uri} reads texts; name their column with text_column"),
            ),
        },
        (_, true) => (
            "loss".to_owned(),
            format!("{uri} gives one loss an example; set loss to per_example"),
        ),
        (_, false) => return Ok(()),
    };
    Err(Error::new(Reason::RunSpecImpossible, message).with("field", field))
}

/// Checks that every approximation of `spec` fits the models that are to be run with it.
///
/// # Errors
/// `RunSpecImpossible`, naming the phase's field.
pub fn check_approximations(
    spec: &RunSpec,
    reference: Option<&ModelFact>,
    learner: Option<&ModelFact>,
) -> Result<()> {
    for (i, phase) in spec.phases.iter().enumerate() {
        let Ok(fidelity) = Fidelity::of(phase.approximation.as_ref()) else {
            continue;
        };
        let scores = scores_at(phase).is_some() || phase.probe.is_some();
        let asks_reference = scores && Asked::by(phase).reference;
        let asked = [
            ("learner", learner),
            ("reference", reference.filter(|_| asks_reference)),
        ];
        for (which, fact) in asked
            .into_iter()
            .filter_map(|(which, fact)| Some((which, fact?)))
        {
            let problem = match &fact.image_tower {
                None if fidelity == Fidelity::Full => continue,
                None => "was described by an older build; open another run".to_owned(),
                Some(tower) => match tower.refuses(fidelity) {
                    Some(problem) => problem,
                    None => continue,
                },
            };
            let field = format!("phases[{i}].approximation.{}", fidelity.field());
            let message = format!("{field} is {}, but the {which} {problem}", fidelity.value());
            return Err(Error::new(Reason::RunSpecImpossible, message).with("field", field));
        }
    }
    Ok(())
}

/// Checks that learner and reference of each phase that chooses tokens give a loss for each of the
/// same tokens, and no more of them than are chosen from at once.
///
/// # Errors
/// `RunSpecImpossible`, naming the phase's field.
pub fn check_tokens(
    spec: &RunSpec,
    reference: Option<&ModelFact>,
    learner: Option<&ModelFact>,
) -> Result<()> {
    let phases = spec.phases.iter().enumerate();
    for (i, phase) in phases.filter(|(_, phase)| phase.token_share.is_some()) {
        let reference = match phase.reference_step {
            Some(_) => learner,
            None => reference,
        };
        let (Some(learner), Some(reference)) = (learner, reference) else {
            continue;
        };
        if let Some(problem) = other_tokens(learner, reference) {
            let field = format!("phases[{i}].token_share");
            let message = format!("{field}: {problem} (docs/models.md)");
            return Err(Error::new(Reason::RunSpecImpossible, message).with("field", field));
        }
        check_count_of_tokens(i, phase.sub_batch_size, tokens(learner))?;
    }
    Ok(())
}

fn check_count_of_tokens(i: usize, rows: u32, tokens: usize) -> Result<()> {
    let count = u64::from(rows) * tokens as u64;
    if count <= MASKED_TOKENS_MAX {
        return Ok(());
    }
    let field = format!("phases[{i}].sub_batch_size");
    let message = format!(
        "{field} {rows} of {tokens} tokens each makes {count} tokens, of which a share is to be \
         trained (token_share); at most {MASKED_TOKENS_MAX} are chosen from at once. Make \
         sub_batch_size smaller"
    );
    Err(Error::new(Reason::RunSpecImpossible, message).with("field", field))
}

/// Returns how many losses of tokens a model gives of a row.
fn tokens(model: &ModelFact) -> usize {
    tokens_of(model.embedding_dim().unwrap_or_default() as usize)
}

fn other_tokens(learner: &ModelFact, reference: &ModelFact) -> Option<String> {
    let none = |which: &str| {
        format!(
            "the {which} gives one loss an example, none for each token; export it with \
             per_token"
        )
    };
    let tokenizer = |fact: &ModelFact| fact.files.get("tokenizer.json").cloned();
    match [learner, reference].map(tokens) {
        [0, _] => Some(none("learner")),
        [_, 0] => Some(none("reference")),
        [learner, reference] if learner != reference => Some(format!(
            "the learner gives losses of {learner} tokens and the reference of {reference}; export \
             them alike"
        )),
        _ if tokenizer(learner) != tokenizer(reference) => {
            Some("tokenizer.json of learner and reference differ; export them alike".to_owned())
        }
        _ => None,
    }
}

/// Checks that workers scored with the model that the run was opened with; of a learner that was
/// pushed (`is_pushed`), with all but its weights.
///
/// # Errors
/// `ModelInvalid`, naming the `file` that differs.
pub fn check_unchanged(
    opened_with: Option<&ModelFact>,
    scored: &Scored,
    is_pushed: bool,
    which: &str,
) -> Result<()> {
    let Some(fact) = opened_with else {
        return Ok(());
    };
    let other = other_file(&fact.files, &scored.files);
    let what = match other {
        Some(file) => file,
        None if is_pushed || fact.digest == scored.digest => return Ok(()),
        // Runs of older builds did not store the folder's files one by one, so the changed one is
        // unknown.
        None if fact.files.is_empty() => "a file",
        None => "the weights file",
    };
    let message = format!(
        "{what} of the {which} is not the one that the run was opened with (the model's digest is \
        {}, it was {}); put that file \
         back and start the workers anew, or open another run",
        scored.digest, fact.digest
    );
    let error = Error::new(Reason::ModelInvalid, message).with("model", which);
    Err(match other {
        Some(file) => error.with("file", file),
        None => error,
    })
}

/// Returns the bias for the sigmoid loss: the model's own, or the one that the spec gives.
///
/// # Errors
/// `BiasMissing`.
pub fn sigmoid_bias(own: Option<f64>, given: Option<f64>, which: &str) -> Result<f64> {
    own.or(given).ok_or_else(|| {
        let message = format!(
            "the {which} has no logit bias, and the sigmoid loss needs one: give \
            {which}.logit_bias, or use the softmax loss"
        );
        Error::new(Reason::BiasMissing, message).with("field", format!("{which}.logit_bias"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::{Phase, PrepareModelResponse};

    #[test]
    fn tokens_are_chosen_by_losses_of_the_same_tokens() {
        let model = |embedding_dim, tokenizer: &str| {
            let files = [("tokenizer.json".to_owned(), tokenizer.to_owned())];
            ModelFact::from(PrepareModelResponse {
                embedding_dim,
                files: files.into(),
                ..Default::default()
            })
        };
        let spec = |token_share, reference_step| RunSpec {
            phases: vec![Phase {
                token_share,
                reference_step,
                ..Default::default()
            }],
            ..Default::default()
        };
        let (asked, own) = (spec(Some(0.5), None), spec(Some(0.5), Some(3)));
        let (eight, bare) = (model(10, "a"), model(2, "a"));
        check_tokens(&asked, Some(&eight), Some(&eight)).unwrap();
        check_tokens(&spec(None, None), Some(&bare), Some(&eight)).unwrap();
        // The reference of this phase is the learner.
        check_tokens(&own, None, Some(&eight)).unwrap();
        check_tokens(&own, Some(&bare), Some(&eight)).unwrap();
        for (spec, reference, learner, says) in [
            (&asked, &bare, &eight, "the reference gives one loss"),
            (&asked, &eight, &bare, "the learner gives one loss"),
            (
                &asked,
                &model(9, "a"),
                &eight,
                "8 tokens and the reference of 7",
            ),
            (&asked, &model(10, "b"), &eight, "tokenizer.json"),
            (&own, &eight, &bare, "the learner gives one loss"),
        ] {
            let error = check_tokens(spec, Some(reference), Some(learner)).unwrap_err();
            assert_eq!(error.reason(), Reason::RunSpecImpossible);
            assert_eq!(error.value("field"), Some("phases[0].token_share"));
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn no_more_tokens_are_chosen_from_than_there_is_room_for() {
        let model = ModelFact::from(PrepareModelResponse {
            embedding_dim: 2 + 1024,
            ..Default::default()
        });
        let check = |token_share, sub_batch_size| {
            let phase = Phase {
                token_share,
                sub_batch_size,
                ..Default::default()
            };
            let spec = RunSpec {
                phases: vec![phase],
                ..Default::default()
            };
            check_tokens(&spec, Some(&model), Some(&model))
        };
        check(Some(0.5), 1 << 14).unwrap();
        check(None, 1 << 15).unwrap();
        let error = check(Some(0.5), (1 << 14) + 1).unwrap_err();
        assert_eq!(error.reason(), Reason::RunSpecImpossible);
        assert_eq!(error.value("field"), Some("phases[0].sub_batch_size"));
        assert!(
            error.to_string().contains("16385 of 1024 tokens"),
            "{error}"
        );
    }

    #[test]
    fn a_model_gives_what_the_loss_is_made_of() {
        let spec = |loss: Loss, text: &str| RunSpec {
            loss: loss.into(),
            sources: vec![Source {
                text_column: text.to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let per_example = Loss::PerExample;
        for (spec, model_type) in [
            (spec(per_example, ""), LOSSES_OF_IMAGES),
            (spec(per_example, "text"), LOSSES_OF_TEXTS),
            (spec(per_example, ""), TOKEN_LOSSES_OF_IMAGES),
            (spec(per_example, "text"), TOKEN_LOSSES_OF_TEXTS),
            (spec(Loss::Sigmoid, ""), "siglip"),
            (spec(Loss::Softmax, ""), "exported"),
        ] {
            check_gives(&spec, model_type, "memory:///m").unwrap();
        }
        let column = "sources[0].text_column";
        for (spec, model_type, field) in [
            (spec(per_example, ""), "exported", "loss"),
            (spec(Loss::Sigmoid, ""), LOSSES_OF_IMAGES, "loss"),
            (spec(Loss::Softmax, ""), LOSSES_OF_TEXTS, "loss"),
            (spec(per_example, "text"), LOSSES_OF_IMAGES, column),
            (spec(per_example, ""), LOSSES_OF_TEXTS, column),
            (spec(Loss::Sigmoid, ""), TOKEN_LOSSES_OF_IMAGES, "loss"),
            (spec(per_example, "text"), TOKEN_LOSSES_OF_IMAGES, column),
            (spec(per_example, ""), TOKEN_LOSSES_OF_TEXTS, column),
        ] {
            let error = check_gives(&spec, model_type, "memory:///m").unwrap_err();
            assert_eq!(error.reason(), Reason::RunSpecImpossible);
            assert_eq!(error.value("field"), Some(field), "{error}");
        }
    }
}
