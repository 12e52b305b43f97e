//! The filter of logs: the operator's, with a limit on libraries whose logs would drown all others.

/// Libraries that log each frame, token or poll below `info`.
const NOISY: [&str; 9] = [
    "h2",
    "hyper",
    "hyper_util",
    "reqwest",
    "rustls",
    "tokenizers",
    "tonic",
    "tower",
    "want",
];

/// Returns `filter` with [`NOISY`] libraries held at `info`, unless it names them itself.
pub fn capped(filter: &str) -> String {
    let directives = || filter.split(',').map(str::trim);
    let is_verbose = |level: &str| {
        ["debug", "trace", "4", "5"]
            .iter()
            .any(|verbose| level.eq_ignore_ascii_case(verbose))
    };
    if !directives().any(is_verbose) {
        return filter.to_owned();
    }
    let is_named = |library: &str| {
        directives().any(|directive| {
            directive
                .split(['=', '[', ':'])
                .next()
                .is_some_and(|target| target == library)
        })
    };
    let capped = NOISY
        .into_iter()
        .filter(|library| !is_named(library))
        .map(|library| format!(",{library}=info"));
    std::iter::once(filter.to_owned()).chain(capped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn noisy_libraries_are_held_back_where_all_is_wanted() {
        for quiet in ["info", "warn,h2=trace", "info,superbatch_server=trace"] {
            assert_eq!(capped(quiet), quiet);
        }
        let all = capped("trace");
        assert_eq!(
            all.split(',').collect::<HashSet<_>>().len(),
            1 + NOISY.len()
        );
        assert!(
            all.starts_with("trace,") && all.contains(",tokenizers=info"),
            "{all}"
        );
        let named = capped("debug, h2=trace,tokenizers::tokenizer=debug");
        assert!(
            !named.contains("h2=info") && !named.contains("tokenizers=info"),
            "{named}"
        );
        assert!(named.contains(",hyper=info"), "{named}");
    }
}
