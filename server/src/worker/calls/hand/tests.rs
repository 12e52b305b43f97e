use super::*;
use crate::{
    dataset::{
        content_hash,
        fixtures::{img2dataset, indexed, parquet, stores},
    },
    handed::Handover,
    worker::{
        calls::{
            answers::{Answers, answer_with},
            score::score,
        },
        config::WorkerConfig,
        engine::Engine,
    },
};
use arrow::{
    array::{AsArray, BinaryArray, StringArray, UInt32Array},
    compute::{cast, concat_batches, interleave_record_batch, take_record_batch},
    datatypes::DataType,
};
use bytes::Bytes;
use superbatch_proto::{
    arrow_stream,
    columns::CONTENT_HASH,
    v1::{
        BlockRows, ChosenRows, ScoreBegin, ScoreRequest, ScoreResponse, score_request,
        score_response::Message,
    },
};
use tonic::Status;

fn image(row: usize) -> Vec<u8> {
    vec![row as u8; 4096]
}

/// A batch of the rows of a range, in the data schema.
fn rows_of(range: std::ops::Range<usize>) -> Arc<RecordBatch> {
    let images: ArrayRef = Arc::new(BinaryArray::from_iter_values(range.clone().map(image)));
    let captions = range.map(|row| format!("caption {row}"));
    let captions: ArrayRef = Arc::new(StringArray::from_iter_values(captions));
    let columns = [("image", images, true), ("caption", captions, true)];
    Arc::new(RecordBatch::try_from_iter_with_nullable(columns).unwrap())
}

/// Returns the rows in their order, as one batch.
fn in_order(rows: &handed::Rows) -> RecordBatch {
    let batches: Vec<&RecordBatch> = rows.batches.iter().collect();
    interleave_record_batch(&batches, &rows.places).unwrap()
}

#[test]
fn a_batch_is_shared_if_most_of_it_is_wanted() {
    let batches = [rows_of(0..8), rows_of(8..16), rows_of(16..24)];
    // Six of the first batch, two of the second, all of the third.
    let wanted = [7, 20, 3, 9, 16, 2, 17, 0, 18, 19, 4, 21, 22, 15, 23, 6];
    let row = |n: &usize| Row {
        batch: batches[n / 8].clone(),
        row: n % 8,
    };
    let rows: Vec<Row> = wanted.iter().map(row).collect();
    let sizes = sizes(&rows).unwrap();
    let schema = hashed_schema(&batches[0].schema());
    let mut all = handed::Rows {
        schema: schema.clone(),
        batches: Vec::new(),
        places: vec![(0, 0); rows.len()],
        value_bytes: 0,
        bytes: 0,
    };
    let hashes = content_hashes(&rows).unwrap();
    for piece in pieces(&rows, &sizes) {
        let batch = batch(&piece, &hashes, &schema, &Buffers::new(0)).unwrap();
        add(&mut all, batch, &piece);
    }
    let memory = |batch: &RecordBatch| batch["image"].as_binary::<i32>().values().as_ptr();
    let is_shared = |from: &Arc<RecordBatch>| all.batches.iter().any(|b| memory(b) == memory(from));
    assert_eq!(batches.each_ref().map(is_shared), [true, false, true]);
    let found = in_order(&all);
    let hashes = found[CONTENT_HASH].as_fixed_size_binary();
    for (place, n) in wanted.into_iter().enumerate() {
        let caption = format!("caption {n}");
        assert!(
            found["image"].as_binary::<i32>().value(place) == image(n),
            "{n}"
        );
        assert_eq!(found["caption"].as_string::<i32>().value(place), caption);
        assert_eq!(hashes.value(place), content_hash(&image(n), &caption));
    }
    let held: usize = all.batches.iter().map(|b| b.get_array_memory_size()).sum();
    let values: usize = sizes.iter().sum();
    assert_eq!(all.bytes, held);
    assert!(held < 2 * values + 4096, "{held} bytes for {values}");
}

#[test]
fn few_rows_of_many_batches_are_copied_together() {
    let batches: Vec<_> = (0..8).map(|n| rows_of(n * 8..n * 8 + 8)).collect();
    let row = |batch: &Arc<RecordBatch>| Row {
        batch: batch.clone(),
        row: 1,
    };
    let rows: Vec<Row> = batches.iter().rev().map(row).collect();
    let pieces = pieces(&rows, &sizes(&rows).unwrap());
    let [piece] = &pieces[..] else {
        panic!("{} pieces", pieces.len())
    };
    assert!(!piece.is_shared && piece.places.iter().copied().eq(0..8));
    let hashes = content_hashes(&rows).unwrap();
    let schema = hashed_schema(&batches[0].schema());
    let made = batch(piece, &hashes, &schema, &Buffers::new(0)).unwrap();
    let found = made[CONTENT_HASH].as_fixed_size_binary();
    assert_eq!(found.value(0), content_hash(&image(57), "caption 57"));
    let captions = made["caption"].as_string::<i32>().iter().flatten();
    let expected = (0..8).rev().map(|n| format!("caption {}", n * 8 + 1));
    assert!(captions.eq(expected));
    assert!(super::pieces(&[], &[]).is_empty());
}

#[test]
fn views_are_copied_together_with_rows_of_other_batches() {
    let plain = rows_of(0..8);
    let mut columns = rows_of(8..16).columns().to_vec();
    columns[0] = cast(&columns[0], &DataType::BinaryView).unwrap();
    let schema = images::typed(&plain.schema(), DataType::BinaryView);
    let viewed = Arc::new(RecordBatch::try_new(schema, columns).unwrap());
    // All of the batch with views, and two of the other.
    let wanted = [15, 3, 8, 9, 14, 5, 10, 11, 12, 13];
    let row = |n: &usize| Row {
        batch: [&plain, &viewed][n / 8].clone(),
        row: n % 8,
    };
    let rows: Vec<Row> = wanted.iter().map(row).collect();
    let sizes = sizes(&rows).unwrap();
    assert!(
        sizes.iter().all(|size| *size > 4096 && *size < 4120),
        "{sizes:?}"
    );
    let pieces = pieces(&rows, &sizes);
    let [piece] = &pieces[..] else {
        panic!("{} pieces", pieces.len())
    };
    let hashes = content_hashes(&rows).unwrap();
    let schema = hashed_schema(&plain.schema());
    let made = batch(piece, &hashes, &schema, &Buffers::new(0)).unwrap();
    assert_eq!(made.schema(), schema);
    let (images, texts) = (
        made["image"].as_binary::<i32>(),
        made["caption"].as_string::<i32>(),
    );
    for (place, n) in wanted.into_iter().enumerate() {
        let caption = format!("caption {n}");
        assert!(images.value(place) == image(n), "{n}");
        assert_eq!(texts.value(place), caption);
        let hash = &hashes[place * HASH_BYTES..][..HASH_BYTES];
        assert_eq!(hash, content_hash(&image(n), &caption));
    }
}

/// Returns the messages of a `Score` call that wants these candidates of 12 rows.
async fn scored(chosen: &[u32], handover: Option<Handover>) -> Vec<Message> {
    let stores = stores();
    let state = stores.open("memory:///state").unwrap();
    let files = [("0.parquet", parquet(&img2dataset(0..12), 4))];
    let manifest = indexed(&stores, &files).await.unwrap();
    let begin = ScoreBegin {
        dataset_manifest: Arc::new(manifest).save(&state).await.unwrap(),
        blocks: (0..3)
            .map(|block| BlockRows {
                block,
                rows: (0..4).collect(),
                ..Default::default()
            })
            .collect(),
        micro_batch_rows: 4,
        columns: vec!["uid".into()],
        ..Default::default()
    };
    let chosen = ChosenRows {
        candidates: chosen.to_vec(),
        ..Default::default()
    };
    let requests = [
        score_request::Message::Begin(begin),
        score_request::Message::Chosen(chosen),
    ];
    let requests = requests.map(|message| {
        Ok::<_, Status>(ScoreRequest {
            message: Some(message),
        })
    });
    let requests = stream::iter(requests);
    let config = WorkerConfig {
        device: "cpu".into(),
        threads: 1,
        ..Default::default()
    };
    let engine = Arc::new(Engine::new(&config, stores, state).unwrap());
    let answers = answer_with(|answers: Answers<ScoreResponse>| {
        let answers = answers.handing(handover);
        async move { score(&engine, requests, &answers).await }.boxed()
    });
    let messages = answers.map(|answer| answer.unwrap().message.unwrap());
    messages.collect().await
}

#[tokio::test]
async fn a_call_hands_over_the_rows_that_it_would_send() {
    // Every fourth row has no image.
    let chosen = [9, 0, 4, 2, 8, 1, 6, 10, 5];
    let sent = scored(&chosen, None).await;
    let parts = sent.iter().filter_map(|message| match message {
        Message::ArrowIpc(part) => Some(part.clone()),
        _ => None,
    });
    let parts: Vec<Bytes> = parts.collect();
    let (schema, batches) = arrow_stream::read(parts).unwrap();
    let sent = concat_batches(&schema, &batches).unwrap();
    let handover = Handover::default();
    let messages = scored(&chosen, Some(handover.clone())).await;
    let [Message::Holes(_), Message::RowsDone(done)] = &messages[..] else {
        panic!("{messages:?}")
    };
    assert_eq!(done.rows, 9);
    let rows = handover.take().unwrap();
    assert_eq!(rows.schema, schema);
    let found = in_order(&rows);
    // Copied, so that both have buffers of their own rows alone.
    let all = UInt32Array::from_iter_values(0..9);
    let alone = |batch: &RecordBatch| take_record_batch(batch, &all).unwrap();
    assert_eq!(alone(&found), alone(&sent));
    let data = Arc::new(found.project(&[0, 1, 2]).unwrap());
    let row = |row| Row {
        batch: data.clone(),
        row,
    };
    let data: Vec<Row> = (0..9).map(row).collect();
    let values: usize = sizes(&data).unwrap().iter().sum();
    assert_eq!(rows.value_bytes, values as u64);
    assert!(handover.take().is_none(), "rows are taken once");
}
