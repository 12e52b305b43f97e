//! The layout's rules: who may name whom, how long files and functions may be, and that generated
//! pages are current.
use std::{
    fs,
    path::{Path, PathBuf},
};
use superbatch_server::{config, metrics};

const FILE_LINES_MAX: usize = 400;
const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
}

/// Folders that hold no sources of ours.
const FOREIGN: [&str; 6] = [
    "target",
    ".venv",
    ".git",
    "node_modules",
    "__pycache__",
    "demo-data",
];

/// Files below `folder` that end with `.rs`, as (path below the root, text).
fn sources(folder: &str) -> Vec<(String, String)> {
    files(folder, "rs")
}

/// Files below `folder` with an ending, as (path below the root, text).
fn files(folder: &str, wanted: &str) -> Vec<(String, String)> {
    let (mut open, mut found) = (vec![root().join(folder)], Vec::new());
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path: PathBuf = entry.expect("an entry that can be read").path();
            let is_foreign = path
                .file_name()
                .is_some_and(|own| FOREIGN.iter().any(|f| own == *f));
            if is_foreign {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|ending| ending == wanted) {
                let name = path
                    .strip_prefix(root())
                    .expect("below the root")
                    .display()
                    .to_string();
                found.push((
                    name,
                    fs::read_to_string(&path).expect("a file that can be read"),
                ));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} holds no sources");
    found.sort();
    found
}

/// Where the crates are that users get.
const CRATES: [&str; 8] = [
    "proto",
    "transport",
    "scoring-kernels",
    "scoring-kernels/python",
    "images",
    "server",
    "client/rust",
    "client/python",
];

fn production() -> Vec<(String, String)> {
    CRATES
        .into_iter()
        .flat_map(|folder| sources(&format!("{folder}/src")))
        .filter(|(name, _)| !is_test(name))
        .collect()
}

/// Whether a module of the sources holds tests alone: `tests.rs`, or a file in a folder `tests`.
fn is_test(name: &str) -> bool {
    name.ends_with("/tests.rs") || name.contains("/tests/")
}

#[test]
fn modules_of_tests_are_told_by_their_name() {
    let mut unclear = Vec::new();
    for folder in CRATES {
        for (name, text) in sources(&format!("{folder}/src")) {
            let lines: Vec<&str> = text.lines().collect();
            for pair in lines.windows(2) {
                let module = pair[1]
                    .trim_start_matches("pub(crate) ")
                    .trim_start_matches("pub ");
                let only_tests = pair[0] == "#[cfg(test)]" && module.starts_with("mod ");
                let clear = ["mod tests;", "mod tests {", "mod fixtures;"].contains(&module);
                if only_tests && !clear {
                    unclear.push(format!("{name}: {module}"));
                }
            }
        }
    }
    assert!(
        unclear.is_empty(),
        "call these `tests`, or put them into a folder `tests`:\n{}",
        unclear.join("\n")
    );
}

/// The text without the tests at its end.
fn without_tests(text: &str) -> &str {
    text.split_once("\n#[cfg(test)]\nmod tests {")
        .map_or(text, |(before, _)| before)
}

/// Functions as (name, lines), told by the indentation that rustfmt gives them.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let Some((before, name)) = line.split_once("fn ") else {
            continue;
        };
        let words = before.split_whitespace().all(|w| {
            ["const", "async", "unsafe", "extern", "\"C\""].contains(&w) || w.starts_with("pub")
        });
        // What a macro makes of a template has no length of its own.
        if !words || name.starts_with('$') || name.trim_end().ends_with(';') {
            continue;
        }
        let end = format!("{}}}", " ".repeat(indent));
        let length = lines[start..]
            .iter()
            .position(|line| *line == end)
            .map_or(1, |n| n + 1);
        found.push((
            name.split(['(', '<']).next().unwrap_or(name).to_owned(),
            length,
        ));
    }
    found
}

#[test]
fn functions_are_measured() {
    let text = "pub async fn a(\n    b: u32,\n) {\n    c();\n}\nimpl X {\n    fn d() {\n    }\n}\n";
    assert_eq!(functions(text), [("a".to_owned(), 5), ("d".to_owned(), 2)]);
}

#[test]
fn files_and_functions_are_short() {
    let mut long = Vec::new();
    for (name, text) in production() {
        let lines = without_tests(&text).lines().count();
        if lines > FILE_LINES_MAX {
            long.push(format!(
                "{name} has {lines} lines, {FILE_LINES_MAX} are allowed"
            ));
        }
        for (function, lines) in functions(without_tests(&text)) {
            if lines > FUNCTION_LINES_MAX {
                long.push(format!(
                    "{name}: {function} has {lines} lines, {FUNCTION_LINES_MAX} are allowed"
                ));
            }
        }
    }
    // Python's tests count too: they are sorted by topic.
    for (name, text) in files("", "py") {
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            long.push(format!(
                "{name} has {lines} lines, {FILE_LINES_MAX} are allowed"
            ));
        }
    }
    assert!(long.is_empty(), "split these:\n{}", long.join("\n"));
}

/// The coordinator's rooms in the order in which they may import each other: a later one may import
/// an earlier one, never the other way round. Stages of a step come in the order of the step.
const COORDINATOR: [&str; 15] = [
    "spec", "facts", "plan", "losses", "receipts", "workers", "score", "select", "serve",
    "weights", "trainer", "runs", "step", "replay", "service",
];
/// The same for the worker.
const WORKER: [&str; 11] = [
    "config", "register", "model", "inputs", "kept", "device", "loader", "engine", "calls",
    "service", "absent",
];

#[test]
fn no_stage_of_a_step_imports_a_later_one() {
    assert_order("coordinator", &COORDINATOR);
}

#[test]
fn no_part_of_the_worker_imports_one_that_is_built_on_it() {
    assert_order("worker", &WORKER);
}

fn assert_order(folder: &str, rooms: &[&str]) {
    let mut reached = Vec::new();
    let root = format!("server/src/{folder}/");
    for (name, text) in sources(&root) {
        let place = name.trim_start_matches(&root);
        let room = place.split('/').next().expect("a name has a first part");
        let Some(own) = rooms
            .iter()
            .position(|known| *known == room.trim_end_matches(".rs"))
        else {
            assert_eq!(
                place, "mod.rs",
                "{name} is in no room; give it a place in the order"
            );
            continue;
        };
        if is_test(&name) {
            continue;
        }
        // Lines are joined, so that the braces of `coordinator::{a::x, b::y}` are seen whole.
        let code: String = without_tests(&text)
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        for later in &rooms[own + 1..] {
            if imports_room(&code, folder, later) {
                reached.push(format!("{name} imports {later}"));
            }
        }
    }
    assert!(
        reached.is_empty(),
        "imports of what comes later in the {folder}:\n{}",
        reached.join("\n")
    );
}

/// Whether `code` names `folder::room`, alone or inside of the braces that follow `folder::`.
fn imports_room(code: &str, folder: &str, room: &str) -> bool {
    code.split(&format!("{folder}::")).skip(1).any(|after| {
        let Some(inside) = after.strip_prefix('{') else {
            let rest = after.strip_prefix(room);
            return rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()));
        };
        let mut depth = 0;
        let mut names = String::new();
        for letter in inside.chars() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                letter if depth == 0 => names.push(letter),
                _ => {}
            }
        }
        names
            .split(',')
            .any(|name| name.trim().split("::").next() == Some(room))
    })
}

#[test]
fn imports_are_found() {
    let code = "use crate::{coordinator::{plan::{a, step}, serve::b}, error::Error};";
    let imports = |room| imports_room(code, "coordinator", room);
    assert!(imports("plan") && imports("serve"));
    assert!(!imports("step") && !imports("error"));
    let one = "use crate::coordinator::step::x;";
    assert!(imports_room(one, "coordinator", "step"));
}

#[test]
fn lines_are_short() {
    let mut long = Vec::new();
    // Of all sources, with tests, comments and strings, which the formatters leave as they are.
    for (name, text) in sources("").into_iter().chain(files("", "py")) {
        for (number, line) in text.lines().enumerate() {
            if line.chars().count() > COLUMNS_MAX {
                long.push(format!("{name}:{}", number + 1));
            }
        }
    }
    assert!(
        long.is_empty(),
        "over {COLUMNS_MAX} columns:\n{}",
        long.join("\n")
    );
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table of rules")]
fn layers_are_not_crossed() {
    // Who must not name what, and the files that may.
    let rules: &[(&str, &[&str], &[&str])] = &[
        (
            "server/src/coordinator",
            &["crate::worker", "crate::app", "crate::config"],
            &[],
        ),
        (
            "server/src/worker",
            &["crate::coordinator", "crate::app", "crate::config"],
            &[],
        ),
        (
            "server/src",
            &["std::env::var", "env::vars"],
            &["server/src/config/"],
        ),
        (
            "server/src",
            &["Status::new", "Status::with_"],
            &["server/src/error.rs"],
        ),
        ("server/src", &["\"superbatch_"], &["server/src/metrics.rs"]),
        (
            "scoring-kernels/src",
            &[
                "superbatch_",
                "tokio",
                "std::env",
                "std::time",
                "std::fs",
                "std::net",
            ],
            &[],
        ),
        (
            "images/src",
            &[
                "superbatch_",
                "tokio",
                "std::env",
                "std::time",
                "std::fs",
                "std::net",
            ],
            &[],
        ),
        (
            "scoring-kernels/python/src",
            &[
                "superbatch_proto",
                "superbatch_server",
                "superbatch_client",
                "use tch",
            ],
            &[],
        ),
        (
            "proto/src",
            &[
                "superbatch_kernels",
                "superbatch_server",
                "superbatch_client",
            ],
            &[],
        ),
        (
            "client/rust/src",
            &["superbatch_kernels", "superbatch_server", "use tch"],
            &[],
        ),
        (
            "client/python/src",
            &["superbatch_kernels", "superbatch_server", "use tch"],
            &[],
        ),
    ];
    let mut reached = Vec::new();
    for (folder, forbidden, allowed) in rules {
        for (name, text) in sources(folder) {
            if is_test(&name) || allowed.iter().any(|place| name.starts_with(place)) {
                continue;
            }
            let code = without_tests(&text)
                .lines()
                .enumerate()
                .filter(|(_, line)| !line.trim_start().starts_with("//"));
            for (number, line) in code {
                for word in forbidden.iter().filter(|word| line.contains(**word)) {
                    reached.push(format!("{name}:{}: {word}", number + 1));
                }
            }
        }
    }
    assert!(
        reached.is_empty(),
        "these reach beyond their layer:\n{}",
        reached.join("\n")
    );
}

#[test]
fn generated_pages_are_current() {
    for (page, now) in [
        ("docs/metrics.md", metrics::reference()),
        ("docs/configuration.md", config::reference()),
    ] {
        let kept = fs::read_to_string(root().join(page)).unwrap_or_default();
        assert!(
            kept == now,
            "{page} is not what the code says; run `make docs`"
        );
    }
}
