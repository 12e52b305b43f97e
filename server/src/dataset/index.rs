//! Indexes sources: their files, and the blocks of each file.
use super::{
    filter::{self, Filter},
    find::{self, FoundFiles},
    manifest::{Format, Manifest, ScoreFiles, SourceManifest},
    paths, pattern, row_groups, tar,
};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    storage::{Location, Pins, Stores},
};

/// Largest file that lists URIs, in bytes.
const LIST_BYTES_MAX: u64 = 64 << 20;

/// One source to index. An empty column name in a request is `None` here.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceRequest {
    /// A file, a folder, a pattern, a `.txt` file that lists such URIs, or several joined by `::`.
    pub uri: String,
    /// Share of each super-batch, relative to the other sources.
    pub weight: f64,
    pub image_column: Option<String>,
    /// What the paths of images are relative to, if `image_column` holds paths.
    pub image_root: Option<String>,
    pub caption_column: Option<String>,
    /// The caption column holds targets of a loss: texts, or integers.
    pub is_target: bool,
    /// The image column holds texts, which a model reads in the place of images.
    pub is_text: bool,
    /// By which one of several captions is drawn; 0 if the rows have several and none is given.
    pub caption_seed: Option<u64>,
    /// Rows of which this is not true are no candidates.
    pub predicate: Option<String>,
    /// Rows whose id is not listed at this URI are no candidates.
    pub allow: Option<String>,
    /// The column that holds the ids.
    pub id_column: Option<String>,
    /// Parquet files of ids and numbers, in which score columns are looked up.
    pub scores: Option<String>,
}

impl SourceRequest {
    /// Makes the request for a source of weight 1 of which nothing else is said.
    pub fn new(uri: &str) -> Self {
        Self {
            uri: uri.to_owned(),
            weight: 1.0,
            image_column: None,
            image_root: None,
            caption_column: None,
            is_target: false,
            is_text: false,
            caption_seed: None,
            predicate: None,
            allow: None,
            id_column: None,
            scores: None,
        }
    }
}

/// Indexes all sources: lists their files, reads every footer or header, and finds image and
/// caption. Indexes of tars are kept in `state`. The caller has checked the URIs against the
/// allow-list; URIs that a file lists are checked here. Branches and tags of the Hugging Face hub
/// are indexed at their commits, all of a branch at one, so that the manifest means the same files
/// for good.
///
/// # Errors
/// `DatasetEmpty` (also for what does not exist), `ColumnNotFound`, `SchemaMismatch`,
/// `StorageUnreachable`, `InvalidArgument` for a pattern, a weight, or a file that is not read.
pub async fn index(
    stores: &Stores,
    state: Option<&Location>,
    sources: &[SourceRequest],
) -> Result<Manifest> {
    if sources.is_empty() {
        return Err(Error::invalid(
            "sources",
            "no source is named; name at least one",
        ));
    }
    let mut indexed = Vec::with_capacity(sources.len());
    let mut pins = Pins::default();
    for request in sources {
        let pinned = pinned_files(stores, &mut pins, request).await?;
        indexed.push(index_source(stores, state, &mut pins, &pinned).await?);
    }
    Ok(Manifest {
        version: Manifest::VERSION,
        sources: indexed,
    })
}

/// Returns the request with what lies beside the data, images by path too, at its commits. Of the
/// images no other place holds their revision: each is read by its row's path below the root.
async fn pinned_files(
    stores: &Stores,
    pins: &mut Pins,
    request: &SourceRequest,
) -> Result<SourceRequest> {
    let mut pinned = request.clone();
    for uris in [&mut pinned.allow, &mut pinned.scores]
        .into_iter()
        .flatten()
    {
        if !uris.contains("hf://") {
            continue;
        }
        let mut parts = Vec::new();
        for part in pattern::parts(uris) {
            parts.push(pins.pin(stores, part).await?);
        }
        *uris = parts.join("::");
    }
    if let Some(images) = &mut pinned.image_root {
        let root = pins.pin(stores, images).await;
        *images = root.map_err(|e| e.about("image_root"))?;
    }
    Ok(pinned)
}

async fn index_source(
    stores: &Stores,
    state: Option<&Location>,
    pins: &mut Pins,
    request: &SourceRequest,
) -> Result<SourceManifest> {
    if !(request.weight.is_finite() && request.weight > 0.0) {
        let message = format!(
            "the weight {} of {} is no positive number",
            request.weight, request.uri
        );
        return Err(Error::invalid("sources.weight", message));
    }
    let mut uris = Vec::new();
    for part in pattern::parts(&request.uri) {
        if part.ends_with(".txt") {
            uris.extend(listed(stores, pins, part).await?)
        } else {
            uris.push(part.to_owned())
        }
    }
    for uri in &mut uris {
        *uri = pins.pin(stores, uri).await?;
    }
    let uri = request.uri.clone();
    // A pattern may name a million files.
    let parse = move || pattern::parse(&uri, uris.iter().map(String::as_str));
    let pattern = blocking("taking a source's URIs apart", parse).await?;
    let FoundFiles {
        root_uri,
        files,
        format,
    } = find::find(stores, state, pattern, &request.uri).await?;
    let root = stores.open(&root_uri)?;
    if let Some(images) = &request.image_root {
        stores.open(images).map_err(|e| e.about("image_root"))?;
    }
    let filter = Filter::open(stores, request).await?;
    if let (Format::Tar, Some(images)) = (format, &request.image_root) {
        let message = format!(
            "{} holds tars, whose members are the images, and not paths below {images}; leave \
             image_root out",
            request.uri
        );
        return Err(Error::invalid("sources.image_root", message).with("uri", &request.uri));
    }
    let mut source = match format {
        Format::Parquet => row_groups::index_shards(request, &filter, &root, root_uri, files).await,
        Format::Tar => tar::index_shards(request, &filter, state, &root, root_uri, files).await,
    }?;
    paths::probe(stores, &source).await?;
    if let Some(uri) = &request.scores {
        let id_column = request.id_column.as_deref().unwrap_or(filter::ID_COLUMN);
        source.scores = Some(ScoreFiles {
            uri: uri.clone(),
            id_column: id_column.to_owned(),
            digest: filter::ids::find(stores, uri).await?.digest,
        });
    }
    Ok(source)
}

/// Returns the URIs in a text file, one in each line. URIs without a scheme are relative to the
/// file's folder.
async fn listed(stores: &Stores, pins: &mut Pins, uri: &str) -> Result<Vec<String>> {
    let list = stores.open(&pins.pin(stores, uri).await?)?;
    let meta = list.head("").await?;
    let size = meta.ok_or_else(|| find::nothing_found(uri, uri))?.size;
    if size > LIST_BYTES_MAX {
        let message = format!("{uri} is no list of URIs: it has {size} bytes");
        return Err(Error::invalid("sources", message).with("uri", uri));
    }
    let bytes = list.get("").await?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|e| Error::invalid("sources", format!("{uri} is no text")).because(e))?;
    let (folder, _) = uri.rsplit_once('/').unwrap_or_default();
    let mut uris = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let named = if line.contains("://") {
            line.to_owned()
        } else {
            format!("{folder}/{line}")
        };
        stores.allow(&named)?;
        uris.push(named);
    }
    if uris.is_empty() {
        let message = format!("{uri} lists nothing; write one URI a line");
        return Err(Error::invalid("sources", message).with("uri", uri));
    }
    Ok(uris)
}
