//! Receipts as JSON for people: the protocol's field names, enums by their names in lower case.
use serde_json::Value;
use superbatch_proto::{
    reflect::{Word, to_plain_json},
    v1::{Accounts, Approximation, BadRow, Fidelity, Receipt, ReceiptSummary, Tuning},
};

pub fn summary(summary: &ReceiptSummary) -> Value {
    let mut all = to_plain_json(summary);
    if let Some(tuning) = &summary.tuning {
        all["tuning"] = self::tuning(tuning);
    }
    all
}

/// Returns a whole receipt as JSON.
pub fn receipt(receipt: &Receipt) -> Value {
    let mut all = to_plain_json(receipt);
    if let Some(summary) = &receipt.summary {
        all["summary"] = self::summary(summary);
    }
    all
}

pub fn bad_rows(rows: &[BadRow]) -> Value {
    rows.iter().map(to_plain_json).collect()
}

/// Returns the numbers that are set.
pub fn tuning(tuning: &Tuning) -> Value {
    let all = to_plain_json(tuning);
    let Value::Object(all) = all else { return all };
    all.into_iter()
        .filter(|(_, number)| !number.is_null())
        .collect()
}

pub fn accounts(accounts: &Accounts) -> Value {
    to_plain_json(accounts)
}

/// Returns the meaning of `approximate` in the step.
pub fn approximation(approximation: &Approximation) -> Value {
    to_plain_json(approximation)
}

/// Returns a fidelity's name in receipts and batches: `full` or `approximate`; the number if it is
/// not known.
pub fn fidelity_name(fidelity: i32) -> String {
    Fidelity::try_from(fidelity).map_or_else(|_| fidelity.to_string(), Fidelity::word)
}

#[cfg(test)]
mod tests;
