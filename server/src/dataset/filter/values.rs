//! Columns of a predicate: which types can be compared, with what, and their values.
use super::expression::{Expression, Literal, Name};
use arrow::{
    array::{Array, ArrayRef, AsArray},
    compute::cast,
    datatypes::{DataType, Decimal128Type, Float64Type},
    error::ArrowError,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::dataset) enum Kind {
    Int,
    /// `true` for numbers of 32 bits and less: what they are compared with is rounded as they are.
    Float(bool),
    Text,
    Bool,
    /// Null throughout: it compares with anything, and is never equal to it.
    Null,
}

impl Kind {
    /// Returns `None` for types that cannot be compared: lists, structs, bytes, dates.
    pub(crate) fn of(data_type: &DataType) -> Option<Self> {
        Some(match data_type {
            DataType::Dictionary(_, values) => Self::of(values)?,
            t if t.is_integer() => Self::Int,
            DataType::Float16 | DataType::Float32 => Self::Float(true),
            DataType::Float64 => Self::Float(false),
            DataType::Null => Self::Null,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Self::Text,
            DataType::Boolean => Self::Bool,
            _ => return None,
        })
    }

    fn takes(self, literal: &Literal) -> bool {
        match literal {
            _ if self == Self::Null => true,
            Literal::Int(_) | Literal::Float(_) => matches!(self, Self::Int | Self::Float(_)),
            Literal::Text(_) => self == Self::Text,
            Literal::Bool(_) => self == Self::Bool,
        }
    }

    /// Returns a literal as it is compared with a column of this kind.
    fn rounded(self, literal: &Literal) -> Literal {
        match (self, literal) {
            (Self::Float(true), Literal::Float(real)) => Literal::Float(f64::from(*real as f32)),
            (Self::Float(true), Literal::Int(whole)) => Literal::Float(f64::from(*whole as f32)),
            (_, same) => same.clone(),
        }
    }
}

/// Returns the expression for columns of the kinds that `kind` returns.
///
/// # Errors
/// The first column with what it is wrongly compared with, and those of `kind`.
pub(super) fn bound<E>(
    expression: &Expression,
    kind: impl Fn(&Name) -> Result<Kind, E>,
    wrong: impl Fn(&Name, &Literal) -> E,
) -> Result<Expression, E> {
    let mut kinds = Vec::new();
    for (name, literals) in expression.columns() {
        let kind = kind(name)?;
        if let Some(literal) = literals.iter().find(|literal| !kind.takes(literal)) {
            return Err(wrong(name, literal));
        }
        kinds.push((name.name.clone(), kind));
    }
    let known = |name: &str| kinds.iter().find(|(known, _)| known == name);
    Ok(expression.with_literals(&|name, literal| {
        known(name).map_or_else(|| literal.clone(), |(_, kind)| kind.rounded(literal))
    }))
}

/// Returns the values of a column that has a [`Kind`]; `None` if they are null.
pub(in crate::dataset) fn values(array: &ArrayRef) -> Result<Vec<Option<Literal>>, ArrowError> {
    let kind = Kind::of(array.data_type()).ok_or_else(|| {
        ArrowError::CastError(format!("a {} cannot be compared", array.data_type()))
    })?;
    Ok(match kind {
        // 38 digits hold any integer.
        Kind::Int => cast(array, &DataType::Decimal128(38, 0))?
            .as_primitive::<Decimal128Type>()
            .iter()
            .map(|whole| whole.map(Literal::Int))
            .collect(),
        Kind::Float(_) => cast(array, &DataType::Float64)?
            .as_primitive::<Float64Type>()
            .iter()
            .map(|real| real.map(Literal::Float))
            .collect(),
        Kind::Text => cast(array, &DataType::LargeUtf8)?
            .as_string::<i64>()
            .iter()
            .map(|text| text.map(|text| Literal::Text(text.to_owned())))
            .collect(),
        Kind::Null => vec![None; array.len()],
        Kind::Bool => cast(array, &DataType::Boolean)?
            .as_boolean()
            .iter()
            .map(|truth| truth.map(Literal::Bool))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Float32Array, StringArray, UInt64Array};
    use std::sync::Arc;

    #[test]
    fn values_are_those_of_the_column() {
        let wholes: ArrayRef = Arc::new(UInt64Array::from(vec![Some(u64::MAX), None]));
        let whole = Literal::Int(u64::MAX.into());
        assert_eq!(values(&wholes).unwrap(), [Some(whole), None]);
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["en", "de"]));
        let categories = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
        let found = values(&cast(&texts, &categories).unwrap()).unwrap();
        assert_eq!(found[1], Some(Literal::Text("de".to_owned())));
    }

    /// `similarity = 0.3` finds the 0.3 of a 32-bit column, as NumPy and DuckDB do.
    #[test]
    fn a_literal_is_rounded_as_the_column_is() {
        let reals: ArrayRef = Arc::new(Float32Array::from(vec![0.3]));
        let value = values(&reals).unwrap().remove(0);
        let expression = super::super::parse("similarity = 0.3").unwrap();
        let bound = |single| {
            let kind = |_: &Name| Ok::<_, ()>(Kind::Float(single));
            let expression = bound(&expression, kind, |_, _| ()).unwrap();
            expression.outcome(&|_| value.as_ref())
        };
        assert_eq!(bound(true), Some(true));
        assert_eq!(bound(false), Some(false));
    }
}
