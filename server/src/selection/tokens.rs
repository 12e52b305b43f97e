//! Which tokens of a sub-batch are to be trained: those of the largest excess loss, the learner's
//! less the reference's (Rho-1, Lin et al. 2024, arXiv 2404.07965).
use super::{Embedded, Values};
use std::cmp::Ordering;

/// Numbers of an embedding that hold the loss of an example; those of its tokens follow.
const OF_EXAMPLE: usize = 2;

/// Returns how many tokens have a loss each in embeddings of this length, of a model that gives
/// losses.
pub(crate) fn tokens_of(dim: usize) -> usize {
    dim.saturating_sub(OF_EXAMPLE)
}

/// The losses of all tokens of the candidates, as learner and reference gave them.
pub(crate) struct TokenLosses {
    pub learner: Embedded,
    pub reference: Embedded,
}

impl TokenLosses {
    /// Returns which tokens of the candidates `rows` are to be trained: for each row, as many as it
    /// has. Of all tokens that count for both models, over all rows, `share` are true: those of the
    /// largest excess loss, the earlier first where it is equal. At least one is, if any counts.
    /// `None` if the models gave no losses of the same tokens.
    pub(crate) fn masks(&self, rows: &[u32], share: f64) -> Option<Vec<Vec<bool>>> {
        let tokens = tokens_of(self.learner.dim);
        if tokens == 0 || self.reference.dim != self.learner.dim {
            return None;
        }
        // In one piece, and with no room to spare: bounds::MASKED_TOKENS_MAX is of this.
        let mut counted: Vec<(f64, usize)> = Vec::with_capacity(rows.len() * tokens);
        for (place, row) in rows.iter().enumerate() {
            let [learner, reference] =
                [of_row(&self.learner, *row)?, of_row(&self.reference, *row)?];
            for (token, (learner, reference)) in learner.zip(reference).enumerate() {
                if let (Some(learner), Some(reference)) = (learner, reference) {
                    // Without the zero -0.0 would lie below +0.0, though the losses are equal.
                    let excess = learner - reference + 0.0;
                    counted.push((excess, place * tokens + token));
                }
            }
        }
        let kept = kept(counted.len(), share);
        if kept < counted.len() {
            counted.select_nth_unstable_by(kept, larger_first);
            counted.truncate(kept);
        }
        let mut masks = vec![vec![false; tokens]; rows.len()];
        for (_, number) in counted {
            masks[number / tokens][number % tokens] = true;
        }
        Some(masks)
    }
}

/// Returns the loss of each token of a row; `None` for one that does not count. The row is `None`
/// if it is not there.
fn of_row(model: &Embedded, row: u32) -> Option<impl Iterator<Item = Option<f64>>> {
    let (Values::F32(losses), Values::F32(counts)) = (&model.image, &model.text) else {
        return None;
    };
    let begin = row as usize * model.dim;
    let places = begin + OF_EXAMPLE..begin + model.dim;
    let (losses, counts) = (losses.get(places.clone())?, counts.get(places)?);
    let each = losses.iter().zip(counts);
    Some(each.map(|(loss, count)| (*count > 0.0).then_some(f64::from(*loss))))
}

fn kept(count: usize, share: f64) -> usize {
    let kept = (count as f64 * share).round() as usize;
    kept.max(1).min(count)
}

fn larger_first(a: &(f64, usize), b: &(f64, usize)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Embedded {
    /// Returns the losses of examples alone; `None` if there are no losses of tokens beside them.
    pub(crate) fn of_examples(&self) -> Option<Self> {
        (tokens_of(self.dim) > 0).then(|| Self {
            image: self.image.of_examples(self.dim),
            text: self.text.of_examples(self.dim),
            dim: OF_EXAMPLE,
        })
    }
}

impl Values {
    fn of_examples(&self, dim: usize) -> Self {
        match self {
            Self::F16(values) => Self::F16(first_of_each(values, dim)),
            Self::F32(values) => Self::F32(first_of_each(values, dim)),
        }
    }
}

fn first_of_each<T: Copy>(values: &[T], dim: usize) -> Vec<T> {
    let rows = values.chunks_exact(dim);
    rows.flat_map(|row| &row[..OF_EXAMPLE]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A model's losses of rows of the same tokens; a token of `None` does not count.
    fn model(rows: &[Vec<Option<f32>>]) -> Embedded {
        let image = rows.iter().flat_map(|row| {
            let losses = row.iter().map(|loss| loss.unwrap_or_default());
            [0.5, 1.0].into_iter().chain(losses)
        });
        let text = rows.iter().flat_map(|row| {
            let counts = row.iter().map(|loss| f32::from(u8::from(loss.is_some())));
            [1.0, 0.0].into_iter().chain(counts)
        });
        Embedded {
            image: Values::F32(image.collect()),
            text: Values::F32(text.collect()),
            dim: OF_EXAMPLE + rows.first().map_or(0, Vec::len),
        }
    }

    fn losses(learner: &[Vec<Option<f32>>], reference: &[Vec<Option<f32>>]) -> TokenLosses {
        TokenLosses {
            learner: model(learner),
            reference: model(reference),
        }
    }

    #[test]
    fn the_share_is_that_of_all_tokens_of_the_chosen_rows() {
        let all = losses(
            &[
                vec![Some(9.0), Some(9.0), Some(9.0)],
                vec![Some(3.0), Some(1.0), None],
                vec![Some(2.0), Some(5.0), Some(4.0)],
            ],
            &[
                vec![Some(0.0), Some(0.0), Some(0.0)],
                vec![Some(1.0), Some(2.0), Some(0.0)],
                vec![None, Some(0.5), Some(3.0)],
            ],
        );
        // Excess of row 2: -, 4.5, 1; of row 1: 2, -1, -. Row 0 is not chosen.
        let masks = |share| all.masks(&[2, 1], share).unwrap();
        let of = |row: [u8; 3]| row.map(|bit| bit > 0).to_vec();
        assert_eq!(masks(0.5), [of([0, 1, 0]), of([1, 0, 0])]);
        assert_eq!(masks(0.75), [of([0, 1, 1]), of([1, 0, 0])]);
        assert_eq!(masks(1.0), [of([0, 1, 1]), of([1, 1, 0])]);
        assert_eq!(masks(0.01), [of([0, 1, 0]), of([0, 0, 0])], "one at least");
    }

    #[test]
    fn of_equal_tokens_the_earlier_are_taken() {
        let same = vec![vec![Some(1.0); 4]; 2];
        let all = losses(&same, &same);
        let masks = all.masks(&[1, 0], 0.625).unwrap();
        assert_eq!(masks, [vec![true; 4], vec![true, false, false, false]]);
    }

    #[test]
    fn zeros_of_either_sign_are_equal() {
        // -0.0 less +0.0 is -0.0.
        let learner = vec![vec![Some(-0.0), Some(0.0), Some(-0.0), Some(0.0)]];
        let masks = losses(&learner, &[vec![Some(0.0); 4]]).masks(&[0], 0.5);
        assert_eq!(masks, Some(vec![vec![true, true, false, false]]));
    }

    #[test]
    fn rows_without_a_token_that_counts_have_none_that_is_trained() {
        let none = vec![vec![None; 2]; 2];
        let masks = losses(&none, &none).masks(&[0, 1], 0.5).unwrap();
        assert_eq!(masks, vec![vec![false; 2]; 2]);
    }

    #[test]
    fn what_is_not_there_makes_no_mask() {
        let (two, three) = (vec![vec![Some(1.0); 2]; 2], vec![vec![Some(1.0); 3]; 2]);
        assert_eq!(losses(&two, &three).masks(&[0], 0.5), None);
        assert_eq!(losses(&two, &two).masks(&[2], 0.5), None, "no such row");
        let bare = vec![vec![]; 2];
        assert_eq!(losses(&bare, &bare).masks(&[0], 0.5), None);
        assert!(model(&bare).of_examples().is_none());
    }

    #[test]
    fn losses_of_examples_are_left_alone_by_those_of_tokens() {
        let narrow = model(&[vec![Some(3.0), None], vec![Some(4.0), Some(5.0)]]);
        let narrow = narrow.of_examples().unwrap();
        assert_eq!(narrow.dim, 2);
        let Values::F32(image) = narrow.image else {
            panic!("losses are f32");
        };
        assert_eq!(image, vec![0.5_f32, 1.0, 0.5, 1.0]);
    }

    proptest! {
        #[test]
        fn the_tokens_that_are_kept_have_the_largest_excess(
            learner in prop::collection::vec(prop::collection::vec(-9..9_i8, 5), 1..6),
            share in 0.01..1.0,
        ) {
            let of_learner: Vec<Vec<Option<f32>>> = learner
                .iter()
                .map(|row| row.iter().map(|loss| Some(f32::from(*loss))).collect())
                .collect();
            let of_reference = vec![vec![Some(0.0); 5]; learner.len()];
            let rows: Vec<u32> = (0..learner.len() as u32).collect();
            let masks = losses(&of_learner, &of_reference).masks(&rows, share).unwrap();
            let (mut yes, mut no) = (Vec::new(), Vec::new());
            for (loss, is_kept) in learner.iter().flatten().zip(masks.iter().flatten()) {
                if *is_kept { yes.push(*loss) } else { no.push(*loss) }
            }
            prop_assert_eq!(yes.len(), kept(learner.len() * 5, share));
            prop_assert!(yes.iter().min() >= no.iter().max() || no.is_empty());
        }
    }
}
