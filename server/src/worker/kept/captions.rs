//! Reads text columns whose bytes may not be UTF-8. Arrow refuses a whole block for one such text;
//! here it costs its row only.
use arrow::{
    array::{Array, ArrayRef, AsArray, BinaryArray, RecordBatch, StringArray},
    buffer::{Buffer, NullBuffer, OffsetBuffer},
    datatypes::{DataType, Field, Schema},
    error::ArrowError,
};
use parquet::{
    arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions},
    basic::Type as Physical,
    errors::ParquetError,
    file::metadata::{FileMetaData, ParquetMetaData},
    schema::types::{SchemaDescriptor, Type},
};
use std::sync::Arc;

/// The bytes behind the null of a caption that is not UTF-8. A caption that is null in the file has
/// no bytes, so the length distinguishes the two without another column.
const MARK: &str = "\u{FFFD}";

/// Returns a footer by which `columns` are read as bytes, and everything else as before.
pub fn as_bytes(
    footer: &ArrowReaderMetadata,
    columns: &[&str],
) -> Result<ArrowReaderMetadata, ParquetError> {
    let file = footer.metadata().file_metadata();
    let root = file.schema_descr().root_schema();
    let untyped = |field: &Arc<Type>| match columns.contains(&field.name()) && field.is_primitive()
    {
        true => {
            let repetition = field.get_basic_info().repetition();
            Type::primitive_type_builder(field.name(), Physical::BYTE_ARRAY)
                .with_repetition(repetition)
                .build()
                .map(Arc::new)
        }
        false => Ok(field.clone()),
    };
    let fields = root
        .get_fields()
        .iter()
        .map(untyped)
        .collect::<Result<Vec<_>, _>>()?;
    let root = Type::group_type_builder(root.name())
        .with_fields(fields)
        .build()?;
    let file = FileMetaData::new(
        file.version(),
        file.num_rows(),
        file.created_by().map(str::to_owned),
        None,
        Arc::new(SchemaDescriptor::new(Arc::new(root))),
        None,
    );
    let metadata = ParquetMetaData::new(file, footer.metadata().row_groups().to_vec());
    let untyped = |field: &Arc<Field>| match columns.contains(&field.name().as_str()) {
        true => Arc::new(Field::new(
            field.name(),
            DataType::Binary,
            field.is_nullable(),
        )),
        false => field.clone(),
    };
    let schema = Schema::new(
        footer
            .schema()
            .fields()
            .iter()
            .map(untyped)
            .collect::<Vec<_>>(),
    );
    ArrowReaderMetadata::try_new(
        Arc::new(metadata),
        ArrowReaderOptions::new().with_schema(Arc::new(schema)),
    )
}

/// Turns bytes into captions. Those that are not UTF-8 become null, with a mark that [`is_invalid`]
/// finds.
pub fn from_bytes(bytes: &BinaryArray) -> Result<ArrayRef, ArrowError> {
    let (mut text, mut lengths, mut valid) = (String::new(), Vec::new(), Vec::new());
    for value in bytes {
        let found = value.map(|value| std::str::from_utf8(value));
        let kept = match found {
            Some(Ok(caption)) => caption,
            Some(Err(_)) => MARK,
            None => "",
        };
        text.push_str(kept);
        lengths.push(kept.len());
        valid.push(matches!(found, Some(Ok(_))));
    }
    let offsets = OffsetBuffer::from_lengths(lengths);
    let nulls = Some(NullBuffer::from(valid));
    Ok(Arc::new(StringArray::try_new(
        offsets,
        Buffer::from_vec(text.into_bytes()),
        nulls,
    )?))
}

/// Returns whether a caption is null because it is not UTF-8.
pub fn is_invalid(captions: &StringArray, row: usize) -> bool {
    captions.is_null(row) && captions.value_length(row) > 0
}

/// Returns the extra column whose text in `row` is not UTF-8.
pub fn invalid_column(batch: &RecordBatch, row: usize) -> Option<&str> {
    const FIXED: usize = 2;
    let fields = batch.schema_ref().fields().iter().zip(batch.columns());
    let found = fields.skip(FIXED).find(|(_, column)| {
        let text = column.as_string_opt::<i32>();
        text.is_some_and(|text| is_invalid(text, row))
    });
    found.map(|(field, _)| field.name().as_str())
}
