//! `superbatch embed`: a model's embeddings of whole data sets, kept for runs and written for
//! others.
mod written;

use self::written::{About, Out};
use super::{ConfigArgs, inspect::uri_of, open_state, progress::Progress};
use crate::{
    config::Config,
    coordinator::spec,
    dataset::{self, Manifest, SourceRequest, counted},
    error::{Error, Result},
    worker::{Asked, Embedder, Worker},
};
use clap::{Args, ValueEnum};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use serde_json::json;
use std::sync::Arc;
use superbatch_proto::v1::{
    Approximation, BlockRows, ComputeDtype, EmbeddingDtype, ModelRef, approximation::By,
};

/// Blocks under way together: one is embedded, the next are read.
const AHEAD: usize = 3;

/// Fills the state's reference embeddings, which every run of the same sources and reference then
/// finds. What is kept already is not made again: after an interruption, start it anew.
#[derive(Args)]
pub struct EmbedArgs {
    /// A model's folder with weights: a URI or a path; a run's `reference`
    #[arg(long, value_name = "URI")]
    model: String,
    /// URIs as the run names them, with or without its weights; may be given several times
    #[arg(long = "sources", value_name = "URI", required = true)]
    sources: Vec<String>,
    /// A folder to write the embeddings to as well, one Parquet file a shard: a URI or a path
    #[arg(long, value_name = "URI")]
    out: Option<String>,
    /// The column that holds the images, where the layout does not tell
    #[arg(long, value_name = "COLUMN")]
    image_column: Option<String>,
    /// The source's `image_root`, if the run has one: the folder that the images lie below
    #[arg(long, value_name = "URI")]
    image_root: Option<String>,
    /// The column that holds the captions, where the layout does not tell
    #[arg(long, value_name = "COLUMN")]
    caption_column: Option<String>,
    /// The source's `target_column`, of runs with the loss per_example
    #[arg(long, value_name = "COLUMN", conflicts_with = "caption_column")]
    target_column: Option<String>,
    /// The source's `text_column`, of runs with the loss per_example whose models read texts
    #[arg(long, value_name = "COLUMN", requires = "target_column",
        conflicts_with_all = ["image_column", "image_root"])]
    text_column: Option<String>,
    /// The source's `caption_seed`, if the run has one
    #[arg(long, value_name = "SEED")]
    caption_seed: Option<u64>,
    /// The source's `where`, if the run has one: embeddings are kept by the rows that it leaves
    #[arg(long = "where", value_name = "PREDICATE")]
    predicate: Option<String>,
    /// The source's `allow`, if the run has one
    #[arg(long, value_name = "URI")]
    allow: Option<String>,
    /// The source's `id_column`, if the run has one
    #[arg(long, value_name = "COLUMN")]
    id_column: Option<String>,
    /// The source's `scores`, if the run has one
    #[arg(long, value_name = "URI")]
    scores: Option<String>,
    /// Side of the images in pixels, of runs that score at that approximation [default: the
    /// model's]
    #[arg(long, value_name = "PIXELS")]
    resolution: Option<u32>,
    /// Side of a patch in pixels, of runs that score at that approximation
    #[arg(long, value_name = "PIXELS", conflicts_with = "resolution")]
    patch: Option<u32>,
    /// Share of the patches that is left out, of runs that score at that approximation
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["resolution", "patch"])]
    patch_dropout: Option<f64>,
    /// Layers of the image tower, of runs that score at that approximation
    #[arg(long, value_name = "N", conflicts_with_all = ["resolution", "patch", "patch_dropout"])]
    layers: Option<u32>,
    /// What embeddings are rounded to; a run's embedding_dtype
    #[arg(long, value_enum, default_value = "f16")]
    embedding_dtype: Width,
    /// Arithmetic of the model; a run's compute_dtype [default: bf16 on CUDA, f32 on a CPU]
    #[arg(long, value_enum)]
    compute_dtype: Option<Arithmetic>,
    /// Rows that go through the model together [default: 256 on CUDA, 64 on a CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    micro_batch_rows: Option<u32>,
    #[command(flatten)]
    pub settings: ConfigArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Width {
    F16,
    F32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Arithmetic {
    F32,
    Bf16,
}

/// What was done.
#[derive(Default)]
struct Done {
    blocks: usize,
    /// Of them, those that were kept already.
    kept: usize,
    rows: u64,
    faults: u64,
    flops: f64,
    files: usize,
    /// Files that were there already.
    files_kept: usize,
    micro_batch_rows: usize,
}

/// # Errors
/// Those of indexing, of loading the model, of reading and of writing.
pub async fn run(config: &Config, args: &EmbedArgs) -> Result<String> {
    let (stores, state) = open_state(config)?;
    let requests = args.sources.iter().map(|uri| SourceRequest {
        uri: uri.clone(),
        weight: 1.0,
        image_column: args.image_column.clone().or(args.text_column.clone()),
        image_root: args.image_root.clone(),
        caption_column: args.caption_column.clone().or(args.target_column.clone()),
        is_target: args.target_column.is_some(),
        is_text: args.text_column.is_some(),
        caption_seed: args.caption_seed,
        predicate: args.predicate.clone(),
        allow: args.allow.clone(),
        id_column: args.id_column.clone(),
        scores: args.scores.clone(),
    });
    let requests: Vec<SourceRequest> = requests.collect();
    let manifest = Arc::new(dataset::index(&stores, Some(&state), &requests).await?);
    let worker = Worker::new(&config.worker, stores.clone(), state.clone())?;
    let asked = asked(args, manifest.save(&state).await?, &worker.info().device)?;
    let embedder = worker.embedder(asked.clone()).await?;
    check_gives(args, embedder.gives_losses(), embedder.reads_texts())?;
    let about = About {
        manifest: asked.manifest.clone(),
        model: embedder.digest().to_owned(),
        resolution: args.resolution,
        dtype: asked.dtype.as_str_name().to_owned(),
        fidelity: Some(embedder.fidelity()),
        compute_dtype: Some(embedder.compute_dtype().to_owned()),
    };
    let out = match &args.out {
        Some(out) => Some(Out::open(stores.open(&uri_of(out)?)?, &about).await?),
        None => None,
    };
    let done = Done {
        micro_batch_rows: asked.micro_batch_rows,
        ..embed(&manifest, &embedder, asked.dtype, out.as_ref()).await?
    };
    Ok(if args.json {
        format!("{}\n", done.json(&about))
    } else {
        done.text(&about, state.uri(), args.out.as_deref())
    })
}

/// Refuses what a model cannot be asked for: of losses per example there are no embeddings to
/// write, and runs keep them in f32.
fn check_gives(args: &EmbedArgs, gives_losses: bool, reads_texts: bool) -> Result<()> {
    let problem = match (gives_losses, args.target_column.is_some()) {
        (true, false) => "it gives losses of examples and their targets; name --target-column",
        (false, true) => "it gives embeddings, and has no use for targets; leave them out",
        (true, _) if reads_texts && args.text_column.is_none() => {
            "it reads texts; name their column with --text-column"
        }
        (true, _) if !reads_texts && args.text_column.is_some() => {
            "it reads images; leave --text-column out"
        }
        (true, _) if args.out.is_some() => {
            "it gives losses of examples, which are kept for runs and not written elsewhere; leave \
             --out out"
        }
        (true, _) if matches!(args.embedding_dtype, Width::F16) => {
            "it gives losses of examples, which runs keep in f32; set --embedding-dtype f32"
        }
        _ => return Ok(()),
    };
    Err(Error::invalid(
        "model",
        format!("{}: {problem}", args.model),
    ))
}

fn asked(args: &EmbedArgs, manifest: String, device: &str) -> Result<Asked> {
    let by = args.resolution.map(By::Resolution);
    let by = by.or(args.patch.map(By::Patch));
    let by = by.or(args.patch_dropout.map(By::PatchDropout));
    let by = by.or(args.layers.map(By::Layers));
    Ok(Asked {
        manifest,
        model: ModelRef {
            model_uri: uri_of(&args.model)?,
            compute_dtype: match args.compute_dtype {
                None => ComputeDtype::Unspecified,
                Some(Arithmetic::F32) => ComputeDtype::F32,
                Some(Arithmetic::Bf16) => ComputeDtype::Bf16,
            }
            .into(),
            ..Default::default()
        },
        approximation: by.map(|by| Approximation { by: Some(by) }),
        dtype: match args.embedding_dtype {
            Width::F16 => EmbeddingDtype::F16,
            Width::F32 => EmbeddingDtype::F32,
        },
        micro_batch_rows: match args.micro_batch_rows {
            Some(rows) => rows,
            None => spec::micro_batch_rows_on(device),
        } as usize,
    })
}

/// Embeds shard by shard, so that a file is written once its last block is there.
async fn embed(
    manifest: &Manifest,
    embedder: &Embedder<'_>,
    dtype: EmbeddingDtype,
    out: Option<&Out>,
) -> Result<Done> {
    let (mut done, total) = (Done::default(), manifest.rows());
    let mut progress = Progress::begin(total);
    for (number, source) in (0u32..).zip(&manifest.sources) {
        for (shard_number, shard) in (0u32..).zip(&source.shards) {
            let several = manifest.sources.len() > 1;
            let mut writer = match out {
                Some(out) => {
                    out.shard(several.then_some(number), &shard.path, dtype)
                        .await?
                }
                None => None,
            };
            done.files_kept += usize::from(out.is_some() && writer.is_none());
            // Of some row groups `where` and `allow` leave no row.
            let blocks = (0u32..)
                .zip(&shard.blocks)
                .filter(|(_, about)| about.rows > 0);
            let blocks = blocks.map(|(block, about)| {
                let rows = BlockRows {
                    source: number,
                    shard: shard_number,
                    block,
                    rows: (0..about.rows).collect(),
                };
                async move { Ok::<_, Error>((about, embedder.block(rows).await?)) }.boxed()
            });
            let mut blocks = stream::iter(blocks.collect::<Vec<_>>()).buffered(AHEAD);
            while let Some((about, embedded)) = blocks.try_next().await? {
                done.blocks += 1;
                done.kept += usize::from(embedded.was_kept);
                done.rows += u64::from(about.rows);
                done.faults += embedded.faults.len() as u64;
                done.flops += embedded.flops;
                tell(&mut progress, done.rows);
                if let Some(writer) = &mut writer {
                    writer.push(about, embedded).await?;
                }
            }
            if let Some(writer) = writer {
                writer.finish().await?;
                done.files += 1;
            }
        }
    }
    Ok(done)
}

fn tell(progress: &mut Progress, rows: u64) {
    if let Some(pace) = progress.due(rows) {
        tracing::info!(
            rows,
            of = progress.total,
            rows_a_second = pace.per_second.round(),
            seconds_left = pace.seconds_left,
            "embedding"
        );
    }
}

impl Done {
    fn text(&self, about: &About, state: &str, out: Option<&str>) -> String {
        let mut text = format!(
            "{} in {}, {} of them kept already; {} rows cannot be used; {:.3e} FLOPs\n\
             reference embeddings of model {} for manifest {} are in {state}\n",
            counted(self.rows as usize, "row"),
            counted(self.blocks, "block"),
            self.kept,
            self.faults,
            self.flops,
            about.model,
            about.manifest,
        );
        if let Some(out) = out {
            text.push_str(&format!(
                "{} written to {out}, {} were there already\n",
                counted(self.files, "file"),
                self.files_kept
            ));
        }
        text
    }

    fn json(&self, about: &About) -> serde_json::Value {
        json!({
            "manifest": about.manifest,
            "model": about.model,
            "blocks": self.blocks,
            "blocks_kept": self.kept,
            "rows": self.rows,
            "faults": self.faults,
            "flops": self.flops,
            "files": self.files,
            "files_kept": self.files_kept,
            "micro_batch_rows": self.micro_batch_rows,
        })
    }
}
