//! The models that open_clip's own configurations name: which are taken, with which tensors.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "torch")]
mod python;

use serde_json::Value;
use std::collections::BTreeMap;
use superbatch_server::worker::model::open_clip_config;

/// Of each form that is taken, and sizes of it.
const TAKEN: [&str; 13] = [
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-quickgelu",
    "ViT-L-14-336",
    "ViT-H-14",
    "ViT-H-14-quickgelu",
    "ViT-H-14-CLIPA",
    "ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP",
    "ViT-B-16-SigLIP2",
    "ViT-L-16-SigLIP2-256",
];
/// One of each kind that is not, and what its refusal names.
const REFUSED: [(&str, &str); 6] = [
    ("RN50", "ResNet"),
    ("convnext_base", "convnext"),
    ("coca_ViT-B-32", "CoCa"),
    ("roberta-ViT-B-32", "transformers"),
    ("EVA02-B-16", "eva02"),
    ("ViTamin-B", "vitamin"),
];

#[test]
fn models_that_open_clip_names_are_taken_or_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    python::run("tests/python/open_clip_names.py", folder.path(), &TAKEN);
    let read = |file: &str| std::fs::read(folder.path().join(file)).unwrap();
    let configs: BTreeMap<String, Value> = serde_json::from_slice(&read("configs.json")).unwrap();
    let tensors: BTreeMap<String, BTreeMap<String, Vec<usize>>> =
        serde_json::from_slice(&read("tensors.json")).unwrap();
    let parse = |name: &str| {
        let json = serde_json::json!({"model_cfg": configs[name], "preprocess_cfg": {}});
        open_clip_config::parse(json.to_string().as_bytes())
    };
    for name in TAKEN {
        let parameters = parse(name).unwrap().parameters();
        let mut ours: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (tensor, parameter) in parameters.iter() {
            if !parameter.optional || tensors[name].contains_key(tensor) {
                ours.insert(tensor.to_owned(), parameter.shape.clone());
            }
        }
        assert_eq!(ours, tensors[name], "{name}");
    }
    for (name, says) in REFUSED {
        let error = parse(name).unwrap_err().to_string();
        assert!(error.contains(says), "{name}: {error}");
    }
    let mut taken = 0;
    for name in configs.keys() {
        match parse(name) {
            Ok(_) => taken += 1,
            Err(e) => {
                assert!(e.to_string().contains("as TorchScript"), "{name}: {e}");
                println!("{name} is refused: {e}");
            }
        }
    }
    println!("{taken} of {} are taken", configs.len());
    assert_eq!(taken, 70, "docs/models.md says how many");
}
