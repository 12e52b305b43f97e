//! Who draws the sub-batch: this process, or a worker's device. One trait, so that a coordinator needs neither GPU nor LibTorch.
use super::{pool::Pool, scoring::Scored};
use crate::error::{Error, Result, from_status};
use async_trait::async_trait;
use std::sync::Arc;
use superbatch_kernels as kernels;
use superbatch_proto::{
    PART_BYTES,
    v1::{
        Criterion, EmbeddingDtype, EmbeddingPart, Loss, Policy, Reason, SelectBegin, SelectRequest, SelectResponse,
        Tower, select_request,
    },
};
use tokio::time::Instant;

/// Draws one sub-batch from embeddings of all candidates.
#[async_trait]
pub trait Selector: Send + Sync {
    /// `begin` says how; a model is absent where the criterion does not ask it.
    async fn select(
        &self,
        begin: SelectBegin,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse>;
}

/// Selects in this process, on its own threads.
pub struct LocalSelector {
    threads: Arc<rayon::ThreadPool>,
}

impl LocalSelector {
    /// `threads` 0 means one a core.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|n| format!("select-{n}")).build();
        let pool = pool.map_err(|e| Error::internal("cannot start the selection threads").because(e))?;
        Ok(Self { threads: Arc::new(pool) })
    }
}

#[async_trait]
impl Selector for LocalSelector {
    async fn select(
        &self,
        begin: SelectBegin,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse> {
        let threads = self.threads.clone();
        let run = move || threads.install(|| select_here(&begin, learner.as_ref(), reference.as_ref()));
        tokio::task::spawn_blocking(run).await.map_err(|e| Error::internal("selection panicked").because(e))?
    }
}

fn select_here(begin: &SelectBegin, learner: Option<&Scored>, reference: Option<&Scored>) -> Result<SelectResponse> {
    let started = Instant::now();
    let candidates = kernels::Candidates {
        count: begin.positions.len(),
        learner: learner.map(|scored| model(scored, begin.learner_scale, begin.learner_bias)),
        reference: reference.map(|scored| model(scored, begin.reference_scale, begin.reference_bias)),
        holes: &begin.holes,
    };
    let settings = kernels::Settings {
        policy: match begin.policy() {
            Policy::Uniform => kernels::Policy::Uniform,
            Policy::Independent => kernels::Policy::Independent,
            Policy::Joint | Policy::Unspecified => kernels::Policy::Joint,
        },
        loss: if begin.loss() == Loss::Softmax { kernels::Loss::Softmax } else { kernels::Loss::Sigmoid },
        criterion: match begin.criterion() {
            Criterion::Hard => kernels::Criterion::Hard,
            Criterion::Easy => kernels::Criterion::Easy,
            Criterion::Learnability | Criterion::Unspecified => kernels::Criterion::Learnability,
        },
        sub_batch_size: begin.sub_batch_size as usize,
        n_chunks: begin.n_chunks as usize,
        gain: begin.gain,
    };
    let noise = kernels::Noise::Seeded {
        seed: begin.seed,
        generation: begin.generation,
        step: begin.step,
        keys: &begin.positions,
    };
    let drawn = kernels::Backend::Native
        .select(&candidates, &settings, &noise)
        .map_err(|e| Error::internal("selection failed").because(e))?;
    Ok(SelectResponse {
        indices: drawn.indices,
        chunks: drawn.chunks,
        scores: drawn.scores,
        weights: drawn.weights,
        batch_score: drawn.batch_score.unwrap_or(0.0),
        mean_score_chosen: drawn.mean_score_chosen.unwrap_or(0.0),
        mean_score_candidates: drawn.mean_score_candidates.unwrap_or(0.0),
        seconds: started.elapsed().as_secs_f64(),
        flops: drawn.flops,
        device: "cpu".to_owned(),
        threads: rayon::current_num_threads() as u32,
    })
}

fn model(scored: &Scored, scale: f64, bias: f64) -> kernels::ModelEmbeddings<'_> {
    kernels::ModelEmbeddings {
        image: kernels::Rows::F32(&scored.image),
        text: kernels::Rows::F32(&scored.text),
        dim: scored.dim,
        scale,
        bias,
    }
}

/// Has a worker select on its device.
pub struct WorkerSelector {
    pub pool: Arc<Pool>,
}

#[async_trait]
impl Selector for WorkerSelector {
    async fn select(
        &self,
        begin: SelectBegin,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse> {
        let dtype = begin.embedding_dtype();
        let mut requests = vec![select_request::Message::Begin(begin)];
        for (tower, scored) in [(Tower::Learner, &learner), (Tower::Reference, &reference)] {
            requests.extend(scored.iter().flat_map(|s| parts(tower, s, dtype)).map(select_request::Message::Embedding));
        }
        let requests: Vec<_> = requests.into_iter().map(|m| SelectRequest { message: Some(m) }).collect();
        let worker = self.pool.one().await?;
        let answer = worker.client().select(tokio_stream::iter(requests)).await;
        answer.map(tonic::Response::into_inner).map_err(|status| from_status(status, Reason::NoWorkers))
    }
}

fn parts(tower: Tower, scored: &Scored, dtype: EmbeddingDtype) -> Vec<EmbeddingPart> {
    let rows = scored.image.len() / scored.dim.max(1);
    let step = (PART_BYTES / (8 * scored.dim.max(1))).max(1);
    let narrow = |values: &[f32]| -> bytes::Bytes {
        if dtype == EmbeddingDtype::F32 {
            values.iter().flat_map(|v| v.to_le_bytes()).collect()
        } else {
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
        }
    };
    let part = |first: usize| {
        let end = (first + step).min(rows);
        let range = first * scored.dim..end * scored.dim;
        EmbeddingPart {
            tower: tower as i32,
            first: first as u32,
            rows: (end - first) as u32,
            dim: scored.dim as u32,
            image: narrow(&scored.image[range.clone()]),
            text: narrow(&scored.text[range]),
        }
    };
    (0..rows).step_by(step).map(part).collect()
}
