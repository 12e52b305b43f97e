//! How much of its captions a text tower has to see.
use super::{
    clip::LEGACY_EOS,
    config::{Family, ModelConfig},
    open_clip_config::TextPool,
};

/// Lengths are multiples of this, so that there are few of them: each new shape costs a device some
/// preparation.
const STEP: usize = 8;

/// Returns, for ids `[rows, length]`, how many of each row its embedding depends on.
///
/// A causal tower that pools at the end of the caption never looks at what comes after it, so the
/// padding may be left out: up to the end of the longest caption of a micro-batch. All others see
/// their padding, and need the whole length.
pub(super) fn seen(config: &ModelConfig, ids: &[i64], length: usize) -> usize {
    let Some(end) = end(config) else {
        return length;
    };
    let last = ids.chunks(length.max(1)).map(|row| end.of(row)).max();
    last.map_or(length, |last| (last + 1).next_multiple_of(STEP).min(length))
}

/// Where a causal tower pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Where that id is first; the first token where it is not.
    Id(i64),
    /// Where the largest id is first.
    Largest,
}

impl End {
    fn of(self, row: &[i64]) -> usize {
        let wanted = match self {
            Self::Id(id) => Some(id),
            Self::Largest => row.iter().copied().max(),
        };
        let first = row.iter().position(|id| Some(*id) == wanted);
        first.unwrap_or(0)
    }
}

fn end(config: &ModelConfig) -> Option<End> {
    match config.family {
        Family::Siglip | Family::Exported => None,
        Family::Clip if config.text.eos_token_id == LEGACY_EOS => Some(End::Largest),
        Family::Clip => Some(End::Id(config.text.eos_token_id)),
        Family::OpenClip(form) if form.causal => match form.pool {
            TextPool::Argmax => Some(End::Largest),
            TextPool::Eos(id) => Some(End::Id(id)),
            TextPool::First | TextPool::Last => None,
        },
        Family::OpenClip(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(family: &str, eos: i64) -> ModelConfig {
        let json = format!(
            r#"{{"model_type": "{family}", "text_config": {{"eos_token_id": {eos},
                "max_position_embeddings": 20, "vocab_size": 99}}}}"#
        );
        ModelConfig::parse(json.as_bytes()).unwrap()
    }

    /// Captions of those lengths, end token included, padded with `pad`.
    fn ids(lengths: &[usize], end: i64, pad: i64) -> Vec<i64> {
        let row = |length: &usize| {
            let mut row = vec![pad; 20];
            row[..length - 1].fill(7);
            row[length - 1] = end;
            row
        };
        lengths.iter().flat_map(row).collect()
    }

    #[test]
    fn causal_captions_end_with_the_longest() {
        let clip = config("clip", 90);
        assert_eq!(seen(&clip, &ids(&[3, 11, 5], 90, 0), 20), 16);
        assert_eq!(seen(&clip, &ids(&[3, 8], 90, 0), 20), 8);
        assert_eq!(seen(&clip, &ids(&[3, 20], 90, 0), 20), 20);
        // As CLIP's own tokenizer pads: with the end token itself.
        assert_eq!(seen(&clip, &ids(&[3, 11], 90, 90), 20), 16);
        assert_eq!(seen(&config("clip", LEGACY_EOS), &ids(&[9], 98, 0), 20), 16);
        assert_eq!(
            seen(&clip, &[0; 40], 20),
            8,
            "without an end, the first token"
        );
    }

    #[test]
    fn a_tower_that_sees_its_padding_gets_all_of_it() {
        assert_eq!(seen(&config("siglip", 1), &ids(&[3], 1, 0), 20), 20);
    }
}
