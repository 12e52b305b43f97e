//! `superbatch select`: one selection over a file of embeddings, without a server.
mod file;
mod norms;

use self::file::File;
use self::file::Model;
use super::at_least_one;
use crate::error::{Error, Result};
use serde::Serialize;
use std::{num::NonZeroUsize, path::PathBuf, time::Instant};
use superbatch_kernels::{
    Backend, Candidates, Criterion, Loss, Needs, Noise, Policy, Selection, Settings, Tuning,
};
use superbatch_proto::v1::Reason;

/// Select from a file of embeddings, without a service: the same code, for offline use and
/// experiments.
///
/// FILE holds a super-batch of B candidates as float32 or float16 tensors `learner_img`,
/// `learner_txt`, `reference_img` and `reference_txt`, each `[B, d]` with L2-normalised rows (the
/// two models may differ in d), and the models' logits as metadata: `learner_scale`,
/// `learner_bias`, `reference_scale`, `reference_bias`, where logit = scale x cosine + bias. A
/// setting without a flag is taken from the metadata of its name (`b` for the sub-batch size), else
/// from the default given below. Rows that are not normalised cause a warning. A flag that only
/// another policy reads is refused; such metadata is ignored.
///
/// Prints {"indices": [...], "chunks": [sizes], "batch_score": x, "seconds": {"load": .., "select":
/// ..}}: the chosen candidates in the order drawn, how many each chunk drew, and the mean
/// conditional score per example of the sub-batch.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  # In Python: arrays of float32, [B, d]
  safetensors.numpy.save_file(
      {'learner_img': a, 'learner_txt': b, 'reference_img': c, 'reference_txt': d}, 'b.safetensors',
      metadata={'learner_scale': '10', 'learner_bias': '-10',
                'reference_scale': '10', 'reference_bias': '-10'})
  # Then
  superbatch select --embeddings b.safetensors --sub-batch-size 128 --seed 1
  superbatch select --embeddings b.safetensors --policy independent --backend cuda")]
pub struct SelectArgs {
    /// The safetensors file
    #[arg(long, value_name = "FILE")]
    pub embeddings: PathBuf,
    /// How examples are drawn: joint (chunk by chunk, each given what was drawn before),
    /// independent (one draw from each candidate's own score), uniform (from noise only; needs no
    /// embeddings if there is noise), joint_top_k, top_k, rank, proportional or k_center [default:
    /// joint]
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<Policy>,
    /// The loss that the models were trained with: sigmoid (SigLIP; needs both biases) or softmax
    /// (CLIP) [default: sigmoid]
    #[arg(long, value_name = "LOSS")]
    pub loss: Option<Loss>,
    /// What makes an example worth drawing: learnability (learner loss - reference loss), hard
    /// (learner loss) or easy (-reference loss). Hard needs no reference and easy no learner
    /// [default: learnability]
    #[arg(long, value_name = "CRITERION")]
    pub criterion: Option<Criterion>,
    /// How many are drawn, exactly [default: a fifth of the candidates, the paper's filter ratio of
    /// 0.8]
    #[arg(long, value_name = "N")]
    pub sub_batch_size: Option<usize>,
    /// Draws of joint selection. More draws follow the exact law more closely; the first ones take
    /// the remainder [default: 16]
    #[arg(long, value_name = "N")]
    pub n_chunks: Option<usize>,
    /// Multiplies softmax scores, which do not grow with what is drawn; the sigmoid loss has none
    /// [default: 1]
    #[arg(long, value_name = "GAIN")]
    pub gain: Option<f64>,
    #[command(flatten)]
    pub tuning: TuningArgs,
    /// Seeds the noise if FILE holds no tensor `noise` (standard Gumbel, float32, one row of B a
    /// draw) or too few rows of it [default: 0]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Where scores are computed. All draw the same examples, up to rounding
    #[arg(long, value_enum, default_value_t = BackendChoice::Native)]
    pub backend: BackendChoice,
    /// Threads on the CPU; the native backend's draw does not depend on it [default: one a core]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub threads: Option<NonZeroUsize>,
}

/// The numbers that only some policies read, and the rules that leave candidates out.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TuningArgs {
    /// Independent: divides the scores; towards 0 it is top_k, towards infinity uniform [default:
    /// 1]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Rank: how many times as likely the first is as the last [default: 100]
    #[arg(long, value_name = "TIMES")]
    pub pressure: Option<f64>,
    /// Proportional: the scores' exponent; 0 is uniform [default: 0.6]
    #[arg(long, value_name = "ALPHA")]
    pub priority_exponent: Option<f64>,
    /// Proportional: how far the importance weights correct the draw, from 0 to 1 [default: 0.4]
    #[arg(long, value_name = "BETA")]
    pub weight_exponent: Option<f64>,
    /// Leave out all but one of images whose cosine, by the reference, is above this
    #[arg(long, value_name = "COSINE")]
    pub duplicates_above: Option<f64>,
    /// Leave out pairs whose CLIPScore (2.5 x cosine of image and text, by the reference) is below
    /// this
    #[arg(long, value_name = "SCORE")]
    pub clip_score_at_least: Option<f64>,
    /// Keep this share of the pairs, those of the best negCLIPLoss by the reference, from 0 to 1
    #[arg(long, value_name = "SHARE")]
    pub neg_clip_loss_keep: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// Plain Rust on the CPU
    Native,
    /// LibTorch on the CPU
    Torch,
    /// Superbatch's own kernels on the first CUDA device that LibTorch finds, or LibTorch if they
    /// cannot be used
    Cuda,
}

#[derive(Serialize)]
struct Printed<'a> {
    indices: &'a [u32],
    chunks: &'a [u32],
    batch_score: Option<f64>,
    /// Importance weights, if the policy has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<&'a [f64]>,
    /// Candidates that were left out, if a rule is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<usize>,
    seconds: Seconds,
}

#[derive(Serialize)]
struct Seconds {
    load: f64,
    select: f64,
}

/// Selects by `args` and the file's metadata. Returns the line of JSON to print.
///
/// # Errors
///
/// `InvalidArgument` names the `field` (and `tensor`) that is missing or of the wrong shape;
/// `BiasMissing` if the sigmoid loss lacks a bias; `DeviceUnavailable` if there is no such
/// backend.
pub fn run(args: &SelectArgs) -> Result<String> {
    let begun = Instant::now();
    let backend = backend(args)?;
    let threads =
        rayon::ThreadPoolBuilder::new().num_threads(args.threads.map_or(0, NonZeroUsize::get));
    let threads = threads
        .build()
        .map_err(|error| Error::internal("cannot start threads").because(error))?;
    let super_batch = SuperBatch::read(args)?;
    super_batch
        .warnings()
        .iter()
        .for_each(|warning| eprintln!("superbatch: warning: {warning}"));
    let load = begun.elapsed().as_secs_f64();

    let begun = Instant::now();
    let selection = threads.install(|| super_batch.select(&backend))?;
    let seconds = Seconds {
        load,
        select: begun.elapsed().as_secs_f64(),
    };
    let Selection {
        indices,
        chunks,
        batch_score,
        weights,
        left_out,
        ..
    } = &selection;
    let printed = Printed {
        indices,
        chunks,
        batch_score: *batch_score,
        weights: (super_batch.settings.policy == Policy::Proportional).then_some(weights),
        left_out: super_batch.tuning.leaves_out().then(|| left_out.total()),
        seconds,
    };
    serde_json::to_string(&printed)
        .map_err(|error| Error::internal("cannot write the selection as JSON").because(error))
}

#[cfg(not(feature = "torch"))]
fn backend(args: &SelectArgs) -> Result<Backend> {
    match args.backend {
        BackendChoice::Native => Ok(Backend::Native),
        _ => Err(Error::new(
            Reason::DeviceUnavailable,
            "this build has no LibTorch: use --backend native",
        )),
    }
}

#[cfg(feature = "torch")]
fn backend(args: &SelectArgs) -> Result<Backend> {
    if let (BackendChoice::Torch | BackendChoice::Cuda, Some(threads)) =
        (args.backend, args.threads)
    {
        tch::set_num_threads(i32::try_from(threads.get()).unwrap_or(i32::MAX));
    }
    match args.backend {
        BackendChoice::Native => Ok(Backend::Native),
        BackendChoice::Torch => Ok(Backend::Torch(tch::Device::Cpu)),
        BackendChoice::Cuda => cuda().map(crate::cuda::backend),
    }
}

/// Returns the CUDA device. The binary links LibTorch without CUDA; the CUDA library registers
/// itself when it is loaded.
#[cfg(feature = "torch")]
fn cuda() -> Result<tch::Device> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let unavailable = |message| Error::new(Reason::DeviceUnavailable, message);
    // SAFETY: LibTorch's own library, whose initialisers are meant to run in a process that holds
    // libtorch_cpu.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    let library = library
        .map_err(|error| unavailable("cannot load LibTorch's CUDA library").because(error))?;
    // Its kernels are registered with libtorch_cpu, so it must stay loaded.
    std::mem::forget(library);
    if tch::Cuda::is_available() {
        Ok(tch::Device::Cuda(0))
    } else {
        Err(unavailable(
            "there is no CUDA device: use --backend torch or native",
        ))
    }
}

/// The file's contents, with every setting resolved.
struct SuperBatch {
    count: usize,
    learner: Option<Model>,
    reference: Option<Model>,
    settings: Settings,
    tuning: Tuning,
    /// `[rows, B]`, if the file has one with enough rows.
    noise: Option<Vec<f32>>,
    seed: u64,
}

impl SuperBatch {
    fn read(args: &SelectArgs) -> Result<Self> {
        let bytes = std::fs::read(&args.embeddings).map_err(|error| {
            invalid(format!("cannot read {}", args.embeddings.display())).because(error)
        })?;
        let file = File::parse(&args.embeddings, &bytes)?;
        let criterion = file.setting(args.criterion, "criterion", Criterion::default())?;
        let policy = file.setting(args.policy, "policy", Policy::default())?;
        let loss = file.setting(args.loss, "loss", Loss::default())?;
        let tuning = file.tuning(&args.tuning, policy)?;
        // A model that the criterion compares with is read if the file has it, even if this policy
        // draws without scores: the scores are reported.
        let needs = Needs::of(policy, Some(criterion), &tuning);
        let learner = if criterion.needs_learner() {
            file.model("learner", loss, !needs.learner)?
        } else {
            None
        };
        let reference = if criterion.needs_reference() || needs.reference {
            file.model("reference", loss, !needs.reference_losses)?
        } else {
            None
        };
        let noise = file.noise()?;
        let models = [&learner, &reference]
            .into_iter()
            .flatten()
            .map(|model| model.count);
        let counts: Vec<usize> = models.chain(noise.as_ref().map(|noise| noise.1)).collect();
        let Some(&count) = counts.first() else {
            return Err(invalid(format!(
                "{} holds neither embeddings nor noise",
                args.embeddings.display()
            )));
        };
        if counts.iter().any(|other| *other != count) {
            return Err(invalid(format!(
                "the tensors disagree on the number of candidates: {counts:?}"
            )));
        }
        let settings = Settings {
            policy,
            loss,
            criterion,
            sub_batch_size: file.setting(args.sub_batch_size, "b", (count / 5).max(1))?,
            n_chunks: file.setting(args.n_chunks, "n_chunks", 16)?,
            gain: file.setting(args.gain, "gain", 1.0)?,
        };
        let noise = noise
            .filter(|(values, _)| values.len() >= settings.noisy_draws() * count)
            .map(|(values, _)| values);
        let seed = file.setting(args.seed, "seed", 0)?;
        Ok(Self {
            count,
            learner,
            reference,
            settings,
            tuning,
            noise,
            seed,
        })
    }

    /// Returns warnings about inputs that are suspicious but can be drawn from.
    fn warnings(&self) -> Vec<String> {
        let models = [("learner", &self.learner), ("reference", &self.reference)];
        models
            .iter()
            .filter_map(|(name, model)| Some((name, model.as_ref()?)))
            .flat_map(|(name, m)| m.warnings(name))
            .collect()
    }

    fn select(&self, backend: &Backend) -> Result<Selection> {
        let (learner, reference) = (
            self.learner.as_ref().map(Model::view),
            self.reference.as_ref().map(Model::view),
        );
        let candidates = Candidates {
            count: self.count,
            learner,
            reference,
            holes: &[],
        };
        let keys: Vec<u64> = (0..self.count as u64).collect();
        let noise = match &self.noise {
            Some(values) => Noise::Given(values),
            None => Noise::Seeded {
                seed: self.seed,
                generation: 0,
                step: 0,
                keys: &keys,
            },
        };
        let drawn = backend.select_tuned(&candidates, &self.settings, &self.tuning, &noise);
        drawn.map_err(|error| invalid("cannot select").because(error))
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::invalid("embeddings", message)
}

#[cfg(test)]
mod tests;
