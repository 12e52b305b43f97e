//! Joint example selection (JEST): draws the jointly most learnable sub-batch of a super-batch.
//!
//! Arrays in, indices out: no I/O, no async, no clock, no configuration. Randomness is an argument,
//! and so are threads (the rayon pool that you call from). This page teaches the method in ten
//! minutes; [`Backend::select`] is all there is to call.
//!
//! # The idea
//!
//! A contrastive model learns from *batches*: how much an example teaches depends on the others
//! beside it. Joint example selection (Evans et al. 2024, [arXiv
//! 2406.17711](https://arxiv.org/abs/2406.17711), Algorithm 1) therefore scores whole batches. Of a
//! *super-batch* of B candidates, seen by the *learner* that is being trained and by a frozen
//! *reference*, it draws a *sub-batch* of b with probability ∝ exp(score of the sub-batch).
//!
//! With L2-normalised embeddings of images and texts, `l[i, j] = scale · ⟨imgᵢ, txtⱼ⟩ + bias` is a
//! model's logit for image i and text j. Its loss on pair (i, j) under the sigmoid loss is
//!
//! ```text
//! pair[i, i] = softplus(-l[i, i])        the positive: image and text belong together
//! pair[i, j] = softplus( l[i, j])        a negative, i ≠ j
//! ```
//!
//! A *criterion* makes scores of losses:
//!
//! ```text
//! learnability   s = pair_learner - pair_reference   not yet learned, and learnable
//! hard           s = pair_learner                    also likes noise
//! easy           s = -pair_reference                 likes clean examples, known already or not
//! ```
//!
//! and a sub-batch's score per example, [`Selection::batch_score`], is `Σ s[i, j] / b` over all its
//! pairs. Drawing it at once is out of reach, so it is drawn in `n_chunks` chunks. With T the
//! examples drawn so far, a candidate's *conditional score*
//!
//! ```text
//! score[x | T] = s[x, x] + Σₖ∈T (s[k, x] + s[x, k])
//! ```
//!
//! is what it would add to the batch; the next chunk is drawn without replacement with p ∝
//! exp(score), and T grows by it. Sixteen chunks come close to the exact law; one chunk is
//! *independent* selection, which ignores the pairs.
//!
//! # By hand
//!
//! Four candidates. The reference tells all of them apart; the learner gives 0 and 1 the same
//! embedding. Each pair alone is as easy for one model as for the other, so all unconditional
//! scores are 0. But once 0 is drawn, the learner's logit between 0 and 1 is 10 - 5 = 5 where the
//! reference's is -5, and softplus(5) - softplus(-5) = 5, in both directions: candidate 1 would add
//! 10 to the batch, the others nothing. Together 0 and 1 teach what neither teaches alone.
//!
//! ```
//! use superbatch_kernels::{Backend, Candidates, ModelEmbeddings, Noise, Policy, Rows, Settings};
//!
//! let unit = |axis: usize| [0, 1, 2, 3].map(|k| if k == axis { 1f32 } else { 0.0 });
//! let axis = |axes: [usize; 4]| axes.map(unit).concat();
//! let (confused, clear) = (axis([0, 0, 1, 2]), axis([0, 1, 2, 3]));
//! let model = |rows| ModelEmbeddings {
//!     image: Rows::F32(rows),
//!     text: Rows::F32(rows),
//!     dim: 4,
//!     scale: 10.0,
//!     bias: -5.0,
//! };
//! let candidates = Candidates {
//!     count: 4,
//!     learner: Some(model(&confused)),
//!     reference: Some(model(&clear)),
//!     holes: &[],
//! };
//! let policy = Policy::JointTopK;
//! let settings = Settings { policy, sub_batch_size: 2, n_chunks: 2, ..Settings::default() };
//! let selection = Backend::Native.select(&candidates, &settings, &Noise::Given(&[]))?;
//! assert_eq!(selection.indices, [0, 1]);
//! assert!(selection.scores[0].abs() < 1e-5 && (selection.scores[1] - 10.0).abs() < 1e-5);
//! # Ok::<(), superbatch_kernels::Error>(())
//! ```
//!
//! # In a training loop
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
//! let (learner, reference) = (Some(learner), Some(reference));
//! let candidates = Candidates { count, learner, reference, holes: &[] };
//! let settings = Settings { sub_batch_size: 4_096, ..Settings::default() };
//! let keys: Vec<u64> = (0..count as u64).collect();
//! let noise = Noise::Seeded { seed: 1, generation: 0, step: 0, keys: &keys };
//! let selection = Backend::Native.select(&candidates, &settings, &noise)?;
//! assert_eq!(selection.indices.len(), 4_096);
//! # Ok::<(), superbatch_kernels::Error>(())
//! ```
//!
//! # Softmax, and losses without pairs
//!
//! Under the softmax loss (CLIP's) the pair terms are the two denominators:
//!
//! ```text
//! loss[x | T] = -l[x, x] + ½ (ln Σₖ∈T exp l[x, k] + ln Σₖ∈T exp l[k, x])
//! score = gain · criterion(losses)
//! ```
//!
//! A loss without pair terms (classification, language modelling) has nothing joint: there, joint
//! selection after n draws is independent selection at a temperature of 1 / (n + 1). Use
//! [`Policy::Independent`].
//!
//! # Other policies
//!
//! [`Policy`] has, beside joint selection, its controls (`uniform`, `independent`) and what others
//! have proposed: the largest scores, ranks, priorities with importance weights, k-center.
//! [`Tuning`] holds their numbers, and may leave near-duplicates or badly matching pairs out before
//! any policy draws ([`Backend::select_tuned`]).
//!
//! # How it is done
//!
//! * **Matrix-free.** A B × B matrix of 163,840 candidates is 100 GiB a model. Only each
//!   candidate's running score is kept: after a chunk of c, just its c rows and columns are
//!   computed, tile by tile, summed and dropped. Memory is O(B·d), work is 8·B·b·d FLOPs for two
//!   models against 4·B²·d for the dense form, and the result is the same. Softmax keeps a running
//!   maximum and a scaled sum for each denominator.
//! * **At the speed of the matrix product.** On the CPU a candidate is a lane of a vector. A panel
//!   of 32 candidates meets the drawn examples twelve at a time; their dot products go to a buffer
//!   of at most 15 KiB in the L1 cache, where one pass turns them into sums of softplus or of
//!   exponentials. The best instruction set is picked at run time (AVX-512, AVX2, portable).
//! * **On CUDA, kernels of our own** ([`Backend::Cuda`]). NVRTC compiles them for the device when
//!   it is opened; driver and NVRTC are found at run time, LibTorch is not needed. Tensor cores
//!   make tiles of 128 x 128 dot products from f16 with f32 sums; an f32 value goes in as the sum
//!   of two halves, in three products. Every 64 terms of a dot product are moved to other registers
//!   and added there with rounding, because tensor cores cut sums off. The tile never leaves the
//!   registers: one pass turns it into softplus or exponentials (or, for k-center, a maximum) and
//!   adds up its rows, in a fixed order, by one block alone. A device is used only after it passed
//!   a check against the CPU ([`CudaDevice::open`]).
//! * **Gumbel-top-k.** Conditional scores are spread over hundreds and exp() overflows. Adding
//!   standard Gumbel noise and taking the c largest is the same draw. Ties go to the lower index.
//! * **Noise by counter.** [`noise::gumbel`] is a pure function of (seed, generation, step, chunk,
//!   position), the same on every machine; every [`Backend`] is handed the same numbers.
//! * **b is the input**, never the filter ratio: `int(163840 * (1 - 0.8) / 16)` is 2047 in doubles.
//!   The first `b % n_chunks` chunks draw one more.
//! * **No scaling of sigmoid scores** by the number drawn, which would undo the method.
//! * **f32 or f16 embeddings, never bf16**: it changes a draw in six at a scale of 100. Products
//!   are accumulated in f32, sums over examples in f64; a softplus is within 10⁻⁷ of its value and
//!   small terms are not lost. A candidate's sums are taken in the order of the drawn examples,
//!   whatever the number of threads. Conditional scores stay within 5·10⁻⁴ + 10⁻⁶ of their value of
//!   those in float64.
#![warn(missing_docs)]
mod backend;
mod cuda;
mod engine;
mod error;
mod filter;
mod law;
mod native;
pub mod noise;
mod problem;
mod rules;
#[cfg(feature = "torch")]
mod torch;
mod types;

pub use backend::Backend;
pub use cuda::{CudaDevice, CudaError, CudaLibraries};
pub use error::{Error, Result};
pub use noise::Noise;
pub use rules::{Needs, Number};
pub use types::{
    Candidates, Criterion, LeftOut, Loss, ModelEmbeddings, Policy, Rows, Selection, Settings,
    Tuning, UnknownWord,
};
