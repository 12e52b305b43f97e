//! Has a worker fetch, check and load a model.
use super::{failover::Failover, pool::Pool, replies::check_model, worker::Worker};
use crate::{
    error::{Result, from_status},
    pushed::Pushed,
};
use std::time::Instant;
use superbatch_proto::v1::{ModelRef, PrepareModelRequest, PrepareModelResponse, Reason};

/// Has a worker load a model and describe it. If the worker is lost, another one takes over.
pub async fn prepare(pool: &Pool, model: ModelRef, canary: bool) -> Result<PrepareModelResponse> {
    let mut failover = Failover::new(pool);
    loop {
        let worker = failover.worker().await?;
        let request = PrepareModelRequest {
            model: Some(model.clone()),
            canary,
        };
        match prepare_on(pool, &worker, request).await {
            Ok(model) => return Ok(model),
            Err(error) => failover.failed(&worker, error)?,
        }
    }
}

/// Has the worker of this process load weights that are in memory. `None` if this process has
/// no worker.
pub(crate) async fn prepare_pushed(
    pool: &Pool,
    model: ModelRef,
    pushed: Pushed,
) -> Result<Option<PrepareModelResponse>> {
    let mut live = pool.live(Instant::now()).into_iter();
    let Some((worker, embedded)) = live.find_map(|worker| {
        let embedded = worker.embedded.clone()?;
        Some((worker, embedded))
    }) else {
        return Ok(None);
    };
    let answer = embedded.calls.prepare_pushed(model, pushed);
    let model = pool.replies().within(&worker, "a model", answer).await??;
    check_model(&model)?;
    Ok(Some(model))
}

async fn prepare_on(
    pool: &Pool,
    worker: &Worker,
    request: PrepareModelRequest,
) -> Result<PrepareModelResponse> {
    let mut client = worker.client();
    let answer = client.prepare_model(request);
    let answer = pool.replies().within(worker, "a model", answer).await?;
    let model = answer
        .map_err(|status| from_status(status, Reason::NoWorkers))?
        .into_inner();
    check_model(&model)?;
    Ok(model)
}
