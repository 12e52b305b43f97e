//! Encodes the rows that were passed over for a receipt's file: columns in JSON.
use serde::{Deserialize, Serialize};
use superbatch_proto::v1::PassedRow;

#[derive(Default, Serialize, Deserialize)]
struct Columns {
    id: Vec<String>,
    source: Vec<u32>,
    shard: Vec<u32>,
    row: Vec<u64>,
    position: Vec<u64>,
    own_score: Vec<f32>,
    learner_loss: Vec<Option<f32>>,
    reference_loss: Vec<Option<f32>>,
    sampled: Vec<bool>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    column_values: Vec<Vec<f64>>,
}

pub(super) fn encode(rows: &[PassedRow]) -> String {
    let mut columns = Columns::default();
    for row in rows {
        columns.id.push(row.id.clone());
        columns.source.push(row.source);
        columns.shard.push(row.shard);
        columns.row.push(row.row);
        columns.position.push(row.position);
        columns.own_score.push(row.own_score);
        columns.learner_loss.push(row.learner_loss);
        columns.reference_loss.push(row.reference_loss);
        columns.sampled.push(row.sampled);
        if !row.column_values.is_empty() {
            columns.column_values.push(row.column_values.clone());
        }
    }
    serde_json::to_string(&columns).expect("plain data encodes")
}

/// Decodes rows; `None` if the text is not of [`encode`].
pub(super) fn decode(text: &str) -> Option<Vec<PassedRow>> {
    let columns: Columns = serde_json::from_str(text).ok()?;
    let row = |(n, id): (usize, &String)| {
        Some(PassedRow {
            id: id.clone(),
            source: *columns.source.get(n)?,
            shard: *columns.shard.get(n)?,
            row: *columns.row.get(n)?,
            position: *columns.position.get(n)?,
            // Beyond an f32 it would be infinite, which is not written.
            own_score: *columns.own_score.get(n).filter(|own| own.is_finite())?,
            learner_loss: *columns.learner_loss.get(n)?,
            reference_loss: *columns.reference_loss.get(n)?,
            sampled: *columns.sampled.get(n)?,
            column_values: columns.column_values.get(n).cloned().unwrap_or_default(),
        })
    };
    columns.id.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_to_the_last_bit_and_damage_is_seen() {
        let row = |n: u32| PassedRow {
            id: format!("a \"{n}\"#7"),
            row: u64::MAX - u64::from(n),
            own_score: f32::from_bits(0x3dcc_cccd + n * 7919),
            learner_loss: n.is_multiple_of(2).then_some(1.0 / 3.0),
            sampled: n.is_multiple_of(3),
            ..Default::default()
        };
        let rows: Vec<PassedRow> = (0..500).map(row).collect();
        let text = encode(&rows);
        assert_eq!(decode(&text), Some(rows));
        assert_eq!(decode("{}"), None);
        let endless = encode(&[row(0)]).replace("\"own_score\":[0.1]", "\"own_score\":[1e39]");
        assert!(endless.contains("1e39"));
        assert_eq!(decode(&endless), None);
        assert_eq!(
            decode(&text.replace("\"source\":[0,", "\"source\":[")),
            None
        );
    }
}
