//! Folders of libraries that the service does not read, and what makes them one that it reads.
use crate::{error::Result, storage::Location};

/// Folders of other libraries, by a file that they have, and what to do with them.
const FORMS: [(&str, &str); 3] = [
    (
        "modules.json",
        "; it is a sentence-transformers folder: name the CLIP folder inside of it, such as \
         0_CLIPModel",
    ),
    (
        "adapter_config.json",
        "; it is a PEFT folder: merge the adapters \
         (model.merge_and_unload().save_pretrained(FOLDER))",
    ),
    (
        "open_clip_pytorch_model.bin",
        "; python: superbatch.open_clip.export(model, FOLDER, MODEL_NAME) writes a whole folder",
    ),
];

/// Returns what to do with a folder that another library wrote; empty for none.
pub(super) async fn hint(location: &Location) -> Result<&'static str> {
    for (file, hint) in FORMS {
        if location.head(file).await?.is_some() {
            return Ok(hint);
        }
    }
    Ok("")
}

/// Endings of files that people name in the place of their folder.
const FILES: [&str; 6] = [".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt"];

/// Returns why a URI can be no model folder, if that is plain without a look.
pub(super) fn wrong_uri(uri: &str) -> Option<&'static str> {
    let path = uri.trim_end_matches('/').to_lowercase();
    if FILES.iter().any(|ending| path.ends_with(ending)) {
        return Some("names a file; name the folder that holds it");
    }
    let is_hub = ["https://huggingface.co/", "https://hf.co/"]
        .iter()
        .any(|hub| path.starts_with(hub));
    let is_page = is_hub && !path.contains("/resolve/");
    is_page.then_some(
        "is a page of the hub, not a folder; download it (hf download NAME --local-dir FOLDER) and \
         name that folder",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_pages_of_the_hub_are_no_folders() {
        for uri in [
            "file:///models/a/model.safetensors",
            "s3://b/a/config.json",
            "https://huggingface.co/google/siglip-base-patch16-224",
            "https://hf.co/google/siglip-base-patch16-224/tree/main/",
        ] {
            assert!(wrong_uri(uri).is_some(), "{uri}");
        }
        for uri in [
            "file:///models/siglip",
            "s3://b/model.v2",
            "https://huggingface.co/google/siglip-base-patch16-224/resolve/main",
        ] {
            assert_eq!(wrong_uri(uri), None, "{uri}");
        }
    }
}
