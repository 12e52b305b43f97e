//! Has a worker fetch, check and load a model.
use super::{failover::is_lost, pool::Pool};
use crate::{
    coordinator::workers::failover::Unable,
    error::{Result, from_status},
};
use superbatch_proto::v1::{ModelRef, PrepareModelRequest, PrepareModelResponse, Reason};

/// Asks a worker to load a model and say what it is; another where one is lost.
pub async fn prepare(pool: &Pool, model: ModelRef, canary: bool) -> Result<PrepareModelResponse> {
    let (mut attempts, mut unable) = (0, Unable::default());
    loop {
        let worker = pool.other(&mut unable).await?;
        let request = PrepareModelRequest {
            model: Some(model.clone()),
            canary,
        };
        match worker.client().prepare_model(request).await {
            Ok(response) => return Ok(response.into_inner()),
            Err(status) => {
                let error = from_status(status, Reason::NoWorkers);
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
