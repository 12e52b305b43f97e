//! What a message says of its body, held against the body's length and the schema.
use crate::SUPER_BATCH_SIZE_MAX;
use arrow::{
    datatypes::{DataType, Field, Schema},
    ipc,
};
use std::vec::IntoIter;

/// # Errors
/// If a column, or a part of one, is of a type that no stream of Superbatch has, or that Arrow does
/// not refuse by itself though it is none.
pub(super) fn check_schema(schema: ipc::Schema<'_>) -> Result<(), String> {
    let mut fields = schema.fields().into_iter().flatten();
    fields.try_for_each(check_field)
}

/// The depth is bounded by the message's verification.
fn check_field(field: ipc::Field<'_>) -> Result<(), String> {
    let name = field.name().unwrap_or_default();
    let unsent = |kind: &str| Err(format!("column {name:?} is {kind}, which are not sent"));
    if field.dictionary().is_some() {
        return unsent("of dictionaries");
    }
    let size = match field.type_type() {
        ipc::Type::Union => return unsent("of unions"),
        ipc::Type::RunEndEncoded => return unsent("of runs"),
        ipc::Type::FixedSizeBinary => field.type_as_fixed_size_binary().map(|t| t.byteWidth()),
        ipc::Type::FixedSizeList => field.type_as_fixed_size_list().map(|t| t.listSize()),
        _ => None,
    };
    if let Some(size) = size
        && size < 0
    {
        return Err(format!("column {name:?} has values of {size} parts"));
    }
    let mut parts = field.children().into_iter().flatten();
    parts.try_for_each(check_field)
}

/// # Errors
/// If a batch of `schema` whose body has `body` bytes cannot be what the message says.
pub(super) fn check_batch(
    batch: ipc::RecordBatch<'_>,
    body: usize,
    schema: &Schema,
) -> Result<(), String> {
    if batch.compression().is_some() {
        return Err("its buffers are compressed, which are not sent".to_owned());
    }
    let rows = batch.length();
    if !(0..=i64::from(SUPER_BATCH_SIZE_MAX)).contains(&rows) {
        return Err(format!("{rows} are more rows than any super-batch has"));
    }
    let nodes = batch.nodes().ok_or("it has no list of arrays")?;
    let buffers = batch.buffers().ok_or("it has no list of buffers")?;
    let mut lengths = Vec::with_capacity(buffers.len());
    for (number, buffer) in buffers.iter().enumerate() {
        lengths.push(length_inside(buffer, body).ok_or_else(|| {
            let (offset, length) = (buffer.offset(), buffer.length());
            format!("buffer {number}: {length} bytes from {offset} on, of a body of {body} bytes")
        })?);
    }
    let nodes: Vec<_> = nodes.iter().map(|n| (n.length(), n.null_count())).collect();
    let counts: Vec<_> = batch.variadicBufferCounts().into_iter().flatten().collect();
    let mut said = Said {
        nodes: nodes.into_iter(),
        buffers: lengths.into_iter(),
        counts: counts.into_iter(),
        values_max: i64::from(SUPER_BATCH_SIZE_MAX).max(body as i64 * 8),
    };
    for field in schema.fields() {
        let checked = said.check(field);
        checked.map_err(|what| format!("column {:?}: {what}", field.name()))?;
    }
    if said.nodes.len() + said.buffers.len() + said.counts.len() > 0 {
        return Err("it has more arrays or buffers than its schema".to_owned());
    }
    Ok(())
}

/// Returns the length of a buffer that lies in a body of so many bytes.
fn length_inside(buffer: &ipc::Buffer, body: usize) -> Option<usize> {
    let offset = usize::try_from(buffer.offset()).ok()?;
    let length = usize::try_from(buffer.length()).ok()?;
    (offset.checked_add(length)? <= body).then_some(length)
}

/// What a message says of its arrays and buffers, which is taken in the order of the schema.
struct Said {
    /// Values and nulls of each array.
    nodes: IntoIter<(i64, i64)>,
    buffers: IntoIter<usize>,
    /// Buffers of texts or bytes of each array of views.
    counts: IntoIter<i64>,
    /// A value takes a bit at least. Those of some types take none, and are no more than rows.
    values_max: i64,
}

impl Said {
    /// Takes an array with all parts, and returns the number of its values.
    fn check(&mut self, field: &Field) -> Result<i64, String> {
        use DataType as T;
        let values = self.node()?;
        match field.data_type() {
            T::Null => {}
            T::Utf8 | T::Binary => {
                self.skip(1)?;
                self.of_width(4)?;
                self.skip(1)?;
            }
            T::LargeUtf8 | T::LargeBinary => {
                self.skip(1)?;
                self.of_width(8)?;
                self.skip(1)?;
            }
            T::Utf8View | T::BinaryView => {
                let count = self.counts.next().ok_or("it has too few buffer counts")?;
                let count = usize::try_from(count).map_err(|_| format!("{count} buffers"))?;
                self.skip(1)?;
                self.of_width(16)?;
                self.skip(count)?;
            }
            T::List(part) | T::Map(part, _) => {
                self.skip(1)?;
                self.of_width(4)?;
                self.check(part)?;
            }
            T::LargeList(part) => {
                self.skip(1)?;
                self.of_width(8)?;
                self.check(part)?;
            }
            T::ListView(part) => {
                self.skip(1)?;
                self.of_width(4)?;
                self.of_width(4)?;
                self.check(part)?;
            }
            T::LargeListView(part) => {
                self.skip(1)?;
                self.of_width(8)?;
                self.of_width(8)?;
                self.check(part)?;
            }
            T::FixedSizeList(part, size) => {
                self.skip(1)?;
                let held = self.check(part)?;
                if values
                    .checked_mul(i64::from(*size))
                    .is_none_or(|due| due > held)
                {
                    return Err(format!("{values} lists of {size} have {held} values"));
                }
            }
            T::Struct(parts) => {
                self.skip(1)?;
                for part in parts {
                    self.check(part)?;
                }
            }
            kind @ (T::Dictionary(..) | T::Union(..) | T::RunEndEncoded(..)) => {
                return Err(format!("{kind} is not sent"));
            }
            // All others have a buffer of values of one size.
            _ => self.skip(2)?,
        }
        Ok(values)
    }

    fn node(&mut self) -> Result<i64, String> {
        let (values, nulls) = self.nodes.next().ok_or("it has too few arrays")?;
        if !(0..=self.values_max).contains(&values) {
            return Err(format!("{values} values are none, or more than its bytes"));
        }
        if !(0..=values).contains(&nulls) {
            return Err(format!("{nulls} of {values} values are null"));
        }
        Ok(values)
    }

    /// Takes buffers whose length Arrow checks.
    fn skip(&mut self, count: usize) -> Result<(), String> {
        (0..count).try_for_each(|_| self.buffer().map(drop))
    }

    /// Takes a buffer of numbers of `width` bytes.
    fn of_width(&mut self, width: usize) -> Result<(), String> {
        let length = self.buffer()?;
        if length.is_multiple_of(width) {
            return Ok(());
        }
        Err(format!("{length} bytes are no numbers of {width} bytes"))
    }

    fn buffer(&mut self) -> Result<usize, String> {
        let next = self.buffers.next();
        next.ok_or_else(|| "it has too few buffers".to_owned())
    }
}
