//! Which samples of a tar are kept: columns are entries of the `json` member.
use super::{
    Columns, Filter,
    expression::{Literal, Name},
    values::{Kind, bound},
};
use crate::{
    dataset::{file::ShardFile, layout},
    error::Result,
};
use serde_json::Value;

/// What is known of a sample: its key, and its `json` member.
pub(in crate::dataset) struct Known<'a> {
    pub key: &'a str,
    pub json: Option<Value>,
}

impl Filter {
    /// Whether a tar's `json` members have to be read.
    pub fn asks(&self) -> bool {
        !self.is_empty()
    }

    /// Which of the samples are kept.
    ///
    /// # Errors
    /// `ColumnNotFound` where no sample has an entry; `SchemaMismatch` where one has another type
    /// than it is compared with.
    pub fn keep_samples(&self, file: &ShardFile, samples: &[Known<'_>]) -> Result<Vec<bool>> {
        let expression = self.predicate.as_ref().map(|(_, expression)| expression);
        let compared = expression.iter().flat_map(|e| e.columns());
        let mut columns = Columns::new();
        for (name, literals) in compared {
            let at = format!(" (where, at character {})", name.at);
            let values = column(file, samples, &name.name, &at)?;
            check(file, samples, name, literals, &values)?;
            columns.insert(name.name.clone(), values);
        }
        if let Some(allow) = &self.allow {
            let at = ", which allow looks up (id_column names another)";
            let values = column(file, samples, &allow.column, at)?;
            columns.insert(allow.column.clone(), values);
        }
        let is_real = |name: &str| {
            let values = columns.get(name).into_iter().flatten().flatten();
            values
                .into_iter()
                .any(|value| matches!(value, Literal::Float(_)))
        };
        let kind = |name: &Name| {
            let first = columns
                .get(&name.name)
                .into_iter()
                .flatten()
                .flatten()
                .next();
            Ok(match first {
                None => Kind::Null,
                Some(Literal::Text(_)) => Kind::Text,
                Some(Literal::Bool(_)) => Kind::Bool,
                Some(_) if is_real(&name.name) => Kind::Float(false),
                Some(_) => Kind::Int,
            })
        };
        let wrong = |name: &Name, literal: &Literal| mismatch(file, name, literal, "another type");
        let bound = expression.map(|e| bound(e, kind, wrong)).transpose()?;
        Ok(self.kept(bound.as_ref(), &columns, samples.len()))
    }
}

/// The values of an entry. Its name may be written as `json[name]`.
fn column(
    file: &ShardFile,
    samples: &[Known<'_>],
    name: &str,
    at: &str,
) -> Result<Vec<Option<Literal>>> {
    let entry = name
        .strip_prefix("json[")
        .and_then(|rest| rest.strip_suffix(']'));
    let entry = entry.unwrap_or(name);
    let value = |sample: &Known<'_>| match entry {
        "__key__" => Some(Literal::Text(sample.key.to_owned())),
        _ => literal(sample.json.as_ref()?.get(entry)?),
    };
    let has = |sample: &Known<'_>| {
        let json = sample.json.as_ref();
        entry == "__key__" || json.is_some_and(|json| json.get(entry).is_some())
    };
    if !samples.is_empty() && !samples.iter().any(has) {
        let objects = samples.iter().filter_map(|s| s.json.as_ref()?.as_object());
        let names = objects.map(|object| object.keys().map(String::as_str).collect::<Vec<_>>());
        let names = names.into_iter().next().unwrap_or_default();
        let message = format!("no json of {} has an entry '{entry}'{at}", file.uri());
        return Err(layout::not_found(message, entry, &names));
    }
    Ok(samples.iter().map(value).collect())
}

fn literal(value: &Value) -> Option<Literal> {
    match value {
        Value::Null => None,
        Value::Bool(truth) => Some(Literal::Bool(*truth)),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Some(Literal::Int(whole.into())),
            (_, Some(whole)) => Some(Literal::Int(whole.into())),
            _ => number.as_f64().map(Literal::Float),
        },
        Value::String(text) => Some(Literal::Text(text.clone())),
        other => Some(Literal::Text(other.to_string())),
    }
}

/// Whether all values are of the kind that they are compared with.
fn check(
    file: &ShardFile,
    samples: &[Known<'_>],
    name: &Name,
    literals: &[Literal],
    values: &[Option<Literal>],
) -> Result<()> {
    let Some(literal) = literals.first() else {
        return Ok(());
    };
    for (sample, value) in samples.iter().zip(values) {
        let Some(value) = value else { continue };
        if rank(value) != rank(literal) {
            let found = format!("{value} in sample {}", sample.key);
            return Err(mismatch(file, name, literal, &found));
        }
    }
    Ok(())
}

fn rank(value: &Literal) -> u8 {
    match value {
        Literal::Int(_) | Literal::Float(_) => 0,
        Literal::Text(_) => 1,
        Literal::Bool(_) => 2,
    }
}

fn mismatch(file: &ShardFile, name: &Name, literal: &Literal, found: &str) -> crate::error::Error {
    let Name { name, at } = name;
    let message = format!(
        "where: '{name}' (at character {at}) of {} is {found}, and is compared with {literal}",
        file.uri()
    );
    layout::mismatch(message, file.uri(), name)
}
