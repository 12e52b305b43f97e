//! `superbatch index`: indexes a data set ahead of its run and writes the manifest into the state.
use super::ConfigArgs;
use crate::{
    dataset::{self, LARGE_BLOCK_ROWS, Manifest, Shard, SourceManifest, SourceRequest, counted},
    error::{Error, Result},
    storage::{Location, Stores},
};
use serde_json::json;
use std::{fmt::Write, sync::Arc};

/// Indexes data sets and writes the manifest, which a run of the same sources then finds.
#[derive(Debug, Clone, clap::Args)]
pub struct IndexArgs {
    /// URIs of Parquet files or tars, of folders of them, of a .txt file that lists URIs, or
    /// patterns such as s3://bucket/{00000..00041}.tar; several URIs joined by :: are one source
    #[arg(required = true, value_name = "SOURCE")]
    pub sources: Vec<String>,
    /// The column that holds the images, if the layout does not tell; of tars endings: 'jpg;png'
    #[arg(long, value_name = "COLUMN")]
    pub image_column: Option<String>,
    /// The folder that the images lie below, if the data has paths in place of images:
    /// s3://bucket/images
    #[arg(long, value_name = "URI")]
    pub image_root: Option<String>,
    /// The column that holds the captions, if the layout does not tell; of tars an ending, or
    /// an entry of a JSON: 'json[caption]'
    #[arg(long, value_name = "COLUMN")]
    pub caption_column: Option<String>,
    /// The source's `target_column`, of runs with the loss per_example
    #[arg(long, value_name = "COLUMN", conflicts_with = "caption_column")]
    pub target_column: Option<String>,
    /// The source's `text_column`, of runs with the loss per_example whose models read texts
    #[arg(long, value_name = "COLUMN", requires = "target_column",
        conflicts_with_all = ["image_column", "image_root"])]
    pub text_column: Option<String>,
    /// By which one caption is drawn of each row that has a list of them [default: 0]
    #[arg(long, value_name = "SEED")]
    pub caption_seed: Option<u64>,
    /// Rows that are candidates: "similarity > 0.3 and language = 'en'". Columns of Parquet files,
    /// or entries of the json of a tar's samples
    #[arg(long = "where", value_name = "PREDICATE")]
    pub predicate: Option<String>,
    /// The ids of the rows that are candidates: a .npy file of uids, as DataComp's, or Parquet
    /// files
    #[arg(long, value_name = "URI")]
    pub allow: Option<String>,
    /// The column that holds the ids [default: uid]
    #[arg(long, value_name = "COLUMN")]
    pub id_column: Option<String>,
    #[command(flatten)]
    pub settings: ConfigArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Indexes, saves the manifest, and describes what was found.
///
/// # Errors
/// As [`dataset::index`], and `StorageUnreachable` for the state.
pub async fn run(stores: &Stores, state: &Location, args: &IndexArgs) -> Result<String> {
    let request = |uri: &String| SourceRequest {
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
        scores: None,
    };
    let requests: Vec<SourceRequest> = args.sources.iter().map(request).collect();
    let manifest = Arc::new(dataset::index(stores, Some(state), &requests).await?);
    let digest = manifest.save(state).await?;
    if !args.json {
        return Ok(text(&digest, &manifest));
    }
    let sources = manifest.sources.iter().map(|source| {
        json!({
            "uri": source.uri,
            "shards": source.shards.len(),
            "blocks": source.blocks().count(),
            "block_rows_max": block_rows_max(source),
            "rows": source.rows(),
            "left_out": sum(source, |shard| shard.left_out),
            "without_image": sum(source, |shard| shard.without_image),
            "outside": sum(source, |shard| shard.outside),
            "not_downloaded": sum(source, |shard| shard.not_downloaded),
            "kept_by": source.kept_by,
            "flaws": flaws(source).collect::<Vec<_>>(),
            "image_column": source.layout.image_column,
            "image_root": source.layout.image_root,
            "caption_column": source.layout.caption_column,
            "caption_seed": source.layout.caption_seed,
            "columns": source.columns,
        })
    });
    let sources = sources.collect::<Vec<_>>();
    let summary = json!({"digest": digest, "rows": manifest.rows(), "sources": sources});
    let line = serde_json::to_string(&summary)
        .map_err(|e| Error::internal("cannot write the summary").because(e))?;
    Ok(line + "\n")
}

fn sum(source: &SourceManifest, of: impl Fn(&Shard) -> u64) -> u64 {
    source.shards.iter().map(of).sum()
}

/// Returns how many rows the largest block has in its file.
fn block_rows_max(source: &SourceManifest) -> u32 {
    let rows = source.blocks().map(|(_, _, block)| block.stored_rows());
    rows.max().unwrap_or_default()
}

/// Returns the flaws of shards of which only what comes before the flaw is read.
fn flaws(source: &SourceManifest) -> impl Iterator<Item = String> {
    let flaw = |shard: &Shard| Some(format!("{}: {}", shard.path, shard.flaw.as_ref()?));
    source.shards.iter().filter_map(flaw)
}

fn text(digest: &str, manifest: &Manifest) -> String {
    let mut text = format!(
        "dataset manifest {digest}\n{}\n",
        counted(manifest.rows() as usize, "row")
    );
    for source in &manifest.sources {
        describe(&mut text, source).expect("a String takes any text");
    }
    text
}

type Count = fn(&Shard) -> u64;

fn describe(text: &mut String, source: &SourceManifest) -> std::fmt::Result {
    writeln!(text, "\n{}", source.uri)?;
    let (shards, blocks) = (
        counted(source.shards.len(), "shard"),
        counted(source.blocks().count(), "block"),
    );
    writeln!(
        text,
        "  {shards}, {blocks}, {}",
        counted(source.rows() as usize, "row")
    )?;
    writeln!(
        text,
        "  image in '{}', caption in '{}'",
        source.layout.image_column, source.layout.caption_column
    )?;
    if let Some(root) = &source.layout.image_root {
        writeln!(text, "  images are paths below {root}")?;
    }
    if let Some(seed) = source.layout.caption_seed {
        writeln!(
            text,
            "  of each list of captions one, drawn by the seed {seed}"
        )?;
    }
    let counts: [(Count, &str, &str); 4] = [
        (
            |shard| shard.left_out,
            "sample",
            "without image or caption left out",
        ),
        (
            |shard| shard.not_downloaded,
            "row",
            "that could not be downloaded left out",
        ),
        (
            |shard| shard.outside,
            "row",
            "outside where and allow left out",
        ),
        (
            |shard| shard.without_image,
            "row",
            "without an image, which cannot be chosen",
        ),
    ];
    for (count, noun, what) in counts {
        match sum(source, count) {
            0 => {}
            count => writeln!(text, "  {} {what}", counted(count as usize, noun))?,
        }
    }
    describe_large_groups(text, source)?;
    for flaw in flaws(source) {
        writeln!(text, "  only what comes before is read of {flaw}")?;
    }
    for column in &source.columns {
        match &column.differs_in {
            None => writeln!(text, "  {}: {}", column.name, column.data_type)?,
            Some(shard) => writeln!(
                text,
                "  {}: {}, but not in {shard}",
                column.name, column.data_type
            )?,
        }
    }
    Ok(())
}

/// Tells of large row groups. Blocks of tars, and of images by path, are small.
fn describe_large_groups(text: &mut String, source: &SourceManifest) -> std::fmt::Result {
    match block_rows_max(source) {
        0..=LARGE_BLOCK_ROWS => Ok(()),
        rows => writeln!(
            text,
            "  row groups of up to {rows} rows, which steps read as a whole: write groups of a few \
             hundred rows (row_group_size in pyarrow)"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::fixtures::{img2dataset, parquet, put, stores};

    #[tokio::test]
    async fn it_says_what_it_found_and_saves_it() {
        let stores = stores();
        put(&stores, &[("0.parquet", parquet(&img2dataset(0..5), 2))]).await;
        let state = stores.open("memory:///state").unwrap();
        let mut args = IndexArgs {
            sources: vec!["memory:///data".into()],
            image_column: None,
            image_root: None,
            caption_column: None,
            target_column: None,
            text_column: None,
            caption_seed: None,
            predicate: None,
            allow: None,
            id_column: None,
            settings: ConfigArgs::default(),
            json: false,
        };
        let text = run(&stores, &state, &args).await.unwrap();
        assert!(
            text.contains("1 shard, 3 blocks, 5 rows") && text.contains("image in 'jpg'"),
            "{text}"
        );
        args.json = true;
        let line = run(&stores, &state, &args).await.unwrap();
        assert!(line.ends_with("}\n"));
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        let manifest = Manifest::load(&state, json["digest"].as_str().unwrap())
            .await
            .unwrap();
        assert_eq!(json["rows"], manifest.rows());
    }
}
