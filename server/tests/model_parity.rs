//! The models against transformers and open_clip themselves, on random weights: the same embeddings
//! from the same folders.
#![allow(clippy::too_many_lines, clippy::unwrap_used)]
#![cfg(feature = "torch")]
mod python;

use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use superbatch_proto::v1::{EmbeddingDtype, approximation::By};
use superbatch_server::fidelity::Fidelity;
use superbatch_server::storage::{StorageConfig, Stores};
use superbatch_server::worker::device::{Device, Embedded, LoadModel, MicroBatch, Weights};
use superbatch_server::worker::inputs::preprocess::{ImageLimits, Preprocess};
use superbatch_server::worker::model::{Compute, ModelFolder, Normalisation};

const FOLDERS: [&str; 7] = [
    "siglip-64",
    "siglip-96",
    "clip-legacy-eos",
    "clip-gelu-sharded",
    "open_clip-vit",
    "open_clip-custom",
    "open_clip-siglip",
];

/// The CPU, or what `make test-gpu` names.
fn device() -> String {
    std::env::var("SUPERBATCH_TEST_DEVICE").unwrap_or_else(|_| "cpu".into())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

struct Expected {
    pixels: Vec<u8>,
    /// Images of fewer patches: their side, pixels and embeddings.
    low: (usize, Vec<u8>, Vec<f32>),
    /// Of the full pixels, at other approximations.
    others: Vec<(Fidelity, Vec<f32>)>,
    ids: Vec<i64>,
    image: Vec<f32>,
    text: Vec<f32>,
    normalisation: Normalisation,
    logits: Vec<f32>,
    state_dict: BTreeMap<String, Vec<u64>>,
}

impl Expected {
    fn read(folder: &Path) -> Self {
        let file = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        let data = |name| file.tensor(name).unwrap().data().to_vec();
        let [rescale, rest @ ..] = &floats(&data("normalisation"))[..] else {
            panic!("no normalisation")
        };
        Self {
            pixels: data("pixels"),
            low: (
                file.tensor("low_pixels").unwrap().shape()[1],
                data("low_pixels"),
                floats(&data("low_image")),
            ),
            others: file
                .tensors()
                .iter()
                .filter_map(|(name, of)| Some((fidelity(name)?, floats(of.data()))))
                .collect(),
            ids: data("ids")
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            image: floats(&data("image")),
            text: floats(&data("text")),
            normalisation: Normalisation {
                rescale: *rescale,
                mean: rest[..3].try_into().unwrap(),
                std: rest[3..].try_into().unwrap(),
            },
            logits: floats(&data("logits")),
            state_dict: serde_json::from_slice(
                &std::fs::read(folder.join("state_dict.json")).unwrap(),
            )
            .unwrap(),
        }
    }
}

/// Of a tensor's name such as `patch=16`.
fn fidelity(name: &str) -> Option<Fidelity> {
    let (field, value) = name.split_once('=')?;
    let by = match field {
        "patch" => By::Patch(value.parse().unwrap()),
        "patch_dropout" => By::PatchDropout(value.parse().unwrap()),
        "layers" => By::Layers(value.parse().unwrap()),
        _ => panic!("{name}"),
    };
    Some(by.into())
}

/// The smallest cosine and the largest difference of an element, over all rows.
fn compare(found: &[f32], expected: &[f32], dim: usize) -> (f64, f64) {
    assert_eq!(found.len(), expected.len());
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    };
    let cosine = |(a, b): (&[f32], &[f32])| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    let cosines = found
        .chunks_exact(dim)
        .zip(expected.chunks_exact(dim))
        .map(cosine);
    let differences = found
        .iter()
        .zip(expected)
        .map(|(a, b)| f64::from((a - b).abs()));
    (cosines.fold(1.0, f64::min), differences.fold(0.0, f64::max))
}

#[tokio::test]
async fn embeddings_are_those_of_the_models_library() {
    let folders = tempfile::tempdir().unwrap();
    python::run("tests/python/model_parity.py", folders.path(), &[]);
    let device = Device::start(&device(), 1).unwrap();
    let stores = Stores::new(StorageConfig::default());
    for name in FOLDERS {
        let path = folders.path().join(name);
        let location = stores.open(&format!("file://{}", path.display())).unwrap();
        let folder = Arc::new(ModelFolder::fetch(&location).await.unwrap());
        let expected = Expected::read(&path);
        for (compute, least_cosine) in [(Compute::F32, 0.9999), (Compute::Bf16, 0.999)] {
            let load = LoadModel {
                folder: folder.clone(),
                weights: Weights::Folder,
                compute,
                canary: true,
            };
            let info = device.load(load).await.unwrap();
            let mut tensors: BTreeMap<_, _> = info.tensors.iter().cloned().collect();
            for name in &info.optional_tensors {
                if !expected.state_dict.contains_key(name) {
                    tensors.remove(name);
                }
            }
            assert_eq!(
                tensors, expected.state_dict,
                "{name}: names and shapes are those of model.state_dict()"
            );
            assert!((info.logit_scale - f64::from(expected.logits[0])).abs() < 1e-5);
            let has_bias = expected.state_dict.contains_key("logit_bias");
            let bias = has_bias.then_some(f64::from(expected.logits[1]));
            assert_eq!(info.logit_bias, bias, "{name}");

            let batch = MicroBatch {
                model: info.key.clone(),
                fidelity: Fidelity::Full,
                keys: (0..(expected.ids.len() / info.text_length) as u64).collect(),
                pixels: expected.pixels.clone(),
                grids: Vec::new(),
                normalisation: expected.normalisation,
                ids: expected.ids.clone(),
                dtype: EmbeddingDtype::F32,
            };
            let Embedded {
                image,
                text,
                dim,
                not_finite,
                ..
            } = device.embed(batch.clone()).await.unwrap();
            assert!(not_finite.is_empty());
            assert_eq!(dim, info.embedding_dim);
            let (side, pixels, low) = &expected.low;
            assert!(*side < info.image_size);
            let smaller = MicroBatch {
                fidelity: Fidelity::Resolution(*side as u32),
                pixels: pixels.clone(),
                ..batch.clone()
            };
            let small = device.embed(smaller).await.unwrap();
            let mut all = vec![
                ("image".to_owned(), image, &expected.image),
                ("small image".to_owned(), small.image, low),
                ("text".to_owned(), text, &expected.text),
            ];
            assert_eq!(
                expected.others.len(),
                4,
                "{name}: each approximation, and one twice"
            );
            for (fidelity, expected) in &expected.others {
                let batch = MicroBatch {
                    fidelity: *fidelity,
                    ..batch.clone()
                };
                let found = device.embed(batch).await.unwrap();
                all.push((fidelity.to_string(), found.image, expected));
            }
            for (tower, found, expected) in all {
                let (cosine, difference) = compare(&floats(&found), expected, dim);
                println!(
                    "{name} {tower} {compute:?}: cosine {cosine:.7}, difference {difference:.1e}"
                );
                assert!(
                    cosine >= least_cosine,
                    "{name} {tower} {compute:?}: a row's cosine is {cosine}"
                );
                // In f32 the two differ by rounding alone.
                assert!(
                    compute == Compute::Bf16 || difference < 1e-4,
                    "{name} {tower}: {difference}"
                );
            }
        }
    }
}

/// Pictures of several shapes as files, by way of the service's own decoding: their pixels as a
/// micro-batch has them, and the grids of their patches.
fn pictures(folder: &Path, preprocess: &Preprocess, count: usize) -> (Vec<u8>, Vec<[u32; 2]>) {
    let limits = ImageLimits {
        pixels_max: 1 << 24,
        bytes_max: 1 << 24,
    };
    let (side, most) = preprocess.patches().unwrap();
    let bytes = (most * side * side * 3) as usize;
    let (mut pixels, mut grids) = (Vec::new(), Vec::new());
    for n in 0..count {
        let picture = std::fs::read(folder.join(format!("{n}.png"))).unwrap();
        let found = preprocess.pixels(&picture, &limits).unwrap();
        pixels.extend(found.bytes);
        // Padding is never looked at.
        pixels.resize((n + 1) * bytes, n as u8 * 30);
        grids.push(found.grid.unwrap());
    }
    (pixels, grids)
}

#[tokio::test]
async fn images_of_any_shape_are_embedded_as_transformers_does() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path();
    python::run("tests/python/naflex_parity.py", path, &[]);
    let device = Device::start(&device(), 1).unwrap();
    let stores = Stores::new(StorageConfig::default());
    let location = stores.open(&format!("file://{}", path.display())).unwrap();
    let folder = Arc::new(ModelFolder::fetch(&location).await.unwrap());
    let preprocess = Preprocess::parse(&folder.preprocessor_json).unwrap();
    let file = std::fs::read(path.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let data = |name| file.tensor(name).unwrap().data().to_vec();
    let longs = |name| -> Vec<i64> {
        data(name)
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
            .collect()
    };
    let rows = file.tensor("image").unwrap().shape()[0];
    let (pixels, grids) = pictures(path, &preprocess, rows);
    let flat: Vec<i64> = grids.iter().flatten().map(|n| i64::from(*n)).collect();
    assert_eq!(flat, longs("grids"), "spatial_shapes");
    for (compute, least_cosine) in [(Compute::F32, 0.9999), (Compute::Bf16, 0.999)] {
        let load = LoadModel {
            folder: folder.clone(),
            weights: Weights::Folder,
            compute,
            canary: true,
        };
        let info = device.load(load).await.unwrap();
        let tensors: BTreeMap<_, _> = info.tensors.iter().cloned().collect();
        let names = std::fs::read(path.join("state_dict.json")).unwrap();
        let names: BTreeMap<String, Vec<u64>> = serde_json::from_slice(&names).unwrap();
        assert_eq!(tensors, names, "those of model.state_dict()");
        let batch = MicroBatch {
            model: info.key.clone(),
            fidelity: Fidelity::Full,
            keys: vec![0; rows],
            pixels: pixels.clone(),
            grids: grids.clone(),
            normalisation: preprocess.normalisation(),
            ids: longs("ids"),
            dtype: EmbeddingDtype::F32,
        };
        let found = device.embed(batch).await.unwrap();
        assert!(found.not_finite.is_empty());
        for (tower, found) in [("image", &found.image), ("text", &found.text)] {
            let (cosine, difference) =
                compare(&floats(found), &floats(&data(tower)), info.embedding_dim);
            println!("naflex {tower} {compute:?}: cosine {cosine:.7}, difference {difference:.1e}");
            assert!(cosine >= least_cosine, "{tower} {compute:?}: {cosine}");
            assert!(
                compute == Compute::Bf16 || difference < 1e-4,
                "{tower}: {difference}"
            );
        }
    }
}
