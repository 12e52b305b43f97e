//! Rows that are no candidates: what a source's `where` and `allow` leave out, and downloads that
//! img2dataset notes as failed. They are found once, by indexing, and counted in the manifest.
mod bounds;
pub(super) mod columns;
pub(crate) mod expression;
pub(super) mod ids;
mod pages;
mod parse;
mod row_groups;
mod samples;
#[cfg(test)]
mod tests;
pub(super) mod values;
mod words;

use super::{
    SourceRequest,
    manifest::{AllowedIds, KeptBy},
};
use crate::{
    error::{Error, Result},
    storage::Stores,
};
use expression::{Expression, Literal};
use ids::Ids;
pub(crate) use parse::parse;
pub(super) use samples::{Entries, KEY, Seen};
use std::{collections::HashMap, sync::Arc};
pub(crate) use words::Fault;

/// The column whose values are looked up in a list of ids, where the source names none.
pub(super) const ID_COLUMN: &str = "uid";

/// What a source leaves out.
pub(super) struct Filter {
    predicate: Option<(String, Expression)>,
    allow: Option<Arc<Allow>>,
}

/// By what rows are kept.
struct Rule {
    /// Bound to the columns' kinds.
    expression: Option<Expression>,
    allow: Option<Arc<Allow>>,
}

struct Allow {
    uri: String,
    column: String,
    ids: Ids,
}

/// Rows that were left out of a shard.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub outside: u64,
    pub not_downloaded: u64,
}

/// Values of columns, by name, row by row.
type Columns = HashMap<String, Vec<Option<Literal>>>;

/// Returns what is wrong with a predicate, for people.
pub(crate) fn describe_fault(text: &str, fault: &Fault) -> String {
    let Fault { at, what } = fault;
    format!(
        "where: \"{text}\" is no predicate: at character {at}, {what}; write comparisons such as \
         similarity > 0.3 and language in ('en', 'de')"
    )
}

impl Filter {
    /// Parses the predicate and reads the list of ids.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no predicate or no list of ids; those of reading.
    pub(super) async fn open(stores: &Stores, request: &SourceRequest) -> Result<Self> {
        let predicate = match &request.predicate {
            Some(text) => {
                let bad = |fault| Error::invalid("sources.where", describe_fault(text, &fault));
                Some((text.clone(), parse(text).map_err(bad)?))
            }
            None => None,
        };
        let allow = match &request.allow {
            Some(uri) => {
                let column = request.id_column.as_deref().unwrap_or(ID_COLUMN);
                Some(Arc::new(Allow {
                    ids: ids::read(stores, uri, column).await?,
                    uri: uri.clone(),
                    column: column.to_owned(),
                }))
            }
            None => None,
        };
        Ok(Self { predicate, allow })
    }

    fn is_empty(&self) -> bool {
        self.predicate.is_none() && self.allow.is_none()
    }

    /// Returns the filter's entry in the manifest.
    pub(super) fn kept_by(&self) -> Option<KeptBy> {
        let allow = self.allow.as_ref().map(|allow| AllowedIds {
            uri: allow.uri.clone(),
            id_column: allow.column.clone(),
            ids: allow.ids.len() as u64,
            digest: allow.ids.digest().to_owned(),
        });
        (!self.is_empty()).then(|| KeptBy {
            predicate: self.predicate.as_ref().map(|(text, _)| text.clone()),
            allow,
        })
    }

    /// Returns the end of an error about a source without rows.
    pub(super) fn left_out_hint(&self, outside: u64) -> String {
        if outside == 0 {
            return String::new();
        }
        let what = match (&self.predicate, &self.allow) {
            (Some(_), Some(_)) => "where and allow leave",
            (Some(_), None) => "where leaves",
            _ => "allow leaves",
        };
        format!(": {what} out {outside} of them")
    }
}

impl Rule {
    /// Returns which of `rows` rows are kept.
    fn keeps(&self, columns: &Columns, rows: usize) -> Vec<bool> {
        let column = |name: &str| columns.get(name);
        let allowed = self
            .allow
            .as_ref()
            .map(|allow| (allow, column(&allow.column)));
        let is_kept = |row: usize| {
            let value = |name: &str| column(name)?.get(row)?.as_ref();
            let expression = self.expression.as_ref();
            let inside = expression.is_none_or(|e| e.outcome(&value) == Some(true));
            let is_allowed = allowed.is_none_or(|(allow, values)| {
                let value = values.and_then(|values| values.get(row)?.as_ref());
                allow.ids.hold(value)
            });
            inside && is_allowed
        };
        (0..rows).map(is_kept).collect()
    }
}
