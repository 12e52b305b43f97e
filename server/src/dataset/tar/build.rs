//! Indexes tars as a source of the manifest. Blocks are consecutive samples.
use super::{
    entries::End,
    json,
    kept::survey_kept,
    layout::{self, KEY},
    samples::Sample,
    survey::Survey,
};
use crate::{
    dataset::{
        SourceRequest, counted,
        file::{self, ShardFile},
        filter::{Filter, Seen},
        manifest::{Block, Column, Layout, Shard, SourceManifest},
    },
    error::{Error, Result},
    storage::Location,
};
use futures::{FutureExt, TryStreamExt, stream::FuturesOrdered};
use object_store::ObjectMeta;
use std::collections::{BTreeSet, VecDeque};
use superbatch_proto::v1::Reason;

/// Limits of a block. A sample that would exceed either begins the next block.
const BLOCK_MEMBERS_MAX: usize = 1024;
const BLOCK_BYTES_MAX: u64 = 64 << 20;
/// Tars that are walked at the same time.
const TARS_AT_ONCE: usize = 16;
/// An entry that a filter reads is in one of so many tars with samples, or the source is refused:
/// a mistyped name must not cost a walk through all of a large source.
const TARS_ASKED: usize = 16;

/// Indexes the source whose shards are `files` below `root`.
///
/// # Errors
/// `ColumnNotFound`, `DatasetEmpty`, and those of walking a tar.
pub(in crate::dataset) async fn index_shards(
    request: &SourceRequest,
    filter: &Filter,
    state: Option<&Location>,
    root: &Location,
    root_uri: String,
    files: Vec<(String, ObjectMeta)>,
) -> Result<SourceManifest> {
    let files = files.into_iter().map(|(path, meta)| {
        let etag = file::etag(root, &meta);
        let file = ShardFile::new(root.below(&path), meta.size, etag);
        (path, file)
    });
    let mut files: VecDeque<_> = files.collect();
    // The first tar that has samples says how all are laid out.
    let (mut source, mut first) = (Building::default(), None);
    while let Some((path, file)) = files.pop_front() {
        let survey = survey_kept(state, &file).await?;
        if !survey.samples.is_empty() {
            source.layout = Some(layout::discover(request, &file, &survey).await?);
            first = Some((path, file, survey));
            break;
        }
        source.add(Looked::empty(path, file, survey));
    }
    if let (Some(layout), Some((path, file, survey))) = (source.layout.clone(), first) {
        let layout = &layout;
        // A tar is walked and its rows are kept or left out by one future, and all of them by one
        // stream: requests of futures that nobody polls would stand still until the store takes
        // them for lost.
        let mut looks = FuturesOrdered::new();
        looks.push_back(keep(filter, layout, path, file, survey).boxed());
        loop {
            while looks.len() < TARS_AT_ONCE
                && let Some((path, file)) = files.pop_front()
            {
                looks.push_back(look(state, filter, layout, path, file).boxed());
            }
            let Some(looked) = looks.try_next().await? else {
                break;
            };
            source.add(looked);
            if source.with_samples == TARS_ASKED {
                let these = format!("the first {TARS_ASKED} tars of {}", request.uri);
                if let Some(error) = filter.missing(&source.seen, &these) {
                    return Err(error);
                }
            }
        }
    }
    source.finish(request, filter, root_uri)
}

async fn look(
    state: Option<&Location>,
    filter: &Filter,
    layout: &Layout,
    path: String,
    file: ShardFile,
) -> Result<Looked> {
    let survey = survey_kept(state, &file).await?;
    keep(filter, layout, path, file, survey).await
}

/// A source under construction. Its shards are added in the order of their paths.
#[derive(Default)]
struct Building {
    layout: Option<Layout>,
    fields: BTreeSet<String>,
    shards: Vec<Shard>,
    /// Tars whose samples are rows, before the filter.
    with_samples: usize,
    seen: Seen,
}

impl Building {
    fn add(&mut self, looked: Looked) {
        let Looked {
            path,
            file,
            survey,
            blocks,
            outside,
            seen,
        } = looked;
        self.seen.add(seen);
        self.with_samples += usize::from(!blocks.is_empty());
        let members = survey.samples.iter().flat_map(|sample| &sample.members);
        for member in members {
            if !self.fields.contains(&member.field) {
                self.fields.insert(member.field.clone());
            }
        }
        let rows: u64 = blocks.iter().map(|block| u64::from(block.rows)).sum();
        let flaw = match survey.end {
            End::Whole => None,
            End::Unmarked(0) => Some("it is empty".to_owned()),
            End::Unmarked(at) => Some(format!(
                "it has no end mark, and may have been cut off at byte {at}"
            )),
            End::Cut(at) => Some(format!("it ends in the middle of the member at byte {at}")),
            End::Damaged(at) => Some(format!("there is no tar header at byte {at}")),
        };
        if let Some(flaw) = &flaw {
            tracing::warn!(shard = file.uri(), flaw, "only the samples before are rows");
        }
        self.shards.push(Shard {
            path,
            size: file.size(),
            etag: file.etag().map(str::to_owned),
            blocks,
            left_out: survey.samples.len() as u64 - rows - outside,
            without_image: 0,
            outside,
            not_downloaded: 0,
            flaw,
        });
    }

    fn finish(
        self,
        request: &SourceRequest,
        filter: &Filter,
        root_uri: String,
    ) -> Result<SourceManifest> {
        let column = |name: &str| Column {
            name: name.to_owned(),
            data_type: layout::type_of(name).to_string(),
            differs_in: None,
        };
        let names = std::iter::once(KEY).chain(self.fields.iter().map(String::as_str));
        let columns = names.map(column).collect();
        let blocks = self.shards.iter().flat_map(|shard| &shard.blocks);
        let rows: u64 = blocks.map(|block| u64::from(block.rows)).sum();
        let outside = self.shards.iter().map(|shard| shard.outside).sum();
        if let Some(error) = filter.missing(&self.seen, &request.uri) {
            return Err(error);
        }
        match self.layout {
            Some(layout) if rows > 0 => Ok(SourceManifest {
                uri: request.uri.clone(),
                root_uri,
                weight: request.weight,
                layout,
                columns,
                shards: self.shards,
                kept_by: filter.kept_by(),
                scores: None,
            }),
            _ => {
                let message = format!(
                    "{} has no sample with an image and a caption in its {}{}",
                    request.uri,
                    counted(self.shards.len(), "tar"),
                    filter.left_out_hint(outside)
                );
                Err(Error::new(Reason::DatasetEmpty, message).with("source", &request.uri))
            }
        }
    }
}

/// A shard that was walked, and what of it is kept.
struct Looked {
    path: String,
    file: ShardFile,
    survey: Survey,
    blocks: Vec<Block>,
    /// Rows that are left out.
    outside: u64,
    seen: Seen,
}

impl Looked {
    /// A tar without samples.
    fn empty(path: String, file: ShardFile, survey: Survey) -> Self {
        Self {
            path,
            file,
            survey,
            blocks: Vec::new(),
            outside: 0,
            seen: Seen::default(),
        }
    }
}

async fn keep(
    filter: &Filter,
    layout: &Layout,
    path: String,
    file: ShardFile,
    survey: Survey,
) -> Result<Looked> {
    let mut looked = Looked::empty(path, file, survey);
    looked.blocks = blocks(&looked.survey.samples, layout);
    if !filter.entries().is_empty() {
        keep_rows(filter, layout, &mut looked).await?;
    }
    Ok(looked)
}

/// Takes the rows that `filter` leaves out from the blocks of a tar.
async fn keep_rows(filter: &Filter, layout: &Layout, looked: &mut Looked) -> Result<()> {
    let (file, survey) = (&looked.file, &looked.survey);
    let entries = json::entries(file, survey, layout, &filter.entries()).await?;
    let kept = filter.keep_samples(file, &entries)?;
    looked.seen = entries.seen();
    let mut rest = kept.as_slice();
    for block in &mut looked.blocks {
        let (these, after) = rest.split_at(block.rows as usize);
        rest = after;
        block.keep(these);
        looked.outside += these.len() as u64 - u64::from(block.rows);
    }
    Ok(())
}

/// Cuts the samples that are rows into blocks.
pub(super) fn blocks(samples: &[Sample], layout: &Layout) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let (mut first_row, mut members) = (0, 0);
    for sample in samples
        .iter()
        .filter(|sample| layout::is_row(layout, sample))
    {
        let fits = |block: &&mut Block| {
            members + sample.members.len() <= BLOCK_MEMBERS_MAX
                && sample.end - block.bytes.0 <= BLOCK_BYTES_MAX
        };
        match blocks.last_mut().filter(fits) {
            Some(block) => {
                block.rows += 1;
                block.bytes.1 = sample.end;
                members += sample.members.len();
            }
            None => {
                blocks.push(Block {
                    rows: 1,
                    first_row,
                    bytes: (sample.start, sample.end),
                    mask: None,
                });
                members = sample.members.len();
            }
        }
        first_row += 1;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{manifest::Format, tar::samples::Member};

    fn sample(start: u64, fields: &[&str], length: u64) -> Sample {
        let member = |field: &&str| Member {
            field: (*field).to_owned(),
            offset: start,
            length,
        };
        Sample {
            key: start.to_string(),
            start,
            end: start + length * fields.len() as u64,
            members: fields.iter().map(member).collect(),
        }
    }

    #[test]
    fn blocks_end_at_a_number_of_members_and_of_bytes() {
        let layout = Layout {
            image_column: "jpg;png".into(),
            image_in_struct: false,
            image_root: None,
            caption_column: "txt".into(),
            caption_seed: None,
            format: Format::Tar,
        };
        let fields = ["jpg", "txt", "json"];
        let mut samples: Vec<_> = (0..700).map(|n| sample(n * 30, &fields, 10)).collect();
        samples.push(sample(21_000, &["jpg", "json"], 10));
        samples.push(sample(21_020, &fields, BLOCK_BYTES_MAX));
        samples.push(sample(21_020 + 3 * BLOCK_BYTES_MAX, &["png", "txt"], 10));
        let found = blocks(&samples, &layout);
        let rows: Vec<_> = found
            .iter()
            .map(|block| (block.first_row, block.rows))
            .collect();
        // 341 samples of 3 members are 1,023; the one without a caption is no row.
        assert_eq!(rows, [(0, 341), (341, 341), (682, 18), (700, 1), (701, 1)]);
        assert_eq!(found[1].bytes, (341 * 30, 682 * 30));
        assert_eq!(found[3].bytes, (21_020, 21_020 + 3 * BLOCK_BYTES_MAX));
    }
}
