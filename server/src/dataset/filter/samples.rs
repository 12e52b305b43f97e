//! Which samples of a tar are kept: columns are entries of the `json` member.
use super::{
    Columns, Filter, Rule,
    expression::{Literal, Name},
    values::{Kind, bound},
};
use crate::{
    dataset::{file::ShardFile, layout},
    error::{Error, Result},
};
use serde_json::Value;
use std::collections::BTreeSet;

/// The column of a sample's key.
pub(in crate::dataset) const KEY: &str = "__key__";

/// What the samples of a shard have under some names.
#[derive(Debug)]
pub(in crate::dataset) struct Entries {
    /// As they are asked for: `similarity` or `json[similarity]`.
    names: Vec<String>,
    keys: Vec<String>,
    /// By name, then by sample; `None` if it is null or absent.
    values: Vec<Vec<Option<Literal>>>,
    /// Which of the names some sample has, also as a null.
    found: Vec<bool>,
    /// All names of the first sample, for people.
    there: Vec<String>,
}

impl Entries {
    pub(crate) fn new(names: &[&str]) -> Self {
        Self {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            keys: Vec::new(),
            values: vec![Vec::new(); names.len()],
            found: vec![false; names.len()],
            there: Vec::new(),
        }
    }

    /// Adds a sample.
    pub(crate) fn push(&mut self, key: &str, json: Option<&Value>) {
        self.keys.push(key.to_owned());
        let object = json.and_then(Value::as_object);
        if let Some(object) = object.filter(|_| self.there.is_empty()) {
            self.there = object.keys().cloned().collect();
        }
        for (n, name) in self.names.iter().enumerate() {
            let (is_there, value) = match entry(name) {
                KEY => (true, Some(Literal::Text(key.to_owned()))),
                entry => {
                    let value = object.and_then(|object| object.get(entry));
                    (value.is_some(), value.and_then(literal))
                }
            };
            self.found[n] |= is_there;
            self.values[n].push(value);
        }
    }

    /// Returns the values under a name, of all samples. They are nulls if no sample has it: one
    /// shard says nothing of the others.
    ///
    /// # Errors
    /// `Internal` for a name that was not read.
    pub(crate) fn column(&self, name: &str) -> Result<&[Option<Literal>]> {
        let n = self.names.iter().position(|known| known == name);
        let n = n.ok_or_else(|| Error::internal(format!("'{name}' was not read")))?;
        Ok(&self.values[n])
    }

    /// Returns which names are there.
    pub(in crate::dataset) fn seen(&self) -> Seen {
        let names = self.names.iter().zip(&self.found);
        Seen {
            samples: self.keys.len(),
            found: names
                .filter(|(_, found)| **found)
                .map(|(name, _)| name.clone())
                .collect(),
            there: self.there.clone(),
        }
    }

    /// Returns the key of a sample.
    pub(crate) fn key(&self, sample: usize) -> &str {
        &self.keys[sample]
    }
}

/// Which names the samples of some shards have.
#[derive(Debug, Default)]
pub(in crate::dataset) struct Seen {
    samples: usize,
    found: BTreeSet<String>,
    /// All names of one sample, for people.
    there: Vec<String>,
}

impl Seen {
    pub(in crate::dataset) fn add(&mut self, other: Self) {
        self.samples += other.samples;
        self.found.extend(other.found);
        if self.there.is_empty() {
            self.there = other.there;
        }
    }

    /// Returns the error that no sample of `uri` has an entry; `at` says what asks for it. `None`
    /// if one has it, or if there are no samples.
    pub(in crate::dataset) fn missing(&self, uri: &str, name: &str, at: &str) -> Option<Error> {
        if self.found.contains(name) || self.samples == 0 {
            return None;
        }
        let there: Vec<&str> = self.there.iter().map(String::as_str).collect();
        let name = entry(name);
        let message = format!("no json of {uri} has an entry '{name}'{at}");
        Some(layout::not_found(message, name, &there))
    }
}

/// Returns `similarity` of `json[similarity]`.
fn entry(name: &str) -> &str {
    let inner = name.strip_prefix("json[");
    inner
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(name)
}

impl Filter {
    /// Returns the entries of samples that the filter reads; empty if it keeps all.
    pub(crate) fn entries(&self) -> Vec<&str> {
        let compared = self.predicate.iter().flat_map(|(_, e)| e.columns());
        let names = compared.map(|(name, _)| name.name.as_str());
        let ids = self.allow.iter().map(|allow| allow.column.as_str());
        let mut names: Vec<&str> = names.chain(ids).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Returns the error that no sample of a source has what the filter reads.
    pub(in crate::dataset) fn missing(&self, seen: &Seen, uri: &str) -> Option<Error> {
        let compared = self.predicate.iter().flat_map(|(_, e)| e.columns());
        let compared = compared.map(|(name, _)| {
            let at = format!(" (where, at character {})", name.at);
            (name.name.as_str(), at)
        });
        let looked_up = self.allow.iter().map(|allow| {
            let at = ", which allow looks up (id_column names another)".to_owned();
            (allow.column.as_str(), at)
        });
        compared
            .chain(looked_up)
            .find_map(|(name, at)| seen.missing(uri, name, &at))
    }

    /// Returns which of the samples are kept.
    ///
    /// # Errors
    /// `SchemaMismatch` where one has another type than it is compared with.
    pub(crate) fn keep_samples(&self, file: &ShardFile, entries: &Entries) -> Result<Vec<bool>> {
        let expression = self.predicate.as_ref().map(|(_, expression)| expression);
        let mut columns = Columns::new();
        for (name, literals) in expression.iter().flat_map(|e| e.columns()) {
            let values = entries.column(&name.name)?;
            check(file, entries, name, literals, values)?;
            columns.insert(name.name.clone(), values.to_vec());
        }
        if let Some(allow) = &self.allow {
            let values = entries.column(&allow.column)?;
            columns.insert(allow.column.clone(), values.to_vec());
        }
        let values = |name: &str| columns.get(name).into_iter().flatten().flatten();
        let is_real = |name: &str| values(name).any(|value| matches!(value, Literal::Float(_)));
        let kind = |name: &Name| {
            Ok(match values(&name.name).next() {
                None => Kind::Null,
                Some(Literal::Text(_)) => Kind::Text,
                Some(Literal::Bool(_)) => Kind::Bool,
                Some(_) if is_real(&name.name) => Kind::Float(false),
                Some(_) => Kind::Int,
            })
        };
        let wrong = |name: &Name, literal: &Literal| mismatch(file, name, literal, "another type");
        let bound = expression.map(|e| bound(e, kind, wrong)).transpose()?;
        let rule = Rule {
            expression: bound,
            allow: self.allow.clone(),
        };
        Ok(rule.keeps(&columns, entries.keys.len()))
    }
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

/// Checks that all values are of the kind that they are compared with.
fn check(
    file: &ShardFile,
    entries: &Entries,
    name: &Name,
    literals: &[Literal],
    values: &[Option<Literal>],
) -> Result<()> {
    let Some(literal) = literals.first() else {
        return Ok(());
    };
    for (sample, value) in values.iter().enumerate() {
        let Some(value) = value else { continue };
        if rank(value) != rank(literal) {
            let found = format!("{value} in sample {}", entries.key(sample));
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

fn mismatch(file: &ShardFile, name: &Name, literal: &Literal, found: &str) -> Error {
    let Name { name, at } = name;
    let message = format!(
        "where: '{name}' (at character {at}) of {} is {found}, and is compared with {literal}",
        file.uri()
    );
    layout::mismatch(message, file.uri(), name)
}
