//! The schema of a run's batches: the data columns of its sources under fixed names, and the
//! columns that selection adds.
use super::{
    Format, Manifest, SourceManifest,
    layout::{mismatch, not_found},
    manifest::Column,
    tar, unify,
};
use crate::error::{Error, Result};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use std::{collections::HashSet, sync::Arc};
use superbatch_proto::columns as own;

impl Manifest {
    /// Returns `image: binary`, `caption: utf8`, then `columns` in their order with the type that
    /// all sources share. Every field may be null.
    ///
    /// # Errors
    /// `ColumnNotFound` listing the columns there are; `SchemaMismatch` naming source and column;
    /// `InvalidArgument` for a name that is taken.
    pub fn data_schema(&self, columns: &[String]) -> Result<SchemaRef> {
        Ok(Arc::new(Schema::new(self.data_fields(columns)?)))
    }

    /// Returns [`Manifest::data_schema`], then `_superbatch_id: utf8`, `_superbatch_position:
    /// uint64`, `_superbatch_score: float64`, `_superbatch_fidelity: utf8` and `_superbatch_weight:
    /// float64`, which are never null.
    ///
    /// # Errors
    /// As [`Manifest::data_schema`].
    pub fn output_schema(&self, columns: &[String]) -> Result<SchemaRef> {
        let mut fields = self.data_fields(columns)?;
        for (name, data_type) in [
            (own::ID, DataType::Utf8),
            (own::POSITION, DataType::UInt64),
            (own::SCORE, DataType::Float64),
            (own::FIDELITY, DataType::Utf8),
            (own::WEIGHT, DataType::Float64),
        ] {
            fields.push(Field::new(name, data_type, false));
        }
        Ok(Arc::new(Schema::new(fields)))
    }

    /// Returns the columns that say where a row's image lies: its bytes in a tar, and if images of
    /// some source lie below a root, their URIs.
    pub fn image_place_fields(&self) -> Vec<Field> {
        let mut fields: Vec<Field> = [own::IMAGE_OFFSET, own::IMAGE_LENGTH]
            .map(|name| Field::new(name, DataType::UInt64, true))
            .into();
        let mut layouts = self.sources.iter().map(|source| &source.layout);
        if layouts.any(|layout| layout.image_root.is_some()) {
            fields.push(Field::new(own::IMAGE_URI, DataType::Utf8, true));
        }
        fields
    }

    fn data_fields(&self, columns: &[String]) -> Result<Vec<Field>> {
        let mut fields = vec![
            Field::new("image", DataType::Binary, true),
            Field::new("caption", DataType::Utf8, true),
        ];
        let mut taken = HashSet::from(["image", "caption"]);
        for column in columns {
            if column.starts_with(own::OWN) || !taken.insert(column) {
                let message = format!(
                    "the extra column '{column}' has the name of another column of the output; \
                    leave it out"
                );
                return Err(Error::invalid("columns", message).with("column", column));
            }
            fields.push(Field::new(column, self.column_type(column)?, true));
        }
        Ok(fields)
    }

    /// Returns the type of `column` in all shards of all sources.
    fn column_type(&self, column: &str) -> Result<DataType> {
        let mut found: Option<DataType> = None;
        for source in &self.sources {
            let data_type = source.column_type(column)?;
            let first = found.as_ref().unwrap_or(&data_type);
            let Some(both) = unify::unify(first, &data_type) else {
                let message = format!(
                    "column '{column}' is {data_type} in {} and {first} in {}; leave it out or \
                     write it alike",
                    source.uri, self.sources[0].uri
                );
                return Err(mismatch(message, &source.uri, column));
            };
            found = Some(both);
        }
        found.ok_or_else(|| Error::internal("a manifest without sources"))
    }
}

impl SourceManifest {
    /// Returns whether rows hold texts in the place of images.
    pub fn has_texts(&self) -> bool {
        let layout = &self.layout;
        let is_text = |column: &Column| {
            column.name == layout.image_column && column.data_type.contains("Utf8")
        };
        layout.format == Format::Parquet
            && layout.image_root.is_none()
            && !layout.image_in_struct
            && self.columns.iter().any(is_text)
    }

    fn column_type(&self, column: &str) -> Result<DataType> {
        let named = self.columns.iter().map(|column| column.name.as_str());
        if let (Format::Tar, Some(found)) = (self.layout.format, tar::member_type(column, named)) {
            return Ok(found);
        }
        let Some(found) = self.columns.iter().find(|c| c.name == column) else {
            let available: Vec<&str> = self.columns.iter().map(|c| c.name.as_str()).collect();
            return Err(not_found(
                format!("{} has no column '{column}'", self.uri),
                column,
                &available,
            ));
        };
        if let Some(shard) = &found.differs_in {
            let message = format!(
                "column '{column}' of {} is missing or of another type in {shard}; leave it out \
                or write it alike",
                self.uri
            );
            return Err(mismatch(message, &self.uri, column).with("shard", shard));
        }
        let found = found.data_type.parse().map_err(|e| {
            mismatch(
                format!(
                    "column '{column}' of {} has a type that cannot be delivered",
                    self.uri
                ),
                &self.uri,
                column,
            )
            .because(e)
        });
        // Manifests of earlier builds have lists of categories.
        found.map(|found: DataType| unify::plain(&found))
    }
}
