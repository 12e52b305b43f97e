//! Replays of a step: a draw by another policy, and the scores of its pairs. Only a page of its own
//! (`superbatch page`) makes them: beside a service they would take compute from its steps.
use super::{
    Page,
    answer::{Answer, Json, number, text},
};
use crate::{
    coordinator::replay::{Change, CommittedStep, Past, pairs::Pairs, redraw::Redrawn},
    error::{Error, Result},
};
use async_trait::async_trait;
use axum::extract::{Path, RawQuery, State};
use std::sync::Arc;
use superbatch_proto::v1::{Criterion, Policy, Reason};

/// Most chosen examples whose pairs are scored: 65,536 pairs.
const PAIRS: usize = 256;

/// Replays steps.
#[async_trait]
pub trait Replays: Send + Sync {
    async fn redraw(&self, past: &Past, change: &Change) -> Result<Redrawn>;
    /// Scores the pairs of the first `most` of the chosen.
    async fn pairs(&self, past: &Past, most: usize) -> Result<Pairs>;
}

/// Answers `GET /api/runs/{run}/steps/{step}/pairs`, with `?generation=N`.
pub(super) async fn pairs(
    State(page): State<Arc<Page>>,
    Path((id, step)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Answer {
    let asked = ReplayQuery::of(&page, &id, &step, query.as_deref()).await?;
    let key = (asked.nonce.clone(), asked.step, asked.generation);
    if let Some(kept) = page.replayed.get(&key) {
        return Ok(kept);
    }
    let turn = page.turns.take().await?;
    let work = async move {
        // Another request may have asked for the same before.
        if let Some(kept) = page.replayed.get(&key) {
            return Ok(kept);
        }
        let past = asked.past(&page).await?;
        let found = asked.replays.pairs(&past, PAIRS).await?;
        let show = move || Ok(Json::from(found.json(&past)));
        let pairs = page.work("showing pairs", show).await?;
        page.replayed.put(key, pairs.clone());
        Ok(pairs)
    };
    Ok(turn.spend_on(work).await?)
}

/// Answers `GET /api/runs/{run}/steps/{step}/redraw`, with `?policy=`, `criterion`, `filter_ratio`,
/// `sub_batch_size`, `n_chunks`, `seed` and `generation`.
pub(super) async fn redraw(
    State(page): State<Arc<Page>>,
    Path((id, step)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Answer {
    let change = change(query.as_deref())?;
    let asked = ReplayQuery::of(&page, &id, &step, query.as_deref()).await?;
    let turn = page.turns.take().await?;
    let work = async move {
        let past = asked.past(&page).await?;
        let redrawn = asked.replays.redraw(&past, &change).await?;
        let show = move || Ok(Json::from(redrawn.json(&past)));
        page.work("showing a draw", show).await
    };
    Ok(turn.spend_on(work).await?)
}

/// A step that is to be replayed, of which little is read yet: requests that wait for their turn
/// hold no receipt and no manifest.
struct ReplayQuery {
    replays: Arc<dyn Replays>,
    id: String,
    nonce: String,
    step: u64,
    /// The generation whose receipt is in force in the trajectory that was asked for.
    generation: u32,
}

impl ReplayQuery {
    async fn of(page: &Page, id: &str, step: &str, query: Option<&str>) -> Result<Self> {
        let Some(replays) = &page.replays else {
            let message = "this page belongs to a service and takes no compute from its steps; \
                           `superbatch page --state URI` replays, and so does `superbatch replay`";
            return Err(Error::new(Reason::Unimplemented, message).with("feature", "replay"));
        };
        let step: u64 = step
            .parse()
            .map_err(|_| Error::invalid("step", format!("'{step}' is no step")))?;
        // Also checks the id, before it becomes a part of a path.
        let known = page.find_or_load(id).await?;
        let generations = known.generations_of(step, number(query, "generation")?);
        let found = page.summary_of(&known, step, generations).await?;
        let (generation, _) = found.ok_or_else(|| known.not_committed(step))?;
        Ok(Self {
            replays: replays.clone(),
            id: known.id.clone(),
            nonce: known.nonce().to_owned(),
            step,
            generation,
        })
    }

    /// Reads the whole step; the manifest is the page's.
    async fn past(&self, page: &Page) -> Result<Past> {
        let found = {
            let _read = page.reads.take().await?;
            CommittedStep::find(&page.state, &self.id, self.step, Some(self.generation)).await?
        };
        let manifest = page.manifest(found.manifest()).await?;
        Past::of(found, manifest).await
    }
}

fn change(query: Option<&str>) -> Result<Change> {
    let whole = |name: &str| -> Result<Option<u32>> {
        let given = number(query, name)?;
        let small = |given: u64| {
            u32::try_from(given)
                .map_err(|_| Error::invalid(name, format!("{name} is {given}; give less")))
        };
        given.map(small).transpose()
    };
    let named = |name: &str, prefix: &str| {
        text(query, name)
            .filter(|value| !value.is_empty())
            .map(|value| (format!("{prefix}{}", value.to_uppercase()), value))
    };
    let unknown = |name: &str, value: &str| Error::invalid(name, format!("'{value}' is no {name}"));
    let policy = named("policy", "POLICY_").map(|(proto, value)| {
        Policy::from_str_name(&proto).ok_or_else(|| unknown("policy", &value))
    });
    let criterion = named("criterion", "CRITERION_").map(|(proto, value)| {
        Criterion::from_str_name(&proto).ok_or_else(|| unknown("criterion", &value))
    });
    let ratio = text(query, "filter_ratio").map(|given| {
        given
            .parse()
            .map_err(|_| Error::invalid("filter_ratio", format!("'{given}' is no share")))
    });
    Ok(Change {
        policy: policy.transpose()?,
        criterion: criterion.transpose()?,
        sub_batch_size: whole("sub_batch_size")?,
        filter_ratio: ratio.transpose()?,
        n_chunks: whole("n_chunks")?,
        seed: number(query, "seed")?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_read_from_the_query() {
        let found = change(Some("policy=top_k&criterion=hard&filter_ratio=0.9&seed=3")).unwrap();
        let expected = Change {
            policy: Some(Policy::TopK),
            criterion: Some(Criterion::Hard),
            filter_ratio: Some(0.9),
            seed: Some(3),
            ..Default::default()
        };
        assert_eq!(found, expected);
        assert_eq!(change(None).unwrap(), Change::default());
        for (query, field) in [
            ("policy=best", "policy"),
            ("criterion=x", "criterion"),
            ("n_chunks=9999999999", "n_chunks"),
            ("filter_ratio=much", "filter_ratio"),
        ] {
            let error = change(Some(query)).unwrap_err();
            assert_eq!(error.value("field"), Some(field));
        }
    }
}
