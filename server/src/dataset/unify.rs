//! Finds one type for a column that shards write differently, as pyarrow does.
use arrow::datatypes::DataType;

/// Returns the type in which a column is delivered: categories become their values' type.
pub(super) fn plain(data_type: &DataType) -> &DataType {
    match data_type {
        DataType::Dictionary(_, values) => values,
        other => other,
    }
}

/// Returns a type that can hold the values of both; `None` if no type can.
pub(super) fn unify(a: &DataType, b: &DataType) -> Option<DataType> {
    use DataType as T;
    let text = |t: &T| matches!(t, T::Utf8 | T::LargeUtf8 | T::Utf8View);
    let bytes = |t: &T| matches!(t, T::Binary | T::LargeBinary | T::BinaryView);
    match (a, b) {
        (a, b) if a == b => Some(a.clone()),
        (T::Null, other) | (other, T::Null) => Some(other.clone()),
        (a, b) if text(a) && text(b) => Some(T::LargeUtf8),
        (a, b) if bytes(a) && bytes(b) => Some(T::LargeBinary),
        (a, b) if a.is_signed_integer() && b.is_signed_integer() => wider(a, b),
        (a, b) if a.is_unsigned_integer() && b.is_unsigned_integer() => wider(a, b),
        (a, b) if a.is_floating() && b.is_floating() => wider(a, b),
        _ => None,
    }
}

fn wider(a: &DataType, b: &DataType) -> Option<DataType> {
    let wide = a.primitive_width()? >= b.primitive_width()?;
    Some(if wide { a.clone() } else { b.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use DataType as T;

    #[test]
    fn what_holds_both_is_taken_and_nothing_else() {
        for (a, b, expected) in [
            (T::Int32, T::Int64, Some(T::Int64)),
            (T::UInt8, T::UInt16, Some(T::UInt16)),
            (T::Float32, T::Float64, Some(T::Float64)),
            (T::Utf8, T::LargeUtf8, Some(T::LargeUtf8)),
            (T::Binary, T::Binary, Some(T::Binary)),
            (T::Null, T::Date32, Some(T::Date32)),
            (T::Int32, T::UInt32, None),
            (T::Int64, T::Float64, None),
            (T::Utf8, T::Int64, None),
        ] {
            assert_eq!(unify(&a, &b), expected);
            assert_eq!(unify(&b, &a), expected);
        }
    }
}
