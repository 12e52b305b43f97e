//! Joint selection on this worker's device.
use super::engine::Engine;
use crate::error::{Error, Result, from_status};
use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use half::f16;
use std::pin::pin;
use superbatch_kernels::{
    Backend, Candidates, Criterion, Loss, ModelEmbeddings, Noise, Policy, Rows, Selection, Settings,
};
use superbatch_proto::v1::{
    self, EmbeddingDtype, EmbeddingPart, Reason, SelectBegin, SelectRequest, SelectResponse, Tower,
    select_request::Message,
};
use tokio::time::Instant;
use tonic::Status;

/// Serves one `Select` call: a `SelectBegin`, then both models' embeddings of all candidates, in order.
///
/// # Errors
/// `InvalidArgument` naming the field, `TooManyBadRows` where fewer than the sub-batch survive, `DeviceUnavailable`.
pub(super) async fn select(
    engine: &Engine,
    requests: impl Stream<Item = Result<SelectRequest, Status>>,
) -> Result<SelectResponse> {
    let mut requests = pin!(requests.map_err(|status| from_status(status, Reason::Internal)));
    let first = requests.try_next().await?.and_then(|request| request.message);
    let Some(Message::Begin(begin)) = first else {
        return Err(Error::invalid("message", "a Select call starts with SelectBegin"));
    };
    let settings = settings(&begin)?;
    let mut received = [Received::default(), Received::default()];
    while let Some(request) = requests.try_next().await? {
        let Some(Message::Embedding(part)) = request.message else {
            return Err(Error::invalid("message", "after SelectBegin come embeddings only"));
        };
        let tower = match part.tower() {
            Tower::Learner => 0,
            Tower::Reference => 1,
            Tower::Unspecified => return Err(Error::invalid("tower", "an EmbeddingPart names no tower")),
        };
        received[tower].append(part, begin.positions.len(), begin.embedding_dtype())?;
    }
    let (device, threads) = (engine.device.name().to_owned(), engine.threads as u32);
    let started = Instant::now();
    let selection = match engine.device.name().starts_with("cuda") {
        true => engine.device.run(move |device| draw(Backend::Torch(device), &begin, &settings, &received)).await??,
        false => engine.pool.run(move |_| draw(Backend::Native, &begin, &settings, &received)).await??,
    };
    Ok(SelectResponse {
        indices: selection.indices,
        chunks: selection.chunks,
        scores: selection.scores,
        weights: selection.weights,
        batch_score: selection.batch_score.unwrap_or_default(),
        mean_score_chosen: selection.mean_score_chosen.unwrap_or_default(),
        mean_score_candidates: selection.mean_score_candidates.unwrap_or_default(),
        seconds: started.elapsed().as_secs_f64(),
        flops: selection.flops,
        device,
        threads,
    })
}

/// One model's embeddings as they come in.
#[derive(Default)]
struct Received {
    dim: usize,
    rows: usize,
    image: Values,
    text: Values,
}

#[derive(Default)]
struct Values {
    f32: Vec<f32>,
    f16: Vec<f16>,
}

impl Received {
    fn append(&mut self, part: EmbeddingPart, count: usize, dtype: EmbeddingDtype) -> Result<()> {
        let (rows, dim) = (part.rows as usize, part.dim as usize);
        let width = if dtype == EmbeddingDtype::F32 { 4 } else { 2 };
        let bytes = rows.saturating_mul(dim).saturating_mul(width);
        let in_order =
            part.first as usize == self.rows && self.rows + rows <= count && (self.rows == 0 || dim == self.dim);
        if !in_order || dim == 0 || part.image.len() != bytes || part.text.len() != bytes {
            let message = format!(
                "an EmbeddingPart of rows {}+{rows} and dim {dim} does not follow {} of {count} rows of dim {} in {width} bytes each",
                part.first, self.rows, self.dim
            );
            return Err(Error::invalid("embedding", message));
        }
        (self.dim, self.rows) = (dim, self.rows + rows);
        self.image.append(&part.image, width);
        self.text.append(&part.text, width);
        Ok(())
    }

    fn model(&self, count: usize, scale: f64, bias: f64) -> Result<Option<ModelEmbeddings<'_>>> {
        if self.rows != 0 && self.rows != count {
            return Err(Error::invalid("embedding", format!("embeddings of {} of {count} candidates came", self.rows)));
        }
        let (image, text) = (self.image.rows(), self.text.rows());
        Ok((self.rows > 0).then_some(ModelEmbeddings { image, text, dim: self.dim, scale, bias }))
    }
}

impl Values {
    fn append(&mut self, bytes: &Bytes, width: usize) {
        if width == 4 {
            let (values, _) = bytes.as_chunks::<4>();
            self.f32.extend(values.iter().map(|value| f32::from_le_bytes(*value)));
        } else {
            let (values, _) = bytes.as_chunks::<2>();
            self.f16.extend(values.iter().map(|value| f16::from_le_bytes(*value)));
        }
    }

    fn rows(&self) -> Rows<'_> {
        if self.f16.is_empty() { Rows::F32(&self.f32) } else { Rows::F16(&self.f16) }
    }
}

fn draw(backend: Backend, begin: &SelectBegin, settings: &Settings, received: &[Received; 2]) -> Result<Selection> {
    let count = begin.positions.len();
    let candidates = Candidates {
        count,
        learner: received[0].model(count, begin.learner_scale, begin.learner_bias)?,
        reference: received[1].model(count, begin.reference_scale, begin.reference_bias)?,
        holes: &begin.holes,
    };
    let SelectBegin { seed, generation, step, .. } = *begin;
    let noise = Noise::Seeded { seed, generation, step, keys: &begin.positions };
    backend.select(&candidates, settings, &noise).map_err(refusal)
}

fn settings(begin: &SelectBegin) -> Result<Settings> {
    let unset = |field| Error::invalid(field, format!("SelectBegin.{field} is not set"));
    Ok(Settings {
        policy: match begin.policy() {
            v1::Policy::Uniform => Policy::Uniform,
            v1::Policy::Independent => Policy::Independent,
            v1::Policy::Joint => Policy::Joint,
            v1::Policy::Unspecified => return Err(unset("policy")),
        },
        loss: match begin.loss() {
            v1::Loss::Sigmoid => Loss::Sigmoid,
            v1::Loss::Softmax => Loss::Softmax,
            v1::Loss::Unspecified => return Err(unset("loss")),
        },
        criterion: match begin.criterion() {
            v1::Criterion::Learnability => Criterion::Learnability,
            v1::Criterion::Hard => Criterion::Hard,
            v1::Criterion::Easy => Criterion::Easy,
            v1::Criterion::Unspecified => return Err(unset("criterion")),
        },
        sub_batch_size: begin.sub_batch_size as usize,
        n_chunks: begin.n_chunks as usize,
        gain: begin.gain,
    })
}

fn refusal(error: superbatch_kernels::Error) -> Error {
    use superbatch_kernels::Error as E;
    let message = error.to_string();
    match &error {
        E::TooFewCandidates { .. } => Error::new(Reason::TooManyBadRows, message),
        E::Torch(_) => Error::new(Reason::DeviceUnavailable, message).because(error),
        _ => Error::invalid("select", message),
    }
}
