//! The parts that all calls of one worker share.
use super::{
    config::WorkerConfig,
    device::Device,
    inputs::{decode_pool::DecodePool, preprocess::ImageLimits, row::Prepared},
    kept::{
        cache::Cache, held::Holder, read::BlockReader, retained::Retained, sidecar::Sidecar,
        ticket_calls::TicketCalls,
    },
    loader::Models,
};
use crate::{
    buffers::Buffers,
    dataset::Manifest,
    error::{Error, Result},
    storage::{Location, Stores},
    ticket::TicketKey,
};
use arrow::record_batch::RecordBatch;
use std::{sync::Arc, time::Duration};
use superbatch_proto::v1::Reason;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

/// Manifests kept in memory: one for each run.
const MANIFESTS_MAX: usize = 16;

pub(super) struct Engine {
    pub state: Location,
    pub device: Device,
    pub threads: usize,
    pub reader: BlockReader,
    pub manifests: Cache<String, Arc<Manifest>>,
    /// By digest of the manifest, as those.
    pub rows_digests: Cache<String, Arc<Vec<String>>>,
    pub models: Models,
    pub sidecar: Sidecar,
    pub pool: DecodePool,
    /// For blocks of local files, and for chosen rows.
    pub buffers: Buffers,
    /// Rows of slices whose chosen rows are not asked for yet.
    pub raw: Retained<Arc<RecordBatch>>,
    /// Decoded rows that wait for the learner.
    pub ready: Retained<Arc<Prepared>>,
    /// Chosen rows that trainers fetch.
    pub held: Holder,
    /// Calls that fetch them.
    pub ticket_calls: TicketCalls,
    /// Signs the tickets for them.
    pub ticket_key: TicketKey,
    /// Ends calls that wait for their coordinator.
    pub stopping: CancellationToken,
    slots: Semaphore,
    slots_total: usize,
    fetches: Semaphore,
}

impl Engine {
    pub(super) fn new(config: &WorkerConfig, stores: Stores, state: Location) -> Result<Self> {
        config.validate()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = config.threads_on(cores);
        let slots_total = config.slots_on(threads);
        let device = Device::start_keeping(&config.device, threads, config.models_max)?
            .with_deadline(Duration::from_secs(config.device_deadline_seconds));
        let limits = ImageLimits {
            pixels_max: config.image_pixels_max,
            bytes_max: config.image_bytes_max,
        };
        let buffers = Buffers::new(config.buffer_bytes_max);
        Ok(Self {
            sidecar: Sidecar::new(state.clone(), config.reference_cache_bytes),
            reader: BlockReader::new(stores.clone(), config.block_cache_bytes)
                .keeping(state.clone())
                .keeping_views()
                .reusing(&buffers)
                .reading_images(config.image_bytes_max, config.image_reads_max),
            buffers,
            threads,
            manifests: Cache::new(MANIFESTS_MAX, |_| 1),
            rows_digests: Cache::new(MANIFESTS_MAX, |_| 1),
            models: Models::new(
                stores,
                state.clone(),
                device.clone(),
                config.exported_modules.clone(),
            ),
            state,
            device,
            pool: DecodePool::new(
                threads,
                limits,
                Duration::from_secs(config.decode_deadline_seconds),
            )?,
            raw: Retained::new(config.row_bytes_max),
            ready: Retained::new(config.decoded_bytes_max),
            held: Holder::new(
                config.held_bytes_max,
                Duration::from_secs(config.held_seconds),
            ),
            ticket_calls: TicketCalls::default(),
            ticket_key: TicketKey::random(),
            stopping: CancellationToken::new(),
            slots: Semaphore::new(slots_total),
            slots_total,
            fetches: Semaphore::new(slots_total),
        })
    }

    /// Waits for a slot. A slot is held while rows are read, decoded or embedded, and never while
    /// the call waits for its coordinator. A step ahead waits for weights that the trainer pushes
    /// only after it has the step before. If the step ahead held all slots meanwhile, the step
    /// before could not be scored and both would wait for ever.
    pub(super) async fn slot(&self) -> Result<SemaphorePermit<'_>> {
        self.slots.acquire().await.map_err(|_| shutting_down())
    }

    /// Waits for one of the slots of `FetchRows` calls. It is held while the call has rows in
    /// memory: one call may name a whole super-batch, so without a bound on calls their memory has
    /// none.
    /// These slots are not those of slices: a step that is served from its receipt does not wait
    /// for steps that are scored ahead of it, nor they for it.
    pub(super) async fn fetch_slot(&self) -> Result<SemaphorePermit<'_>> {
        self.fetches.acquire().await.map_err(|_| shutting_down())
    }

    /// Ends the calls that wait for a slot or for their coordinator. Calls that hold a slot go on.
    pub(super) fn stop(&self) {
        self.stopping.cancel();
        self.slots.close();
        self.fetches.close();
    }

    /// Waits until no slice holds a slot.
    pub(super) async fn wait_until_idle(&self) {
        drop(self.slots.acquire_many(self.slots_total as u32).await);
    }
}

/// Returns the error by which a coordinator moves a slice to another worker. It keeps what it has
/// received of the slice.
pub(super) fn shutting_down() -> Error {
    Error::new(
        Reason::ShuttingDown,
        "this worker is shutting down; score elsewhere",
    )
}
