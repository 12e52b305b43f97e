//! Decodes a block: the needed columns of one row group, or of a part of it, under the names and
//! with the types that are delivered.
use crate::{
    caught::caught,
    dataset::{Block, Layout, Ranges, TarBlock, row_group_of},
    worker::inputs::{captions, images},
};
use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, RecordBatch, RecordBatchOptions, RecordBatchReader,
        StringArray, new_null_array,
    },
    compute::{cast, concat_batches, nullif},
    datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef},
    error::ArrowError,
};
use parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{
            ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection,
        },
    },
    basic::Compression,
    errors::ParquetError,
    file::metadata::RowGroupMetaData,
};
use std::sync::Arc;

/// Values of up to so many bytes lie in their view, and refer to no other memory.
const INLINE_BYTES_MAX: usize = 12;

/// The columns and types to read of a block.
pub(super) struct Wanted {
    pub layout: Layout,
    pub columns: Vec<String>,
    pub schema: SchemaRef,
    /// Whether images may stay views of the file's bytes, which are of another type than in
    /// `schema`.
    pub keeps_views: bool,
    /// The block's number in its shard.
    pub number: usize,
    pub block: Block,
}

/// Rows of a Parquet file: a part of a row group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub group: usize,
    /// Rows of the group before it.
    pub first: usize,
    /// Rows of the group.
    pub of: usize,
}

impl Part {
    /// Returns the part of a row group that a block is; `None` if the groups are others than those
    /// of which the block was made.
    pub(super) fn of(groups: &[RowGroupMetaData], wanted: &Wanted) -> Option<Self> {
        let (group, first) = row_group_of(groups, &wanted.block)?;
        let of = usize::try_from(groups[group].num_rows()).ok()?;
        let stored = wanted.block.stored_rows() as usize;
        let is_whole = group == wanted.number && stored == of;
        (is_whole || wanted.layout.image_root.is_some()).then_some(Self { group, first, of })
    }
}

/// A block as it was decoded: its rows in the data schema, and the paths of images that are not in
/// the file.
pub(super) type Decoded = (RecordBatch, Option<StringArray>);

impl Wanted {
    pub(super) fn decode(
        &self,
        bytes: &Ranges,
        footer: &ArrowReaderMetadata,
        mask: &ProjectionMask,
        part: Part,
    ) -> Result<Decoded, ArrowError> {
        let is_plain = self.has_plain_images(footer, mask, part);
        let views = is_plain.then(|| self.viewing(footer).ok()).flatten();
        let views = views.unwrap_or_else(|| footer.clone());
        let cause = match self.read(bytes, views, mask, part) {
            Ok(batch) => {
                // Views that stay hold all that was read: other rows and columns, too.
                let is_whole = self.block.rows as usize == part.of;
                let images = batch.column_by_name(&self.layout.image_column);
                let is_most = 4 * images.map_or(0, viewed_bytes) >= 3 * bytes.bytes();
                let keeps_views = self.keeps_views && is_plain && is_whole && is_most;
                return self.assemble(&batch, keeps_views);
            }
            Err(cause) => cause,
        };
        // Arrow's reader checks text columns as a whole, so one text that is not UTF-8 fails the
        // block. The second pass reads them as bytes, so that the bad text costs its row only. It
        // runs only after a failure, because it copies every text once more. Its own error is
        // dropped for the first one, which names the true cause.
        let fields = self.schema.fields().iter().skip(2).zip(&self.columns);
        let texts = fields.filter(|(field, _)| *field.data_type() == DataType::Utf8);
        let texts = texts.map(|(_, column)| column.as_str());
        let is = |name: &str, of: fn(&DataType) -> bool| {
            let field = footer.schema().field_with_name(name);
            field.is_ok_and(|field| of(field.data_type()))
        };
        let (image, caption) = (&self.layout.image_column, &self.layout.caption_column);
        // Targets may be integers.
        let caption = (!is(caption, DataType::is_integer)).then_some(caption.as_str());
        let mut texts: Vec<&str> = texts.chain(caption).collect();
        if self.layout.image_root.is_some() || is(image, is_text) {
            texts.push(image);
        }
        let as_bytes = captions::as_bytes(footer, &texts)?;
        let batch = self.read(bytes, as_bytes, mask, part);
        let batch = batch.map_err(|_| cause)?;
        self.assemble(&batch, false)
    }

    /// Returns whether the images of a row group lie in the file as they are, so that views of them
    /// take no memory beside the file's bytes. Of a compressed column the pages would all be held
    /// at once.
    fn has_plain_images(
        &self,
        footer: &ArrowReaderMetadata,
        mask: &ProjectionMask,
        part: Part,
    ) -> bool {
        let columns = footer.metadata().row_group(part.group).columns();
        columns.iter().enumerate().all(|(leaf, column)| {
            let is_image = mask.leaf_included(leaf)
                && column.column_path().parts().first() == Some(&self.layout.image_column);
            !is_image || column.compression() == Compression::UNCOMPRESSED
        })
    }

    /// Returns a footer by which images are read as views of their pages, which copies none. Views
    /// that do not stay are copied once, into memory of their size. As an array of bytes they would
    /// be copied page by page into memory that is doubled, and copied, whenever it is full, and up
    /// to half of it would stay empty for as long as the block is kept.
    fn viewing(&self, footer: &ArrowReaderMetadata) -> Result<ArrowReaderMetadata, ParquetError> {
        let (schema, name) = (footer.schema(), &self.layout.image_column);
        let fields = schema.fields().iter().map(|field| {
            if field.name() == name {
                with_views(field)
            } else {
                field.clone()
            }
        });
        let schema =
            Schema::new_with_metadata(fields.collect::<Fields>(), schema.metadata().clone());
        let options = ArrowReaderOptions::new().with_schema(Arc::new(schema));
        caught(ParquetError::General, || {
            ArrowReaderMetadata::try_new(footer.metadata().clone(), options)
        })
    }

    fn read(
        &self,
        bytes: &Ranges,
        footer: ArrowReaderMetadata,
        mask: &ProjectionMask,
        part: Part,
    ) -> Result<RecordBatch, ArrowError> {
        caught(ArrowError::ParquetError, || {
            self.rows(bytes, footer, mask, part)
        })
    }

    fn rows(
        &self,
        bytes: &Ranges,
        footer: ArrowReaderMetadata,
        mask: &ProjectionMask,
        part: Part,
    ) -> Result<RecordBatch, ArrowError> {
        let (rows, stored) = (self.block.rows as usize, self.block.stored_rows() as usize);
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), footer)
            .with_row_groups(vec![part.group])
            .with_batch_size(rows.max(1))
            .with_projection(mask.clone());
        if rows < part.of {
            let mut kept = vec![false; part.of];
            let (from, to) = (part.first, part.first + stored);
            match &self.block.mask {
                Some(mask) => kept[from..to].copy_from_slice(&mask.rows().collect::<Vec<_>>()),
                None => kept[from..to].fill(true),
            }
            let kept = RowSelection::from_filters(&[BooleanArray::from(kept)]);
            builder = builder.with_row_selection(kept);
        }
        let reader = builder.build()?;
        let schema = reader.schema();
        let batches = reader.collect::<Result<Vec<_>, _>>()?;
        concat_batches(&schema, &batches)
    }

    /// Returns the leaves to read: only the bytes or the path of an image struct, and the whole of
    /// all other columns.
    pub(super) fn projection(&self, footer: &ArrowReaderMetadata) -> ProjectionMask {
        let schema = footer.parquet_schema();
        let layout = &self.layout;
        let wanted = |leaf: usize| {
            let parts = schema.column(leaf).path().parts().to_vec();
            let root = &parts[0];
            layout.reads_for_image(&parts)
                || *root == layout.caption_column
                || self.columns.contains(root)
        };
        ProjectionMask::leaves(
            schema,
            (0..schema.num_columns()).filter(|&leaf| wanted(leaf)),
        )
    }

    /// Returns the batch with the delivered names and types. Images that are views may stay so.
    pub(super) fn assemble(
        &self,
        batch: &RecordBatch,
        keeps_views: bool,
    ) -> Result<Decoded, ArrowError> {
        let layout = &self.layout;
        let column = |name: &str| {
            let missing = || ArrowError::SchemaError(format!("no column '{name}'"));
            batch.column_by_name(name).cloned().ok_or_else(missing)
        };
        let mut image = column(&layout.image_column)?;
        let mut paths = None;
        if layout.image_root.is_some() {
            let (bytes, found) = bytes_and_paths(&image)?;
            (image, paths) = (bytes, Some(found));
        } else if layout.image_in_struct {
            image = field_of(&image, "bytes")?;
        } else if is_text(image.data_type()) {
            // Texts in the place of images. Arrow casts views and categories to bytes only by way
            // of texts.
            image = cast(&image, &DataType::Utf8)?;
        }
        let lists = batch.column_by_name(TarBlock::CAPTIONS).cloned();
        let mut caption = lists.map_or_else(|| column(&layout.caption_column), Ok)?;
        if let Some(seed) = layout.caption_seed {
            caption = captions::drawn(&caption, seed)?;
        }
        let schema = if keeps_views && *image.data_type() == DataType::BinaryView {
            images::typed(&self.schema, DataType::BinaryView)
        } else {
            self.schema.clone()
        };
        let mut arrays = vec![image, caption];
        for name in &self.columns {
            arrays.push(column(name)?);
        }
        let cast_to = |(array, field): (ArrayRef, &FieldRef)| {
            let is_bytes = matches!(
                array.data_type(),
                DataType::Binary | DataType::LargeBinary | DataType::BinaryView
            );
            if *field.data_type() == DataType::Utf8 && is_bytes {
                return captions::from_bytes(cast(&array, &DataType::Binary)?.as_binary());
            }
            to_type(&array, field.data_type())
        };
        let arrays = arrays
            .into_iter()
            .zip(schema.fields())
            .map(cast_to)
            .collect::<Result<Vec<_>, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(self.block.rows as usize));
        let batch = RecordBatch::try_new_with_options(schema.clone(), arrays, &options)?;
        Ok((batch, paths))
    }
}

/// Returns a field of bytes, or of a struct with `bytes`, with views in their place; others as they
/// are.
fn with_views(field: &FieldRef) -> FieldRef {
    let kind = match field.data_type() {
        DataType::Binary | DataType::LargeBinary => DataType::BinaryView,
        DataType::Struct(parts) => {
            let part = |part: &FieldRef| match part.name().as_str() {
                "bytes" if !part.data_type().is_nested() => with_views(part),
                _ => part.clone(),
            };
            DataType::Struct(parts.iter().map(part).collect())
        }
        kind => kind.clone(),
    };
    Arc::new(Field::clone(field).with_data_type(kind))
}

/// Returns how many bytes of other memory views refer to, in a column of images or of structs with
/// `bytes`.
fn viewed_bytes(images: &ArrayRef) -> usize {
    if let Some(parts) = images.as_struct_opt() {
        return parts.column_by_name("bytes").map_or(0, viewed_bytes);
    }
    let Some(views) = images.as_binary_view_opt() else {
        return 0;
    };
    let valid = (0..views.len()).filter(|row| views.is_valid(*row));
    let sizes = valid.map(|row| views.value(row).len());
    let referred: usize = sizes.filter(|size| *size > INLINE_BYTES_MAX).sum();
    // Rows may share an image of a dictionary.
    let held: usize = views.data_buffers().iter().map(|buffer| buffer.len()).sum();
    referred.min(held)
}

/// Casts an array.
///
/// # Errors
/// Arrow's, and for views of more bytes than one array can hold.
fn to_type(array: &ArrayRef, kind: &DataType) -> Result<ArrayRef, ArrowError> {
    if *kind == DataType::Binary {
        return cast(&images::joined(array)?, kind);
    }
    cast(array, kind)
}

fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Dictionary(_, values) => is_text(values),
        kind => kind.is_string() || *kind == DataType::Null,
    }
}

/// Returns a field of an image struct. A null struct may have values in its children, so its nulls
/// are applied.
fn field_of(image: &ArrayRef, name: &str) -> Result<ArrayRef, ArrowError> {
    let missing = || ArrowError::SchemaError(format!("the image is no struct with `{name}`"));
    let image = image.as_struct_opt().ok_or_else(missing)?;
    let field = image.column_by_name(name).ok_or_else(missing)?;
    match image.nulls() {
        None => Ok(field.clone()),
        Some(nulls) => nullif(field, &BooleanArray::new(!nulls.inner(), None)),
    }
}

/// Returns the images that a column of paths has as bytes, of a struct that has both; and the paths
/// of the others. A path that is not UTF-8 is null with a mark, as captions are.
fn bytes_and_paths(image: &ArrayRef) -> Result<(ArrayRef, StringArray), ArrowError> {
    let fields = image.as_struct_opt();
    let paths = match fields {
        Some(_) => field_of(image, "path")?,
        None => image.clone(),
    };
    let bytes = match fields.and_then(|fields| fields.column_by_name("bytes")) {
        Some(_) => to_type(&field_of(image, "bytes")?, &DataType::Binary)?,
        None => new_null_array(&DataType::Binary, image.len()),
    };
    let paths = if *paths.data_type() == DataType::Binary {
        paths
    } else {
        // Arrow casts views and categories to bytes only by way of texts.
        cast(&cast(&paths, &DataType::Utf8)?, &DataType::Binary)?
    };
    let paths = captions::some_from_bytes(paths.as_binary(), |row| bytes.is_null(row))?;
    Ok((bytes, paths))
}
