//! Decoding, resizing and tokenizing against Pillow, transformers and open_clip, which
//! `tests/python/preprocess_parity.py` runs.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "torch")]
mod python;

use serde::Deserialize;
use std::{collections::BTreeMap, fs, path::Path};
use superbatch_server::storage::{StorageConfig, Stores};
use superbatch_server::worker::inputs::{
    model_inputs::Inputs,
    preprocess::{ImageLimits, Preprocess, decode},
    tokenize::{End, TextShape, Tokenizer},
};
use superbatch_server::worker::model::{ModelFolder, open_clip_config::Clean};

const LIMITS: ImageLimits = ImageLimits {
    pixels_max: 1 << 24,
    bytes_max: 1 << 24,
};

#[derive(Deserialize)]
struct Cases {
    images: Vec<ImageCase>,
    processors: Vec<String>,
    tokens: Tokens,
    open_clip: Vec<Cleaned>,
    siglip2: Captions,
}

#[derive(Deserialize)]
struct Captions {
    captions: Vec<String>,
    ids: Vec<Vec<i64>>,
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

#[derive(Deserialize)]
struct Cleaned {
    clean: String,
    strips: bool,
    captions: Vec<String>,
    ids: Vec<Vec<i64>>,
}

/// The largest difference allowed, in 1/255: promised is 1, kept is 0.
const ALLOWED: u8 = 0;

/// The largest difference, in 1/255.
fn apart(ours: &[u8], theirs: &[u8]) -> u8 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| a.abs_diff(*b))
        .max()
        .unwrap_or(0)
}

fn generate(folder: &Path) -> Cases {
    python::run("../tests/python/preprocess_parity.py", folder, &[]);
    serde_json::from_slice(&fs::read(folder.join("cases.json")).unwrap()).unwrap()
}

#[test]
fn pixels_and_ids_are_those_of_pillow_and_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let cases = generate(folder.path());
    let read = |name: String| fs::read(folder.path().join(name)).unwrap();
    let processor = |key: &String| {
        (
            key.clone(),
            Preprocess::parse(&read(format!("{key}/preprocessor_config.json"))).unwrap(),
        )
    };
    let processors: Vec<(String, Preprocess)> = cases.processors.iter().map(processor).collect();
    let (mut seen, mut wrong) = (BTreeMap::<_, usize>::new(), Vec::new());
    let mut compare = |kind: (String, String), name: &str, ours: &[u8], theirs: &[u8]| {
        let difference = apart(ours, theirs);
        if difference > ALLOWED {
            wrong.push(format!("{name} {}: {difference}/255 apart", kind.1));
        }
        *seen.entry(kind).or_default() += 1;
    };
    for case in &cases.images {
        let bytes = read(case.name.clone());
        let image =
            decode(&bytes, &LIMITS).unwrap_or_else(|fault| panic!("{}: {}", case.name, fault));
        assert_eq!(
            image.dimensions(),
            (case.width, case.height),
            "{}",
            case.name
        );
        let kind = |what: &str| (case.group.clone(), what.to_owned());
        compare(
            kind("decoded"),
            &case.name,
            image.as_raw(),
            &read(format!("{}.rgb", case.name)),
        );
        for (key, processor) in &processors {
            let pixels = processor.pixels(&bytes, &LIMITS).unwrap().bytes;
            compare(
                kind(key),
                &case.name,
                &pixels,
                &read(format!("{}.{key}", case.name)),
            );
        }
    }
    for ((group, kind), count) in &seen {
        println!("{group} {kind}: {count} images compared");
    }
    assert!(
        wrong.is_empty(),
        "{} of them:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(
        seen.values().sum::<usize>() > 1000,
        "the script wrote too few cases"
    );
    normalisation(&processors, &read);
    let json = read("tokenizer/tokenizer.json".to_owned());
    tokens(&cases.tokens, &json);
    let image = read("normalised.png".to_owned());
    captions_of_siglip2(&cases.siglip2, &folder.path().join("siglip2-fixed"), &image);
    captions_of_open_clip(&cases, &json, &built_in(&folder.path().join("built_in")));
    cut_jpegs_are_refused(&read("jpeg-q75-s2-64x48".to_owned()));
}

fn normalisation(processors: &[(String, Preprocess)], read: &dyn Fn(String) -> Vec<u8>) {
    for (key, processor) in processors {
        let how = processor.normalisation();
        let pixels = processor
            .pixels(&read("normalised.png".to_owned()), &LIMITS)
            .unwrap()
            .bytes;
        let theirs = read(format!("normalised.{key}"));
        let theirs = theirs
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let ours = pixels
            .iter()
            .enumerate()
            .map(|(n, &v)| (f32::from(v) * how.rescale - how.mean[n % 3]) / how.std[n % 3]);
        assert_eq!(ours.len(), theirs.len());
        // One step of a pixel is all that may lie between.
        let step = how.rescale / how.std.iter().copied().fold(f32::INFINITY, f32::min) * 1.001;
        let worst = ours
            .zip(theirs)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= step, "{key}: {worst} apart, {step} allowed");
        println!("normalised {key}: at most {worst} apart");
    }
}

fn tokens(tokens: &Tokens, json: &[u8]) {
    let shape = TextShape {
        length: tokens.length,
        pad_id: tokens.pad_id,
        vocab_size: tokens.vocab_size,
        end: End::Id(tokens.eos_id),
        clean: Clean::Nothing,
        separator: None,
    };
    let tokenizer = Tokenizer::parse(json, &shape).unwrap();
    for (caption, ids) in tokens.captions.iter().zip(&tokens.ids) {
        assert_eq!(tokenizer.encode(caption).unwrap(), *ids, "{caption:?}");
    }
    println!("{} captions tokenized alike", tokens.captions.len());
    assert!(tokens.captions.len() > 5);
}

fn opened(folder: &Path) -> ModelFolder {
    let stores = Stores::new(StorageConfig::default());
    let location = stores
        .open(&format!("file://{}", folder.display()))
        .unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(ModelFolder::fetch(&location)).unwrap()
}

/// The service's tokenizer of a folder with the files of open_clip's built-in one.
fn built_in(folder: &Path) -> Vec<u8> {
    opened(folder).tokenizer_json.to_vec()
}

fn captions_of_siglip2(cases: &Captions, folder: &Path, image: &[u8]) {
    let inputs = Inputs::of(&opened(folder)).unwrap();
    for (caption, ids) in cases.captions.iter().zip(&cases.ids) {
        let prepared = inputs.prepare(image, caption, &LIMITS).unwrap();
        assert_eq!(prepared.ids, *ids, "{caption:?}");
        assert_eq!(prepared.ids.len(), 64);
    }
    assert!(
        cases.ids.iter().any(|ids| ids.ends_with(&[0])),
        "padded with 0"
    );
}

fn captions_of_open_clip(cases: &Cases, json: &[u8], built_in: &[u8]) {
    let transformers = |clean, separator| TextShape {
        length: cases.open_clip[0].ids[0].len(),
        pad_id: cases.tokens.pad_id,
        vocab_size: cases.tokens.vocab_size,
        end: End::Anywhere,
        clean,
        separator,
    };
    let mut wrong = Vec::new();
    for case in &cases.open_clip {
        let separator = case.strips.then_some(cases.tokens.eos_id);
        let (json, shape) = match case.clean.as_str() {
            "whitespace" => (json, transformers(Clean::Whitespace, separator)),
            "lower" => (json, transformers(Clean::Lower, separator)),
            "canonicalize" => (json, transformers(Clean::Canonicalize, separator)),
            _ => (
                built_in,
                TextShape {
                    length: 77,
                    pad_id: 0,
                    vocab_size: 49_408,
                    end: End::Largest,
                    clean: Clean::Lower,
                    separator: None,
                },
            ),
        };
        let tokenizer = Tokenizer::parse(json, &shape).unwrap();
        for (caption, ids) in case.captions.iter().zip(&case.ids) {
            if tokenizer.encode(caption).unwrap() != *ids {
                wrong.push(format!("{}: {caption:?}", case.clean));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let compared: usize = cases.open_clip.iter().map(|case| case.captions.len()).sum();
    println!("{compared} captions tokenized as open_clip does");
    assert!(compared > 100, "the script wrote too few captions");
}

fn cut_jpegs_are_refused(bytes: &[u8]) {
    for keep in [2, 20, bytes.len() / 2, bytes.len() - 1] {
        assert!(
            decode(&bytes[..keep], &LIMITS).is_err(),
            "{keep} of {} bytes",
            bytes.len()
        );
    }
}
