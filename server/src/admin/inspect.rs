//! `superbatch inspect`: what the service reads in a model folder, or why it refuses it.
use super::{ConfigArgs, table::table};
use crate::{
    config::Config,
    error::{Error, Result},
    fidelity::Fidelity,
    storage::Stores,
    worker::{
        device::{Device, LoadModel, Weights},
        inputs::model_inputs::Inputs,
        model::{
            Compute, ModelConfig, ModelFolder, ModelInfo,
            config::{Tower, VisionConfig},
            flops,
            losses::{Input, LossForm},
        },
    },
};
use clap::Args;
use serde_json::json;
use std::sync::Arc;
use url::Url;

/// Sides and depths that are shown beside the model's own, as shares of them: those that people
/// score at.
const SHARES: [(u32, u32); 3] = [(3, 4), (1, 2), (1, 4)];

/// Larger patches that are shown.
const PATCHES: usize = 2;
/// Shares of the patches to leave out that are shown.
const DROPPED: [f64; 2] = [0.5, 0.75];

/// Reads the folder as a worker does, and writes nothing.
#[derive(Args)]
pub struct InspectArgs {
    /// A model's folder: a URI such as s3://bucket/models/siglip, or a path
    model: String,
    #[command(flatten)]
    pub settings: ConfigArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What was read.
struct Inspected {
    folder: Arc<ModelFolder>,
    inputs: Inputs,
    /// Absent where the folder has no weights.
    loaded: Option<ModelInfo>,
    device: String,
}

/// # Errors
/// Those that opening a run with the folder would have.
pub async fn run(config: &Config, args: &InspectArgs) -> Result<String> {
    let uri = uri_of(&args.model)?;
    let stores = Stores::new(config.storage.clone());
    let folder =
        ModelFolder::fetch_allowing(&stores.open(&uri)?, &config.worker.exported_modules).await?;
    let folder = Arc::new(folder);
    let inputs = Inputs::of(&folder)?;
    let device = Device::start(&config.worker.device, config.worker.threads)?;
    let loaded = if folder.has_weights().await? {
        Some(load(&device, &folder).await?)
    } else {
        None
    };
    let found = Inspected {
        folder,
        inputs,
        loaded,
        device: device.name().to_owned(),
    };
    Ok(if args.json {
        format!("{}\n", found.json())
    } else {
        found.text()
    })
}

async fn load(device: &Device, folder: &Arc<ModelFolder>) -> Result<ModelInfo> {
    let request = LoadModel {
        folder: folder.clone(),
        weights: Weights::Folder,
        compute: Compute::F32,
        canary: true,
    };
    device.load(request).await
}

/// Returns the URI of what people type: a URI, or a path.
pub(super) fn uri_of(model: &str) -> Result<String> {
    if model.contains("://") {
        return Ok(model.to_owned());
    }
    let unusable = || Error::invalid("model", format!("{model:?} is neither a URI nor a path"));
    let path = std::path::absolute(model).map_err(|e| unusable().because(e))?;
    Ok(Url::from_file_path(path).map_err(|()| unusable())?.into())
}

/// One fidelity that the image tower can be run at.
struct Choice {
    fidelity: Fidelity,
    patches: usize,
    image: f64,
    /// Both towers, of the cost at full fidelity.
    share: f64,
}

impl Inspected {
    fn config(&self) -> &ModelConfig {
        &self.folder.config
    }

    /// Returns full fidelity, then approximations of each kind that the tower can be run at.
    fn choices(&self) -> Vec<Choice> {
        let tower = flops::image_tower(self.config());
        let text = flops::text(self.config());
        let full = tower.flops(Fidelity::Full);
        let (own, patch, layers) = (tower.image_size, tower.patch_size, tower.layers);
        let sides = SHARES.map(|(of, whole)| own * of / whole / patch.max(1) * patch);
        let patch = patch.max(1);
        let larger = (patch + 1..=own).filter(|side| own.is_multiple_of(*side));
        let depths = SHARES.map(|(of, whole)| layers * of / whole);
        let mut all = vec![Fidelity::Full];
        all.extend(sides.map(Fidelity::Resolution));
        all.extend(larger.take(PATCHES).map(Fidelity::Patch));
        all.extend(DROPPED.map(Fidelity::PatchDropout));
        all.extend(depths.map(Fidelity::Layers));
        all.retain(|fidelity| tower.refuses(*fidelity).is_none());
        all.dedup();
        let choice = |fidelity| {
            let image = tower.flops(fidelity);
            Choice {
                fidelity,
                patches: tower.patches(fidelity),
                image,
                share: (image + text) / (full + text),
            }
        };
        all.into_iter().map(choice).collect()
    }

    fn parameters(&self) -> u64 {
        let tensors = self.loaded.iter().flat_map(|info| &info.tensors);
        tensors
            .map(|(_, shape)| shape.iter().product::<u64>())
            .sum()
    }

    fn text(&self) -> String {
        let config = self.config();
        let (vision, text) = (&config.vision, &config.text);
        if let Some(form) = config.losses() {
            return self.losses_text(&form);
        }
        let mut lines = vec![
            ("model", self.folder.uri.clone()),
            (
                "family",
                format!(
                    "{}, embeddings of {} numbers",
                    config.model_type(),
                    config.embedding_dim
                ),
            ),
            (
                "image",
                format!("{}; {}", sizes(vision), shape(&vision.tower)),
            ),
            ("pixels", self.inputs.pixels_of()),
            (
                "resizing",
                format!(
                    "positions {}, kernel {}",
                    config.resizes.positions, config.resizes.kernel
                ),
            ),
            (
                "text",
                format!(
                    "{} tokens of {}; {}",
                    text.max_position_embeddings,
                    text.vocab_size,
                    shape(&text.tower)
                ),
            ),
            ("tokens", self.inputs.tokens_of()),
        ];
        lines.extend(self.weights());
        let mut description = aligned(&lines);
        description
            .push_str("\nFLOPs of one pair, forward, by the fidelity that a phase may score at\n");
        description.push_str(&self.costs());
        description
    }

    /// Describes a module that gives losses.
    fn losses_text(&self, form: &LossForm) -> String {
        let config = self.config();
        let mut lines = vec![
            ("model", self.folder.uri.clone()),
            (
                "family",
                format!("{}, one loss for each {form}", config.model_type()),
            ),
        ];
        if form.input == Input::Image {
            let size = config.vision.image_size;
            lines.push(("image", format!("{size} x {size} pixels")));
            lines.push(("pixels", self.inputs.pixels_of()));
        }
        if form.has_text() {
            let (length, vocabulary) = (form.text_length, form.vocab_size);
            lines.push(("text", format!("{length} tokens of {vocabulary}")));
            lines.push(("tokens", self.inputs.tokens_of()));
        }
        if form.tokens > 0 {
            let count = form.tokens;
            lines.push(("losses", format!("of {count} tokens, for token_share")));
        }
        let of_pairs = |(name, _): &(&str, String)| *name == "loss";
        lines.extend(self.weights().into_iter().filter(|line| !of_pairs(line)));
        let flops = flops::image(config) + flops::text(config);
        lines.push(("FLOPs", format!("{flops:.3e} of one example, forward")));
        aligned(&lines)
    }

    fn weights(&self) -> Vec<(&'static str, String)> {
        let Some(info) = &self.loaded else {
            let none =
                "none: a learner with first_push or random_seed needs none, a reference does";
            return vec![("weights", none.to_owned())];
        };
        let (count, bias) = (self.parameters(), info.logit_bias);
        let bias = bias.map_or("none (give one for the sigmoid loss)".to_owned(), |bias| {
            bias.to_string()
        });
        let gib = |bytes: u64| (count * bytes) as f64 / f64::from(1 << 30);
        vec![
            (
                "weights",
                format!(
                    "{:.1} million numbers in {} tensors, digest {}; finite, and so are {} on {}",
                    count as f64 / 1e6,
                    info.tensors.len(),
                    info.weights_digest,
                    if info.gives_losses {
                        "losses"
                    } else {
                        "embeddings"
                    },
                    self.device
                ),
            ),
            (
                "loss",
                format!("scale {} (exp applied), bias {bias}", info.logit_scale),
            ),
            (
                "memory",
                format!("{:.3} GiB of weights in f32, {:.3} in bf16", gib(4), gib(2)),
            ),
        ]
    }

    fn costs(&self) -> String {
        let head = "fidelity patches image text pair of_full";
        let mut rows: Vec<Vec<String>> = vec![head.split(' ').map(str::to_owned).collect()];
        let text = flops::text(self.config());
        rows.extend(self.choices().iter().map(|choice| {
            vec![
                choice.fidelity.to_string(),
                choice.patches.to_string(),
                format!("{:.3e}", choice.image),
                format!("{text:.3e}"),
                format!("{:.3e}", choice.image + text),
                format!("{:.3}", choice.share),
            ]
        }));
        table(&rows)
    }

    fn json(&self) -> serde_json::Value {
        let config = self.config();
        let choice = |choice: &Choice| {
            json!({
                "fidelity": choice.fidelity.to_string(),
                "patches": choice.patches,
                "image_flops": choice.image,
                "of_full": choice.share,
            })
        };
        let info = self.loaded.as_ref();
        json!({
            "uri": self.folder.uri,
            "family": config.model_type(),
            "gives": config.losses().map_or("embeddings", |form| form.method()),
            "compares": config.losses().map(|form| form.to_string()),
            "embedding_dim": config.embedding_dim,
            "image": {
                "size": config.vision.image_size,
                "patch_size": config.vision.patch_size,
                "max_patches": config.vision.max_patches,
                "tower": tower_json(&config.vision.tower),
                "preprocessing": self.inputs.pixels_of(),
                "resizes": {
                    "positions": config.resizes.positions.to_string(),
                    "kernel": config.resizes.kernel.to_string(),
                },
            },
            "text": {
                "length": config.text.max_position_embeddings,
                "vocab_size": config.text.vocab_size,
                "tower": tower_json(&config.text.tower),
                "tokenizer": self.inputs.tokens_of(),
                "flops": flops::text(config),
            },
            "fidelities": self.choices().iter().map(choice).collect::<Vec<_>>(),
            "weights": info.map(|info| json!({
                "digest": info.weights_digest,
                "parameters": self.parameters(),
                "tensors": info.tensors.len(),
                "logit_scale": info.logit_scale,
                "logit_bias": info.logit_bias,
            })),
            "files": self.folder.file_digests(),
        })
    }
}

/// Returns a line for each name and value.
fn aligned(lines: &[(&str, String)]) -> String {
    let line = |(name, value): &(&str, String)| format!("{name:<10}{value}\n");
    lines.iter().map(line).collect()
}

/// Describes the images that a tower takes.
fn sizes(vision: &VisionConfig) -> String {
    let (side, patch) = (vision.image_size, vision.patch_size);
    match (vision.max_patches, patch) {
        (Some(most), _) => {
            let grid = vision.grid();
            format!(
                "of any shape (NaFlex), at most {most} patches of {patch} pixels; positions of \
                 {grid} x {grid} patches"
            )
        }
        (None, 0) => format!("{side} x {side} pixels"),
        (None, _) => format!("{side} x {side} pixels in patches of {patch}"),
    }
}

fn shape(tower: &Tower) -> String {
    if tower.num_hidden_layers == 0 {
        return "by an exported module".to_owned();
    }
    format!(
        "{} layers of width {}, {} heads, MLP {}",
        tower.num_hidden_layers,
        tower.hidden_size,
        tower.num_attention_heads,
        tower.intermediate_size
    )
}

fn tower_json(tower: &Tower) -> serde_json::Value {
    json!({
        "layers": tower.num_hidden_layers,
        "width": tower.hidden_size,
        "heads": tower.num_attention_heads,
        "mlp": tower.intermediate_size,
    })
}
