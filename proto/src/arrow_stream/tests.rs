use super::*;
use arrow::{
    array::{
        Array, ArrayRef, BinaryViewArray, BooleanArray, DictionaryArray, FixedSizeBinaryArray,
        FixedSizeListArray, Float64Array, Int32Array, LargeStringArray, ListArray, MapBuilder,
        NullArray, RecordBatchOptions, RunArray, StringArray, StringBuilder, StructArray,
    },
    datatypes::{DataType, Field, Float32Type, Int32Type, Schema},
    ipc::writer::StreamWriter,
};

fn written(batches: &[RecordBatch]) -> Vec<u8> {
    let mut writer = StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
    for batch in batches {
        writer.write(batch).unwrap();
    }
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

fn of<const N: usize>(columns: [(&str, ArrayRef); N]) -> RecordBatch {
    let columns = columns.map(|(name, column)| (name, column, true));
    RecordBatch::try_from_iter_with_nullable(columns).unwrap()
}

/// A column of each layout that a buffer can have.
fn kinds() -> RecordBatch {
    let texts = StringArray::from(vec![Some("a"), None, Some("a text that is no short view")]);
    let mut map = MapBuilder::new(None, StringBuilder::new(), StringBuilder::new());
    for key in ["a", "b", "c"] {
        map.keys().append_value(key);
        map.values().append_null();
        map.append(true).unwrap();
    }
    let lists = vec![
        Some(vec![Some(1.0), None]),
        None,
        Some(vec![None, Some(2.0)]),
    ];
    let part = Field::new("text", DataType::Utf8, true);
    let parts: ArrayRef = Arc::new(texts.clone());
    let structs = StructArray::new(vec![part].into(), vec![parts], None);
    let bytes = FixedSizeBinaryArray::try_from_iter([[1_u8, 2], [3, 4], [5, 6]].iter());
    let columns: [(&str, ArrayRef); 11] = [
        ("texts", Arc::new(texts)),
        (
            "large",
            Arc::new(LargeStringArray::from(vec![Some("b"), None, Some("")])),
        ),
        (
            "views",
            Arc::new(BinaryViewArray::from_iter([Some([b'x'; 20]), None, None])),
        ),
        (
            "bools",
            Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
        ),
        (
            "numbers",
            Arc::new(Float64Array::from(vec![Some(0.5), None, Some(1.5)])),
        ),
        ("none", Arc::new(NullArray::new(3))),
        ("map", Arc::new(map.finish())),
        ("structs", Arc::new(structs)),
        ("bytes", Arc::new(bytes.unwrap())),
        (
            "lists",
            Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(
                lists.clone(),
            )),
        ),
        (
            "pairs",
            Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(lists, 2)),
        ),
    ];
    of(columns)
}

fn pieces(stream: &[u8], length: usize) -> Vec<Bytes> {
    stream.chunks(length).map(Bytes::copy_from_slice).collect()
}

#[test]
fn a_stream_is_read_however_it_is_cut() {
    let batches = [kinds(), kinds().slice(1, 2), kinds().slice(0, 0)];
    let stream = written(&batches);
    for length in [1, 3, 8, 64, 1000, stream.len()] {
        let (schema, read) = read(pieces(&stream, length)).unwrap();
        assert_eq!(
            (schema, &read[..]),
            (batches[0].schema(), &batches[..]),
            "{length}"
        );
    }
    let whole = Bytes::from(stream);
    let (_, read) = read([whole.clone()]).unwrap();
    let bytes = read[0].column(0).to_data().buffers()[1].clone();
    assert!(
        whole.as_ptr_range().contains(&bytes.as_ptr()),
        "its memory is shared"
    );
}

#[test]
fn a_stream_that_is_cut_off_is_read_up_to_a_message_or_refused() {
    let stream = written(&[kinds(), kinds()]);
    let mut read_of = [0; 3];
    for length in 0..stream.len() {
        if let Ok((_, read)) = read(pieces(&stream[..length], 100)) {
            read_of[read.len()] += 1;
        }
    }
    // After the schema and after each batch. The mark of the end may be missing.
    assert_eq!(read_of, [1, 1, 1]);
    let error = read([]).unwrap_err().to_string();
    assert!(error.contains("no schema"), "{error}");
}

/// Where a stream's first batch says what its first array and its buffers are.
fn places(stream: &Bytes) -> (usize, Vec<usize>) {
    let mut left = Left::new([stream.clone()]);
    metadata(&mut left).unwrap().unwrap();
    let rows = metadata(&mut left).unwrap().unwrap();
    let batch = message(&rows).unwrap().header_as_record_batch().unwrap();
    // The stream is in one part, so that these lie in its memory.
    let base = stream.as_ptr().addr();
    let node = std::ptr::from_ref(batch.nodes().unwrap().get(0)).addr() - base;
    let buffers = batch.buffers().unwrap();
    let buffers = buffers.iter().map(|b| std::ptr::from_ref(b).addr() - base);
    (node, buffers.collect())
}

fn with(stream: &Bytes, place: usize, said: [i64; 2]) -> Bytes {
    let mut lying = stream.to_vec();
    lying[place..place + 16].copy_from_slice(&said.map(i64::to_le_bytes).concat());
    lying.into()
}

#[test]
fn what_a_message_says_of_its_body_is_held_against_it() {
    let numbers = Int32Array::from_iter_values(0..7);
    let stream = Bytes::from(written(&[of([("n", Arc::new(numbers) as ArrayRef)])]));
    let (node, buffers) = places(&stream);
    let refused = |place, lie, said: &str| {
        let error = read([with(&stream, place, lie)]).unwrap_err().to_string();
        let is_told = error.contains("message 1 of the stream") && error.contains(said);
        assert!(is_told, "{said}: {error}");
    };
    refused(node, [-7, 0], "-7 values");
    refused(node, [1 << 40, 0], "more than its bytes");
    refused(node, [7, 8], "8 of 7 values are null");
    refused(node, [7, -1], "-1 of 7 values are null");
    refused(node, [1000, 0], "4000 bytes");
    refused(buffers[1], [-4, 28], "buffer 1: 28 bytes from -4 on");
    refused(buffers[1], [4, i64::MAX], "of a body of");
    refused(buffers[1], [1 << 20, 28], "of a body of");
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(["ab", "cde"]));
    let stream = Bytes::from(written(&[of([("t", texts)])]));
    let (_, buffers) = places(&stream);
    let error = read([with(&stream, buffers[1], [0, 13])]).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("13 bytes are no numbers of 4 bytes"),
        "{error}"
    );
}

#[test]
fn lengths_beyond_the_stream_take_no_memory() {
    let stream = written(&[kinds()]);
    let long = [&stream[..4], &u32::MAX.to_le_bytes(), &stream[8..]].concat();
    for (stream, said) in [
        (
            long,
            "message 0 of the stream: it should have 4294967295 bytes",
        ),
        ([&stream[..], b"more"].concat(), "4 bytes follow the end"),
        (stream[4..].to_vec(), "it begins with"),
        (stream[..6].to_vec(), "ends in its length"),
    ] {
        let error = read([stream.into()]).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn what_is_never_sent_is_refused_by_name() {
    let categories: DictionaryArray<Int32Type> = ["a", "a"].into_iter().collect();
    let (ends, values) = (
        Int32Array::from(vec![1, 2]),
        StringArray::from(vec!["a", "b"]),
    );
    let runs = RunArray::try_new(&ends, &values).unwrap();
    let (categories, runs): (ArrayRef, ArrayRef) = (Arc::new(categories), Arc::new(runs));
    for (column, said) in [
        (categories, "column \"c\" is of dictionaries"),
        (runs, "column \"c\" is of runs"),
    ] {
        let nested: ArrayRef = Arc::new(StructArray::from(of([("c", column.clone())])));
        for batch in [of([("c", column)]), of([("outer", nested)])] {
            let error = read([written(&[batch]).into()]).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}

#[test]
fn no_more_rows_are_read_than_any_super_batch_has() {
    let count = RecordBatchOptions::new().with_row_count(Some(1 << 50));
    let schema = Arc::new(Schema::empty());
    let endless = RecordBatch::try_new_with_options(schema, Vec::new(), &count).unwrap();
    let error = read([written(&[endless]).into()]).unwrap_err().to_string();
    assert!(error.contains("more rows than any super-batch"), "{error}");
}
