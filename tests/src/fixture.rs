//! Small real parts: a data set, a model folder and a tokenizer, made in memory.
use arrow::{
    array::{BinaryArray, Int64Array, StringArray},
    datatypes::{DataType, Field, Schema},
    record_batch::RecordBatch,
};
use bytes::Bytes;
use parquet::{arrow::ArrowWriter, file::properties::WriterProperties};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::sync::Arc;
use superbatch_proto::v1::{
    ModelRef, PrepareModelRequest, worker_service_client::WorkerServiceClient,
};
use superbatch_server::{
    dataset::{SourceRequest, index},
    storage::{Location, StorageConfig, Stores},
    worker::{Worker, WorkerConfig},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

/// Words of the tiny tokenizer, after its special ones.
pub const WORDS: [&str; 12] = [
    "a", "red", "green", "blue", "dark", "bright", "small", "large", "square", "stripe", "noise",
    "photo",
];
/// Side of the images that the tiny models take, in pixels.
pub const IMAGE_SIZE: usize = 16;
/// Ids of a caption in the tiny models.
pub const TEXT_LENGTH: usize = 8;
/// Width of the tiny models' embeddings.
pub const EMBEDDING_DIM: usize = 16;

/// One row of a data set; `None` is null.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub image: Option<Vec<u8>>,
    pub caption: Option<String>,
}

impl Row {
    /// A usable row; rows of different `n` differ.
    pub fn good(n: u32) -> Self {
        let word = |shift: u32| WORDS[1 + (n >> shift) as usize % (WORDS.len() - 1)];
        let caption = format!("a {} {} {}", word(0), word(3), word(6));
        Self {
            image: Some(png(20, 18, n)),
            caption: Some(caption),
        }
    }
}

/// In-memory storage with a state, and no allow-list.
pub fn storage() -> (Stores, Location) {
    let stores = Stores::new(StorageConfig::default());
    let state = stores.open("memory:///state").expect("a valid URI");
    (stores, state)
}

/// Writes one Parquet file with columns `image`, `caption` and `n` (the row's number), in row
/// groups of `block_rows`.
pub async fn write_parquet(file: &Location, rows: &[Row], block_rows: usize) {
    let schema = Arc::new(Schema::new(vec![
        Field::new("image", DataType::Binary, true),
        Field::new("caption", DataType::Utf8, true),
        Field::new("n", DataType::Int64, false),
    ]));
    let images: BinaryArray = rows.iter().map(|row| row.image.as_deref()).collect();
    let captions: StringArray = rows.iter().map(|row| row.caption.as_deref()).collect();
    let numbers = Int64Array::from_iter_values(0..rows.len() as i64);
    let batch = RecordBatch::try_new(
        schema.clone(),
        vec![Arc::new(images), Arc::new(captions), Arc::new(numbers)],
    )
    .expect("columns fit the schema");
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(block_rows))
        .build();
    let mut writer =
        ArrowWriter::try_new(Vec::new(), schema, Some(properties)).expect("a valid schema");
    writer.write(&batch).expect("writing to memory");
    let bytes = writer.into_inner().expect("writing to memory");
    file.put("", bytes.into()).await.expect("writing to memory");
}

/// Writes `rows` as one file at `uri`, indexes it, and saves the manifest; its digest.
pub async fn dataset(
    stores: &Stores,
    state: &Location,
    uri: &str,
    rows: &[Row],
    block_rows: usize,
) -> String {
    write_parquet(&stores.open(uri).expect("a valid URI"), rows, block_rows).await;
    let source = SourceRequest::new(uri);
    let manifest = index(stores, None, &[source]).await.expect("a data set");
    let manifest = Arc::new(manifest);
    manifest.save(state).await.expect("writing to memory")
}

/// Writes the small files of a SigLIP folder; weights are the caller's business (random ones need
/// none). `mean` changes its preprocessing.
pub async fn model_folder(folder: &Location, mean: f64) {
    let tower = json!({
        "hidden_size": EMBEDDING_DIM, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    });
    let with = |more: Value| {
        let mut config = tower.clone();
        config
            .as_object_mut()
            .expect("an object")
            .extend(more.as_object().expect("an object").clone());
        config
    };
    let config = json!({
        "model_type": "siglip",
        "vision_config": with(json!({"image_size": IMAGE_SIZE, "patch_size": 8})),
        "text_config": with(json!({
            "vocab_size": 16, "max_position_embeddings": TEXT_LENGTH,
            "pad_token_id": 1, "eos_token_id": 1,
        })),
    });
    let preprocessor = json!({
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": true, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "resample": 3,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": [mean, mean, mean], "image_std": [0.5, 0.5, 0.5],
    });
    for (file, content) in [
        ("config.json", config),
        ("preprocessor_config.json", preprocessor),
        ("tokenizer.json", tokenizer()),
    ] {
        folder
            .put(file, Bytes::from(content.to_string()))
            .await
            .expect("writing to memory");
    }
}

/// Writes weights for the model folder at `uri`, different for each `seed`: what a worker says that
/// the model has.
pub async fn model_weights(stores: &Stores, state: &Location, uri: &str, seed: u32) {
    let config = WorkerConfig {
        device: "cpu".into(),
        threads: 1,
        ..WorkerConfig::default()
    };
    let worker = Worker::new(&config, stores.clone(), state.clone()).expect("a worker on the CPU");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("a bound socket"));
    let serving = Server::builder()
        .add_service(worker.service())
        .serve_with_incoming(TcpListenerStream::new(listener));
    let serving = tokio::spawn(serving);
    let model = ModelRef {
        model_uri: uri.into(),
        random_seed: Some(0),
        ..ModelRef::default()
    };
    let request = PrepareModelRequest {
        model: Some(model),
        canary: false,
    };
    let mut client = WorkerServiceClient::connect(address)
        .await
        .expect("it serves");
    let tensors = client
        .prepare_model(request)
        .await
        .expect("a good folder")
        .into_inner()
        .tensors;
    serving.abort();
    let views: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|tensor| {
            let shape: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
            let bytes = weights(&tensor.name, shape.iter().product(), seed);
            (tensor.name, shape, bytes)
        })
        .collect();
    let views = views.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).expect("bytes of the shape"),
        )
    });
    let file = safetensors::serialize(views, None).expect("valid tensors");
    stores
        .open(uri)
        .expect("a valid URI")
        .put("model.safetensors", file.into())
        .await
        .expect("writing");
}

fn weights(name: &str, count: usize, seed: u32) -> Vec<u8> {
    let mixed = |n: usize| {
        (n as u32)
            .wrapping_add(seed.wrapping_mul(0x85EB_CA6B))
            .wrapping_mul(0x9E37_79B1)
    };
    let value = |n: usize| match name {
        "logit_scale" => 10_f32.ln(),
        "logit_bias" => -5.0,
        _ => (mixed(n + name.len()) >> 8) as f32 / (1 << 24) as f32 - 0.5,
    };
    (0..count).flat_map(|n| value(n).to_le_bytes()).collect()
}

/// A `tokenizer.json` that splits at spaces, knows [`WORDS`], and ends captions as SigLIP does.
pub fn tokenizer() -> Value {
    let special = ["<unk>", "</s>"];
    let vocab: serde_json::Map<String, Value> = special
        .iter()
        .chain(&WORDS)
        .enumerate()
        .map(|(id, word)| ((*word).to_owned(), json!(id)))
        .collect();
    let added = special.iter().enumerate().map(|(id, word)| {
        json!({
            "id": id, "content": word, "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false,
        })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
        "decoder": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}

/// An RGB image whose pixels depend on `seed`, as an uncompressed PNG.
pub fn png(width: u32, height: u32, seed: u32) -> Vec<u8> {
    let mut raw = Vec::new();
    for y in 0..height {
        raw.push(0); // No filter.
        for x in 0..width {
            let mixed = (x / 4 + 31 * (y / 4) + 977 * seed).wrapping_mul(0x9E37_79B1);
            raw.extend_from_slice(&mixed.to_le_bytes()[..3]);
        }
    }
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend([8, 2, 0, 0, 0]); // 8 bits, RGB.
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in [
        (b"IHDR", header),
        (b"IDAT", stored_zlib(&raw)),
        (b"IEND", Vec::new()),
    ] {
        png.extend((data.len() as u32).to_be_bytes());
        let checked = [kind.as_slice(), &data].concat();
        png.extend_from_slice(&checked);
        png.extend(crc32(&checked).to_be_bytes());
    }
    png
}

/// A zlib stream of stored (uncompressed) blocks.
fn stored_zlib(data: &[u8]) -> Vec<u8> {
    let mut out = vec![0x78, 0x01];
    let mut chunks = data.chunks(0xFFFF).peekable();
    while let Some(chunk) = chunks.next() {
        let length = chunk.len() as u16;
        out.push(u8::from(chunks.peek().is_none()));
        out.extend([length.to_le_bytes(), (!length).to_le_bytes()].concat());
        out.extend_from_slice(chunk);
    }
    let (a, b) = data.iter().fold((1_u32, 0_u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65_521;
        (a, (b + a) % 65_521)
    });
    out.extend((b << 16 | a).to_be_bytes());
    out
}

fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xEDB8_8320
            } else {
                crc >> 1
            }
        })
    })
}
