//! Selection on the CPU of this process.
use super::Selector;
use crate::{
    coordinator::score::scored::Scored,
    error::{Error, Result},
    selection::{draw, response},
};
use async_trait::async_trait;
use std::sync::Arc;
use superbatch_kernels::Backend;
use superbatch_proto::v1::{SelectBegin, SelectResponse};
use tokio::time::Instant;

/// Selects in this process, on its own threads.
pub struct LocalSelector {
    threads: Arc<rayon::ThreadPool>,
}

impl LocalSelector {
    /// Makes a selector with `threads` threads; 0 means one for each core.
    pub fn new(threads: usize) -> Result<Self> {
        let built = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("select-{n}"))
            .build();
        let pool =
            built.map_err(|e| Error::internal("cannot start the selection threads").because(e))?;
        Ok(Self {
            threads: Arc::new(pool),
        })
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
        let run = move || {
            let started = Instant::now();
            let [learner, reference] =
                [&learner, &reference].map(|model| model.as_ref().map(|scored| &scored.embedded));
            let drawn = threads.install(|| draw(Backend::Native, &begin, learner, reference))?;
            Ok(SelectResponse {
                seconds: started.elapsed().as_secs_f64(),
                device: "cpu".to_owned(),
                threads: threads.current_num_threads() as u32,
                ..response(drawn)
            })
        };
        tokio::task::spawn_blocking(run)
            .await
            .map_err(|e| Error::internal("selection panicked").because(e))?
    }
}
