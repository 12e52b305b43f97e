//! Patterns of run ids: `*` stands for any text.

/// Returns whether `id` fits `pattern`. It never backtracks: the first match of each middle part is
/// as good as any later one, since only the last part must be at the end. So a pattern of many
/// stars cannot make a call slow.
pub(super) fn fits(pattern: &str, id: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = id.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_letters() {
        for (pattern, id, expected) in [
            ("*", "anything", true),
            ("*", "", true),
            ("team-a", "team-a", true),
            ("team-a", "team-ab", false),
            ("team-a-*", "team-a-1", true),
            ("team-a-*", "team-b-1", false),
            ("*-eval", "x-eval", true),
            ("*-eval", "x-evals", false),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a*a", "a", false),
            ("ab*ba", "aba", false),
            ("", "x", false),
        ] {
            assert_eq!(fits(pattern, id), expected, "{pattern} on {id}");
        }
    }
}
