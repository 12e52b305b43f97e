//! `superbatch select`: one selection over a file of embeddings, without a server.
use crate::error::{Error, Result};
use half::f16;
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};
use serde::Serialize;
use std::{
    collections::HashMap,
    fmt::Display,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    str::FromStr,
    time::Instant,
};
use superbatch_kernels::{
    Backend, Candidates, Criterion, Loss, ModelEmbeddings, Noise, Policy, Rows, Selection, Settings,
};
use superbatch_proto::v1::Reason;

/// Select from a file of embeddings, without a service: the same code, for offline use and experiments.
///
/// FILE holds a super-batch of B candidates as float32 or float16 tensors `learner_img`, `learner_txt`, `reference_img` and
/// `reference_txt`, each `[B, d]` with L2-normalised rows (the two models may differ in d), and the models' logits as metadata:
/// `learner_scale`, `learner_bias`, `reference_scale`, `reference_bias`, where logit = scale x cosine + bias. What a flag does
/// not say is taken from the metadata of its name (`b` for the sub-batch size), else from the default given below.
///
/// Prints {"indices": [...], "chunks": [sizes], "batch_score": x, "seconds": {"load": .., "select": ..}}: the chosen
/// candidates in the order drawn, how many each chunk drew, and the mean conditional score per example of the sub-batch.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  # In Python: arrays of float32, [B, d]
  safetensors.numpy.save_file(
      {'learner_img': a, 'learner_txt': b, 'reference_img': c, 'reference_txt': d}, 'b.safetensors',
      metadata={'learner_scale': '10', 'learner_bias': '-10', 'reference_scale': '10', 'reference_bias': '-10'})
  # Then
  superbatch select --embeddings b.safetensors --sub-batch-size 128 --seed 1
  superbatch select --embeddings b.safetensors --policy independent --backend cuda")]
pub struct SelectArgs {
    /// The safetensors file
    #[arg(long, value_name = "FILE")]
    pub embeddings: PathBuf,
    /// How examples are drawn: joint (chunk by chunk, each given what was drawn before), independent (one draw from each
    /// candidate's own score) or uniform (from noise alone; needs no embeddings where there is noise) [default: joint]
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<Policy>,
    /// The loss that the models were trained with: sigmoid (SigLIP; needs both biases) or softmax (CLIP) [default: sigmoid]
    #[arg(long, value_name = "LOSS")]
    pub loss: Option<Loss>,
    /// What makes an example worth drawing: learnability (learner loss - reference loss), hard (learner loss) or easy
    /// (-reference loss). Hard needs no reference and easy no learner [default: learnability]
    #[arg(long, value_name = "CRITERION")]
    pub criterion: Option<Criterion>,
    /// How many are drawn, exactly [default: a fifth of the candidates, the paper's filter ratio of 0.8]
    #[arg(long, value_name = "N")]
    pub sub_batch_size: Option<usize>,
    /// Draws of joint selection. More draws follow the exact law more closely; the first ones take the remainder [default: 16]
    #[arg(long, value_name = "N")]
    pub n_chunks: Option<usize>,
    /// Multiplies softmax scores, which do not grow with what is drawn; the sigmoid loss has none [default: 1]
    #[arg(long, value_name = "GAIN")]
    pub gain: Option<f64>,
    /// Seeds the noise where FILE holds no tensor `noise` (standard Gumbel, float32, one row of B a draw) or too few rows of
    /// it [default: 0]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Where scores are computed. All draw the same examples, up to rounding
    #[arg(long, value_enum, default_value_t = BackendChoice::Native)]
    pub backend: BackendChoice,
    /// Threads on the CPU; the native backend's draw does not depend on it [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// Plain Rust on the CPU
    Native,
    /// LibTorch on the CPU
    Torch,
    /// LibTorch on the first CUDA device
    Cuda,
}

#[derive(Serialize)]
struct Printed<'a> {
    indices: &'a [u32],
    chunks: &'a [u32],
    batch_score: Option<f64>,
    seconds: Seconds,
}

#[derive(Serialize)]
struct Seconds {
    load: f64,
    select: f64,
}

/// Selects as `args` and the file's metadata say, and returns the line of JSON to print.
///
/// # Errors
///
/// `InvalidArgument` names the `field` (and `tensor`) that is missing or of the wrong shape; `BiasMissing` where the sigmoid
/// loss lacks a bias; `DeviceUnavailable` where there is no such backend.
pub fn run(args: &SelectArgs) -> Result<String> {
    let begun = Instant::now();
    let backend = backend(args)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.map_or(0, NonZeroUsize::get));
    let pool = pool.build().map_err(|error| Error::internal("cannot start threads").because(error))?;
    let super_batch = SuperBatch::read(args)?;
    let load = begun.elapsed().as_secs_f64();

    let begun = Instant::now();
    let selection = pool.install(|| super_batch.select(&backend))?;
    let seconds = Seconds { load, select: begun.elapsed().as_secs_f64() };
    let Selection { indices, chunks, batch_score, .. } = &selection;
    serde_json::to_string(&Printed { indices, chunks, batch_score: *batch_score, seconds })
        .map_err(|error| Error::internal("cannot write the selection as JSON").because(error))
}

#[cfg(not(feature = "torch"))]
fn backend(args: &SelectArgs) -> Result<Backend> {
    match args.backend {
        BackendChoice::Native => Ok(Backend::Native),
        _ => Err(Error::new(Reason::DeviceUnavailable, "this build has no LibTorch: use --backend native")),
    }
}

#[cfg(feature = "torch")]
fn backend(args: &SelectArgs) -> Result<Backend> {
    if let (BackendChoice::Torch | BackendChoice::Cuda, Some(threads)) = (args.backend, args.threads) {
        tch::set_num_threads(i32::try_from(threads.get()).unwrap_or(i32::MAX));
    }
    match args.backend {
        BackendChoice::Native => Ok(Backend::Native),
        BackendChoice::Torch => Ok(Backend::Torch(tch::Device::Cpu)),
        BackendChoice::Cuda => cuda().map(Backend::Torch),
    }
}

/// We link LibTorch without CUDA; its CUDA library registers itself when it is loaded.
#[cfg(feature = "torch")]
fn cuda() -> Result<tch::Device> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let unavailable = |message| Error::new(Reason::DeviceUnavailable, message);
    // SAFETY: LibTorch's own library, whose initialisers are meant to run in a process that holds libtorch_cpu.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    let library = library.map_err(|error| unavailable("cannot load LibTorch's CUDA library").because(error))?;
    // Kernels stay registered for the life of the process.
    std::mem::forget(library);
    if tch::Cuda::is_available() {
        Ok(tch::Device::Cuda(0))
    } else {
        Err(unavailable("there is no CUDA device: use --backend torch or native"))
    }
}

/// The file's contents, with every setting resolved.
struct SuperBatch {
    count: usize,
    learner: Option<Model>,
    reference: Option<Model>,
    settings: Settings,
    /// `[rows, B]`, where there is one with rows enough.
    noise: Option<Vec<f32>>,
    seed: u64,
}

struct Model {
    image: Values,
    text: Values,
    count: usize,
    dim: usize,
    scale: f64,
    bias: f64,
}

enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl SuperBatch {
    fn read(args: &SelectArgs) -> Result<Self> {
        let bytes = std::fs::read(&args.embeddings)
            .map_err(|error| invalid(format!("cannot read {}", args.embeddings.display())).because(error))?;
        let file = File::parse(&args.embeddings, &bytes)?;
        let criterion = file.setting(args.criterion, "criterion", Criterion::default())?;
        let policy = file.setting(args.policy, "policy", Policy::default())?;
        let loss = file.setting(args.loss, "loss", Loss::default())?;
        let optional = policy == Policy::Uniform;
        let learner = if criterion.needs_learner() { file.model("learner", loss, optional)? } else { None };
        let reference = if criterion.needs_reference() { file.model("reference", loss, optional)? } else { None };
        let noise = file.noise()?;
        let models = [&learner, &reference].into_iter().flatten().map(|model| model.count);
        let counts: Vec<usize> = models.chain(noise.as_ref().map(|noise| noise.1)).collect();
        let Some(&count) = counts.first() else {
            return Err(invalid(format!("{} holds neither embeddings nor noise", args.embeddings.display())));
        };
        if counts.iter().any(|other| *other != count) {
            return Err(invalid(format!("the tensors disagree on the number of candidates: {counts:?}")));
        }
        let settings = Settings {
            policy,
            loss,
            criterion,
            sub_batch_size: file.setting(args.sub_batch_size, "b", (count / 5).max(1))?,
            n_chunks: file.setting(args.n_chunks, "n_chunks", 16)?,
            gain: file.setting(args.gain, "gain", 1.0)?,
        };
        let draws = if policy == Policy::Joint { settings.n_chunks.min(settings.sub_batch_size) } else { 1 };
        let noise = noise.filter(|(values, _)| values.len() >= draws * count).map(|(values, _)| values);
        Ok(Self { count, learner, reference, settings, noise, seed: file.setting(args.seed, "seed", 0)? })
    }

    fn select(&self, backend: &Backend) -> Result<Selection> {
        let (learner, reference) = (self.learner.as_ref().map(Model::view), self.reference.as_ref().map(Model::view));
        let candidates = Candidates { count: self.count, learner, reference, holes: &[] };
        let keys: Vec<u64> = (0..self.count as u64).collect();
        let noise = match &self.noise {
            Some(values) => Noise::Given(values),
            None => Noise::Seeded { seed: self.seed, generation: 0, step: 0, keys: &keys },
        };
        backend.select(&candidates, &self.settings, &noise).map_err(|error| invalid("cannot select").because(error))
    }
}

impl Model {
    fn view(&self) -> ModelEmbeddings<'_> {
        let (image, text) = (self.image.view(), self.text.view());
        ModelEmbeddings { image, text, dim: self.dim, scale: self.scale, bias: self.bias }
    }
}

impl Values {
    fn view(&self) -> Rows<'_> {
        match self {
            Self::F32(values) => Rows::F32(values),
            Self::F16(values) => Rows::F16(values),
        }
    }
}

struct File<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> File<'a> {
    fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let broken = |error| invalid(format!("{} is not a safetensors file", path.display())).because(error);
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        Ok(Self { path, tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }

    /// The flag, else the metadata, else the default.
    fn setting<T: FromStr<Err: Display>>(&self, flag: Option<T>, key: &str, default: T) -> Result<T> {
        if let Some(value) = flag {
            return Ok(value);
        }
        Ok(self.metadata_value(key)?.unwrap_or(default))
    }

    fn metadata_value<T: FromStr<Err: Display>>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.metadata.get(key) else { return Ok(None) };
        let wrong = |error| invalid(format!("{}: metadata {key} is {text:?}: {error}", self.path.display()));
        text.parse().map(Some).map_err(wrong).map_err(|error| error.with("metadata", key))
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let missing = || invalid(format!("{} has no tensor {name}", self.path.display())).with("tensor", name);
        self.tensors.tensor(name).map_err(|_| missing())
    }

    /// A model's embeddings and logit; none where they are optional and the file has no tensor of the model.
    fn model(&self, name: &str, loss: Loss, optional: bool) -> Result<Option<Model>> {
        let (image_name, text_name) = (format!("{name}_img"), format!("{name}_txt"));
        let has = |name: &str| self.tensors.tensor(name).is_ok();
        if optional && !has(&image_name) && !has(&text_name) {
            return Ok(None);
        }
        let (image, [count, dim]) = values(&image_name, &self.tensor(&image_name)?)?;
        let (text, shape) = values(&text_name, &self.tensor(&text_name)?)?;
        if shape != [count, dim] {
            let message = format!("{text_name} is {shape:?} where {image_name} is {:?}: they must agree", [count, dim]);
            return Err(invalid(message).with("tensor", text_name));
        }
        let scale_key = format!("{name}_scale");
        let no_scale = || invalid(format!("{} has no metadata {scale_key}", self.path.display()));
        let scale = self.metadata_value(&scale_key)?.ok_or_else(no_scale)?;
        let bias_key = format!("{name}_bias");
        let bias = match (self.metadata_value(&bias_key)?, loss) {
            (Some(bias), _) => bias,
            (None, Loss::Softmax) => 0.0,
            (None, Loss::Sigmoid) => {
                let message =
                    format!("{} has no metadata {bias_key}, which the sigmoid loss needs", self.path.display());
                return Err(Error::new(Reason::BiasMissing, message));
            }
        };
        Ok(Some(Model { image, text, count, dim, scale, bias }))
    }

    /// Given noise and the number of candidates that it is for.
    fn noise(&self) -> Result<Option<(Vec<f32>, usize)>> {
        let Ok(view) = self.tensors.tensor("noise") else { return Ok(None) };
        match values("noise", &view)? {
            (Values::F32(noise), [_, count]) => Ok(Some((noise, count))),
            (Values::F16(_), _) => Err(invalid("tensor noise must be F32").with("tensor", "noise")),
        }
    }
}

/// A tensor's values and shape.
fn values(name: &str, view: &TensorView<'_>) -> Result<(Values, [usize; 2])> {
    let shape = <[usize; 2]>::try_from(view.shape());
    let shape = shape.ok().filter(|shape| shape.iter().all(|extent| *extent > 0)).ok_or_else(|| {
        invalid(format!("tensor {name} is {:?}: two extents, neither 0, are needed", view.shape())).with("tensor", name)
    })?;
    let values = match view.dtype() {
        Dtype::F32 => Values::F32(view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
        Dtype::F16 => Values::F16(view.data().as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect()),
        other => {
            return Err(invalid(format!("tensor {name} is {other:?}: F32 or F16 is needed")).with("tensor", name));
        }
    };
    Ok((values, shape))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::invalid("embeddings", message)
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
