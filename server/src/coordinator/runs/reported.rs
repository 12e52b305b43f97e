//! Losses that a trainer reports of a step's examples.
use super::run::Run;
use crate::{
    bounds::{LOSSES_MAX, check_count},
    coordinator::losses::{Example, Loss},
    error::{Error, Result},
    metrics,
};
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
};
use superbatch_proto::v1::{Reason, Receipt, ReportLossesRequest};
use tokio::sync::OnceCell;

/// Steps whose examples are kept: ranks report one after the other, and some are a step behind.
const STEPS_KEPT: usize = 4;

/// The examples that a step chose, by id. Empty until the step's receipt was read.
type Chosen = Arc<OnceCell<HashMap<String, Example>>>;

/// The steps of which losses came last, by (generation, step), so that the receipt is not read for
/// each rank.
#[derive(Debug, Default)]
pub(crate) struct Reported(Mutex<VecDeque<((u32, u64), Chosen)>>);

impl Reported {
    fn of(&self, at: (u32, u64)) -> Chosen {
        let mut steps = self.0.lock().expect("no panic while held");
        if let Some((_, chosen)) = steps.iter().find(|(known, _)| *known == at) {
            return chosen.clone();
        }
        if steps.len() == STEPS_KEPT {
            steps.pop_front();
        }
        let chosen = Chosen::default();
        steps.push_back((at, chosen.clone()));
        chosen
    }
}

impl Run {
    /// Notes the losses of examples that a step chose.
    ///
    /// # Errors
    /// `RunClosed`, `RunFailed`, `NotOwner`; `StepNotCommitted`; `InvalidArgument`, with the `id`
    /// of the first example that the step did not choose, or whose loss is not finite; those of
    /// [`crate::coordinator::losses::Losses::report`].
    pub(super) async fn report_losses(&self, request: &ReportLossesRequest) -> Result<()> {
        check(request)?;
        self.state().check_open()?;
        let (generation, step) = (request.generation, request.step);
        let chosen = self.reported.of((generation, step));
        let read = async || {
            let receipt = self.find_receipt(step, Some(generation)).await?;
            let receipt = receipt.ok_or_else(|| {
                let message = format!(
                    "step {step} is not committed in generation {generation}: it has no examples"
                );
                let error = Error::new(Reason::StepNotCommitted, message).with("step", step);
                error.with("generation", generation)
            })?;
            Ok::<_, Error>(by_id(receipt))
        };
        let losses = of_chosen(chosen.get_or_try_init(read).await?, request)?;
        self.owner.check().await?;
        let count = losses.len() as u64;
        self.losses.report(losses).await?;
        metrics::losses_reported().increment(count);
        Ok(())
    }
}

/// Checks what a report says, before a receipt is read for it.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn check(request: &ReportLossesRequest) -> Result<()> {
    check_count("ids", request.ids.len(), LOSSES_MAX)?;
    check_count("losses", request.losses.len(), LOSSES_MAX)?;
    if request.ids.len() != request.losses.len() || request.ids.is_empty() {
        let message = format!(
            "{} ids and {} losses; give one loss of each example",
            request.ids.len(),
            request.losses.len()
        );
        return Err(Error::invalid("losses", message));
    }
    let mut pairs = request.ids.iter().zip(&request.losses);
    match pairs.find(|(_, loss)| !loss.is_finite()) {
        None => Ok(()),
        Some((id, loss)) => {
            let message = format!("the loss of {id} is {loss}; leave such examples out");
            Err(Error::invalid("losses", message).with("id", id))
        }
    }
}

fn by_id(receipt: Receipt) -> HashMap<String, Example> {
    let chosen = receipt.chosen.into_iter();
    chosen
        .map(|row| (row.id, (row.source, row.shard, row.row)))
        .collect()
}

/// Returns the losses by example.
fn of_chosen(
    chosen: &HashMap<String, Example>,
    request: &ReportLossesRequest,
) -> Result<Vec<Loss>> {
    let losses = request.ids.iter().zip(&request.losses).map(|(id, loss)| {
        let example = chosen.get(id.as_str()).ok_or_else(|| {
            let message = format!(
                "step {} did not choose {id}; report the losses of its own examples, by their \
                _superbatch_id",
                request.step
            );
            Error::invalid("ids", message).with("id", id)
        })?;
        Ok((*example, *loss))
    });
    losses.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use superbatch_proto::v1::ChosenRow;

    fn request(ids: &[&str], losses: &[f32]) -> ReportLossesRequest {
        ReportLossesRequest {
            ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            losses: losses.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn losses_are_of_examples_that_the_step_chose() {
        let row = |id: &str, shard, row| ChosenRow {
            id: id.into(),
            shard,
            row,
            ..Default::default()
        };
        let receipt = Receipt {
            chosen: vec![row("a#1", 0, 1), row("b#2", 3, 2)],
            ..Default::default()
        };
        let chosen = by_id(receipt);
        let found = of_chosen(&chosen, &request(&["b#2", "a#1"], &[0.5, 1.5])).unwrap();
        assert_eq!(found, [((0, 3, 2), 0.5), ((0, 0, 1), 1.5)]);
        let error = of_chosen(&chosen, &request(&["a#1", "c#3"], &[0.5, 1.5])).unwrap_err();
        assert_eq!(error.value("id"), Some("c#3"));
    }

    #[tokio::test]
    async fn a_steps_examples_are_read_once_for_all_ranks() {
        let (reported, reads) = (Reported::default(), AtomicUsize::new(0));
        let examples = async |at| {
            let read = async || {
                reads.fetch_add(1, Relaxed);
                Ok::<_, Error>(HashMap::from([("a#1".to_owned(), (0, 0, 1))]))
            };
            reported.of(at).get_or_try_init(read).await.unwrap().len()
        };
        let ranks = (0..8).map(|_| examples((0, 7)));
        assert_eq!(join_all(ranks).await, [1; 8]);
        assert_eq!(reads.load(Relaxed), 1);
        // Another generation chose others. Only a few steps are kept.
        for (generation, step, read) in [(1, 7, 2), (1, 8, 3), (1, 9, 4), (0, 7, 4), (1, 10, 5)] {
            examples((generation, step)).await;
            assert_eq!(reads.load(Relaxed), read, "{generation} {step}");
        }
        examples((0, 7)).await;
        assert_eq!(reads.load(Relaxed), 6);
        // A step that is not committed yet may be by the next report.
        let refused = async || Err::<HashMap<_, _>, _>(Error::internal("not committed"));
        let cell = reported.of((1, 11));
        assert!(cell.get_or_try_init(refused).await.is_err());
        examples((1, 11)).await;
        assert_eq!(reads.load(Relaxed), 7);
    }

    #[test]
    fn a_report_has_one_finite_loss_of_each_example() {
        assert!(check(&request(&["a"], &[1.0])).is_ok());
        for (ids, losses, field) in [
            (vec!["a"; 2], vec![1.0], "losses"),
            (vec![], vec![], "losses"),
            (vec!["a"], vec![f32::NAN], "losses"),
            (vec!["a"; LOSSES_MAX + 1], vec![1.0], "ids"),
            (vec!["a"], vec![1.0; LOSSES_MAX + 1], "losses"),
        ] {
            let error = check(&request(&ids, &losses)).unwrap_err();
            assert_eq!(error.value("field"), Some(field));
        }
    }
}
