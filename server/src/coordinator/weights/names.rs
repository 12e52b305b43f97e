//! Names of pushed tensors: removes the prefixes of wrappers, and suggests what a wrong name may
//! have meant.
use std::{collections::BTreeMap, sync::Once};

/// Parts of a name that wrappers of a model add, at any place.
const WRAPPERS: [&str; 4] = [
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];
/// The prefix of a module around the model (Lightning's, `TwoResolutions`).
const OUTER: &str = "model.";

/// Returns the learner's name of a tensor that has the prefixes of DDP, `torch.compile`, FSDP or
/// activation checkpointing.
pub(super) fn unwrapped(name: &str, tensors: &BTreeMap<String, Vec<u64>>) -> Option<String> {
    if tensors.contains_key(name) {
        return None;
    }
    let kept: Vec<&str> = name
        .split('.')
        .filter(|part| !WRAPPERS.contains(part))
        .collect();
    let plain = kept.join(".");
    let inner = plain.strip_prefix(OUTER).map(str::to_owned);
    [Some(plain), inner]
        .into_iter()
        .flatten()
        .find(|name| tensors.contains_key(name))
}

/// Logs, once in each process, that names are taken without their prefixes.
pub(super) fn log_prefixes_once(pushed: &str, taken: &str) {
    static LOGGED: Once = Once::new();
    LOGGED.call_once(|| {
        tracing::info!(
            pushed,
            taken,
            "tensors are pushed with a wrapper's prefix, and taken without it"
        );
    });
}

/// Returns a hint about a name that the learner does not have; empty if no name is near.
pub(super) fn similar_names(name: &str, tensors: &BTreeMap<String, Vec<u64>>) -> String {
    if let Some(library) = library(name, tensors) {
        return format!("; {library}");
    }
    let alike = |own: &str| {
        own.bytes()
            .rev()
            .zip(name.bytes().rev())
            .take_while(|(a, b)| a == b)
            .count()
    };
    let nearest = tensors.keys().max_by_key(|own| alike(own));
    // The common ending must be half of the name, such as `.q_proj.weight`. A shorter one, such as
    // `.weight`, is shared by all tensors.
    let near = nearest.filter(|own| 2 * alike(own) >= name.len().min(own.len()) && alike(own) >= 4);
    near.map_or_else(String::new, |near| format!("; it has '{near}'"))
}

/// Returns which library's names these are, if not the learner's.
fn library(name: &str, tensors: &BTreeMap<String, Vec<u64>>) -> Option<&'static str> {
    let is_open_clip = |name: &str| {
        name.starts_with("visual.")
            || name.contains(".resblocks.")
            || name == "positional_embedding"
    };
    let own_is_open_clip = tensors.keys().any(|own| is_open_clip(own));
    if name.contains("lora_") || name.starts_with("base_model.") {
        return Some(
            "these are PEFT's names: merge the adapters (merge_and_unload) and push the merged \
             model",
        );
    }
    if is_open_clip(name) && !own_is_open_clip {
        let hint = "these are open_clip's names: give the run a folder of open_clip \
                    (superbatch.open_clip.export writes it); a folder that has config.json and \
                    model.safetensors too is read as one of transformers, so take these two out";
        return Some(hint);
    }
    let is_transformers = name.starts_with("vision_model.") || name.starts_with("text_model.");
    if is_transformers && own_is_open_clip {
        return Some(
            "these are transformers' names, and the run's folder is open_clip's: give it one of \
             transformers; one that has both libraries' files is read as transformers' if \
             open_clip_config.json is taken out",
        );
    }
    if name.ends_with("weight_scale") || name.ends_with("absmax") || name.contains("quant_state") {
        return Some("these are quantised weights: push them dequantised");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(names: &[&str]) -> BTreeMap<String, Vec<u64>> {
        names
            .iter()
            .map(|name| ((*name).to_owned(), vec![2]))
            .collect()
    }

    #[test]
    fn prefixes_of_wrappers_are_taken_off() {
        let own = tensors(&["text_model.head.bias", "logit_scale"]);
        for name in [
            "module.text_model.head.bias",
            "_orig_mod.module.text_model.head.bias",
            "module.text_model._fsdp_wrapped_module.head._checkpoint_wrapped_module.bias",
            "module.model.text_model.head.bias",
        ] {
            assert_eq!(
                unwrapped(name, &own).as_deref(),
                Some("text_model.head.bias"),
                "{name}"
            );
        }
        assert_eq!(
            unwrapped("text_model.head.bias", &own),
            None,
            "it is right as it is"
        );
        assert_eq!(unwrapped("module.other", &own), None);
    }

    #[test]
    fn hints_name_what_is_near_or_whose_names_these_are() {
        let own = tensors(&[
            "text_model.encoder.layers.0.self_attn.q_proj.weight",
            "vision_model.embeddings.class_embedding",
        ]);
        let hint = |name| similar_names(name, &own);
        assert!(
            hint("encoder.layers.0.self_attn.q_proj.weight").contains("it has 'text_model.encoder")
        );
        assert!(hint("positional_embedding").contains("open_clip"));
        assert!(hint("visual.conv1.weight").contains("take these two out"));
        assert!(hint("visual.proj").contains("superbatch.open_clip.export"));
        assert!(hint("base_model.model.lora_A.weight").contains("PEFT"));
        assert_eq!(hint("optimizer.state"), "", "nothing is near");
        let open_clip = tensors(&["visual.proj"]);
        assert!(
            super::similar_names("vision_model.head.probe", &open_clip).contains("transformers")
        );
    }
}
