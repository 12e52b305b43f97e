//! Masks of tokens as a column: of each row a list of truth values, null if there is no mask.
use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanBuilder, ListBuilder},
    datatypes::DataType,
};
use std::sync::Arc;
use superbatch_proto::v1::ChosenRow;

pub fn data_type() -> DataType {
    DataType::new_list(DataType::Boolean, true)
}

pub fn column<'a>(rows: impl Iterator<Item = &'a ChosenRow>) -> ArrayRef {
    let mut masks = ListBuilder::new(BooleanBuilder::new());
    for row in rows {
        masks.values().append_slice(&row.token_mask);
        masks.append(!row.token_mask.is_empty());
    }
    Arc::new(masks.finish())
}

/// Returns the mask of a row; empty if it has none, or if there is no such column.
pub(super) fn mask(column: Option<&ArrayRef>, row: usize) -> Vec<bool> {
    let lists = column.and_then(|found| found.as_list_opt::<i32>());
    let Some(lists) = lists.filter(|lists| lists.is_valid(row)) else {
        return Vec::new();
    };
    let values = lists.value(row);
    let values = values.as_boolean_opt();
    values.map_or_else(Vec::new, |values| values.iter().flatten().collect())
}
