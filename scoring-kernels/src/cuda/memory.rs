//! The device memory that a selection needs.
use crate::types::{ModelEmbeddings, Rows};

/// Values of a row that the kernels read at a time. Rows are padded to a multiple of it with zeros.
pub(super) const DEPTH: usize = 64;
/// Most bytes of f32 values that wait on the device to become halves.
pub(super) const STAGING_BYTES: usize = 64 << 20;

/// Bytes on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Needed {
    /// The embeddings as they were given.
    pub inputs: usize,
    /// Everything else: padding of rows, running sums, lists and buffers.
    pub above: usize,
}

/// Returns the number of halves for each value of these towers. An f32 becomes the sum of two,
/// since tensor cores multiply halves.
pub(super) fn planes(towers: &[Rows<'_>]) -> usize {
    if towers.iter().all(|rows| matches!(rows, Rows::F16(_))) {
        1
    } else {
        2
    }
}

/// Returns the memory for `count` candidates with these models' embeddings.
pub(super) fn needed<'a>(
    count: usize,
    models: impl Iterator<Item = ModelEmbeddings<'a>>,
) -> Needed {
    let (mut inputs, mut kept, mut slots, mut staging) = (0, 0, 0, 0);
    for model in models {
        slots += 2;
        let towers = [model.image, model.text];
        kept += 2 * tower_bytes(count, model.dim, planes(&towers));
        for rows in &towers {
            let (bytes, waiting) = given(count, model.dim, rows);
            inputs += bytes;
            staging = waiting.max(staging);
        }
    }
    // Two sets of running sums (one for batch scores), scores, and two lists of indices.
    let running =
        count * (2 * slots * 2 * size_of::<f64>() + size_of::<f64>() + 2 * size_of::<u32>());
    Needed {
        inputs,
        above: kept.saturating_sub(inputs) + running + staging,
    }
}

/// Returns the memory of k-center for `count` candidates with this model's embeddings.
pub(super) fn needed_to_spread(count: usize, model: &ModelEmbeddings<'_>) -> Needed {
    let (inputs, staging) = given(count, model.dim, &model.image);
    let kept = tower_bytes(count, model.dim, planes(&[model.image]));
    // Cosines, whether they are known, and two lists of indices.
    let running = count * (2 * size_of::<f64>() + 2 * size_of::<u32>());
    Needed {
        inputs,
        above: kept.saturating_sub(inputs) + running + staging,
    }
}

fn tower_bytes(count: usize, dim: usize, planes: usize) -> usize {
    planes * count * dim.next_multiple_of(DEPTH) * size_of::<u16>()
}

/// Returns the bytes of a tower as it was given, and of the buffer for values that are split into
/// halves.
fn given(count: usize, dim: usize, rows: &Rows<'_>) -> (usize, usize) {
    match rows {
        Rows::F16(_) => (count * dim * 2, 0),
        Rows::F32(_) => (count * dim * 4, STAGING_BYTES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    fn model<'a>(rows: Rows<'a>, dim: usize) -> ModelEmbeddings<'a> {
        ModelEmbeddings {
            image: rows,
            text: rows,
            dim,
            scale: 1.0,
            bias: 0.0,
        }
    }

    #[test]
    fn the_largest_super_batch_runs_in_eight_gibibytes_above_its_inputs() {
        for rows in [Rows::F16(&[] as &[f16]), Rows::F32(&[])] {
            let Needed { inputs, above } =
                needed(327_680, [model(rows, 1152), model(rows, 1152)].into_iter());
            let width = if matches!(rows, Rows::F16(_)) { 2 } else { 4 };
            assert_eq!(inputs, 4 * 327_680 * 1152 * width);
            assert!(above < 1 << 28, "{above}");
        }
    }

    #[test]
    fn rows_that_are_filled_up_are_counted() {
        let half = needed(1_000, [model(Rows::F16(&[]), 65)].into_iter());
        assert_eq!(half.inputs, 1_000 * 2 * 65 * 2);
        assert_eq!(half.above, 1_000 * (2 * 63 * 2 + 2 * 2 * 16 + 8 + 8));
        // Both towers of a model have as many planes as one of them needs.
        let mixed = ModelEmbeddings {
            text: Rows::F32(&[]),
            ..model(Rows::F16(&[]), 64)
        };
        assert_eq!(
            needed(10, [mixed].into_iter()).above,
            10 * (64 * 2 + 2 * 2 * 16 + 8 + 8) + STAGING_BYTES
        );
    }
}
