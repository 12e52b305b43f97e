//! One device that embeds the same micro-batch again and again: `bench_embed FOLDER ROWS THREADS`.
//! For each line on standard input it embeds once, and answers with the seconds that took. The
//! driver is `tests/python/bench_embed.py`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use std::{io::BufRead, path::Path, sync::Arc, time::Instant};
use superbatch_proto::v1::EmbeddingDtype;
use superbatch_server::{
    fidelity::Fidelity,
    storage::{StorageConfig, Stores},
    worker::{
        device::{Device, LoadModel, MicroBatch, Weights},
        inputs::model_inputs::Inputs,
        model::{Compute, ModelFolder},
    },
};

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, rows, threads] = &arguments[..] else {
        panic!("usage: bench_embed FOLDER ROWS THREADS");
    };
    let rows: u64 = rows.parse().unwrap();
    let uri = format!("file://{}", Path::new(folder).display());
    let location = Stores::new(StorageConfig::default()).open(&uri).unwrap();
    let folder = Arc::new(ModelFolder::fetch(&location).await.unwrap());
    let inputs = Inputs::of(&folder).unwrap();
    let device = Device::start("cpu", threads.parse().unwrap()).unwrap();
    let load = LoadModel {
        folder: folder.clone(),
        weights: Weights::Folder,
        compute: Compute::F32,
        canary: true,
    };
    let info = device.load(load).await.unwrap();
    let pixels = rows as usize * info.image_size.pow(2) * 3;
    let ids = rows as usize * info.text_length;
    let batch = MicroBatch {
        model: info.key,
        fidelity: Fidelity::Full,
        keys: (0..rows).collect(),
        pixels: (0..pixels).map(|i| (i * 7 % 251) as u8).collect(),
        grids: Vec::new(),
        normalisation: inputs.normalisation(),
        ids: (0..ids).map(|i| (i % 97) as i64).collect(),
        dtype: EmbeddingDtype::F32,
    };
    for _line in std::io::stdin().lock().lines() {
        let batch = batch.clone();
        let begun = Instant::now();
        device.embed(batch).await.unwrap();
        println!("{}", begun.elapsed().as_secs_f64());
    }
}
