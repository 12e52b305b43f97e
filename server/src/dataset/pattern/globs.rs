//! Globs: which paths they match. Pure, and never slower than glob times path.

/// Returns whether `path` is matched by `glob`: `*` stands for any characters but `/`, `?` for one,
/// `[…]` for one of a set, and `**` for any number of folders.
pub(crate) fn matches(glob: &str, path: &str) -> bool {
    let globs: Vec<&str> = glob.split('/').collect();
    let paths: Vec<&str> = path.split('/').collect();
    segments_match(&globs, &paths)
}

/// Compares segment by segment, not by trying what each `**` may stand for: many of them in a row
/// would take as many attempts as there are ways to share out the folders.
fn segments_match(globs: &[&str], paths: &[&str]) -> bool {
    // After each segment of the glob, the places in the path that it may have come to.
    let mut reached = vec![false; paths.len() + 1];
    reached[0] = true;
    for (n, glob) in globs.iter().enumerate() {
        let mut next = vec![false; reached.len()];
        // At the end, `**` is every file below, so one segment or more.
        let least = usize::from(n + 1 == globs.len());
        let mut before = false;
        for at in 0..reached.len() {
            next[at] = match *glob {
                "**" => {
                    before |= at >= least && reached[at - least];
                    before
                }
                _ => at > 0 && reached[at - 1] && segment_matches(glob, paths[at - 1]),
            };
        }
        reached = next;
    }
    reached[paths.len()]
}

/// A piece of a glob within one segment.
pub(super) enum Token {
    Any,
    One,
    Set { not: bool, of: Vec<(char, char)> },
    Sign(char),
}

/// Returns `None` if a set is not closed.
pub(super) fn tokens(glob: &str) -> Option<Vec<Token>> {
    let (mut signs, mut tokens) = (glob.chars().peekable(), Vec::new());
    while let Some(sign) = signs.next() {
        tokens.push(match sign {
            '*' => Token::Any,
            '?' => Token::One,
            '[' => {
                let not = signs.next_if(|sign| matches!(sign, '!' | '^')).is_some();
                let mut of: Vec<(char, char)> = Vec::new();
                loop {
                    let low = signs.next()?;
                    if low == ']' && !of.is_empty() {
                        break;
                    }
                    let mut ahead = signs.clone();
                    let high = (ahead.next() == Some('-')).then(|| ahead.next()).flatten();
                    match high.filter(|high| *high != ']') {
                        Some(high) => {
                            signs = ahead;
                            of.push((low, high));
                        }
                        None => of.push((low, low)),
                    }
                }
                Token::Set { not, of }
            }
            sign => Token::Sign(sign),
        });
    }
    Some(tokens)
}

fn segment_matches(glob: &str, segment: &str) -> bool {
    let Some(tokens) = tokens(glob) else {
        return false;
    };
    let signs: Vec<char> = segment.chars().collect();
    // After each token, the places in the segment that it may have come to.
    let mut reached = vec![false; signs.len() + 1];
    reached[0] = true;
    for token in &tokens {
        let fits = |sign: char| match token {
            Token::Any | Token::One => true,
            Token::Set { not, of } => *not != of.iter().any(|(a, b)| (*a..=*b).contains(&sign)),
            Token::Sign(wanted) => *wanted == sign,
        };
        let mut next = vec![false; reached.len()];
        for at in 0..reached.len() {
            next[at] = match token {
                Token::Any => reached[at] || (at > 0 && next[at - 1]),
                _ => at > 0 && reached[at - 1] && fits(signs[at - 1]),
            };
        }
        reached = next;
    }
    reached[signs.len()]
}
