//! The parts that all calls of one worker share.
use super::{
    config::WorkerConfig,
    device::Device,
    inputs::{decode_pool::Pool, preprocess::ImageLimits, row::Prepared},
    kept::{cache::Cache, read::BlockReader, retained::Retained, sidecar::Sidecar},
    loader::Models,
};
use crate::{
    dataset::Manifest,
    error::{Error, Result},
    storage::{Location, Stores},
};
use arrow::record_batch::RecordBatch;
use std::{sync::Arc, time::Duration};
use superbatch_proto::v1::Reason;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

/// Manifests kept in memory: one for each run.
const MANIFESTS_MAX: usize = 16;

pub struct Engine {
    pub state: Location,
    pub device: Device,
    pub threads: usize,
    pub reader: BlockReader,
    pub manifests: Cache<String, Arc<Manifest>>,
    pub models: Models,
    pub sidecar: Sidecar,
    pub pool: Pool,
    /// Rows of slices whose chosen rows are not asked for yet.
    pub raw: Retained<Arc<RecordBatch>>,
    /// Decoded rows that wait for the learner.
    pub ready: Retained<Arc<Prepared>>,
    /// Ends calls that wait for their coordinator.
    pub stopping: CancellationToken,
    slots: Semaphore,
    slots_total: usize,
}

impl Engine {
    pub fn new(config: &WorkerConfig, stores: Stores, state: Location) -> Result<Self> {
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
        Ok(Self {
            sidecar: Sidecar::new(state.clone(), config.reference_cache_bytes),
            reader: BlockReader::new(stores.clone(), config.block_cache_bytes)
                .keeping(state.clone()),
            threads,
            manifests: Cache::new(MANIFESTS_MAX, |_| 1),
            models: Models::new(stores, state.clone(), device.clone()),
            state,
            device,
            pool: Pool::new(threads, limits)?
                .with_deadline(Duration::from_secs(config.decode_deadline_seconds)),
            raw: Retained::new(config.row_bytes_max),
            ready: Retained::new(config.decoded_bytes_max),
            stopping: CancellationToken::new(),
            slots: Semaphore::new(slots_total),
            slots_total,
        })
    }

    /// Waits for a slot. A slot is held while rows are read, decoded or embedded, and never while
    /// the call waits for its coordinator. A step ahead waits for weights that the trainer pushes
    /// only after it has the step before. If the step ahead held all slots meanwhile, the step
    /// before could not be scored and both would wait for ever.
    pub async fn slot(&self) -> Result<SemaphorePermit<'_>> {
        self.slots.acquire().await.map_err(|_| shutting_down())
    }

    /// Ends the calls that wait for a slot or for their coordinator. Calls that hold a slot go on.
    pub fn stop(&self) {
        self.stopping.cancel();
        self.slots.close();
    }

    /// Waits until no slice holds a slot.
    pub async fn wait_until_idle(&self) {
        drop(self.slots.acquire_many(self.slots_total as u32).await);
    }
}

/// The error by which a coordinator moves a slice to another worker. It keeps what it has received
/// of the slice.
pub fn shutting_down() -> Error {
    Error::new(
        Reason::ShuttingDown,
        "this worker is shutting down; score elsewhere",
    )
}
