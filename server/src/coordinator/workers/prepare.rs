//! Has a worker fetch, check and load a model.
use super::{failover::is_lost, pool::Pool, replies::check_model, worker::Worker};
use crate::{
    coordinator::workers::failover::Unable,
    error::{Result, from_status},
};
use superbatch_proto::v1::{ModelRef, PrepareModelRequest, PrepareModelResponse, Reason};

/// Has a worker load a model and describe it. If the worker is lost, another one takes over.
pub async fn prepare(pool: &Pool, model: ModelRef, canary: bool) -> Result<PrepareModelResponse> {
    let (mut attempts, mut unable) = (0, Unable::default());
    loop {
        let worker = pool.other(&mut unable).await?;
        let request = PrepareModelRequest {
            model: Some(model.clone()),
            canary,
        };
        match prepare_on(pool, &worker, request).await {
            Ok(model) => return Ok(model),
            Err(error) => {
                if !is_lost(&error) {
                    unable.note(&worker, error)?;
                    continue;
                }
                attempts += 1;
                if attempts == 5 {
                    return Err(error);
                }
                pool.lost(&worker);
            }
        }
    }
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
