//! A whole service in one process: a coordinator and its workers on sockets of their own, on ports
//! that the system chooses.
use crate::{
    faults::Script,
    fixture::{self, Row},
};
use futures::FutureExt;
use std::{path::Path, sync::Arc};
use superbatch_client::{
    Client, Run,
    v1::{LearnerSpec, Phase, Policy, ReferenceSpec, RunSpec, Source, learner_spec::Initial},
};
use superbatch_server::{
    app::{Serve, Work},
    config::Config,
    storage::{StorageConfig, Stores, metered},
};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};

/// Rows of the data set, and of its blocks.
pub const ROWS: u32 = 256;
const BLOCK_ROWS: usize = 16;

/// One process' worth of service. Its script must be played out when it is stopped.
pub struct Cluster {
    folder: TempDir,
    address: String,
    script: Script,
    settings: fn(&mut Config),
    parts: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Cluster {
    /// A coordinator with `workers` workers; 0 for an embedded one. `script` are the faults of the
    /// coordinator's storage.
    pub async fn start(workers: usize, script: Script) -> Self {
        Self::start_with(workers, script, |_| {}).await
    }

    /// As [`Cluster::start`], with settings that the operator has changed.
    pub async fn start_with(workers: usize, script: Script, settings: fn(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let stores = Stores::new(StorageConfig::default());
        let data = stores
            .open(&uri(folder.path(), "data/train.parquet"))
            .expect("a valid URI");
        let rows: Vec<Row> = (0..ROWS).map(Row::good).collect();
        fixture::write_parquet(&data, &rows, BLOCK_ROWS).await;
        let model = uri(folder.path(), "model");
        fixture::model_folder(&stores.open(&model).expect("a valid URI"), 0.5).await;
        let scratch = stores.open("memory:///scratch").expect("a valid URI");
        fixture::model_weights(&stores, &scratch, &model, 1).await;
        let mut cluster = Self {
            folder,
            address: String::new(),
            script,
            settings,
            parts: Vec::new(),
        };
        cluster.start_coordinator(workers == 0).await;
        for _ in 0..workers {
            cluster.start_worker().await;
        }
        cluster
    }

    /// Stops the coordinator and all workers, and starts a coordinator with an embedded worker on
    /// the same state.
    pub async fn restart(&mut self) {
        self.stop_parts().await;
        self.start_coordinator(true).await;
    }

    /// Stops the `n`-th worker, from 0.
    pub async fn stop_worker(&mut self, n: usize) {
        let (stop, running) = self.parts.remove(1 + n);
        // One that has ended needs no message; its failure shows below.
        let _ = stop.send(());
        running.await.expect("no panic");
    }

    /// Stops the coordinator and all workers, and starts as many workers anew on the same state.
    pub async fn restart_with_workers(&mut self) {
        let workers = self.parts.len() - 1;
        self.stop_parts().await;
        self.start_coordinator(false).await;
        for _ in 0..workers {
            self.start_worker().await;
        }
    }

    /// Stops everything.
    ///
    /// # Panics
    /// If the script was not played out: the test would prove nothing.
    pub async fn stop(mut self) {
        self.stop_parts().await;
        let left = self.script.left();
        assert!(left.is_empty(), "these faults did not happen: {left:?}");
    }

    /// Whether all faults of the script have happened.
    pub fn is_played_out(&self) -> bool {
        self.script.left().is_empty()
    }

    /// Where the coordinator listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub async fn open_run(&self, id: &str, spec: RunSpec) -> superbatch_client::Result<Run> {
        Client::connect(&self.address)
            .await?
            .open_run(id, spec)
            .await
    }

    /// A run with a random learner, scored by the easy criterion: its reference alone decides.
    pub fn spec(&self) -> RunSpec {
        let model_uri = self.uri("model");
        let phase = Phase {
            policy: Policy::Joint.into(),
            super_batch_size: 64,
            sub_batch_size: 16,
            n_chunks: 4,
            ..Phase::default()
        };
        RunSpec {
            sources: vec![Source {
                uri: self.uri("data"),
                ..Source::default()
            }],
            reference: Some(ReferenceSpec {
                model_uri: model_uri.clone(),
                ..ReferenceSpec::default()
            }),
            learner: Some(LearnerSpec {
                model_uri,
                initial: Some(Initial::RandomSeed(3)),
                ..LearnerSpec::default()
            }),
            phases: vec![phase],
            seed: 7,
            micro_batch_rows: 8,
            ..RunSpec::default()
        }
    }

    /// Of what lies below the cluster's folder: `state`, `data`, `model`.
    pub fn uri(&self, below: &str) -> String {
        uri(self.folder.path(), below)
    }

    /// What its next process is started with.
    pub fn config(&self) -> Config {
        let any = "127.0.0.1:0".parse().expect("an address");
        let mut config = Config {
            listen: any,
            metrics_listen: None,
            page_listen: None,
            state: self.uri("state"),
            ..Config::default()
        };
        // `make test-gpu` has the same tests run on a device.
        config.worker.device =
            std::env::var("SUPERBATCH_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
        config.worker.threads = 1;
        config.worker_role.listen = any;
        if !self.address.is_empty() {
            config.worker_role.coordinator.clone_from(&self.address);
        }
        (self.settings)(&mut config);
        config
    }

    async fn start_coordinator(&mut self, embedded: bool) {
        let mut config = self.config();
        config.coordinator.workers_embedded = embedded;
        let faults = self.script.wrap();
        let serve = Serve::build_on(config, Arc::new(move |store| metered(faults(store))))
            .await
            .expect("it starts");
        self.address = format!("http://{}", serve.address());
        let (stop, stopped) = oneshot::channel();
        self.keep(stop, async move {
            serve.run(stopped.map(drop)).await.expect("it serves")
        });
    }

    async fn start_worker(&mut self) {
        self.add_worker(&Script::default()).await;
    }

    /// One more worker; `script` are the faults of its storage, of which some may be left when it
    /// is stopped.
    pub async fn add_worker(&mut self, script: &Script) {
        let faults = script.wrap();
        let wrap = Arc::new(move |store| metered(faults(store)));
        let work = Work::build_on(self.config(), wrap)
            .await
            .expect("it starts");
        let (stop, stopped) = oneshot::channel();
        self.keep(stop, async move {
            work.run(stopped.map(drop)).await.expect("it works")
        });
    }

    fn keep(
        &mut self,
        stop: oneshot::Sender<()>,
        running: impl Future<Output = ()> + Send + 'static,
    ) {
        self.parts.push((stop, tokio::spawn(running)));
    }

    async fn stop_parts(&mut self) {
        for (stop, running) in self.parts.drain(..).rev() {
            // One that has ended needs no telling; its failure shows below.
            let _ = stop.send(());
            running.await.expect("no panic");
        }
    }
}

fn uri(folder: &Path, below: &str) -> String {
    format!("file://{}/{below}", folder.display())
}
