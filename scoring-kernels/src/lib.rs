//! Joint example selection (JEST): draws the jointly most learnable sub-batch of a super-batch.
//!
//! Arrays in, indices out: no I/O, no async, no clock, no configuration. Randomness is an argument, and so are threads
//! (the rayon pool that you call from).
//!
//! # What it does
//!
//! A contrastive model learns from *batches*: how much an example teaches depends on the others beside it. Joint example
//! selection (Evans et al. 2024, [arXiv 2406.17711](https://arxiv.org/abs/2406.17711), Algorithm 1) therefore scores whole
//! batches. Of a *super-batch* of B candidates, seen by the *learner* that is being trained and by a frozen *reference*, it
//! draws a *sub-batch* of b with probability ∝ exp(score of the sub-batch).
//!
//! With L2-normalised embeddings of images and texts, `l[i, j] = scale · ⟨imgᵢ, txtⱼ⟩ + bias` is a model's logit for image i
//! and text j. Its loss on pair (i, j) under the sigmoid loss is
//!
//! ```text
//! pair[i, i] = softplus(-l[i, i])        the positive: image and text belong together
//! pair[i, j] = softplus( l[i, j])        a negative, i ≠ j
//! ```
//!
//! A *criterion* makes scores of losses:
//!
//! ```text
//! learnability   s = pair_learner - pair_reference      not yet learned, and learnable
//! hard           s = pair_learner                       also likes noise
//! easy           s = -pair_reference                    likes clean examples, whatever is known already
//! ```
//!
//! and a sub-batch's score per example, [`Selection::batch_score`], is `Σ s[i, j] / b` over all its pairs. Drawing it at once
//! is out of reach, so it is drawn in `n_chunks` chunks. With T the examples drawn so far, a candidate's *conditional score*
//!
//! ```text
//! score[x | T] = s[x, x] + Σₖ∈T (s[k, x] + s[x, k])
//! ```
//!
//! is what it would add to the batch; the next chunk is drawn without replacement with p ∝ exp(score), and T grows by it.
//! Sixteen chunks come close to the exact law; one chunk is *independent* selection, which ignores the pairs.
//!
//! Under the softmax loss (CLIP's) the pair terms are the two denominators:
//!
//! ```text
//! loss[x | T] = -l[x, x] + ½ (ln Σₖ∈T exp l[x, k] + ln Σₖ∈T exp l[k, x]),   score = gain · criterion(losses)
//! ```
//!
//! A loss without pair terms (classification, language modelling) has nothing joint: there, joint selection after n draws
//! is independent selection at an inverse temperature of n + 1. Use [`Policy::Independent`].
//!
//! # How it does it
//!
//! * **Matrix-free.** A B × B matrix of 163,840 candidates is 100 GiB a model. Only each candidate's running score is kept:
//!   after a chunk of c, just its c rows and columns are computed, tile by tile, summed and dropped. Memory is O(B·d), work
//!   is 8·B·b·d FLOPs for two models against 4·B²·d for the dense form, and the result is the same. Softmax keeps a running
//!   maximum and a scaled sum for each denominator.
//! * **Gumbel-top-k.** Conditional scores are spread over hundreds and exp() overflows. Adding standard Gumbel noise and
//!   taking the c largest is the same draw. Ties go to the lower index.
//! * **Noise by counter.** [`noise::gumbel`] is a pure function of (seed, generation, step, chunk, position), the same on every
//!   machine; every [`Backend`] is handed the same numbers.
//! * **b is the input**, never the filter ratio: `int(163840 * (1 - 0.8) / 16)` is 2047 in doubles. The first `b % n_chunks`
//!   chunks draw one more.
//! * **No scaling of sigmoid scores** by the number drawn, which would undo the method.
//! * **f32 or f16 embeddings, never bf16**: it changes a draw in six at a scale of 100. Products are accumulated in f32, sums
//!   over examples in f64.
//!
//! # Example
//!
//! ```no_run
//! use superbatch_kernels::{Backend, Candidates, ModelEmbeddings, Noise, Rows, Settings};
//!
//! # fn embed() -> [Vec<f32>; 4] { std::array::from_fn(|_| vec![0.0; 20_480 * 512]) }
//! let [learner_images, learner_texts, reference_images, reference_texts] = embed();
//! let (count, dim) = (20_480, 512);
//! let learner = ModelEmbeddings {
//!     image: Rows::F32(&learner_images),
//!     text: Rows::F32(&learner_texts),
//!     dim,
//!     scale: 42.0,
//!     bias: -12.0,
//! };
//! let reference = ModelEmbeddings {
//!     image: Rows::F32(&reference_images),
//!     text: Rows::F32(&reference_texts),
//!     dim,
//!     scale: 118.0,
//!     bias: -12.9,
//! };
//! let candidates = Candidates { count, learner: Some(learner), reference: Some(reference), holes: &[] };
//! let settings = Settings { sub_batch_size: 4_096, ..Settings::default() };
//! let keys: Vec<u64> = (0..count as u64).collect();
//! let noise = Noise::Seeded { seed: 1, generation: 0, step: 0, keys: &keys };
//! let selection = Backend::Native.select(&candidates, &settings, &noise)?;
//! assert_eq!(selection.indices.len(), 4_096);
//! # Ok::<(), superbatch_kernels::Error>(())
//! ```
mod backend;
mod engine;
mod error;
mod native;
pub mod noise;
mod problem;
#[cfg(feature = "torch")]
mod torch;
mod types;

pub use backend::Backend;
pub use error::{Error, Result};
pub use noise::Noise;
pub use types::{Candidates, Criterion, Loss, ModelEmbeddings, Policy, Rows, Selection, Settings};
