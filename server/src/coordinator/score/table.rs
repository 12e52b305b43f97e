//! Chosen rows in memory, as they arrived: in many record batches, with an order of their own.
//!
//! They are never joined to one array. Arrow's `Binary` counts bytes in 32 bits, so one array
//! cannot hold all images of a large sub-batch. Only the rows of one record batch of the output are
//! gathered.
use crate::{
    batches::row_bytes,
    blocking::blocking,
    coordinator::workers::replies::{Replies, unsound},
    error::{Error, Result},
    handed::{self, Handover},
};
use arrow::{
    array::{Array, ArrayRef, RecordBatch, UInt32Array, make_array},
    compute::{interleave, take},
    datatypes::{DataType, SchemaRef},
    error::ArrowError,
};
use bytes::Bytes;
use std::collections::HashMap;
use superbatch_proto::{SUPER_BATCH_SIZE_MAX, arrow_stream};

/// Rows of several record batches of one schema. Batches are shared, not copied.
#[derive(Debug, Clone)]
pub struct Table {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
    /// For each row, its batch and its row there.
    places: Vec<(usize, usize)>,
    bytes: usize,
}

impl Table {
    pub fn empty(schema: SchemaRef) -> Self {
        Self {
            schema,
            batches: Vec::new(),
            places: Vec::new(),
            bytes: 0,
        }
    }

    /// Reads a whole Arrow IPC stream, which may be cut into parts anywhere, with its rows in
    /// order.
    ///
    /// # Errors
    /// `Internal` if the parts are no complete stream.
    pub fn from_stream(parts: impl IntoIterator<Item = Bytes>) -> Result<Self> {
        let read = || {
            let mut held = 0;
            let parts = parts.into_iter().inspect(|part| held += part.len());
            let (schema, batches) = arrow_stream::read(parts)?;
            // Before memory is taken for them: of columns without values, a few bytes are any
            // number of rows.
            let rows = batches.iter().map(RecordBatch::num_rows);
            if rows.fold(0, usize::saturating_add) > SUPER_BATCH_SIZE_MAX as usize {
                let what = "the stream has more rows than any super-batch".to_owned();
                return Err(ArrowError::IpcError(what));
            }
            Ok(Self::new(schema, batches, held))
        };
        read().map_err(broken)
    }

    /// As [`Self::from_stream`], of a worker's answer, which must hold `due` rows. What the worker
    /// sent is read while another worker can still be asked: later, the step would fail by it.
    ///
    /// # Errors
    /// `Internal` for other rows than those, or none that can be read.
    pub async fn of_answer(parts: Vec<Bytes>, due: usize) -> Result<Self> {
        let read = move || {
            let table = Self::from_stream(parts)?;
            if table.rows() == due {
                return Ok(table);
            }
            // A slice with one row too few or too many would shift the rows of all later slices:
            // every one of them would be served under another row's id and score.
            Err(unsound(format_args!("{} of {due} rows", table.rows())))
        };
        blocking("reading rows", read).await
    }

    /// Returns the rows of a call that has said that it is done: those that a worker of this
    /// process has handed over, else those of its answer, as [`Self::of_answer`] reads them.
    ///
    /// # Errors
    /// As [`Self::of_answer`]; `MessageTooLarge`.
    pub async fn of_call(
        replies: Replies,
        handover: &Handover,
        parts: Vec<Bytes>,
        due: usize,
    ) -> Result<Self> {
        let Some(handed) = handover.take() else {
            return Self::of_answer(parts, due).await;
        };
        replies.check_rows_bytes(handed.value_bytes)?;
        Self::of_handed(handed, due)
    }

    fn of_handed(rows: handed::Rows, due: usize) -> Result<Self> {
        if rows.places.len() != due {
            let rows = rows.places.len();
            return Err(unsound(format_args!("{rows} of {due} rows")));
        }
        Ok(Self {
            schema: rows.schema,
            batches: rows.batches,
            places: rows.places,
            bytes: rows.bytes,
        })
    }

    /// Makes a table of all rows of `batches`, which hold `bytes` of memory.
    fn new(schema: SchemaRef, batches: Vec<RecordBatch>, bytes: usize) -> Self {
        let rows = batches
            .iter()
            .enumerate()
            .flat_map(|(n, batch)| (0..batch.num_rows()).map(move |row| (n, row)));
        Self {
            places: rows.collect(),
            schema,
            batches,
            bytes,
        }
    }

    pub fn rows(&self) -> usize {
        self.places.len()
    }

    /// Returns the memory that its batches hold. The batches share the memory of the streams they
    /// were read from, so it stays until the last row is dropped.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends the rows of `other`.
    ///
    /// # Errors
    /// `Internal` if the schemas differ.
    pub fn append(&mut self, other: Self) -> Result<()> {
        if other.schema.fields() != self.schema.fields() {
            return Err(Error::internal(
                "workers sent rows of different schemas for one step",
            ));
        }
        let first = self.batches.len();
        self.places.extend(
            other
                .places
                .into_iter()
                .map(|(batch, row)| (first + batch, row)),
        );
        self.batches.extend(other.batches);
        self.bytes += other.bytes;
        Ok(())
    }

    /// Returns the rows in the order of `rows`, each of which is below [`Table::rows`].
    #[must_use]
    pub fn reordered(self, rows: &[u32]) -> Self {
        Self {
            places: rows.iter().map(|row| self.places[*row as usize]).collect(),
            ..self
        }
    }

    /// Returns a column of some rows as one array. Its bytes depend on the values only. Rows that
    /// follow each other in one batch stay in its memory; others are gathered in memory of their
    /// own.
    ///
    /// # Errors
    /// `Internal` if there is no such column, or if one array cannot hold its values: ask for fewer
    /// rows.
    pub fn column(&self, name: &str, rows: &[usize]) -> Result<ArrayRef> {
        let at = self.schema.index_of(name).map_err(broken)?;
        if let Some(part) = self.in_a_row(at, rows) {
            return Ok(part);
        }
        // Only the batches of these rows are passed on: a step has thousands of batches, and a
        // record batch of the output has rows of a few.
        let mut numbers = HashMap::new();
        let mut arrays: Vec<&dyn Array> = Vec::new();
        let mut places = Vec::with_capacity(rows.len());
        for row in rows {
            let (batch, row) = self.places[*row];
            let number = *numbers.entry(batch).or_insert_with(|| {
                arrays.push(self.batches[batch].column(at));
                arrays.len() - 1
            });
            places.push((number, row));
        }
        if arrays.is_empty() {
            return Ok(arrow::array::new_empty_array(
                self.schema.field(at).data_type(),
            ));
        }
        let gathered = interleave(&arrays, &places).map_err(broken)?;
        // Interleaving keeps a validity buffer if any source array has nulls, even if none of these
        // rows is null.
        if gathered.null_count() == 0 && !gathered.data_type().is_nested() {
            return without_nulls(gathered).map_err(broken);
        }
        take(
            &gathered,
            &UInt32Array::from_iter_values(0..places.len() as u32),
            None,
        )
        .map_err(broken)
    }

    /// Returns a column of rows that follow each other in one batch; `None` for others, for nulls,
    /// and for arrays that refer to memory beside their own.
    fn in_a_row(&self, at: usize, rows: &[usize]) -> Option<ArrayRef> {
        let (batch, first) = self.places[*rows.first()?];
        let column = self.batches[batch].column(at);
        let is_plain = match column.data_type() {
            DataType::Binary | DataType::Utf8 | DataType::LargeBinary | DataType::LargeUtf8 => true,
            other => other.is_primitive(),
        };
        let mut numbered = rows.iter().enumerate();
        if !is_plain || !numbered.all(|(n, row)| self.places[*row] == (batch, first + n)) {
            return None;
        }
        let part = column.slice(first, rows.len());
        match (part.nulls().is_some(), part.null_count()) {
            (false, _) => Some(part),
            (true, 0) => without_nulls(part).ok(),
            _ => None,
        }
    }

    /// Returns the bytes of a row's values.
    pub fn row_bytes(&self, row: usize) -> Result<usize> {
        let (batch, row) = self.places[row];
        row_bytes(&self.batches[batch], row).map_err(broken)
    }
}

/// Returns an array of which no value is null without a buffer that says so. Such traces are
/// removed, since a client may resume a stream at a byte offset on another coordinator, where the
/// rows arrived in other batches: the bytes must be the same there.
fn without_nulls(array: ArrayRef) -> Result<ArrayRef, ArrowError> {
    let built = array.into_data().into_builder().nulls(None).build();
    built.map(make_array)
}

fn broken(cause: ArrowError) -> Error {
    Error::internal("rows that workers sent cannot be read or put together").because(cause)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::ipc::Encoder;
    use arrow::{
        array::{AsArray, RecordBatchOptions},
        datatypes::Schema,
    };

    /// All rows of batches that are made in a test.
    pub fn table(batches: Vec<RecordBatch>) -> Table {
        let bytes = batches.iter().map(RecordBatch::get_array_memory_size).sum();
        Table::new(batches[0].schema(), batches, bytes)
    }

    fn numbers(range: std::ops::Range<u32>) -> RecordBatch {
        let column: ArrayRef = std::sync::Arc::new(UInt32Array::from_iter_values(range));
        RecordBatch::try_from_iter([("n", column)]).unwrap()
    }

    fn n(table: &Table, rows: &[usize]) -> Vec<u32> {
        table
            .column("n", rows)
            .unwrap()
            .as_primitive::<arrow::datatypes::UInt32Type>()
            .values()
            .to_vec()
    }

    #[test]
    fn a_column_has_no_trace_of_the_nulls_beside_its_rows() {
        let of = |values: Vec<Option<u32>>| {
            let column: ArrayRef = std::sync::Arc::new(UInt32Array::from(values));
            table(vec![
                RecordBatch::try_from_iter_with_nullable([("n", column, true)]).unwrap(),
            ])
        };
        let among = of(vec![Some(1), None, Some(3)])
            .column("n", &[0, 2])
            .unwrap();
        assert!(among.nulls().is_none());
        assert_eq!(
            among.to_data(),
            of(vec![Some(3), Some(1)])
                .column("n", &[1, 0])
                .unwrap()
                .to_data()
        );
        assert_eq!(
            of(vec![None, Some(2)])
                .column("n", &[1, 0])
                .unwrap()
                .null_count(),
            1
        );
    }

    /// Rows without columns take no byte, so that a stream of a few may name any number.
    #[test]
    fn rows_beyond_any_super_batch_take_no_memory() {
        let count = RecordBatchOptions::new().with_row_count(Some(1 << 50));
        let schema = std::sync::Arc::new(Schema::empty());
        let endless = RecordBatch::try_new_with_options(schema, Vec::new(), &count).unwrap();
        let mut encoder = Encoder::new(&endless.schema()).unwrap();
        let mut parts = encoder.encode(&endless).unwrap();
        parts.extend(encoder.finish().unwrap());
        let refused = Table::from_stream(parts).unwrap_err();
        assert!(refused.chain().contains("more rows"), "{}", refused.chain());
    }

    #[test]
    fn rows_that_follow_each_other_stay_where_they_are() {
        let texts: ArrayRef = std::sync::Arc::new(arrow::array::StringArray::from_iter_values([
            "a", "bc", "", "def", "g",
        ]));
        let batch = RecordBatch::try_from_iter([("n", texts.clone())]).unwrap();
        let rows = table(vec![batch]).reordered(&[3, 1, 2, 0, 4]);
        let memory = |array: &ArrayRef| array.to_data().buffers()[1].as_ptr();
        let column = |of: &[usize]| rows.column("n", of).unwrap();
        let values = |of: &[usize]| -> Vec<String> {
            let column = column(of);
            let texts = column.as_string::<i32>().iter();
            texts.map(|text| text.unwrap().to_owned()).collect()
        };
        assert_eq!(values(&[1, 2, 0, 4]), ["bc", "", "def", "g"]);
        assert_eq!(memory(&column(&[1, 2, 0, 4])), memory(&texts));
        for others in [&[0, 2][..], &[1, 2, 4], &[1, 1], &[4, 3]] {
            assert_ne!(memory(&column(others)), memory(&texts), "{others:?}");
        }
        assert_eq!(values(&[1, 2, 4]), ["bc", "", "g"]);
        assert_eq!(values(&[1, 1]), ["bc", "bc"]);
    }

    #[test]
    fn nulls_beside_rows_that_follow_each_other_leave_no_trace() {
        let texts = arrow::array::StringArray::from_iter([Some("a"), Some("bc"), None, Some("d")]);
        let texts: ArrayRef = std::sync::Arc::new(texts);
        let batch = RecordBatch::try_from_iter_with_nullable([("n", texts.clone(), true)]).unwrap();
        let rows = table(vec![batch]);
        let memory = |array: &ArrayRef| array.to_data().buffers()[1].as_ptr();
        let found = rows.column("n", &[0, 1]).unwrap();
        assert!(found.nulls().is_none() && memory(&found) == memory(&texts));
        assert_eq!(found.as_string::<i32>().value(1), "bc");
        assert_eq!(rows.column("n", &[1, 2]).unwrap().null_count(), 1);
    }

    #[test]
    fn rows_of_many_batches_come_in_any_order() {
        let mut all = Table::empty(numbers(0..0).schema());
        assert_eq!((all.rows(), all.bytes(), n(&all, &[])), (0, 0, vec![]));
        for range in [0..3, 3..3, 3..8] {
            all.append(table(vec![numbers(range)])).unwrap();
        }
        let held = all.bytes();
        assert_eq!(n(&all, &[7, 0, 3, 0]), [7, 0, 3, 0]);
        let all = all.reordered(&[4, 2, 6]);
        assert_eq!(
            (all.rows(), all.bytes(), n(&all, &[0, 1, 2])),
            (3, held, vec![4, 2, 6])
        );
        assert!(all.column("m", &[0]).is_err());
        let other: ArrayRef = std::sync::Arc::new(arrow::array::Float64Array::from(vec![1.0]));
        let other = table(vec![RecordBatch::try_from_iter([("n", other)]).unwrap()]);
        assert!(all.clone().append(other).is_err());
    }
}
