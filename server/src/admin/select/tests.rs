use super::*;
use clap::Parser;
use half::f16;
use safetensors::tensor::{Dtype, TensorView};
use std::{collections::HashMap, path::Path};

const COUNT: usize = 40;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: SelectArgs,
}

/// A file being put together: name to (dtype, shape, bytes), and metadata.
struct Draft {
    tensors: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
    metadata: HashMap<String, String>,
    folder: tempfile::TempDir,
}

fn floats(rows: usize, columns: usize, salt: u32) -> Vec<u8> {
    let unit = |row: usize| {
        let values: Vec<f32> = (0..columns)
            .map(|k| {
                (((row * 31 + k * 7) as u32)
                    .wrapping_mul(2654435761)
                    .wrapping_add(salt)
                    >> 16) as f32
                    % 97.0
                    - 48.0
            })
            .collect();
        let norm = values.iter().map(|value| value * value).sum::<f32>().sqrt();
        values.into_iter().map(move |value| value / norm)
    };
    (0..rows)
        .flat_map(unit)
        .flat_map(f32::to_le_bytes)
        .collect()
}

impl Draft {
    fn new() -> Self {
        let tensor = |name, columns, salt| {
            (
                name,
                Dtype::F32,
                vec![COUNT, columns],
                floats(COUNT, columns, salt),
            )
        };
        let tensors = vec![
            tensor("learner_img", 8, 1),
            tensor("learner_txt", 8, 2),
            tensor("reference_img", 12, 3),
            tensor("reference_txt", 12, 4),
        ];
        let words = [
            ("learner_scale", "8"),
            ("learner_bias", "-4"),
            ("reference_scale", "10"),
            ("reference_bias", "-5"),
        ];
        let metadata = words
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Self {
            tensors,
            metadata,
            folder: tempfile::tempdir().expect("a folder"),
        }
    }

    fn with(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.metadata.remove(name);
        self.tensors.retain(|tensor| tensor.0 != name);
        self
    }

    fn noise(mut self, rows: usize) -> Self {
        self.tensors.push((
            "noise",
            Dtype::F32,
            vec![rows, COUNT],
            floats(rows, COUNT, 9),
        ));
        self
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("embeddings.safetensors")
    }

    fn select(&self, flags: &[&str]) -> Result<serde_json::Value> {
        let views = self.tensors.iter().map(|(name, dtype, shape, bytes)| {
            (
                *name,
                TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"),
            )
        });
        let bytes = safetensors::serialize(views, Some(self.metadata.clone())).expect("a file");
        std::fs::write(self.path(), bytes).expect("a writable folder");
        select(&self.path(), flags)
    }
}

fn select(path: &Path, flags: &[&str]) -> Result<serde_json::Value> {
    let path = path.to_str().expect("a path");
    let words = ["select", "--embeddings", path]
        .into_iter()
        .chain(flags.iter().copied());
    let command = Command::try_parse_from(words).expect("known flags");
    run(&command.args).map(|line| serde_json::from_str(&line).expect("one JSON object"))
}

fn sizes(json: &serde_json::Value) -> (usize, usize) {
    (
        json["indices"].as_array().expect("indices").len(),
        json["chunks"].as_array().expect("chunks").len(),
    )
}

#[test]
fn a_flag_beats_the_metadata_which_beats_the_default() {
    let plain = Draft::new();
    let json = plain.select(&[]).expect("defaults");
    assert_eq!(
        sizes(&json),
        (8, 8),
        "a fifth of 40, in at most 16 chunks: {json}"
    );
    assert!(
        json["batch_score"].is_f64()
            && json["seconds"]["load"].is_f64()
            && json["seconds"]["select"].is_f64()
    );
    let told = Draft::new()
        .with("b", "10")
        .with("n_chunks", "3")
        .with("loss", "softmax")
        .with("criterion", "hard");
    assert_eq!(sizes(&told.select(&[]).expect("metadata")), (10, 3));
    assert_eq!(
        sizes(
            &told
                .select(&["--sub-batch-size", "6", "--n-chunks", "2"])
                .expect("flags")
        ),
        (6, 2)
    );
    let json = told.select(&["--policy", "independent"]).expect("flags");
    assert_eq!(json["chunks"], serde_json::json!([10]));
}

#[test]
fn the_kernels_draw_is_printed_and_every_backend_prints_it() {
    let draft = Draft::new().with("b", "11").with("n_chunks", "4").noise(4);
    let native = draft.select(&["--threads", "1"]).expect("native");
    let super_batch = SuperBatch::read(
        &Command::parse_from(["x", "--embeddings", draft.path().to_str().expect("a path")]).args,
    );
    let expected = super_batch
        .expect("read")
        .select(&Backend::Native)
        .expect("selected");
    assert_eq!(native["indices"], serde_json::json!(expected.indices));
    assert_eq!(native["chunks"], serde_json::json!([3, 3, 3, 2]));
    #[cfg(feature = "torch")]
    assert_eq!(
        draft.select(&["--backend", "torch"]).expect("torch")["indices"],
        native["indices"]
    );
}

#[test]
fn noise_in_the_file_is_used_and_the_seed_is_where_there_is_too_little() {
    let indices =
        |draft: &Draft, flags: &[&str]| draft.select(flags).expect("selected")["indices"].clone();
    let given = Draft::new().with("b", "12").with("n_chunks", "2").noise(2);
    assert_eq!(
        indices(&given, &["--seed", "1"]),
        indices(&given, &["--seed", "2"])
    );
    let more = ["--n-chunks", "3", "--seed"];
    assert_ne!(
        indices(&given, &[&more[..], &["1"]].concat()),
        indices(&given, &[&more[..], &["2"]].concat())
    );
    let seeded = Draft::new().with("b", "12").with("seed", "5");
    assert_eq!(indices(&seeded, &[]), indices(&seeded, &["--seed", "5"]));
    assert_ne!(indices(&seeded, &[]), indices(&seeded, &["--seed", "6"]));
}

#[test]
fn only_what_the_criterion_and_policy_need_must_be_there() {
    let easy = Draft::new()
        .without("learner_img")
        .without("learner_txt")
        .without("learner_scale");
    assert!(easy.select(&["--criterion", "easy"]).is_ok());
    let error = easy
        .select(&["--criterion", "hard"])
        .expect_err("no learner");
    assert_eq!(
        (error.reason(), error.value("tensor")),
        (Reason::InvalidArgument, Some("learner_img"))
    );
    let blind = easy
        .without("reference_img")
        .without("reference_txt")
        .noise(1);
    let json = blind.select(&["--policy", "uniform"]).expect("noise alone");
    assert_eq!(
        (sizes(&json), json["batch_score"].is_null()),
        ((8, 1), true)
    );
    assert!(
        blind
            .without("noise")
            .select(&["--policy", "uniform"])
            .is_err(),
        "how many candidates?"
    );
}

#[test]
fn f16_embeddings_are_read() {
    let mut draft = Draft::new();
    let exact = draft.select(&[]).expect("f32")["batch_score"]
        .as_f64()
        .expect("a score");
    for (_, dtype, _, bytes) in &mut draft.tensors {
        let values = bytes
            .as_chunks()
            .0
            .iter()
            .map(|value| f16::from_f32(f32::from_le_bytes(*value)));
        (*dtype, *bytes) = (Dtype::F16, values.flat_map(f16::to_le_bytes).collect());
    }
    let rounded = draft.select(&[]).expect("f16")["batch_score"]
        .as_f64()
        .expect("a score");
    assert!(
        (exact - rounded).abs() < 0.1 && exact != rounded,
        "{exact} {rounded}"
    );
}

#[test]
fn what_is_wrong_with_a_file_is_named() {
    let says = |draft: Draft, flags: &[&str], words: &str| {
        let error = draft.select(flags).expect_err(words);
        assert!(
            error.chain().contains(words),
            "{} lacks {words:?}",
            error.chain()
        );
        error.reason()
    };
    let mut narrow = Draft::new();
    (narrow.tensors[1].2, narrow.tensors[1].3) = (vec![COUNT, 7], floats(COUNT, 7, 1));
    says(
        narrow,
        &[],
        "learner_txt is [40, 7] where learner_img is [40, 8]",
    );
    let mut short = Draft::new();
    (2..4)
        .for_each(|k| (short.tensors[k].2, short.tensors[k].3) = (vec![39, 12], floats(39, 12, 1)));
    says(short, &[], "disagree on the number of candidates");
    let mut flat = Draft::new();
    flat.tensors[0].2 = vec![COUNT * 8];
    says(flat, &[], "two extents");
    let mut whole = Draft::new();
    whole.tensors[2].1 = Dtype::I32;
    says(whole, &[], "reference_img is I32");
    says(
        Draft::new().without("reference_scale"),
        &[],
        "no metadata reference_scale; give save_file of safetensors metadata=",
    );
    says(
        Draft::new().with("learner_scale", "-1"),
        &[],
        "scale is -1: it must be finite and above 0",
    );
    says(Draft::new().with("policy", "jest"), &[], "metadata policy");
    says(
        Draft::new(),
        &["--sub-batch-size", "41"],
        "cannot draw a sub-batch of 41",
    );
    assert_eq!(
        says(
            Draft::new().without("learner_bias"),
            &[],
            "sigmoid loss needs"
        ),
        Reason::BiasMissing
    );
    assert!(
        Draft::new()
            .without("learner_bias")
            .select(&["--loss", "softmax"])
            .is_ok()
    );
    let nowhere = Draft::new();
    assert!(
        select(&nowhere.path(), &[])
            .expect_err("no file")
            .chain()
            .contains("cannot read")
    );
    std::fs::write(nowhere.path(), b"not a tensor in sight").expect("a writable folder");
    assert!(
        select(&nowhere.path(), &[])
            .expect_err("no tensors")
            .chain()
            .contains("not a safetensors file")
    );
}

#[test]
fn rows_that_are_not_normalised_are_warned_of_by_model_tower_and_row() {
    let warnings = |draft: &Draft| {
        draft.select(&[]).expect("a draw all the same");
        let path = draft.path();
        let command = Command::parse_from(["x", "--embeddings", path.to_str().expect("a path")]);
        SuperBatch::read(&command.args).expect("read").warnings()
    };
    let mut draft = Draft::new();
    assert_eq!(warnings(&draft), Vec::<String>::new());
    let longer = |bytes: &mut Vec<u8>, rows: usize, times: f32| {
        for value in bytes.as_chunks_mut().0.iter_mut().take(rows) {
            *value = (f32::from_le_bytes(*value) * times).to_le_bytes();
        }
    };
    longer(&mut draft.tensors[3].3, 12, 1.5);
    assert_eq!(
        warnings(&draft),
        Vec::<String>::new(),
        "one row is no forgotten normalisation"
    );
    longer(&mut draft.tensors[3].3, COUNT * 12, 3.0);
    let said = warnings(&draft);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].starts_with("reference text: rows are not L2-normalised"),
        "{said:?}"
    );
    assert!(
        said[0].contains("median norm 3.000, candidate 0 has 4.500"),
        "{said:?}"
    );
}

#[test]
fn what_another_policy_reads_is_refused_as_a_flag_and_ignored_as_metadata() {
    for (flags, field, says) in [
        (
            ["--temperature", "2"],
            "temperature",
            "belongs to policy independent, and the policy is joint; leave it out",
        ),
        (["--pressure", "2"], "pressure", "belongs to policy rank"),
        (
            ["--priority-exponent", "1"],
            "priority_exponent",
            "belongs to policy proportional",
        ),
        (
            ["--weight-exponent", "1"],
            "weight_exponent",
            "belongs to policy proportional",
        ),
    ] {
        let error = Draft::new().select(&flags).expect_err(field);
        assert_eq!(error.value("field"), Some(field));
        assert!(error.to_string().contains(says), "{error}");
    }
    let told = Draft::new().with("temperature", "2");
    assert_eq!(
        told.select(&[]).unwrap()["indices"],
        Draft::new().select(&[]).unwrap()["indices"]
    );
    let independent = ["--policy", "Independent", "--temperature", "2"];
    assert_eq!(
        told.select(&independent[..2]).unwrap()["indices"],
        Draft::new().select(&independent).unwrap()["indices"]
    );
}

#[test]
fn unknown_words_and_zero_threads_are_refused_by_the_flags() {
    for flags in [
        ["--policy", "jest"],
        ["--backend", "tpu"],
        ["--threads", "0"],
    ] {
        let words = ["select", "--embeddings", "x"].into_iter().chain(flags);
        assert!(Command::try_parse_from(words).is_err(), "{flags:?}");
    }
}

#[test]
fn the_reference_judges_what_is_left_out_whatever_the_criterion() {
    let left_out = |criterion| {
        let flags = [
            "--criterion",
            criterion,
            "--sub-batch-size",
            "4",
            "--duplicates-above",
            "0.5",
        ];
        Draft::new().select(&flags).unwrap()["left_out"]
            .as_u64()
            .unwrap()
    };
    let counts = ["learnability", "hard", "easy"].map(left_out);
    assert!(counts[0] > 0 && counts == [counts[0]; 3], "{counts:?}");
    let bare = Draft::new().without("learner_img").without("learner_txt");
    let spread = bare
        .select(&["--policy", "k_center", "--sub-batch-size", "4"])
        .unwrap();
    assert_eq!(
        spread["indices"].as_array().unwrap().len(),
        4,
        "distances ask no learner"
    );
}
