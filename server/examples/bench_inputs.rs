//! A worker's input path without the rest of the worker: blocks are read, and their rows decoded,
//! resized and tokenized, as scoring does it: `bench_inputs MODEL_FOLDER DATA_URI THREADS`. For
//! each line on standard input it passes over all rows once, and answers with their number and the
//! seconds that took. No block is kept from one pass to the next. The driver is
//! `tests/python/bench_inputs.py`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use futures::{StreamExt, stream};
use std::{
    io::BufRead,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use superbatch_server::{
    dataset::{Manifest, SourceRequest, index},
    storage::{StorageConfig, Stores},
    worker::{
        BlockReader, WorkerConfig,
        inputs::{
            decode_pool::DecodePool, model_inputs::Inputs, preprocess::ImageLimits, row::Row,
        },
        model::ModelFolder,
    },
};

/// Blocks that are under way at the same time, as in a slice.
const AHEAD: usize = 3;

struct InputPath {
    reader: BlockReader,
    manifest: Manifest,
    pool: DecodePool,
    inputs: Arc<Inputs>,
}

impl InputPath {
    /// Makes all rows ready for the model, and returns how many could be used.
    async fn pass(&self) -> usize {
        let blocks: Vec<(u32, u32)> = self.manifest.sources[0]
            .blocks()
            .map(|(shard, block, _)| (shard, block))
            .collect();
        let ready = blocks.into_iter().map(|at| self.block(at));
        let ready = stream::iter(ready).buffered(AHEAD);
        ready.fold(0, |sum, rows| async move { sum + rows }).await
    }

    async fn block(&self, (shard, block): (u32, u32)) -> usize {
        let read = self.reader.read(&self.manifest, 0, shard, block, &[]);
        let batch = read.await.unwrap().batch;
        let row = |row| Row {
            batch: batch.clone(),
            row,
        };
        let rows: Vec<Row> = (0..batch.num_rows()).map(row).collect();
        let (prepared, _) = self.pool.prepare(rows, self.inputs.clone()).await.unwrap();
        prepared.iter().filter(|row| row.is_ok()).count()
    }
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, data, threads] = &arguments[..] else {
        panic!("usage: bench_inputs MODEL_FOLDER DATA_URI THREADS");
    };
    let stores = Stores::new(StorageConfig::default());
    let uri = format!("file://{}", Path::new(folder).display());
    let folder = ModelFolder::fetch(&stores.open(&uri).unwrap()).await;
    let manifest = index(&stores, None, &[SourceRequest::new(data)]).await;
    let config = WorkerConfig::default();
    let limits = ImageLimits {
        pixels_max: config.image_pixels_max,
        bytes_max: config.image_bytes_max,
    };
    let deadline = Duration::from_secs(config.decode_deadline_seconds);
    let path = InputPath {
        reader: BlockReader::new(stores, 0),
        manifest: manifest.unwrap(),
        pool: DecodePool::new(threads.parse().unwrap(), limits, deadline).unwrap(),
        inputs: Arc::new(Inputs::of(&folder.unwrap()).unwrap()),
    };
    for _line in std::io::stdin().lock().lines() {
        let begun = Instant::now();
        let rows = path.pass().await;
        println!("{rows} {}", begun.elapsed().as_secs_f64());
    }
}
