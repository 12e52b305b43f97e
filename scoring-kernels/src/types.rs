//! The inputs and the result of a selection.
use half::{f16, slice::HalfFloatSliceExt};
use std::{fmt, str::FromStr};

/// A word that names no policy, loss or criterion.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is no {what}: use one of {valid}")]
pub struct UnknownWord {
    /// What the word should have named.
    pub what: &'static str,
    /// As it was given.
    pub word: String,
    /// All words that there are.
    pub valid: &'static str,
}

/// Defines an enum of words: `as_str`, `Display`, `FromStr`.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal,
        $valid:literal { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// All values, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Returns the word that names this value.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            /// Parses a word in upper or lower case, as a run's spec does.
            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                match word.to_ascii_lowercase().as_str() {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(UnknownWord { what: $what, word: word.to_owned(), valid: $valid }),
                }
            }
        }
    };
}

words! {
    /// How examples are drawn.
    Policy, "policy",
    "uniform, independent, joint, joint_top_k, top_k, rank, proportional, k_center" {
        /// From noise only: all candidates are equally likely.
        Uniform = "uniform",
        /// One draw from the unconditional scores, p ~ exp(score / temperature).
        Independent = "independent",
        /// Chunk by chunk, each from scores conditional on what was drawn before (Algorithm 1).
        #[default]
        Joint = "joint",
        /// As joint, but each chunk takes the largest conditional scores: no noise.
        JointTopK = "joint_top_k",
        /// The largest unconditional scores: no noise. With learnability it is RHO-LOSS's rule
        /// (Mindermann et al. 2022).
        TopK = "top_k",
        /// One draw with a probability that falls exponentially with the rank of the unconditional
        /// score (Loshchilov and Hutter 2015).
        Rank = "rank",
        /// One draw with p ~ score^priority_exponent, negative scores counting as 0, and importance
        /// weights (Schaul et al. 2015).
        Proportional = "proportional",
        /// Chunk by chunk the candidates whose image embeddings are farthest from all chosen
        /// before; the first chunk at random (greedy k-center, Sener and Savarese 2018).
        KCenter = "k_center",
    }
}

words! {
    /// The contrastive loss from which scores are made.
    Loss, "loss", "sigmoid, softmax" {
        /// SigLIP's: a sum over pairs, each judged alone. Needs the models' biases.
        #[default]
        Sigmoid = "sigmoid",
        /// CLIP's: a cross entropy in both directions. The bias cancels and is ignored.
        Softmax = "softmax",
    }
}

words! {
    /// The losses from which a score is made.
    Criterion, "criterion", "learnability, hard, easy" {
        /// Learner loss - reference loss: not yet learned, and learnable.
        #[default]
        Learnability = "learnability",
        /// Learner loss: also likes noise.
        Hard = "hard",
        /// - reference loss: likes what is clean, whatever the learner knows already.
        Easy = "easy",
    }
}

impl Criterion {
    /// Returns whether the learner's embeddings are needed.
    pub fn needs_learner(self) -> bool {
        self != Self::Easy
    }

    /// Returns whether the reference's embeddings are needed.
    pub fn needs_reference(self) -> bool {
        self != Self::Hard
    }
}

/// Row-major values of one tower, `[B, dim]`. Not bf16: its rounding changes one draw in six at a
/// scale of 100.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// Of 32 bits.
    F32(&'a [f32]),
    /// Of 16 bits; converted to 32 before use.
    F16(&'a [f16]),
}

impl Rows<'_> {
    /// Returns the number of values (not of rows).
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// Returns whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns values `start..start + buffer.len()` of row `index` of rows of `dim`, as f32.
    /// `buffer` is used only if the values must be converted.
    pub(crate) fn read<'b>(
        &'b self,
        index: usize,
        dim: usize,
        start: usize,
        buffer: &'b mut [f32],
    ) -> &'b [f32] {
        let begin = index * dim + start;
        let range = begin..begin + buffer.len();
        match self {
            Self::F32(values) => &values[range],
            Self::F16(values) => {
                values[range].convert_to_f32_slice(buffer);
                buffer
            }
        }
    }

    pub(crate) fn row_is_finite(&self, index: usize, dim: usize) -> bool {
        let range = index * dim..(index + 1) * dim;
        // The compiler vectorises a maximum over bit patterns, but not a loop with an early exit.
        match self {
            Self::F32(values) => {
                let worst = values[range]
                    .iter()
                    .fold(0, |worst, value| (value.to_bits() & 0x7fff_ffff).max(worst));
                worst < f32::INFINITY.to_bits()
            }
            Self::F16(values) => {
                let worst = values[range]
                    .iter()
                    .fold(0, |worst, value| (value.to_bits() & 0x7fff).max(worst));
                worst < f16::INFINITY.to_bits()
            }
        }
    }
}

/// One model's view of the candidates. Row i of both towers is candidate i; rows are L2-normalised.
#[derive(Clone, Copy, Debug)]
pub struct ModelEmbeddings<'a> {
    /// `[B, dim]`.
    pub image: Rows<'a>,
    /// `[B, dim]`.
    pub text: Rows<'a>,
    /// Width of a row. The two models may differ.
    pub dim: usize,
    /// logit = scale x cosine + bias: the temperature, already exponentiated, so above 0.
    pub scale: f64,
    /// In the sign of big_vision, open_clip and transformers: about -10 at initialisation. Ignored
    /// by the softmax loss.
    pub bias: f64,
}

impl ModelEmbeddings<'_> {
    /// Returns the cosine of a candidate's image and text, in f64. It is not finite if a value of
    /// either row is not finite.
    pub fn own_cosine(&self, index: u32) -> f64 {
        const STRETCH: usize = 128;
        let (mut image, mut text, mut lanes) = ([0f32; STRETCH], [0f32; STRETCH], [0f64; 8]);
        for start in (0..self.dim).step_by(STRETCH) {
            let end = STRETCH.min(self.dim - start);
            let image = self
                .image
                .read(index as usize, self.dim, start, &mut image[..end]);
            let text = self
                .text
                .read(index as usize, self.dim, start, &mut text[..end]);
            for (image, text) in image.chunks(8).zip(text.chunks(8)) {
                for ((lane, a), b) in lanes.iter_mut().zip(image).zip(text) {
                    *lane += f64::from(*a) * f64::from(*b);
                }
            }
        }
        lanes.iter().sum()
    }
}

/// The super-batch: B candidates, as one or two models see them.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// B.
    pub count: usize,
    /// May be absent for the easy criterion and the uniform policy.
    pub learner: Option<ModelEmbeddings<'a>>,
    /// May be absent for the hard criterion and the uniform policy.
    pub reference: Option<ModelEmbeddings<'a>>,
    /// Candidates that may not be chosen, in any order. Their embeddings are never read.
    pub holes: &'a [u32],
}

/// What to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How examples are drawn.
    pub policy: Policy,
    /// The loss that a candidate is scored by.
    pub loss: Loss,
    /// What makes an example worth drawing.
    pub criterion: Criterion,
    /// b: exactly this number is drawn.
    pub sub_batch_size: usize,
    /// Draws of the policies that go chunk by chunk. The first `b % n_chunks` draw one more; more
    /// chunks than b means b chunks of one.
    pub n_chunks: usize,
    /// Multiplies softmax scores, which unlike sigmoid scores do not grow with what is drawn.
    /// Ignored by the sigmoid loss.
    pub gain: f64,
}

impl Default for Settings {
    /// Joint, sigmoid, learnability, 16 chunks, gain 1; `sub_batch_size` is 0 and must be set.
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            loss: Loss::default(),
            criterion: Criterion::default(),
            sub_batch_size: 0,
            n_chunks: 16,
            gain: 1.0,
        }
    }
}

/// The numbers that only some policies read, and the rules that leave candidates out before any
/// policy draws.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// Independent: divides the scores. Towards 0 it is `top_k`, towards infinity `uniform`.
    pub temperature: f64,
    /// Rank: how many times as likely the first is as the last.
    pub pressure: f64,
    /// Proportional: alpha. 0 is uniform.
    pub priority_exponent: f64,
    /// Proportional: beta. 1 corrects the whole bias of the draw, 0 nothing.
    pub weight_exponent: f64,
    /// Of images whose cosine is above this, all but one are left out.
    pub duplicates_above: Option<f64>,
    /// Candidates whose CLIPScore (2.5 x cosine of image and text, at least 0) is below this are
    /// left out.
    pub clip_score_at_least: Option<f64>,
    /// The share of the candidates that is kept, those of the largest negCLIPLoss; at least one
    /// candidate.
    pub neg_clip_loss_keep: Option<f64>,
}

impl Default for Tuning {
    /// Temperature 1, pressure 100, alpha 0.6, beta 0.4, no candidate left out.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            pressure: 100.0,
            priority_exponent: 0.6,
            weight_exponent: 0.4,
            duplicates_above: None,
            clip_score_at_least: None,
            neg_clip_loss_keep: None,
        }
    }
}

impl Tuning {
    /// Returns whether a rule leaves candidates out. Such rules read embeddings, also under a
    /// policy that needs none.
    pub fn leaves_out(&self) -> bool {
        [
            self.duplicates_above,
            self.clip_score_at_least,
            self.neg_clip_loss_keep,
        ]
        .iter()
        .any(Option::is_some)
    }
}

/// How many candidates each rule of [`Tuning`] left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Left out by [`Tuning::clip_score_at_least`].
    pub clip_score_at_least: usize,
    /// Left out by [`Tuning::neg_clip_loss_keep`].
    pub neg_clip_loss_keep: usize,
    /// Left out by [`Tuning::duplicates_above`].
    pub duplicates_above: usize,
}

impl LeftOut {
    /// Returns how many all rules left out.
    pub fn total(&self) -> usize {
        self.clip_score_at_least + self.neg_clip_loss_keep + self.duplicates_above
    }
}

/// The sub-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// The b chosen candidates in the order drawn: chunk by chunk, in a chunk by falling perturbed
    /// score.
    pub indices: Vec<u32>,
    /// The number of examples of each chunk; the sum is b.
    pub chunks: Vec<u32>,
    /// The conditional score with which each was drawn, without noise, with gain. Uniform: 0.
    /// K-center: the distance (1 - cosine) from the nearest of the chunks before.
    pub scores: Vec<f64>,
    /// Importance weights, the largest 1. Only the proportional policy has them; under all other
    /// policies they are 1.
    pub weights: Vec<f64>,
    /// Candidates that [`Tuning`] left out.
    pub left_out: LeftOut,
    /// Mean conditional score per example of the whole sub-batch, which joint selection tries to
    /// make large: the criterion's difference of the batch losses that a trainer would see on it.
    /// No gain, so that runs compare. Absent if the uniform policy was given no embeddings.
    pub batch_score: Option<f64>,
    /// Mean unconditional score of the chosen; absent as `batch_score` is.
    pub mean_score_chosen: Option<f64>,
    /// Mean unconditional score of all candidates that are not holes; absent as `batch_score` is.
    pub mean_score_candidates: Option<f64>,
    /// Floating-point operations spent on dot products, those of [`Tuning`]'s rules included.
    pub flops: f64,
}
