//! What statistics of a row group say of a predicate before any value is read.
use super::expression::{Expression, Literal, Operator};
use std::cmp::Ordering;

/// The least and the largest value of a column in a row group, as far as they are known, and how
/// many values are null.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Bounds {
    pub low: Option<Literal>,
    pub high: Option<Literal>,
    pub nulls: Option<u64>,
    pub rows: u64,
}

/// Which outcomes a predicate may have for the rows of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outcomes {
    pub truth: bool,
    pub falsehood: bool,
    pub unknown: bool,
}

impl Outcomes {
    const ALL: Self = Self {
        truth: true,
        falsehood: true,
        unknown: true,
    };

    /// Nothing is asked.
    pub(super) const TRUE: Self = Self {
        truth: true,
        falsehood: false,
        unknown: false,
    };

    fn not(self) -> Self {
        Self {
            truth: self.falsehood,
            falsehood: self.truth,
            ..self
        }
    }

    fn and(self, other: Self) -> Self {
        let (a, b) = (self, other);
        Self {
            truth: a.truth && b.truth,
            falsehood: a.falsehood || b.falsehood,
            unknown: (a.unknown && (b.unknown || b.truth)) || (b.unknown && a.truth),
        }
    }

    /// Returns whether no row is wanted.
    pub(super) fn never(self) -> bool {
        !self.truth
    }

    /// Returns whether every row is wanted.
    pub(super) fn always(self) -> bool {
        !self.falsehood && !self.unknown
    }
}

/// Returns the outcomes that `expression`, bound to its columns, may have; `bounds` has those of
/// a column.
pub(super) fn outcomes(
    expression: &Expression,
    bounds: &impl Fn(&str) -> Option<Bounds>,
) -> Outcomes {
    match expression {
        Expression::And(both) => outcomes(&both[0], bounds).and(outcomes(&both[1], bounds)),
        Expression::Or(both) => {
            let not = |side| outcomes(side, bounds).not();
            not(&both[0]).and(not(&both[1])).not()
        }
        Expression::Not(inner) => outcomes(inner, bounds).not(),
        Expression::Compare(name, operator, literal) => {
            bounds(&name.name).map_or(Outcomes::ALL, |b| b.compare(*operator, literal))
        }
        Expression::In(name, literals) => {
            let Some(bounds) = bounds(&name.name) else {
                return Outcomes::ALL;
            };
            let equal = |literal| bounds.compare(Operator::Equal, literal);
            let all: Vec<_> = literals.iter().map(equal).collect();
            Outcomes {
                truth: all.iter().any(|one| one.truth),
                falsehood: all.iter().all(|one| one.falsehood),
                unknown: all.iter().any(|one| one.unknown),
            }
        }
        Expression::IsNull(name) => {
            let nulls = bounds(&name.name).and_then(|b| Some((b.nulls?, b.rows)));
            Outcomes {
                truth: nulls.is_none_or(|(nulls, _)| nulls > 0),
                falsehood: nulls.is_none_or(|(nulls, rows)| nulls < rows),
                unknown: false,
            }
        }
    }
}

impl Bounds {
    fn compare(&self, operator: Operator, literal: &Literal) -> Outcomes {
        let all_null = self.nulls == Some(self.rows);
        // Statistics do not count values that are no numbers.
        let is_float = matches!(self.low, Some(Literal::Float(_)));
        let unknown = all_null || is_float || self.nulls != Some(0);
        let sides = self.low.as_ref().zip(self.high.as_ref());
        let orders = sides.and_then(|(low, high)| {
            Some((literal.compared_with(low)?, literal.compared_with(high)?))
        });
        let (truth, falsehood) = match orders {
            _ if all_null => (false, false),
            None => (true, true),
            Some((low, high)) => may_be(operator, low, high),
        };
        Outcomes {
            truth,
            falsehood,
            unknown,
        }
    }
}

/// Returns whether values between a least and a largest, which compare so with the literal, may
/// make the operator true, and false.
fn may_be(operator: Operator, low: Ordering, high: Ordering) -> (bool, bool) {
    match operator {
        Operator::Equal => (low.is_le() && high.is_ge(), low.is_ne() || high.is_ne()),
        Operator::NotEqual => {
            let (truth, falsehood) = may_be(Operator::Equal, low, high);
            (falsehood, truth)
        }
        Operator::Less | Operator::LessOrEqual => (operator.holds(low), !operator.holds(high)),
        Operator::Greater | Operator::GreaterOrEqual => {
            (operator.holds(high), !operator.holds(low))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[Option<i128>]) -> Bounds {
        let known = || values.iter().flatten();
        Bounds {
            low: known().min().copied().map(Literal::Int),
            high: known().max().copied().map(Literal::Int),
            nulls: Some(values.iter().filter(|value| value.is_none()).count() as u64),
            rows: values.len() as u64,
        }
    }

    #[test]
    fn truncated_and_missing_statistics_rule_nothing_out() {
        let none = Bounds {
            low: None,
            high: None,
            nulls: None,
            rows: 4,
        };
        let expression = super::super::parse("a = 3").unwrap();
        assert_eq!(
            outcomes(&expression, &|_| Some(none.clone())),
            Outcomes::ALL
        );
        assert_eq!(outcomes(&expression, &|_| None), Outcomes::ALL);
        // Statistics of floats leave out what is no number.
        let float = Bounds {
            low: Some(Literal::Float(3.0)),
            high: Some(Literal::Float(3.0)),
            nulls: Some(0),
            rows: 4,
        };
        assert!(!outcomes(&expression, &|_| Some(float.clone())).always());
    }

    proptest! {
        /// Whatever a row's outcome is, the statistics allow for it.
        #[test]
        fn no_row_is_ruled_out_wrongly(
            values in prop::collection::vec(prop::option::of(-3_i128..4), 1..6),
            text in prop::sample::select(vec![
                "a < 1", "a <= -1", "a > 2", "a >= 0", "a = 1", "a <> 1", "a in (1, 3)",
                "a is null", "not (a > 0 and a < 3)", "a < 0 or a > 2", "not a in (0, 1)",
                "a between 0 and 2",
                "a is not null and not a = 2", "not (a < 0 or a is null)",
            ]),
        ) {
            let expression = super::super::parse(text).unwrap();
            let found = outcomes(&expression, &|_| Some(of(&values)));
            let mut wanted = 0;
            for value in &values {
                let value = value.map(Literal::Int);
                let outcome = expression.outcome(&|_| value.as_ref());
                wanted += usize::from(outcome == Some(true));
                let is_allowed = match outcome {
                    Some(true) => found.truth,
                    Some(false) => found.falsehood,
                    None => found.unknown,
                };
                prop_assert!(is_allowed);
            }
            prop_assert!(!found.never() || wanted == 0);
            prop_assert!(!found.always() || wanted == values.len());
        }
    }
}
