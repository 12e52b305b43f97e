use super::*;
use crate::coordinator::score::table::tests::table;
use arrow::{
    array::{AsArray, BinaryArray, Int32Array, ListArray},
    compute::concat_batches,
    datatypes::{DataType, Field, Int32Type, UInt64Type},
    ipc::reader::StreamReader,
};
use std::ops::Range;

fn field(name: &str, data_type: DataType, nullable: bool) -> Field {
    Field::new(name, data_type, nullable)
}

fn data_fields() -> Vec<Field> {
    let list = DataType::List(Arc::new(field("item", DataType::Int32, true)));
    vec![
        field("image", DataType::Binary, false),
        field("caption", DataType::Utf8, false),
        field("width", DataType::Int32, true),
        field("tags", list, true),
    ]
}

fn output_schema() -> SchemaRef {
    let own = [
        ("_superbatch_id", DataType::Utf8),
        ("_superbatch_position", DataType::UInt64),
        ("_superbatch_score", DataType::Float64),
        ("_superbatch_fidelity", DataType::Utf8),
        ("_superbatch_weight", DataType::Float64),
    ];
    let own = own
        .into_iter()
        .map(|(name, data_type)| field(name, data_type, false));
    Arc::new(Schema::new(
        data_fields().into_iter().chain(own).collect::<Vec<_>>(),
    ))
}

/// Rows `range` with images of these sizes.
fn rows(range: Range<usize>, image_bytes: impl Fn(usize) -> usize) -> RecordBatch {
    let images: Vec<Vec<u8>> = range
        .clone()
        .map(|i| vec![i as u8; image_bytes(i)])
        .collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(BinaryArray::from_iter_values(images)),
        Arc::new(StringArray::from_iter_values(
            range.clone().map(|i| format!("caption {i}")),
        )),
        Arc::new(Int32Array::from_iter(
            range.clone().map(|i| (i % 3 > 0).then_some(i as i32)),
        )),
        Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(
            range.map(|i| (i % 4 > 0).then(|| (0..i as i32 % 5).map(Some).collect::<Vec<_>>())),
        )),
    ];
    RecordBatch::try_new(Arc::new(Schema::new(data_fields())), columns).unwrap()
}

fn receipt(count: usize) -> Receipt {
    let chosen = (0..count).map(|i| ChosenRow {
        id: format!("0.parquet#{i}"),
        position: 100 + i as u64,
        score: i as f64 / 3.0,
        weight: 1.0,
        fidelity: 1,
        ..Default::default()
    });
    Receipt {
        chosen: chosen.collect(),
        ..Default::default()
    }
}

/// A rank's stream as a whole.
fn rank(schema: &SchemaRef, rows: &Table, receipt: &Receipt, indices: &[usize]) -> Result<Bytes> {
    rank_stream(schema, rows, receipt, indices).map(|parts| parts.concat().into())
}

fn read(stream: &Bytes) -> RecordBatch {
    let reader = StreamReader::try_new(stream.as_ref(), None).unwrap();
    concat_batches(
        &reader.schema(),
        &reader.collect::<Result<Vec<_>, _>>().unwrap(),
    )
    .unwrap()
}

#[test]
fn a_rank_gets_its_rows_in_order_with_the_receipts_columns() {
    let schema = output_schema();
    let stream = rank(
        &schema,
        &table(vec![rows(0..10, |_| 5)]),
        &receipt(10),
        &[7, 0, 3],
    )
    .unwrap();
    let batch = read(&stream);
    assert_eq!(batch.schema(), schema);
    let text = |name: &str| {
        batch
            .column_by_name(name)
            .unwrap()
            .as_string::<i32>()
            .iter()
            .flatten()
            .collect::<Vec<_>>()
    };
    assert_eq!(text("caption"), ["caption 7", "caption 0", "caption 3"]);
    assert_eq!(
        text("_superbatch_id"),
        ["0.parquet#7", "0.parquet#0", "0.parquet#3"]
    );
    assert_eq!(text("_superbatch_fidelity"), ["full"; 3]);
    assert_eq!(batch["image"].as_binary::<i32>().value(0), [7; 5]);
    assert_eq!(
        batch["width"]
            .as_primitive::<Int32Type>()
            .iter()
            .collect::<Vec<_>>(),
        [Some(7), None, None]
    );
    let positions = batch["_superbatch_position"].as_primitive::<UInt64Type>();
    assert_eq!(positions.values(), &[107, 100, 103]);
    let scores = batch["_superbatch_score"].as_primitive::<arrow::datatypes::Float64Type>();
    assert_eq!(scores.values(), &[7.0 / 3.0, 0.0, 1.0]);
}

#[test]
fn masks_of_tokens_are_the_receipts_and_null_where_it_has_none() {
    let mask = field("_superbatch_token_mask", masks::data_type(), true);
    let fields = output_schema();
    let fields = fields.fields().iter().cloned().chain([Arc::new(mask)]);
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let mut receipt = receipt(3);
    for row in &mut receipt.chosen {
        row.content_hash = vec![7; 16].into();
    }
    receipt.chosen[0].token_mask = vec![true, false, true];
    receipt.chosen[2].token_mask = vec![false; 3];
    let stream = rank(
        &schema,
        &table(vec![rows(0..3, |_| 5)]),
        &receipt,
        &[2, 1, 0],
    )
    .unwrap();
    let own = own_stream(&schema, &receipt, &[2, 1, 0]).unwrap().concat();
    for stream in [stream, own.into()] {
        let batch = read(&stream);
        let lists = batch["_superbatch_token_mask"].as_list::<i32>();
        let found: Vec<Option<Vec<bool>>> = lists
            .iter()
            .map(|list| Some(list?.as_boolean().iter().flatten().collect()))
            .collect();
        let expected = [Some(vec![false; 3]), None, Some(vec![true, false, true])];
        assert_eq!(found, expected);
    }
}

#[test]
fn bytes_depend_on_contents_alone() {
    let (schema, receipt) = (output_schema(), receipt(10));
    let size = |i| i * 7 % 5;
    let joined = concat_batches(
        &rows(0..0, size).schema(),
        &[rows(0..4, size), rows(4..10, size)],
    )
    .unwrap();
    let sliced = rows(0..15, size).slice(0, 10);
    let reread =
        Table::from_stream(write(&sliced.schema(), [Ok(sliced.clone())]).unwrap()).unwrap();
    assert_eq!(reread.rows(), 10);
    let apart = table(vec![rows(0..4, size), rows(4..10, size)]);
    // In the order in which ranks have them, the rows of the last one follow each other.
    let mixed = [5, 3, 9, 1, 2, 4, 8, 0, 6, 7];
    let each = mixed.map(|row| rows(row..row + 1, size));
    let mixed = concat_batches(&joined.schema(), &each).unwrap();
    let mixed = table(vec![mixed]).reordered(&[7, 3, 4, 1, 5, 0, 8, 9, 6, 2]);
    let whole = table(vec![rows(0..10, size)]);
    let others = [
        table(vec![joined]),
        table(vec![sliced]),
        reread,
        apart,
        mixed,
    ];
    for indices in [&[9, 1, 2, 4, 8][..], &[3, 4, 5, 6], &[0, 1], &[7], &[]] {
        let whole = rank(&schema, &whole, &receipt, indices).unwrap();
        for other in &others {
            let other = rank(&schema, other, &receipt, indices).unwrap();
            assert_eq!(other, whole, "{indices:?}");
        }
    }
}

#[test]
fn record_batches_hold_64_mib_or_one_row() {
    let mib = 1 << 20;
    // Rows 0..6 of 24 MiB but for one of 144 MiB. All share one image's memory or the other's.
    let (small, large) = (rows(0..1, |_| 24 * mib), rows(0..1, |_| 144 * mib));
    let [a, b, c, d, e] = [(); 5].map(|()| small.clone());
    let rows = table(vec![a, b, c, large, d, e]);
    let stream = rank(&output_schema(), &rows, &receipt(6), &[0, 1, 2, 3, 4, 5]).unwrap();
    let batches = StreamReader::try_new(stream.as_ref(), None)
        .unwrap()
        .map(|batch| batch.unwrap().num_rows());
    assert_eq!(batches.collect::<Vec<_>>(), [2, 1, 1, 2]);
}

#[test]
fn what_the_service_adds_is_cut_alike() {
    let mut receipt = receipt(5);
    for row in &mut receipt.chosen {
        row.id = "x".repeat(24 << 20);
        row.content_hash = vec![7; 16].into();
    }
    let own = |indices: &[usize]| own_stream(&output_schema(), &receipt, indices);
    let stream = Bytes::from(own(&[4, 3, 2, 1, 0]).unwrap().concat());
    let batches = StreamReader::try_new(stream.as_ref(), None).unwrap();
    let batches = batches.map(|batch| {
        let batch = batch.unwrap();
        let positions = batch["_superbatch_position"].as_primitive::<UInt64Type>();
        positions.values().to_vec()
    });
    let positions: Vec<Vec<u64>> = batches.collect();
    assert_eq!(positions, [vec![104, 103], vec![102, 101], vec![100]]);
    let beyond = own(&[0, 5]).unwrap_err();
    assert!(beyond.to_string().contains("none of number 5"), "{beyond}");
}

#[test]
fn a_sub_batch_may_be_larger_than_one_array_can_be() {
    // 160 images of 40 MiB, which share their memory: 6.25 GiB, of which 32-bit offsets reach a
    // third.
    let image = rows(0..1, |_| 40 << 20);
    let all = table(vec![image; 160]);
    let stream = rank(&output_schema(), &all, &receipt(160), &[159, 0]).unwrap();
    let batches: Vec<RecordBatch> = StreamReader::try_new(stream.as_ref(), None)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let ids = batches
        .iter()
        .map(|batch| batch["_superbatch_id"].as_string::<i32>().value(0));
    assert_eq!(ids.collect::<Vec<_>>(), ["0.parquet#159", "0.parquet#0"]);
    assert!(
        batches
            .iter()
            .all(|batch| batch["image"].as_binary::<i32>().value_length(0) == 40 << 20)
    );
}

#[test]
fn an_empty_stream_carries_the_schema() {
    let schema = output_schema();
    let stream = schema_bytes(&schema).unwrap();
    assert_eq!(
        StreamReader::try_new(stream.as_ref(), None)
            .unwrap()
            .schema(),
        schema
    );
    assert_eq!(Table::from_stream([stream]).unwrap().rows(), 0);
}

#[test]
fn what_does_not_fit_together_is_an_error() {
    let schema = output_schema();
    let batch = rows(0..4, |_| 1);
    let rows = table(vec![batch.clone()]);
    assert!(
        rank(&schema, &rows, &receipt(5), &[0]).is_err(),
        "a row is missing"
    );
    assert!(
        rank(&schema, &rows, &receipt(4), &[4]).is_err(),
        "no such row"
    );
    assert!(
        rank(
            &schema,
            &table(vec![batch.project(&[0, 1]).unwrap()]),
            &receipt(4),
            &[0]
        )
        .is_err(),
        "a column is missing"
    );
    let stream = rank(&schema, &rows, &receipt(4), &[0, 1]).unwrap();
    assert!(
        Table::from_stream([stream.slice(..stream.len() / 2)]).is_err(),
        "cut off"
    );
    assert!(Table::from_stream([]).is_err());
}
