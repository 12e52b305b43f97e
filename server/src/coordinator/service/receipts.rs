//! The receipt of a request.
use crate::{
    coordinator::runs::registry::Coordinator,
    error::{Error, Result},
};
use superbatch_proto::v1::{GetReceiptRequest, Reason, Receipt};

/// Returns the receipt that is asked for. A run that is not in memory is not loaded for it: its
/// receipts are in the state, and reading them must put no trainer's run to sleep.
pub(super) async fn of(coordinator: &Coordinator, request: &GetReceiptRequest) -> Result<Receipt> {
    let (chain, receipts) = coordinator.history(&request.run_id).await?;
    let newest = chain.current();
    let generation = request.generation.unwrap_or(newest);
    if generation > newest {
        return Err(Error::invalid(
            "generation",
            format!("the run's newest generation is {newest}, not {generation}"),
        ));
    }
    let found = receipts.find_of(&chain, request.step, generation).await?;
    let mut receipt = found.ok_or_else(|| {
        let message = format!(
            "step {} of run '{}' is not committed in generation {generation} (yet)",
            request.step, request.run_id
        );
        Error::new(Reason::StepNotCommitted, message)
            .with("step", request.step)
            .with("generation", generation)
    })?;
    // The generation of the request; `chosen_in_generation` stays.
    receipt.summary.get_or_insert_default().generation = generation;
    Ok(receipt)
}
