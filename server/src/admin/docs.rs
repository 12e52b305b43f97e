//! `superbatch docs`: writes the reference pages, which are generated from declarations.
use crate::{
    config,
    error::{Error, Result},
    metrics,
};
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
pub struct DocsArgs {
    /// Folder to write to.
    folder: PathBuf,
}

/// Returns the generated pages by file name.
pub fn pages() -> [(&'static str, String); 2] {
    [
        ("metrics.md", metrics::reference()),
        ("configuration.md", config::reference()),
    ]
}

pub fn run(args: &DocsArgs) -> Result<String> {
    for (name, page) in pages() {
        let path = args.folder.join(name);
        std::fs::write(&path, page).map_err(|e| {
            Error::invalid("folder", format!("cannot write {}", path.display())).because(e)
        })?;
    }
    Ok(String::new())
}
