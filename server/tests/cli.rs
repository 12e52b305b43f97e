//! The binary as a user meets it: what it prints, what it refuses, and how it exits.
#![allow(clippy::unwrap_used)]
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Output, Stdio},
};

fn superbatch(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_superbatch"));
    command.args(args).stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> Output {
    superbatch(args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Returns whether a command told one error, in a line, and where its entry is.
fn is_one_error(told: &str) -> bool {
    let lines: Vec<&str> = told.lines().collect();
    matches!(lines[..], [error, entry] if error.starts_with("superbatch: ")
        && entry.starts_with("  causes and remedies: docs/errors.md#"))
}

#[test]
fn every_command_explains_itself() {
    let commands = [
        "serve",
        "worker",
        "check-config",
        "index",
        "runs",
        "receipts",
        "select",
    ];
    let top = output(&["--help"]);
    for command in commands {
        assert!(
            text(&top.stdout).contains(&format!("\n  {command} ")),
            "{command}"
        );
        let help = output(&[command, "--help"]);
        assert!(
            help.status.success() && help.stdout.len() > 400,
            "{command}: {}",
            text(&help.stdout)
        );
    }
    assert!(
        text(&output(&["select", "--help"]).stdout).contains("learner_img"),
        "what the file holds"
    );
    // A command shows the options that it heeds, and takes no others.
    let select = output(&["select", "--help"]);
    for foreign in ["--listen", "--coordinator", "--state", "--device"] {
        assert!(!text(&select.stdout).contains(foreign), "{foreign}");
    }
}

#[test]
fn wrong_arguments_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let state = format!("--state=file://{}", folder.path().display());
    let cases: &[(&[&str], i32, &str)] = &[
        (&[], 2, "Usage: superbatch"),
        (&["serv"], 2, "serve"),
        (
            &["select", "--embeddings", "x", "--device", "cuda"],
            2,
            "--device",
        ),
        (
            &["select", "--embeddings", "/nowhere.safetensors"],
            1,
            "/nowhere.safetensors",
        ),
        (
            &["select", "--embeddings", "x", "--policy", "best"],
            2,
            "joint",
        ),
        (&["serve", "--listen", "here"], 2, "--listen"),
        (&["serve", "--listen", "0.0.0.0:0"], 1, "allow_insecure"),
        (&["serve", &state, "--device", "gpu"], 1, "gpu"),
        (
            &["worker", &state, "--coordinator", "not a uri"],
            1,
            "worker_role.coordinator",
        ),
        (
            &["check-config", "--config", "/nowhere.yaml"],
            1,
            "/nowhere.yaml",
        ),
        (&["index", &state], 2, "<SOURCE>"),
        (&["index", &state, "data.parquet"], 1, "data.parquet"),
        (
            &["receipts", &state, "nobody"],
            1,
            "where nothing is; name the service's state with --state",
        ),
        (&["receipts", &state, "nobody", "--last", "0"], 2, "--last"),
        (
            &["receipts", &state, "nobody", "--generation", "1"],
            2,
            "--step",
        ),
    ];
    for (args, code, word) in cases {
        let done = output(args);
        let told = text(&done.stderr);
        assert_eq!(done.status.code(), Some(*code), "{args:?}: {told}");
        assert!(told.contains(word), "{args:?}: {told}");
        if *code == 1 {
            assert!(is_one_error(told), "{args:?}: {told}");
        }
    }
}

#[test]
fn the_printed_defaults_are_a_config_that_is_ok() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("superbatch.yaml");
    fs::write(&file, output(&["check-config", "--defaults"]).stdout).unwrap();
    let checked = output(&["check-config", "--config", file.to_str().unwrap()]);
    assert!(
        checked.status.success() && text(&checked.stdout).starts_with("# ok\n"),
        "{}",
        text(&checked.stderr)
    );
}

#[test]
fn a_config_is_printed_without_its_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("superbatch.yaml");
    fs::write(
        &file,
        "storage: {options: {aws_secret_access_key: hunter2, aws_region: eu-north-1}}",
    )
    .unwrap();
    let checked = output(&["check-config", "--config", file.to_str().unwrap()]);
    let told = text(&checked.stdout);
    assert!(
        checked.status.success() && !told.contains("hunter2"),
        "{told}"
    );
    assert!(
        told.contains("aws_secret_access_key: (hidden)") && told.contains("aws_region: eu-north-1"),
        "{told}"
    );
}

#[test]
fn output_that_cannot_be_written_is_told_and_a_closed_pipe_is_not() {
    let full = superbatch(&["check-config"])
        .stdout(File::create("/dev/full").unwrap())
        .output()
        .unwrap();
    assert_eq!(
        (full.status.code(), is_one_error(text(&full.stderr))),
        (Some(1), true),
        "{}",
        text(&full.stderr)
    );
    assert!(text(&full.stderr).contains("standard output"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let closed = superbatch(&["check-config"])
        .stdout(writer)
        .output()
        .unwrap();
    assert!(
        closed.status.success() && closed.stderr.is_empty(),
        "{}",
        text(&closed.stderr)
    );
}

/// A process that ends with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has told then.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_worker_tells_its_build_where_it_tells_its_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let state = format!("--state=file://{}", folder.path().display());
    let mut worker = superbatch(&[
        "worker",
        &state,
        "--listen",
        "127.0.0.1:0",
        "--device",
        "cpu",
    ]);
    worker
        .env("SUPERBATCH_WORKER_ROLE__METRICS_LISTEN", "127.0.0.1:0")
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut worker = Running(worker.spawn().unwrap());
    let mut said = BufReader::new(worker.0.stdout.take().unwrap()).lines();
    assert!(
        said.next()
            .unwrap()
            .unwrap()
            .starts_with("superbatch working on http://127.0.0.1:")
    );
    let metrics = said.next().unwrap().unwrap();
    let address = metrics
        .strip_prefix("superbatch metrics on http://")
        .and_then(|at| at.strip_suffix("/metrics"));
    let mut stream = TcpStream::connect(address.unwrap()).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(
        page.contains("superbatch_build_info{version=") && page.contains("device=\"cpu\""),
        "{page}"
    );
}
