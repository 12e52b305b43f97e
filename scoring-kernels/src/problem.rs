//! A selection with checked inputs, in the form that every engine uses.
use crate::{
    error::{Error, Result},
    noise::Noise,
    types::{Candidates, Loss, ModelEmbeddings, Policy, Rows, Settings, Tuning},
};
use rayon::prelude::*;

/// Signed loss of one model: a score is the sum of `sign x loss` over the criterion's models.
pub(crate) struct SignedModel<'a> {
    pub sign: f64,
    pub embeddings: ModelEmbeddings<'a>,
    /// By candidate, the cosine of its own pair; 0 for holes.
    pub cosines: Vec<f64>,
}

pub(crate) struct Problem<'a> {
    /// B.
    pub count: usize,
    /// One or two; none under the uniform policy without embeddings.
    pub models: Vec<SignedModel<'a>>,
    pub policy: Policy,
    pub tuning: Tuning,
    pub loss: Loss,
    /// 1 for the sigmoid loss: scaling its scores undoes the method.
    pub gain: f64,
    /// All candidates that are neither holes nor left out, rising.
    pub offered: Vec<u32>,
    /// The number of examples of each draw.
    pub chunks: Vec<usize>,
    /// K-center: the model whose image embeddings are spread out.
    pub spread: Option<ModelEmbeddings<'a>>,
    /// By candidate: added to its score.
    pub terms: Option<&'a [f64]>,
}

impl<'a> Problem<'a> {
    pub(crate) fn new(
        candidates: &Candidates<'a>,
        settings: &Settings,
        tuning: &Tuning,
        terms: Option<&'a [f64]>,
        noise: &Noise<'_>,
    ) -> Result<Self> {
        check_settings(candidates, settings)?;
        tuning.check()?;
        settings.policy.check_criterion(settings.criterion)?;
        let offered = offered(candidates)?;
        enough(settings.sub_batch_size, candidates.count, &offered)?;
        let chunks = if settings.policy.goes_by_chunks() {
            chunk_sizes(settings.sub_batch_size, settings.n_chunks)
        } else {
            vec![settings.sub_batch_size]
        };
        noise.check(settings.noisy_draws(), candidates.count)?;
        let bare = candidates.learner.is_none() && candidates.reference.is_none();
        let models = match terms {
            Some(_) if bare => Vec::new(),
            _ => models(candidates, settings, &offered)?,
        };
        check_terms(terms, candidates.count, &offered)?;
        let spread = match settings.policy {
            Policy::KCenter => {
                let chosen = candidates.reference.or(candidates.learner);
                let missing = Error::ModelMissing {
                    criterion: settings.criterion,
                    model: "reference",
                };
                let chosen = chosen.ok_or(missing)?;
                let name = if candidates.reference.is_some() {
                    "reference"
                } else {
                    "learner"
                };
                check_model(name, &chosen, candidates.count, &offered)?;
                Some(chosen)
            }
            _ => None,
        };
        let gain = if settings.loss == Loss::Softmax {
            settings.gain
        } else {
            1.0
        };
        Ok(Self {
            count: candidates.count,
            models,
            policy: settings.policy,
            tuning: tuning.clone(),
            loss: settings.loss,
            gain,
            offered,
            chunks,
            spread,
            terms,
        })
    }

    /// Makes the problem of one model's softmax loss.
    pub(crate) fn of_one(
        embeddings: ModelEmbeddings<'a>,
        cosines: Vec<f64>,
        offered: Vec<u32>,
    ) -> Self {
        Self {
            count: cosines.len(),
            models: vec![SignedModel {
                sign: 1.0,
                embeddings,
                cosines,
            }],
            policy: Policy::Joint,
            tuning: Tuning::default(),
            loss: Loss::Softmax,
            gain: 1.0,
            offered,
            chunks: Vec::new(),
            spread: None,
            terms: None,
        }
    }
}

fn enough(sub_batch_size: usize, candidates: usize, offered: &[u32]) -> Result<()> {
    let holes = candidates - offered.len();
    if sub_batch_size <= offered.len() {
        return Ok(());
    }
    Err(Error::TooFewCandidates {
        sub_batch_size,
        candidates,
        holes,
    })
}

/// Divides b into n parts: the first `b % n` get one more; no part is empty.
pub(crate) fn chunk_sizes(sub_batch_size: usize, n_chunks: usize) -> Vec<usize> {
    let parts = n_chunks.min(sub_batch_size);
    (0..parts)
        .map(|k| sub_batch_size / parts + usize::from(k < sub_batch_size % parts))
        .collect()
}

fn check_settings(candidates: &Candidates<'_>, settings: &Settings) -> Result<()> {
    let at_least_one = [
        ("sub_batch_size", settings.sub_batch_size),
        ("n_chunks", settings.n_chunks),
    ];
    if let Some((setting, _)) = at_least_one.into_iter().find(|(_, value)| *value == 0) {
        return Err(Error::SettingInvalid {
            setting,
            value: "0".into(),
            must: "at least 1",
        });
    }
    if u32::try_from(candidates.count).is_err() {
        let value = candidates.count.to_string();
        return Err(Error::SettingInvalid {
            setting: "count",
            value,
            must: "less than 2^32",
        });
    }
    finite("gain", settings.gain)
}

fn check_terms(terms: Option<&[f64]>, count: usize, offered: &[u32]) -> Result<()> {
    let Some(terms) = terms else { return Ok(()) };
    let bad = |value: String, must| {
        let setting = "terms";
        Err(Error::SettingInvalid {
            setting,
            value,
            must,
        })
    };
    if terms.len() != count {
        return bad(format!("{} numbers", terms.len()), "one number a candidate");
    }
    let not_finite = offered
        .iter()
        .map(|&index| terms[index as usize])
        .find(|term| !term.is_finite());
    not_finite.map_or(Ok(()), |term| bad(term.to_string(), "finite"))
}

fn finite(setting: &'static str, value: f64) -> Result<()> {
    check_at_least(setting, value, f64::NEG_INFINITY, "finite")
}

fn check_at_least(setting: &'static str, value: f64, least: f64, must: &'static str) -> Result<()> {
    if value.is_finite() && value > least {
        return Ok(());
    }
    Err(Error::SettingInvalid {
        setting,
        value: value.to_string(),
        must,
    })
}

fn offered(candidates: &Candidates<'_>) -> Result<Vec<u32>> {
    let mut open = vec![true; candidates.count];
    for &hole in candidates.holes {
        let slot = open.get_mut(hole as usize);
        *slot.ok_or(Error::HoleOutOfRange {
            hole: hole as usize,
            candidates: candidates.count,
        })? = false;
    }
    Ok((0..candidates.count as u32)
        .filter(|&index| open[index as usize])
        .collect())
}

fn models<'a>(
    candidates: &Candidates<'a>,
    settings: &Settings,
    offered: &[u32],
) -> Result<Vec<SignedModel<'a>>> {
    let wanted = [
        (
            "learner",
            1.0,
            settings.criterion.needs_learner(),
            candidates.learner,
        ),
        (
            "reference",
            -1.0,
            settings.criterion.needs_reference(),
            candidates.reference,
        ),
    ];
    let mut models = Vec::new();
    for (name, sign, needed, embeddings) in wanted {
        match embeddings {
            _ if !needed => {}
            Some(embeddings) => {
                let cosines = check_model(name, &embeddings, candidates.count, offered)?;
                models.push(SignedModel {
                    sign,
                    embeddings,
                    cosines,
                });
            }
            // These draws need no scores. They report scores if all embeddings are given.
            None if !settings.policy.is_scored() => return Ok(Vec::new()),
            None => {
                return Err(Error::ModelMissing {
                    criterion: settings.criterion,
                    model: name,
                });
            }
        }
    }
    Ok(models)
}

/// Checks a model's embeddings of the offered candidates. Returns their own cosines by index; 0 for
/// the others.
pub(crate) fn check_model(
    model: &'static str,
    embeddings: &ModelEmbeddings<'_>,
    count: usize,
    offered: &[u32],
) -> Result<Vec<f64>> {
    // A scale of 0 or below is mostly a logit scale before exp(). Selection with it would run and
    // mean nothing.
    check_at_least(
        "scale",
        embeddings.scale,
        0.0,
        "finite and above 0 (the temperature, already exponentiated)",
    )?;
    finite("bias", embeddings.bias)?;
    let dim = embeddings.dim;
    if dim == 0 {
        return Err(Error::SettingInvalid {
            setting: "dim",
            value: "0".into(),
            must: "at least 1",
        });
    }
    let towers = [("image", &embeddings.image), ("text", &embeddings.text)];
    if let Some((tower, rows)) = towers.iter().find(|(_, rows)| rows.len() != count * dim) {
        let (found, expected) = (rows.len(), count * dim);
        return Err(Error::ShapeMismatch {
            model,
            tower,
            found,
            candidates: count,
            dim,
            expected,
        });
    }
    let own: Vec<f64> = offered
        .par_iter()
        .with_min_len(64)
        .map(|&index| embeddings.own_cosine(index))
        .collect();
    // Every value of both rows is a factor of a term of this sum, so a sum that is finite proves
    // all of them finite. The rows are searched only if it is not.
    if let Some(&row) = offered
        .iter()
        .zip(&own)
        .find(|(_, cosine)| !cosine.is_finite())
        .map(|(row, _)| row)
    {
        let bad = |rows: &Rows<'_>| {
            offered
                .iter()
                .find(|&&row| !rows.row_is_finite(row as usize, dim))
        };
        let (tower, row) = towers
            .iter()
            .find_map(|(tower, rows)| Some((*tower, *bad(rows)?)))
            .unwrap_or(("text", row));
        return Err(Error::NotFinite {
            model,
            tower,
            row: row as usize,
        });
    }
    let mut cosines = vec![0.0; count];
    offered
        .iter()
        .zip(own)
        .for_each(|(&index, cosine)| cosines[index as usize] = cosine);
    Ok(cosines)
}
