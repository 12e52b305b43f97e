//! Warns of rows that are not normalised. Their logits are not scale x cosine + bias, so a
//! selection from them means little.
use half::f16;
use superbatch_kernels::Rows;

/// How far the median norm may be from 1.
const SLACK: f64 = 0.05;

/// Returns the warning about a tower whose rows are not L2-normalised, with the row that is
/// farthest off. Rows that are not finite are left to the kernels, which refuse them.
pub(super) fn warning(tower: &str, rows: Rows<'_>, dim: usize) -> Option<String> {
    let mut norms: Vec<(usize, f64)> = match rows {
        Rows::F32(values) => norms(values, dim, |value: f32| value.into()),
        Rows::F16(values) => norms(values, dim, |value: f16| value.into()),
    };
    norms.retain(|(_, norm)| norm.is_finite());
    norms.sort_unstable_by(|a, b| a.1.total_cmp(&b.1));
    let median = norms.get(norms.len() / 2)?.1;
    if (median - 1.0).abs() <= SLACK {
        return None;
    }
    let (row, norm) = *norms
        .iter()
        .max_by(|a, b| (a.1 - 1.0).abs().total_cmp(&(b.1 - 1.0).abs()))?;
    Some(format!(
        "{tower}: rows are not L2-normalised (median norm {median:.3}, candidate {row} has \
        {norm:.3}), so logits are not \
         scale * cosine + bias"
    ))
}

/// Returns each row's number and norm.
fn norms<T: Copy>(values: &[T], dim: usize, real: impl Fn(T) -> f64) -> Vec<(usize, f64)> {
    let norm = |row: &[T]| {
        row.iter()
            .map(|value| real(*value).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    values.chunks_exact(dim).map(norm).enumerate().collect()
}
