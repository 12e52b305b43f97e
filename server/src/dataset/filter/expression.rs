//! Predicates, and their outcome for a value: true, false, or, as in SQL, unknown.
use std::{cmp::Ordering, fmt};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Literal {
    Int(i128),
    Float(f64),
    Text(String),
    Bool(bool),
}

/// A column's name and where it stands in the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    pub name: String,
    pub at: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Expression {
    And(Box<[Self; 2]>),
    Or(Box<[Self; 2]>),
    Not(Box<Self>),
    Compare(Name, Operator, Literal),
    /// One of the literals. Not empty.
    In(Name, Vec<Literal>),
    IsNull(Name),
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(whole) => write!(f, "{whole}"),
            Self::Float(real) => write!(f, "{real}"),
            Self::Text(text) => write!(f, "'{}'", text.replace('\'', "''")),
            Self::Bool(truth) => write!(f, "{truth}"),
        }
    }
}

impl Literal {
    /// Returns how it compares with a value of the same kind; `None` beside a NaN.
    pub(crate) fn compared_with(&self, value: &Self) -> Option<Ordering> {
        match (value, self) {
            (Self::Int(a), Self::Int(b)) => Some(a.cmp(b)),
            (Self::Float(a), Self::Float(b)) => a.partial_cmp(b),
            (Self::Int(a), Self::Float(b)) => (*a as f64).partial_cmp(b),
            (Self::Float(a), Self::Int(b)) => a.partial_cmp(&(*b as f64)),
            (Self::Text(a), Self::Text(b)) => Some(a.cmp(b)),
            (Self::Bool(a), Self::Bool(b)) => Some(a.cmp(b)),
            _ => None,
        }
    }
}

impl Operator {
    pub(crate) fn of(sign: &str) -> Option<Self> {
        Some(match sign {
            "=" | "==" => Self::Equal,
            "!=" | "<>" => Self::NotEqual,
            "<" => Self::Less,
            "<=" => Self::LessOrEqual,
            ">" => Self::Greater,
            ">=" => Self::GreaterOrEqual,
            _ => return None,
        })
    }

    /// Returns the operator with its operands swapped.
    pub(crate) fn turned(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessOrEqual => Self::GreaterOrEqual,
            Self::Greater => Self::Less,
            Self::GreaterOrEqual => Self::LessOrEqual,
            same => same,
        }
    }

    pub(crate) fn holds(self, ordering: Ordering) -> bool {
        match self {
            Self::Equal => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
            Self::Less => ordering.is_lt(),
            Self::LessOrEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterOrEqual => ordering.is_ge(),
        }
    }
}

impl Expression {
    /// Returns the outcome; `None` is unknown. `value` returns a column's value, `None` for a null.
    pub(crate) fn outcome<'v>(&self, value: &impl Fn(&str) -> Option<&'v Literal>) -> Option<bool> {
        let compare = |name: &Name, operator: Operator, literal: &Literal| {
            let ordering = literal.compared_with(value(&name.name)?)?;
            Some(operator.holds(ordering))
        };
        match self {
            Self::And(both) => and(both[0].outcome(value), both[1].outcome(value)),
            Self::Or(both) => {
                let not = |side: &Self| side.outcome(value).map(|truth| !truth);
                and(not(&both[0]), not(&both[1])).map(|truth| !truth)
            }
            Self::Not(inner) => inner.outcome(value).map(|truth| !truth),
            Self::Compare(name, operator, literal) => compare(name, *operator, literal),
            Self::In(name, literals) => {
                let equal = |literal: &Literal| compare(name, Operator::Equal, literal);
                let mut outcomes = literals.iter().map(equal);
                outcomes.try_fold(false, |found, equal| Some(found | equal?))
            }
            Self::IsNull(name) => Some(value(&name.name).is_none()),
        }
    }

    /// Returns all columns with the literals that they are compared with, in the order of the text.
    pub(crate) fn columns(&self) -> Vec<(&Name, &[Literal])> {
        match self {
            Self::And(both) | Self::Or(both) => both.iter().flat_map(Self::columns).collect(),
            Self::Not(inner) => inner.columns(),
            Self::Compare(name, _, literal) => vec![(name, std::slice::from_ref(literal))],
            Self::In(name, literals) => vec![(name, literals)],
            Self::IsNull(name) => vec![(name, &[])],
        }
    }

    /// Returns the same with each literal as `change` makes it.
    pub(crate) fn with_literals(&self, change: &impl Fn(&str, &Literal) -> Literal) -> Self {
        let inner = |side: &Self| side.with_literals(change);
        let both = |sides: &[Self; 2]| Box::new([inner(&sides[0]), inner(&sides[1])]);
        match self {
            Self::And(sides) => Self::And(both(sides)),
            Self::Or(sides) => Self::Or(both(sides)),
            Self::Not(side) => Self::Not(Box::new(inner(side))),
            Self::Compare(name, operator, literal) => {
                Self::Compare(name.clone(), *operator, change(&name.name, literal))
            }
            Self::In(name, literals) => {
                let changed = literals.iter().map(|literal| change(&name.name, literal));
                Self::In(name.clone(), changed.collect())
            }
            Self::IsNull(name) => Self::IsNull(name.clone()),
        }
    }
}

pub(super) fn and(a: Option<bool>, b: Option<bool>) -> Option<bool> {
    match (a, b) {
        (Some(false), _) | (_, Some(false)) => Some(false),
        (Some(true), Some(true)) => Some(true),
        _ => None,
    }
}
