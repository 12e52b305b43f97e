//! The errors of a selection's inputs.
use crate::{
    cuda::error::CudaError,
    types::{Criterion, LeftOut, Policy, UnknownWord},
};

/// Why a selection was refused. Nothing is drawn when one of these is returned.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// The sub-batch is larger than the number of candidates that are not holes.
    #[error(
        "cannot draw a sub-batch of {sub_batch_size}: of {candidates} candidates {holes} are \
        holes; ask for fewer or offer more"
    )]
    TooFewCandidates {
        sub_batch_size: usize,
        candidates: usize,
        holes: usize,
    },
    /// There were enough candidates before [`Tuning`](crate::Tuning) left some out.
    #[error(
        "cannot draw a sub-batch of {sub_batch_size}: of {candidates} candidates {holes} are \
        holes, and {} were left out \
         (clip_score_at_least {}, neg_clip_loss_keep {}, duplicates_above {}); loosen the \
         threshold, or enlarge the super-batch",
        left_out.total(), left_out.clip_score_at_least, left_out.neg_clip_loss_keep,
            left_out.duplicates_above
    )]
    TooManyLeftOut {
        sub_batch_size: usize,
        candidates: usize,
        holes: usize,
        left_out: LeftOut,
    },
    /// A setting outside its range.
    #[error("{setting} is {value}: it must be {must}")]
    SettingInvalid {
        setting: &'static str,
        value: String,
        must: &'static str,
    },
    /// A number that was given, and that the policy does not read.
    #[error("{setting} belongs to policy {reader}, and the policy is {policy}; leave it out")]
    NumberUnread {
        setting: &'static str,
        reader: Policy,
        policy: Policy,
    },
    /// A word that names no policy, loss, criterion or backend.
    #[error(transparent)]
    UnknownWord(#[from] UnknownWord),
    /// The criterion compares with a model whose embeddings were not given.
    #[error("the {criterion} criterion needs the {model}'s embeddings, and there are none")]
    ModelMissing {
        criterion: Criterion,
        model: &'static str,
    },
    /// An array's length is not candidates x dim.
    #[error(
        "the {model}'s {tower} embeddings hold {found} values: {candidates} candidates of dim \
        {dim} need {expected}"
    )]
    ShapeMismatch {
        model: &'static str,
        tower: &'static str,
        found: usize,
        candidates: usize,
        dim: usize,
        expected: usize,
    },
    /// A NaN or an infinity in the embedding of a candidate that is not a hole.
    #[error(
        "the {model}'s {tower} embedding of candidate {row} is not finite: make the candidate a \
        hole, or mend it"
    )]
    NotFinite {
        model: &'static str,
        tower: &'static str,
        row: usize,
    },
    /// Finite embeddings whose score overflowed: they are far from L2-normalised, or the scale is
    /// absurd.
    #[error("the score of candidate {row} is not finite: are the embeddings L2-normalised?")]
    ScoreNotFinite { row: usize },
    /// The index of a hole is not the index of a candidate.
    #[error("hole {hole} is out of range: there are {candidates} candidates")]
    HoleOutOfRange { hole: usize, candidates: usize },
    /// A given noise array, or the keys of seeded noise, of the wrong length.
    #[error(
        "the noise holds {found} values: {draws} draws from {candidates} candidates need {expected}"
    )]
    NoiseShape {
        found: usize,
        draws: usize,
        candidates: usize,
        expected: usize,
    },
    /// A CUDA device failed, or lacks memory.
    #[error("a CUDA device failed while selecting")]
    Cuda(#[from] CudaError),
    /// LibTorch failed, for example for lack of device memory.
    #[cfg(feature = "torch")]
    #[error("LibTorch failed while selecting")]
    Torch(#[from] tch::TchError),
}

/// The result of a selection.
pub type Result<T, E = Error> = std::result::Result<T, E>;
