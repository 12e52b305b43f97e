//! Finds one type for a column that shards write differently, as pyarrow does.
use arrow::datatypes::{DataType, FieldRef};
use std::sync::Arc;

/// Returns the type in which a column is delivered: categories and runs become their values' type,
/// also inside of lists. Streams of rows have neither.
pub(super) fn plain(data_type: &DataType) -> DataType {
    use DataType as T;
    let part = |field: &FieldRef| {
        let plain = plain(field.data_type());
        Arc::new(field.as_ref().clone().with_data_type(plain))
    };
    match data_type {
        T::Dictionary(_, values) => plain(values),
        T::RunEndEncoded(_, values) => plain(values.data_type()),
        T::List(field) => T::List(part(field)),
        T::LargeList(field) => T::LargeList(part(field)),
        T::ListView(field) => T::ListView(part(field)),
        T::LargeListView(field) => T::LargeListView(part(field)),
        T::FixedSizeList(field, size) => T::FixedSizeList(part(field), *size),
        T::Map(field, sorted) => T::Map(part(field), *sorted),
        T::Struct(fields) => T::Struct(fields.iter().map(part).collect()),
        other => other.clone(),
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
    use arrow::datatypes::Field;

    #[test]
    fn categories_become_their_values_wherever_they_are() {
        let category = T::Dictionary(Box::new(T::Int8), Box::new(T::Utf8));
        assert_eq!(plain(&category), T::Utf8);
        let runs = |values| {
            let ends = Arc::new(Field::new("run_ends", T::Int32, false));
            T::RunEndEncoded(ends, Arc::new(Field::new("values", values, true)))
        };
        assert_eq!(plain(&runs(T::Float32)), T::Float32);
        let nested = |part: &T| {
            let fields = [
                Field::new("a", part.clone(), false),
                Field::new("b", T::Int32, true),
            ];
            T::new_list(T::Struct(fields.into_iter().collect()), true)
        };
        assert_eq!(plain(&nested(&category)), nested(&T::Utf8));
        assert_eq!(plain(&nested(&T::Binary)), nested(&T::Binary));
    }

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
