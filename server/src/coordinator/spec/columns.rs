//! Score columns of a phase: their defaults, and what can never work.
use super::impossible;
use crate::{error::Result, selection};
use std::collections::HashSet;
use superbatch_kernels as kernels;
use superbatch_proto::{
    reflect::Word,
    v1::{Criterion, Phase, ScoreColumn},
};

const COLUMNS_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 1 << 12;

/// Completes score columns: one without rules gets a weight.
pub(super) fn complete(phase: &mut Phase) {
    for column in &mut phase.score_columns {
        if column.at_least.is_none() && column.at_most.is_none() {
            column.weight.get_or_insert(1.0);
        }
    }
}

/// Refuses columns that can never work. `at` is the path of the phase.
pub(super) fn check(at: &str, phase: &Phase) -> Result<()> {
    let columns = &phase.score_columns;
    let field = format!("{at}.score_columns");
    if columns.len() > COLUMNS_MAX {
        let message = format!("{} columns; at most {COLUMNS_MAX}", columns.len());
        return Err(impossible(&field, message));
    }
    let mut seen = HashSet::new();
    for (i, column) in columns.iter().enumerate() {
        self::column(&format!("{field}[{i}]"), column)?;
        if !seen.insert(&column.name) {
            let message = format!("'{}' is there twice", column.name);
            return Err(impossible(&format!("{field}[{i}].name"), message));
        }
    }
    let policy = phase.policy().word();
    let has_weight = columns.iter().any(|column| column.weight.is_some());
    let scored = selection::is_scored(phase.policy());
    if has_weight && !scored {
        let message = format!(
            "policy {policy} draws by no scores, so that a weight has no effect; give at_least or \
             at_most alone, or another policy"
        );
        return Err(impossible(&field, message));
    }
    if phase.criterion() != Criterion::Column || !scored {
        return Ok(());
    }
    if !has_weight {
        let message = "the criterion is a column, and none has a weight; name one";
        return Err(impossible(&field, message));
    }
    if selection::policy(phase.policy()).is_some_and(kernels::Policy::is_conditional) {
        let message = format!(
            "a column says nothing of pairs, so that {policy} has nothing joint to draw by; use \
             independent, top_k, rank or proportional, or add the column to learnability"
        );
        return Err(impossible(&format!("{at}.policy"), message));
    }
    Ok(())
}

fn column(at: &str, column: &ScoreColumn) -> Result<()> {
    let ScoreColumn {
        name,
        weight,
        at_least,
        at_most,
        missing,
    } = column;
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        let message = format!(
            "{at}.name has {} bytes, not 1 to {NAME_BYTES_MAX}",
            name.len()
        );
        return Err(impossible(&format!("{at}.name"), message));
    }
    let numbers = [
        ("weight", weight),
        ("at_least", at_least),
        ("at_most", at_most),
        ("missing", missing),
    ];
    for (field, number) in numbers {
        if let Some(number) = number.filter(|number| !number.is_finite()) {
            let message = format!("{at}.{field} is {number}; give a finite number");
            return Err(impossible(&format!("{at}.{field}"), message));
        }
    }
    if *weight == Some(0.0) {
        let message = format!("{at}.weight is 0; leave the column out, or give a rule alone");
        return Err(impossible(&format!("{at}.weight"), message));
    }
    match at_least.zip(*at_most) {
        Some((least, most)) if least > most => {
            let message = format!("{at} keeps nothing: at_least {least} is above at_most {most}");
            Err(impossible(&format!("{at}.at_most"), message))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::Policy;

    fn phase(policy: Policy, criterion: Criterion, columns: &[ScoreColumn]) -> Phase {
        let mut phase = Phase {
            policy: policy.into(),
            criterion: criterion.into(),
            score_columns: columns.to_vec(),
            ..Default::default()
        };
        complete(&mut phase);
        phase
    }

    #[test]
    fn what_can_never_work_is_refused_by_its_field() {
        let named = ScoreColumn {
            name: "x".to_owned(),
            ..Default::default()
        };
        let rule = ScoreColumn {
            at_least: Some(0.3),
            ..named.clone()
        };
        let with = |change: fn(&mut ScoreColumn)| {
            let mut column = rule.clone();
            change(&mut column);
            vec![column]
        };
        use {Criterion as C, Policy as P};
        for good in [
            phase(P::TopK, C::Column, std::slice::from_ref(&named)),
            phase(P::Joint, C::Learnability, std::slice::from_ref(&named)),
            phase(P::Uniform, C::Learnability, std::slice::from_ref(&rule)),
            phase(P::KCenter, C::Column, &[]),
        ] {
            check("p", &good).unwrap();
        }
        for (phase, field) in [
            (phase(P::TopK, C::Column, &[]), "p.score_columns"),
            (
                phase(P::TopK, C::Column, std::slice::from_ref(&rule)),
                "p.score_columns",
            ),
            (
                phase(P::Joint, C::Column, std::slice::from_ref(&named)),
                "p.policy",
            ),
            (
                phase(P::Uniform, C::Hard, std::slice::from_ref(&named)),
                "p.score_columns",
            ),
            (
                phase(P::TopK, C::Hard, &[named.clone(), named]),
                "p.score_columns[1].name",
            ),
            (
                phase(P::TopK, C::Hard, &with(|c| c.name.clear())),
                "p.score_columns[0].name",
            ),
            (
                phase(P::TopK, C::Hard, &with(|c| c.weight = Some(0.0))),
                "p.score_columns[0].weight",
            ),
            (
                phase(P::TopK, C::Hard, &with(|c| c.missing = Some(f64::NAN))),
                "p.score_columns[0].missing",
            ),
            (
                phase(P::TopK, C::Hard, &with(|c| c.at_most = Some(0.2))),
                "p.score_columns[0].at_most",
            ),
        ] {
            let error = check("p", &phase).unwrap_err();
            assert_eq!(error.value("field"), Some(field), "{error}");
        }
    }
}
