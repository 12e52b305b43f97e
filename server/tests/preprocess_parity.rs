//! Decoding, resizing and tokenizing against Pillow and transformers, which `tests/python/preprocess_parity.py` runs.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "torch")]
use serde::Deserialize;
use std::{collections::BTreeMap, fs, path::Path, process::Command};
use superbatch_server::worker::{
    preprocess::{ImageLimits, Preprocess, decode},
    tokenize::{TextShape, Tokenizer},
};

const LIMITS: ImageLimits = ImageLimits { pixels_max: 1 << 24, bytes_max: 1 << 24 };

#[derive(Deserialize)]
struct Cases {
    images: Vec<ImageCase>,
    processors: Vec<String>,
    tokens: Tokens,
}

#[derive(Deserialize)]
struct ImageCase {
    name: String,
    group: String,
    width: u32,
    height: u32,
}

#[derive(Deserialize)]
struct Tokens {
    length: usize,
    pad_id: i64,
    eos_id: i64,
    vocab_size: usize,
    captions: Vec<String>,
    ids: Vec<Vec<i64>>,
}

/// The largest difference allowed, in 1/255, after decoding and after resizing. Lossless images: only what resizing may do.
/// JPEG's inverse transform and chroma filter are no norm, and libjpeg's are others than ours: a few steps in single pixels of
/// these small noisy images, within half a step on the mean. WebP: where the exact sum lies between two steps, two passes may
/// round the other way.
fn allowed(group: &str) -> (u8, u8) {
    match group {
        "jpeg" => (5, 5),
        "webp" => (0, 2),
        _ => (0, 1),
    }
}

/// The largest mean difference allowed over a group of images.
const MEAN_MAX: f64 = 0.5;

/// The largest and the mean difference, in 1/255.
fn apart(ours: &[u8], theirs: &[u8]) -> (u8, f64) {
    assert_eq!(ours.len(), theirs.len());
    let apart = || ours.iter().zip(theirs).map(|(a, b)| a.abs_diff(*b));
    (apart().max().unwrap_or(0), apart().map(f64::from).sum::<f64>() / ours.len() as f64)
}

fn generate(folder: &Path) -> Cases {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    let python = std::env::var("SUPERBATCH_PYTHON").unwrap_or(format!("{}/.venv/bin/python", root.display()));
    let script = root.join("tests/python/preprocess_parity.py");
    let status = Command::new(&python).arg(&script).arg(folder).env("HF_HUB_OFFLINE", "1").status();
    let status =
        status.unwrap_or_else(|e| panic!("cannot run {python}: {e}; run `make setup` or set SUPERBATCH_PYTHON"));
    assert!(status.success(), "{} failed", script.display());
    serde_json::from_slice(&fs::read(folder.join("cases.json")).unwrap()).unwrap()
}

#[test]
fn pixels_and_ids_are_those_of_pillow_and_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let cases = generate(folder.path());
    let read = |name: String| fs::read(folder.path().join(name)).unwrap();
    let processor =
        |key: &String| (key.clone(), Preprocess::parse(&read(format!("{key}/preprocessor_config.json"))).unwrap());
    let processors: Vec<(String, Preprocess)> = cases.processors.iter().map(processor).collect();
    let (mut seen, mut wrong) = (BTreeMap::<_, (usize, u8, f64)>::new(), Vec::new());
    let mut compare = |kind: (String, String), name: &str, limit: u8, (difference, mean): (u8, f64)| {
        if difference > limit {
            wrong.push(format!("{name} {}: {difference}/255 apart, {limit} allowed", kind.1));
        }
        let entry = seen.entry(kind).or_default();
        *entry = (entry.0 + 1, entry.1.max(difference), entry.2 + mean);
    };
    for case in &cases.images {
        let bytes = read(case.name.clone());
        let image = decode(&bytes, &LIMITS).unwrap_or_else(|fault| panic!("{}: {}", case.name, fault.detail));
        assert_eq!(image.dimensions(), (case.width, case.height), "{}", case.name);
        let (decoding, resizing) = allowed(&case.group);
        let difference = apart(image.as_raw(), &read(format!("{}.rgb", case.name)));
        compare((case.group.clone(), "decoded".to_owned()), &case.name, decoding, difference);
        for (key, processor) in &processors {
            let pixels = processor.pixels(&bytes, &LIMITS).unwrap();
            let difference = apart(&pixels, &read(format!("{}.{key}", case.name)));
            compare((case.group.clone(), key.clone()), &case.name, resizing, difference);
        }
    }
    for ((group, kind), (count, worst, sum)) in &seen {
        let mean = sum / *count as f64;
        println!("{group} {kind}: {count} images compared, at most {worst}/255 apart, {mean:.3}/255 on the mean");
        if mean > MEAN_MAX {
            wrong.push(format!("{group} {kind}: {mean}/255 apart on the mean, {MEAN_MAX} allowed"));
        }
    }
    assert!(wrong.is_empty(), "{} of them:\n{}", wrong.len(), wrong.join("\n"));
    assert!(seen.values().map(|(count, ..)| count).sum::<usize>() > 1000, "the script wrote too few cases");
    normalisation(&processors, &read);
    tokens(&cases.tokens, &read("tokenizer/tokenizer.json".to_owned()));
    cut_jpegs_are_refused(&read("jpeg-q75-s2-64x48".to_owned()));
}

fn normalisation(processors: &[(String, Preprocess)], read: &dyn Fn(String) -> Vec<u8>) {
    for (key, processor) in processors {
        let how = processor.normalisation();
        let pixels = processor.pixels(&read("normalised.png".to_owned()), &LIMITS).unwrap();
        let theirs = read(format!("normalised.{key}"));
        let theirs = theirs.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let ours =
            pixels.iter().enumerate().map(|(n, &v)| (f32::from(v) * how.rescale - how.mean[n % 3]) / how.std[n % 3]);
        assert_eq!(ours.len(), theirs.len());
        // One step of a pixel is all that may lie between.
        let step = how.rescale / how.std.iter().copied().fold(f32::INFINITY, f32::min) * 1.001;
        let worst = ours.zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= step, "{key}: {worst} apart, {step} allowed");
        println!("normalised {key}: at most {worst} apart");
    }
}

fn tokens(tokens: &Tokens, json: &[u8]) {
    let shape = TextShape {
        length: tokens.length,
        pad_id: tokens.pad_id,
        vocab_size: tokens.vocab_size,
        eos_id: Some(tokens.eos_id),
    };
    let tokenizer = Tokenizer::parse(json, &shape).unwrap();
    for (caption, ids) in tokens.captions.iter().zip(&tokens.ids) {
        assert_eq!(tokenizer.encode(caption).unwrap(), *ids, "{caption:?}");
    }
    println!("{} captions tokenized alike", tokens.captions.len());
    assert!(tokens.captions.len() > 5);
}

fn cut_jpegs_are_refused(bytes: &[u8]) {
    for keep in [2, 20, bytes.len() / 2, bytes.len() - 1] {
        assert!(decode(&bytes[..keep], &LIMITS).is_err(), "{keep} of {} bytes", bytes.len());
    }
}
