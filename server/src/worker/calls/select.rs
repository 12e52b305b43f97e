//! Selection on this worker's device.
use crate::{
    bounds::{EMBEDDING_DIM_MAX, check_count},
    cuda,
    error::{Error, Result, from_status},
    selection::{Embedded, Values, draw, response, settings},
    worker::engine::{Engine, shutting_down},
};
use futures::{Stream, TryStreamExt};
use std::{
    pin::{Pin, pin},
    time::Duration,
};
use superbatch_kernels::{Backend, Policy};
use superbatch_proto::{
    SUPER_BATCH_SIZE_MAX,
    v1::{
        CandidatesPart, EmbeddingDtype, EmbeddingPart, Reason, SelectBegin, SelectRequest,
        SelectResponse, Tower, select_request::Message,
    },
};
use tokio::time::{Instant, timeout};
use tonic::Status;

/// How long a caller may be silent before all of its selection has come.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// Serves one `Select` call: a `SelectBegin`, the rest of the candidates, then the models'
/// embeddings of all candidates, in order.
///
/// # Errors
/// `InvalidArgument` naming the field, and those of [`draw`].
pub(crate) async fn select(
    engine: &Engine,
    requests: impl Stream<Item = Result<SelectRequest, Status>>,
) -> Result<SelectResponse> {
    let mut requests = pin!(requests.map_err(|status| from_status(status, Reason::Internal)));
    let first = next(engine, requests.as_mut()).await?;
    let first = first.and_then(|request| request.message);
    let Some(Message::Begin(begin)) = first else {
        return Err(Error::invalid(
            "message",
            "a Select call starts with SelectBegin",
        ));
    };
    let policy = settings(&begin)?.policy;
    check_candidates(&begin)?;
    let mut received = Received {
        begin,
        learner: None,
        reference: None,
    };
    while let Some(request) = next(engine, requests.as_mut()).await? {
        match request.message {
            Some(Message::Candidates(part)) => received.add(part)?,
            Some(Message::Embedding(part)) => received.append(part)?,
            _ => {
                return Err(Error::invalid(
                    "message",
                    "after SelectBegin come candidates and embeddings only",
                ));
            }
        }
    }
    let Received {
        begin,
        learner,
        reference,
    } = received;
    let count = begin.positions.len();
    let (learner, reference) = (whole(learner, count)?, whole(reference, count)?);
    let (device, threads) = (engine.device.name().to_owned(), engine.threads as u32);
    let started = Instant::now();
    // A uniform draw compares no candidates and needs no device. It must not wait behind forward
    // passes, nor delay them.
    let on_device = policy != Policy::Uniform && device.starts_with("cuda");
    let run = move |backend| draw(backend, &begin, learner.as_ref(), reference.as_ref());
    let selection = if on_device {
        engine
            .device
            .run(move |device| run(cuda::backend(device)))
            .await??
    } else {
        engine.pool.run(move || run(Backend::Native)).await??
    };
    Ok(SelectResponse {
        seconds: started.elapsed().as_secs_f64(),
        device,
        threads,
        ..response(selection)
    })
}

/// Returns the next message. The caller has all of a selection before it asks, so one that is
/// silent for [`SILENCE_MAX`] counts as lost, and its embeddings are freed. The request may still
/// be right (the caller was stopped for a while), so the reason is one after which a caller tries
/// again.
async fn next(
    engine: &Engine,
    mut requests: Pin<&mut impl Stream<Item = Result<SelectRequest>>>,
) -> Result<Option<SelectRequest>> {
    let next = tokio::select! {
        biased;
        next = timeout(SILENCE_MAX, requests.try_next()) => next,
        () = engine.stopping.cancelled() => return Err(shutting_down()),
    };
    next.map_err(|_| {
        let seconds = SILENCE_MAX.as_secs();
        let message = format!("a Select call was silent for {seconds} s; ask again");
        Error::new(Reason::Overloaded, message)
    })?
}

fn check_candidates(begin: &SelectBegin) -> Result<()> {
    check_count(
        "positions",
        begin.positions.len(),
        SUPER_BATCH_SIZE_MAX as usize,
    )?;
    check_count("terms", begin.terms.len(), SUPER_BATCH_SIZE_MAX as usize)?;
    check_count("holes", begin.holes.len(), SUPER_BATCH_SIZE_MAX as usize)
}

/// Candidates and embeddings as they come in.
struct Received {
    begin: SelectBegin,
    learner: Option<Embedded>,
    reference: Option<Embedded>,
}

impl Received {
    fn add(&mut self, part: CandidatesPart) -> Result<()> {
        if self.learner.is_some() || self.reference.is_some() {
            return Err(Error::invalid(
                "candidates",
                "candidates come before the first embedding",
            ));
        }
        self.begin.positions.extend(part.positions);
        self.begin.holes.extend(part.holes);
        self.begin.terms.extend(part.terms);
        check_candidates(&self.begin)
    }

    fn append(&mut self, part: EmbeddingPart) -> Result<()> {
        let model = match part.tower() {
            Tower::Learner => &mut self.learner,
            Tower::Reference => &mut self.reference,
            Tower::Unspecified => {
                return Err(Error::invalid("tower", "an EmbeddingPart names no tower"));
            }
        };
        let (count, dtype) = (self.begin.positions.len(), self.begin.embedding_dtype());
        let (rows, dim) = (part.rows as usize, part.dim as usize);
        // Memory grows with the bytes that have arrived, not with the counts that the message
        // claims: a small message could otherwise reserve gigabytes.
        let empty = || Values::with_capacity(dtype, 0);
        let model = model.get_or_insert_with(|| Embedded {
            image: empty(),
            text: empty(),
            dim,
        });
        let known = model.image.len() / model.dim.max(1);
        let width = if dtype == EmbeddingDtype::F32 { 4 } else { 2 };
        // `rows` and `dim` come off the wire. Saturating, since an overflow could wrap to the
        // length of the bytes that came.
        let bytes = rows.saturating_mul(dim).saturating_mul(width);
        if dim > EMBEDDING_DIM_MAX as usize {
            let message = format!("dim is {dim}; an embedding has at most {EMBEDDING_DIM_MAX}");
            return Err(Error::invalid("dim", message));
        }
        let in_order = part.first as usize == known && known + rows <= count && dim == model.dim;
        if !in_order || dim == 0 || part.image.len() != bytes || part.text.len() != bytes {
            let message = format!(
                "an EmbeddingPart of rows {}+{rows} and dim {dim} does not follow {known} of \
                {count} rows of dim {} in {width} bytes each",
                part.first, model.dim
            );
            return Err(Error::invalid("embedding", message));
        }
        model.image.append(&part.image);
        model.text.append(&part.text);
        Ok(())
    }
}

fn whole(model: Option<Embedded>, count: usize) -> Result<Option<Embedded>> {
    match model {
        Some(model) if model.image.len() != count * model.dim => {
            let rows = model.image.len() / model.dim.max(1);
            Err(Error::invalid(
                "embedding",
                format!("embeddings of {rows} of {count} candidates came"),
            ))
        }
        model => Ok(model),
    }
}
