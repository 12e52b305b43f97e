//! A row as it is stored, and as a model takes it.
use super::{captions, images, preprocess::RowFault};
use crate::error::Result;
use arrow::{
    array::{Array, AsArray, BinaryArray, StringArray},
    record_batch::RecordBatch,
};
use std::sync::Arc;
use superbatch_proto::v1::BadRowReason;

/// One row of a batch in the data schema.
#[derive(Debug, Clone)]
pub struct Row {
    pub batch: Arc<RecordBatch>,
    pub row: usize,
}

/// What a model takes of one row: RGB pixels and token ids.
#[derive(Debug)]
pub struct Prepared {
    /// Of an image of any shape, its patches one after the other, without padding.
    pub pixels: Vec<u8>,
    /// Rows and columns of patches, of an image of any shape.
    pub grid: Option<[u32; 2]>,
    pub ids: Vec<i64>,
    /// A hash of the image as it is stored; 0 where nothing depends on it.
    pub key: u64,
}

/// A row as its model takes it, or what is wrong with it.
pub type PreparedRow = Result<Arc<Prepared>, RowFault>;

impl Prepared {
    pub fn bytes(&self) -> usize {
        self.pixels.len() + size_of_val(self.ids.as_slice())
    }
}

impl Row {
    /// Returns the encoded image; `None` if it is null.
    pub fn image(&self) -> Option<&[u8]> {
        let column = self.batch.column_by_name("image")?;
        if let Some(views) = column.as_binary_view_opt() {
            return views.is_valid(self.row).then(|| views.value(self.row));
        }
        let column = self.images()?;
        column.is_valid(self.row).then(|| column.value(self.row))
    }

    /// Returns why there is no image. Only a block as it was read tells more than that it is null.
    pub fn image_fault(&self) -> RowFault {
        let fault = self
            .images()
            .and_then(|column| images::fault(column, self.row));
        match fault {
            Some((reason, detail)) => RowFault::new(reason, detail),
            None => RowFault::new(BadRowReason::ImageNull, "the image is null"),
        }
    }

    fn images(&self) -> Option<&BinaryArray> {
        self.batch.column_by_name("image")?.as_binary_opt::<i32>()
    }

    /// Returns the caption; `None` if it is null or not UTF-8.
    pub fn caption(&self) -> Option<&str> {
        let column = self.captions()?;
        column.is_valid(self.row).then(|| column.value(self.row))
    }

    /// Returns whether the caption is null because it is not UTF-8. Only a block as it was read
    /// tells; rows copied out of it have lost the mark.
    pub fn caption_is_invalid(&self) -> bool {
        self.captions()
            .is_some_and(|captions| captions::is_invalid(captions, self.row))
    }

    /// Returns whether the caption is null because its list has none, as above.
    pub fn has_no_caption(&self) -> bool {
        self.captions()
            .is_some_and(|captions| captions::has_none(captions, self.row))
    }

    fn captions(&self) -> Option<&StringArray> {
        self.batch.column_by_name("caption")?.as_string_opt::<i32>()
    }
}
