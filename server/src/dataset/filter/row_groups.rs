//! Which rows of a Parquet file are kept. Row groups that their statistics decide are not read.
use super::{
    Columns, Filter, LeftOut, Rule,
    bounds::{Bounds, Outcomes, outcomes},
    columns::{self, Batches},
    expression::{Expression, Literal, Name, Operator},
    pages::{self, Run},
    values::{Kind, bound, values},
};
use crate::{
    dataset::{file::ShardFile, layout, manifest::Block},
    error::Result,
};
use arrow::{array::Array, error::ArrowError};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, statistics::StatisticsConverter};
use std::collections::BTreeSet;

/// Columns by which img2dataset's own files are known, and what a download that went well has.
const STATUS: &str = "status";
const ERROR: &str = "error_message";
const SUCCESS: &str = "success";

/// A column's statistics in each row group.
struct ColumnStatistics {
    low: Vec<Option<Literal>>,
    high: Vec<Option<Literal>>,
    nulls: Vec<Option<u64>>,
}

impl Filter {
    /// Takes the rows that are not kept out of `blocks`, which are the file's row groups.
    ///
    /// # Errors
    /// `ColumnNotFound`, `SchemaMismatch` if a column's type is not what it is compared with;
    /// those of reading.
    pub(crate) async fn keep_rows(
        &self,
        file: &ShardFile,
        footer: &ArrowReaderMetadata,
        blocks: &mut [Block],
    ) -> Result<LeftOut> {
        let status = status(footer);
        if self.is_empty() && status.is_none() {
            return Ok(LeftOut::default());
        }
        let expression = self.bound(file, footer)?;
        let mut names: BTreeSet<&str> = status.iter().map(|_| STATUS).collect();
        names.extend(self.allow.iter().map(|allow| allow.column.as_str()));
        let compared = expression.iter().flat_map(Expression::columns);
        names.extend(compared.map(|(name, _)| name.name.as_str()));
        let names: Vec<&str> = names.into_iter().collect();
        let looks = self.undecided(footer, expression.as_ref(), status.as_ref(), blocks);
        let undecided: Vec<usize> = (0..blocks.len())
            .filter(|n| looks[*n] == Look::Read)
            .collect();
        let read = if undecided.is_empty() {
            Vec::new()
        } else {
            let footer = pages::with_indexes(file, footer, &undecided, &names).await?;
            let reading = self.reading(
                &footer,
                expression.clone(),
                status.clone(),
                &undecided,
                blocks,
            );
            let group =
                |(group, (_, runs)): (&usize, &(_, Vec<Run>))| (*group, pages::selection(runs));
            let groups: Vec<_> = undecided.iter().zip(&reading.blocks).map(group).collect();
            let look = move |n: usize, batches: &mut Batches| reading.group(n, batches);
            columns::read_selected(file, &footer, &groups, &names, look).await?
        };
        let (mut left_out, mut read) = (LeftOut::default(), read.into_iter());
        for (block, look) in blocks.iter_mut().zip(looks) {
            match look {
                Look::All => {}
                Look::None => {
                    left_out.outside += u64::from(block.rows);
                    block.keep(&[]);
                }
                Look::Read => {
                    if let Some((kept, these)) = read.next() {
                        *block = kept;
                        left_out.not_downloaded += these.not_downloaded;
                        left_out.outside += these.outside;
                    }
                }
            }
        }
        Ok(left_out)
    }

    /// Returns the predicate for the types of this file; the list's column is checked as well.
    fn bound(&self, file: &ShardFile, footer: &ArrowReaderMetadata) -> Result<Option<Expression>> {
        let schema = footer.schema();
        let (uri, fields) = (file.uri(), schema.fields());
        let kind = |column: &str, at: String| {
            let Ok(field) = schema.field_with_name(column) else {
                let message = format!("{uri} has no column '{column}'{at}");
                let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
                return Err(layout::not_found(message, column, &names));
            };
            Kind::of(field.data_type()).ok_or_else(|| {
                let message = format!(
                    "column '{column}' of {uri} is {}{at}, and only numbers, texts and truth \
                     values are compared",
                    field.data_type()
                );
                layout::mismatch(message, uri, column)
            })
        };
        if let Some(allow) = &self.allow {
            kind(
                &allow.column,
                ", which allow looks up (id_column names another)".to_owned(),
            )?;
        }
        let Some((_, expression)) = &self.predicate else {
            return Ok(None);
        };
        let wrong = |name: &Name, literal: &Literal| {
            let found = schema.field_with_name(&name.name);
            let found = found.map_or_else(|_| String::new(), |f| f.data_type().to_string());
            let Name { name, at } = name;
            let message = format!(
                "where: column '{name}' (at character {at}) of {uri} is {found}, and is compared \
                 with {literal}"
            );
            layout::mismatch(message, uri, name)
        };
        let at = |name: &Name| format!(" (where, at character {})", name.at);
        bound(expression, |name| kind(&name.name, at(name)), wrong).map(Some)
    }

    /// Returns what is to be done with each row group.
    fn undecided(
        &self,
        footer: &ArrowReaderMetadata,
        expression: Option<&Expression>,
        status: Option<&Expression>,
        blocks: &[Block],
    ) -> Vec<Look> {
        let all = [expression, status];
        let columns = all.into_iter().flatten().flat_map(Expression::columns);
        let known: Vec<_> = columns
            .map(|(name, _)| (name.name.as_str(), known(footer, &name.name)))
            .collect();
        let look = |(n, block): (usize, &Block)| {
            let bounds = |name: &str| {
                let (_, known) = known.iter().find(|(column, _)| *column == name)?;
                let known = known.as_ref()?;
                Some(Bounds {
                    low: known.low.get(n)?.clone(),
                    high: known.high.get(n)?.clone(),
                    nulls: *known.nulls.get(n)?,
                    rows: u64::from(block.rows),
                })
            };
            self.decide(expression, status, &bounds)
        };
        blocks.iter().enumerate().map(look).collect()
    }

    /// Returns what is to be done with rows of which a column's bounds are so.
    fn decide(
        &self,
        expression: Option<&Expression>,
        status: Option<&Expression>,
        bounds: &impl Fn(&str) -> Option<Bounds>,
    ) -> Look {
        let asked = |expression: Option<&Expression>| {
            expression.map_or(Outcomes::TRUE, |asked| outcomes(asked, bounds))
        };
        let (inside, status) = (asked(expression), asked(status));
        match () {
            () if !status.always() => Look::Read,
            () if inside.never() => Look::None,
            () if inside.always() && self.allow.is_none() => Look::All,
            () => Look::Read,
        }
    }

    /// Returns what is read of row groups, after a look at the statistics of their pages.
    fn reading(
        &self,
        footer: &ArrowReaderMetadata,
        expression: Option<Expression>,
        status: Option<Expression>,
        undecided: &[usize],
        blocks: &[Block],
    ) -> Reading {
        let runs = |group: usize, rows: u32| {
            let all = [&expression, &status].into_iter().flatten();
            let names = all
                .flat_map(Expression::columns)
                .map(|(name, _)| name.name.as_str());
            let names: BTreeSet<&str> = names.collect();
            let pages = |name| (name, pages::pages(footer, group, rows, name));
            let columns: Vec<_> = names.into_iter().map(pages).collect();
            pages::runs(rows, &columns, |bounds| {
                self.decide(expression.as_ref(), status.as_ref(), &bounds)
            })
        };
        let block = |n: &usize| (blocks[*n].clone(), runs(*n, blocks[*n].rows));
        Reading {
            blocks: undecided.iter().map(block).collect(),
            status,
            rule: Rule {
                expression,
                allow: self.allow.clone(),
            },
        }
    }
}

/// What is to be done with rows: all are kept, none are, or their values are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    All,
    None,
    Read,
}

/// Returns, for img2dataset's files, what a row's status has to be.
fn status(footer: &ArrowReaderMetadata) -> Option<Expression> {
    let is_text = |name: &str| {
        let field = footer.schema().field_with_name(name).ok();
        field.is_some_and(|field| Kind::of(field.data_type()) == Some(Kind::Text))
    };
    let has_error = footer.schema().field_with_name(ERROR).is_ok();
    (is_text(STATUS) && has_error).then(|| {
        let name = Name {
            name: STATUS.to_owned(),
            at: 0,
        };
        Expression::Compare(name, Operator::Equal, Literal::Text(SUCCESS.to_owned()))
    })
}

/// What the rows of row groups are read for.
struct Reading {
    /// What a row's status has to be.
    status: Option<Expression>,
    rule: Rule,
    /// The groups, and what is to be done with each one's rows.
    blocks: Vec<(Block, Vec<Run>)>,
}

impl Reading {
    /// Returns the `n`-th group with the rows that are kept, and how many are left out.
    fn group(&self, n: usize, batches: &mut Batches) -> Result<(Block, LeftOut), ArrowError> {
        let (mut block, runs) = self.blocks[n].clone();
        let read = runs.iter().filter(|run| run.look == Look::Read);
        let rows: usize = read.map(|run| run.rows as usize).sum();
        let (mut kept, mut not_downloaded) = (Vec::new(), 0);
        for batch in batches {
            let batch = batch?;
            let mut columns = Columns::new();
            for (field, array) in batch.schema().fields().iter().zip(batch.columns()) {
                columns.insert(field.name().clone(), values(array)?);
            }
            let value = |row: usize| columns.get(STATUS)?.get(row)?.as_ref();
            let went_well = |row: usize| match &self.status {
                Some(status) => status.outcome(&|_| value(row)) == Some(true),
                None => true,
            };
            let inside = self.rule.keeps(&columns, batch.num_rows());
            for (row, inside) in inside.into_iter().enumerate() {
                let is_there = went_well(row);
                not_downloaded += u64::from(!is_there);
                kept.push(inside && is_there);
            }
            if kept.len() > rows {
                break;
            }
        }
        if kept.len() != rows {
            let what = format!("its columns do not have the {rows} rows of the group");
            return Err(ArrowError::ParseError(what));
        }
        let stored = u64::from(block.rows);
        block.keep(&pages::spread(&runs, &kept));
        let left_out = LeftOut {
            outside: stored - u64::from(block.rows) - not_downloaded,
            not_downloaded,
        };
        Ok((block, left_out))
    }
}

/// Returns `None` if the file has no statistics that can be trusted.
fn known(footer: &ArrowReaderMetadata, column: &str) -> Option<ColumnStatistics> {
    let (schema, groups) = (footer.schema(), footer.metadata().row_groups());
    let converter = StatisticsConverter::try_new(column, schema, footer.parquet_schema()).ok()?;
    let converter = converter.with_missing_null_counts_as_zero(false);
    let is_text = Kind::of(schema.field_with_name(column).ok()?.data_type()) == Some(Kind::Text);
    let leaf = converter.parquet_column_index()?;
    // Old writers compared the bytes of texts with their signs.
    let deprecated = groups.iter().any(|group| {
        let statistics = group.column(leaf).statistics();
        statistics.is_some_and(|statistics| statistics.is_min_max_deprecated())
    });
    let nulls = converter.row_group_null_counts(groups).ok()?;
    let bounds = |array: parquet::errors::Result<arrow::array::ArrayRef>| {
        let none = vec![None; groups.len()];
        match array {
            Ok(array) if !(is_text && deprecated) => values(&array).unwrap_or(none),
            _ => none,
        }
    };
    Some(ColumnStatistics {
        low: bounds(converter.row_group_mins(groups)),
        high: bounds(converter.row_group_maxes(groups)),
        nulls: (0..nulls.len())
            .map(|n| nulls.is_valid(n).then(|| nulls.value(n)))
            .collect(),
    })
}
