//! The inputs of `fuzz/`: its seeds, and those that once broke a promise, through the functions and
//! within the memory that the fuzzer holds them to.
#[path = "../../fuzz/src/memory.rs"]
mod memory;
#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::{collections::BTreeSet, fs, path::Path};
use targets::{TARGETS, Target};

/// Bytes of all inputs: they lie in the repository.
const INPUTS_BYTES_MAX: u64 = 300 << 10;
/// Places where each input is cut.
const CUTS: usize = 16;

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

fn folder(name: &str) -> std::path::PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.expect("the crate lies in the workspace")
        .join("fuzz")
        .join(name)
}

/// Names in a folder that may not be there, sorted.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let names = entries.map(|entry| entry.expect("an entry that can be read").file_name());
    names
        .map(|name| name.into_string().expect("a name in UTF-8"))
        .collect()
}

/// One test, since the memory of others would be counted with it.
#[test]
fn inputs_that_were_kept_break_no_promise() {
    let known: BTreeSet<String> = TARGETS.iter().map(|t| t.name.to_owned()).collect();
    assert_eq!(names(&folder("seeds")), known, "each target has seeds");
    let found = names(&folder("found"));
    assert!(found.is_subset(&known), "one of {found:?} is no target");
    let mut bytes = 0;
    for (kind, name) in known
        .iter()
        .flat_map(|name| [("seeds", name), ("found", name)])
    {
        let (inputs, target) = (folder(kind).join(name), Target::named(name));
        let target = target.expect("it is known");
        for name in names(&inputs) {
            let input = fs::read(inputs.join(&name)).expect("a file that can be read");
            bytes += input.len() as u64;
            // If it ends the process, this is the last line that is printed.
            println!("{kind}/{}/{name}", target.name);
            target.check(&input);
            // What is left of a file whose upload broke.
            for part in 0..CUTS {
                target.check(&input[..input.len() * part / CUTS]);
            }
        }
    }
    assert!(bytes <= INPUTS_BYTES_MAX, "{bytes} bytes of inputs");
}
