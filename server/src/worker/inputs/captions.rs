//! Reads text columns whose bytes may not be UTF-8, and draws one caption where a row has several.
//! Arrow refuses a whole block for one text that is not UTF-8; here it costs its row only.
use arrow::{
    array::{Array, ArrayRef, AsArray, BinaryArray, RecordBatch, StringArray},
    buffer::{Buffer, NullBuffer, OffsetBuffer},
    compute::cast,
    datatypes::{DataType, Field, FieldRef, Schema},
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
/// The bytes behind the null of a caption whose list has none. Its length tells it from [`MARK`].
const NONE_MARK: &str = "-";

/// Returns a footer by which `columns` are read as bytes, and everything else as before.
pub(crate) fn as_bytes(
    footer: &ArrowReaderMetadata,
    columns: &[&str],
) -> Result<ArrowReaderMetadata, ParquetError> {
    let file = footer.metadata().file_metadata();
    let root = file.schema_descr().root_schema();
    let untyped = |field: &Arc<Type>| {
        if columns.contains(&field.name()) {
            without_type(field)
        } else {
            Ok(field.clone())
        }
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
    let untyped = |field: &Arc<Field>| {
        if columns.contains(&field.name().as_str()) {
            let bytes = bytes_for(field.data_type());
            Arc::new(Field::new(field.name(), bytes, field.is_nullable()))
        } else {
            field.clone()
        }
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

/// Returns a column with bytes in place of its texts: of a text, or of texts in a list or a struct.
fn without_type(field: &Arc<Type>) -> Result<Arc<Type>, ParquetError> {
    let info = field.get_basic_info();
    let built = if field.is_primitive() {
        Type::primitive_type_builder(field.name(), Physical::BYTE_ARRAY)
            .with_repetition(info.repetition())
            .build()
    } else {
        // A struct may have numbers beside its texts.
        let is_other =
            |part: &Type| part.is_primitive() && part.get_physical_type() != Physical::BYTE_ARRAY;
        let parts = field.get_fields().iter().map(|part| {
            if is_other(part) {
                Ok(part.clone())
            } else {
                without_type(part)
            }
        });
        Type::group_type_builder(field.name())
            .with_repetition(info.repetition())
            .with_converted_type(info.converted_type())
            .with_logical_type(info.logical_type_ref().cloned())
            .with_fields(parts.collect::<Result<_, _>>()?)
            .build()
    };
    built.map(Arc::new)
}

/// Returns the type of [`without_type`].
fn bytes_for(data_type: &DataType) -> DataType {
    let part = |field: &FieldRef| {
        let kind = field.data_type();
        let kind = if kind.is_nested() || holds_bytes(kind) {
            bytes_for(kind)
        } else {
            kind.clone()
        };
        Arc::new(Field::new(field.name(), kind, field.is_nullable()))
    };
    match data_type {
        DataType::List(field) => DataType::List(part(field)),
        DataType::LargeList(field) => DataType::LargeList(part(field)),
        DataType::FixedSizeList(field, size) => DataType::FixedSizeList(part(field), *size),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(part).collect()),
        _ => DataType::Binary,
    }
}

/// Returns whether a Parquet file has byte arrays for a type.
fn holds_bytes(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
        DataType::Dictionary(_, values) => holds_bytes(values),
        _ => false,
    }
}

/// Draws one caption of each list; a column that holds no lists is returned as it is. Nulls in a
/// list are passed over; a list without a caption becomes null, with a mark that [`has_none`]
/// finds. The draw depends on the seed and the list's own texts, so it is the same wherever and
/// whenever the row is read, and embeddings of the caption stay valid.
pub(crate) fn drawn(column: &ArrayRef, seed: u64) -> Result<ArrayRef, ArrowError> {
    let kind = match column.data_type() {
        DataType::List(part) | DataType::LargeList(part) | DataType::FixedSizeList(part, _) => {
            part.data_type()
        }
        _ => return Ok(column.clone()),
    };
    let of = |part| DataType::List(Arc::new(Field::new_list_field(part, true)));
    let is_bytes = matches!(
        kind,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView
    );
    // Arrow casts views and categories to bytes only by way of texts.
    let lists = if is_bytes {
        column.clone()
    } else {
        cast(column, &of(DataType::Utf8))?
    };
    let lists = cast(&lists, &of(DataType::Binary))?;
    let lists = lists.as_list::<i32>();
    let values = lists.values().as_binary::<i32>();
    let mut captions = Vec::new();
    let rows = lists.value_offsets().windows(2).enumerate();
    let drawn = texts(rows.map(|(row, ends)| {
        if lists.is_null(row) {
            return Ok(None);
        }
        captions.clear();
        let entries = (ends[0] as usize..ends[1] as usize).filter(|&n| values.is_valid(n));
        captions.extend(entries.map(|n| values.value(n)));
        match captions.len() {
            0 => Err(NONE_MARK),
            _ => Ok(Some(captions[draw(seed, &captions)])),
        }
    }));
    Ok(Arc::new(drawn?))
}

/// Returns the number of the caption that is drawn. Kept embeddings and receipts rest on it:
/// another rule needs another field in the manifest's layout.
fn draw(seed: u64, captions: &[&[u8]]) -> usize {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    for caption in captions {
        // With its length, since ["ab", "c"] and ["a", "bc"] are different lists.
        hasher.update(&(caption.len() as u64).to_le_bytes());
        hasher.update(caption);
    }
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    ((u128::from(u64::from_le_bytes(word)) * captions.len() as u128) >> 64) as usize
}

/// Turns bytes into captions. Those that are not UTF-8 become null, with a mark that [`is_invalid`]
/// finds.
pub(crate) fn from_bytes(bytes: &BinaryArray) -> Result<ArrayRef, ArrowError> {
    some_from_bytes(bytes, |_| true).map(|texts| Arc::new(texts) as ArrayRef)
}

/// As [`from_bytes`], of some rows. The others become null.
pub(crate) fn some_from_bytes(
    bytes: &BinaryArray,
    wanted: impl Fn(usize) -> bool,
) -> Result<StringArray, ArrowError> {
    let each = bytes.iter().enumerate();
    texts(each.map(|(row, value)| Ok(value.filter(|_| wanted(row)))))
}

/// Returns a column of texts. An error is a null with that mark.
fn texts<'a>(
    values: impl Iterator<Item = Result<Option<&'a [u8]>, &'static str>>,
) -> Result<StringArray, ArrowError> {
    let (mut text, mut lengths, mut valid) = (String::new(), Vec::new(), Vec::new());
    for value in values {
        let found = value.and_then(|value| {
            let decoded = value.map(|bytes| std::str::from_utf8(bytes).map_err(|_| MARK));
            decoded.transpose()
        });
        let kept = match found {
            Ok(caption) => caption.unwrap_or_default(),
            Err(mark) => mark,
        };
        text.push_str(kept);
        lengths.push(kept.len());
        valid.push(matches!(found, Ok(Some(_))));
    }
    if i32::try_from(text.len()).is_err() {
        let message = "a block has over 2 GiB of one text column";
        return Err(ArrowError::InvalidArgumentError(message.to_owned()));
    }
    let offsets = OffsetBuffer::from_lengths(lengths);
    let nulls = Some(NullBuffer::from(valid));
    StringArray::try_new(offsets, Buffer::from_vec(text.into_bytes()), nulls)
}

/// Returns whether a caption is null because it is not UTF-8.
pub(crate) fn is_invalid(captions: &StringArray, row: usize) -> bool {
    is_marked(captions, row, MARK)
}

/// Returns whether a caption is null because its list has none.
pub(crate) fn has_none(captions: &StringArray, row: usize) -> bool {
    is_marked(captions, row, NONE_MARK)
}

fn is_marked(captions: &StringArray, row: usize, mark: &str) -> bool {
    captions.is_null(row) && captions.value_length(row) as usize == mark.len()
}

/// Returns the extra column whose text in `row` is not UTF-8.
pub(crate) fn invalid_column(batch: &RecordBatch, row: usize) -> Option<&str> {
    const FIXED: usize = 2;
    let fields = batch.schema_ref().fields().iter().zip(batch.columns());
    let found = fields.skip(FIXED).find(|(_, column)| {
        let text = column.as_string_opt::<i32>();
        text.is_some_and(|text| is_invalid(text, row))
    });
    found.map(|(field, _)| field.name().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_draw_is_pinned() {
        // Kept embeddings and receipts rest on these numbers.
        let lists: [&[&[u8]]; 4] = [
            &[b"a", b"b", b"c", b"d", b"e"],
            &[b"ab", b"c"],
            &[b"a", b"bc"],
            &[b"alone"],
        ];
        let of = |seed| lists.map(|list| draw(seed, list));
        let drawn = [of(0), of(1), of(u64::MAX)];
        assert_eq!(drawn, [[3, 0, 1, 0], [2, 1, 0, 0], [2, 0, 0, 0]]);
    }

    #[test]
    fn each_caption_is_drawn_about_as_often() {
        let mut counts = [0; 5];
        for row in 0..5_000 {
            let texts: Vec<String> = (0..5).map(|n| format!("caption {n} of {row}")).collect();
            let list: Vec<&[u8]> = texts.iter().map(String::as_bytes).collect();
            counts[draw(7, &list)] += 1;
        }
        assert!(
            counts.iter().all(|count| (850..1_150).contains(count)),
            "{counts:?}"
        );
    }
}
