//! The published weights of a run: a list, digests by tensor, pushes of stored files, and going
//! back to an older version.
use crate::{Push, Result, Run, client::Api, push::StoredFile};
use superbatch_proto::v1;
use tonic::Status;

impl Run {
    /// Pushes a safetensors file that lies in storage, and waits until it is published. The service
    /// reads it: nothing is sent.
    pub async fn push_uri(&self, step: i64, file: StoredFile) -> Result<v1::WeightsVersion> {
        self.push(Push::stored(step, file)).await
    }

    /// Returns the newest published weights, the newest first.
    pub async fn weights(&self, newest: u32) -> Result<Vec<v1::KeptWeights>> {
        let request = v1::ListWeightsRequest {
            run_id: self.run_id().to_owned(),
            newest,
        };
        let call = |mut api: Api, request| async move { api.list_weights(request).await };
        Ok(self.client.call(request, call).await?.versions)
    }

    /// Returns a version and the digests of its tensors, as they lie in the service's state: of the
    /// newest version that serves, if none is named.
    pub async fn weights_digests(
        &self,
        version: Option<u64>,
    ) -> Result<(v1::WeightsVersion, Vec<v1::TensorDigest>)> {
        let mut request = v1::GetWeightsDigestsRequest {
            run_id: self.run_id().to_owned(),
            version,
            tensor_offset: 0,
        };
        let mut all = Vec::new();
        loop {
            let asked = request.clone();
            let call =
                |mut api: Api, request| async move { api.get_weights_digests(request).await };
            let page = self.client.call(asked, call).await?;
            all.extend(page.tensors);
            let version = page.version.unwrap_or_default();
            match page.next_tensor_offset {
                Some(next) if next > request.tensor_offset => {
                    request.tensor_offset = next;
                    // Pins the version, since a newer one may be published between two pages.
                    request.version = Some(version.version);
                }
                Some(_) => {
                    let message = "GetWeightsDigests answered with a page that leads nowhere";
                    return Err(Status::internal(message).into());
                }
                None => return Ok((version, all)),
            }
        }
    }

    /// Takes back all versions after `version`, which serves in their place from now on. Needs the
    /// scope `admin`. Not retried: a repeated call would take back what was pushed in between.
    pub async fn roll_back_weights(&self, version: u64) -> Result<v1::RollBackWeightsResponse> {
        let request = v1::RollBackWeightsRequest {
            run_id: self.run_id().to_owned(),
            version,
        };
        let answer = self.client.api().roll_back_weights(request).await;
        let answer = answer.map_err(|status| self.client.located(status.into()))?;
        Ok(answer.into_inner())
    }
}
