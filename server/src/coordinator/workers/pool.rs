//! The workers that this coordinator may use: registered ones while their lease lasts, and the
//! embedded one while its device is well.
use super::{
    replies::Replies,
    worker::{Embedded, Holding, Worker},
};
use crate::{
    bounds::{LABEL_BYTES_MAX, TOKEN_BYTES_MAX, URI_BYTES_MAX, WORKERS_MAX, check_bytes},
    error::{Error, Result},
    metrics,
    ticket::TicketKey,
};
use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use superbatch_proto::{
    http2,
    v1::{Reason, RegisterRequest},
};
use superbatch_transport::{Authorized, Bearer, Dialer};
use tokio::sync::watch;
use tonic::transport::Endpoint;

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The address of the worker in this process.
const EMBEDDED: &str = "embedded";

struct Registered {
    worker: Worker,
    /// `None` for the embedded worker, which lives as long as this process.
    lease_until: Option<Instant>,
}

/// The state that all workers must share.
#[derive(Debug, Clone, Default)]
pub struct Home {
    /// See [`crate::storage::probe`].
    pub id: String,
    pub uri: String,
}

/// Workers by address.
pub struct Pool {
    home: Home,
    /// Connects to registered workers.
    dialer: Dialer,
    lease: Duration,
    /// How long a call waits for the first worker before it fails.
    patience: Duration,
    replies: Replies,
    registered: Mutex<BTreeMap<String, Registered>>,
    /// Counts additions, so that waiting calls look again.
    changed: watch::Sender<u64>,
    turn: AtomicUsize,
}

impl Pool {
    pub fn new(lease: Duration, patience: Duration, home: Home) -> Self {
        let changed = watch::Sender::new(0);
        Self {
            home,
            dialer: Dialer::default(),
            lease,
            patience,
            replies: Replies::default(),
            registered: Mutex::default(),
            changed,
            turn: AtomicUsize::new(0),
        }
    }

    /// Sets the bounds on workers' answers.
    #[must_use]
    pub fn with_replies(self, replies: Replies) -> Self {
        Self { replies, ..self }
    }

    pub fn replies(&self) -> Replies {
        self.replies
    }

    /// Connects to registered workers by `dialer`.
    #[must_use]
    pub fn dialing(mut self, dialer: Dialer) -> Self {
        self.dialer = dialer;
        self
    }

    /// Returns the name in the workers' certificates, if it is not the host of their address.
    pub fn server_name(&self) -> &str {
        self.dialer.server_name().unwrap_or_default()
    }

    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Adds the worker that lives in this process.
    pub fn embed(&self, embedded: Embedded, device: &str) {
        let worker = Worker {
            address: EMBEDDED.to_owned(),
            incarnation: String::new(),
            device: device.to_owned(),
            channel: Authorized::new(embedded.channel.clone(), Bearer::default()),
            embedded: Some(embedded),
            holding: Holding::default(),
            ticket_key: None,
        };
        self.insert(Registered {
            worker,
            lease_until: None,
        });
    }

    /// Removes the worker of this process, until it is embedded again.
    pub fn let_embedded_go(&self) {
        let mut registered = self.registered.lock().expect("no panic while held");
        registered.remove(EMBEDDED);
        metrics::workers().set(registered.len() as f64);
    }

    /// Handles a registration at `now`: adds the worker, renews its lease, or removes it.
    ///
    /// # Errors
    /// `InvalidArgument` if its address is no URI, or its state is not this coordinator's.
    pub fn register(&self, request: &RegisterRequest, now: Instant) -> Result<()> {
        check_registration(request)?;
        if request.leaving {
            if self.remove(&request.address, &request.incarnation) {
                tracing::info!(address = request.address, "worker left");
            }
            return Ok(());
        }
        self.check_state(request)?;
        let lease_until = Some(now + self.lease);
        let mut registered = self.registered.lock().expect("no panic while held");
        if let Some(known) = registered
            .get_mut(&request.address)
            .filter(|m| m.worker.incarnation == request.incarnation)
        {
            known.lease_until = lease_until;
            return Ok(());
        }
        if registered.len() >= WORKERS_MAX && !registered.contains_key(&request.address) {
            let message = format!(
                "{WORKERS_MAX} workers are registered, as many as one coordinator has; register \
                again when one has left"
            );
            return Err(Error::new(Reason::Overloaded, message));
        }
        drop(registered);
        let ticket_key = if request.ticket_key.is_empty() {
            None
        } else {
            Some(TicketKey::from_bytes(&request.ticket_key)?)
        };
        let channel = self.connect(request)?;
        let worker = Worker {
            address: request.address.clone(),
            incarnation: request.incarnation.clone(),
            device: request.device.clone(),
            channel,
            embedded: None,
            holding: Holding::default(),
            ticket_key,
        };
        tracing::info!(
            address = request.address,
            device = request.device,
            "worker registered"
        );
        self.insert(Registered {
            worker,
            lease_until,
        });
        Ok(())
    }

    /// Makes a connection to a worker, which opens at its first call. Registration must not wait
    /// for it: a worker that cannot be reached would hold up its own next registration.
    fn connect(&self, request: &RegisterRequest) -> Result<Authorized> {
        let bearer = match request.token.as_str() {
            "" => Bearer::default(),
            token => Bearer::new(token).map_err(|e| Error::invalid("token", e.to_string()))?,
        };
        let channel = self.dialer.connect_lazy(&request.address, tuned);
        let channel = channel.map_err(|e| {
            let message = format!("'{}' is no http://host:port", request.address);
            Error::invalid("address", message).because(e)
        })?;
        Ok(Authorized::new(channel, bearer))
    }

    fn check_state(&self, request: &RegisterRequest) -> Result<()> {
        let (theirs, ours) = (&request.state_uri, &self.home.uri);
        if request.state_id == self.home.id {
            return Ok(());
        }
        let message = format!(
            "the worker at {} has its state at {theirs}, and the coordinator at {ours}: these are \
            two states; give both the \
             same `state` in their settings (or --state)",
            request.address
        );
        tracing::warn!(
            address = request.address,
            theirs,
            ours,
            "refused a worker of another state"
        );
        Err(Error::invalid("state", message)
            .with("theirs", theirs)
            .with("ours", ours))
    }

    /// Removes a worker whose connection broke. It comes back by its next registration.
    pub fn lost(&self, worker: &Worker) {
        if self.remove(&worker.address, &worker.incarnation) {
            tracing::warn!(address = worker.address, "worker lost");
        }
    }

    /// Returns all workers with a lease at `now`, in the order of their addresses.
    pub fn live(&self, now: Instant) -> Vec<Worker> {
        let mut registered = self.registered.lock().expect("no panic while held");
        registered.retain(|_, m| m.lease_until.is_none_or(|until| until > now));
        metrics::workers().set(registered.len() as f64);
        registered.values().map(|m| m.worker.clone()).collect()
    }

    /// Returns all live workers, and waits until there is one.
    ///
    /// # Errors
    /// `NoWorkers` if none registered within the pool's patience.
    pub async fn wait_live(&self) -> Result<Vec<Worker>> {
        self.wait_on("").await
    }

    /// Returns one live worker, in turn.
    pub async fn one(&self) -> Result<Worker> {
        self.one_on("").await
    }

    /// Returns one live worker whose device's name begins with `device`, in turn.
    pub async fn one_on(&self, device: &str) -> Result<Worker> {
        let live = self.wait_on(device).await?;
        let turn = self.next_turn();
        Ok(live[turn % live.len()].clone())
    }

    /// Returns whose turn it is, of any number of workers.
    pub fn next_turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns all live workers whose device's name begins with `device`, once there is one.
    ///
    /// # Errors
    /// `NoWorkers` when none came within the pool's patience.
    pub async fn wait_on(&self, device: &str) -> Result<Vec<Worker>> {
        // Subscribed before the first look, so that a worker that registers between the look and
        // the wait is not missed.
        let mut changed = self.changed.subscribe();
        let found = async {
            loop {
                let mut live = self.live(Instant::now());
                live.retain(|worker| worker.device.starts_with(device));
                if !live.is_empty() {
                    return live;
                }
                if changed.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(self.patience, found)
            .await
            .map_err(|_| {
                let seconds = self.patience.as_secs();
                let kind = if device.is_empty() {
                    String::new()
                } else {
                    format!(" on {device}")
                };
                let message = format!(
                    "no scoring worker{kind} has been there for {seconds} s; start one with \
                `superbatch worker`, or set \
                 coordinator.workers_embedded: true"
                );
                Error::new(Reason::NoWorkers, message)
            })
    }

    fn insert(&self, worker: Registered) {
        let mut registered = self.registered.lock().expect("no panic while held");
        registered.insert(worker.worker.address.clone(), worker);
        metrics::workers().set(registered.len() as f64);
        drop(registered);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Removes one process of a registered worker. Returns whether it was present.
    ///
    /// Several calls report the same loss, some of them late, and a worker may be told to leave
    /// when its successor has registered at the same address: only the very process is removed,
    /// and nobody can take another worker away without knowing its incarnation. The embedded worker
    /// is never removed here, since nothing would bring it back.
    fn remove(&self, address: &str, incarnation: &str) -> bool {
        let mut registered = self.registered.lock().expect("no panic while held");
        let same = |m: &Registered| m.lease_until.is_some() && m.worker.incarnation == incarnation;
        let present = registered.get(address).is_some_and(same);
        if present {
            registered.remove(address);
        }
        metrics::workers().set(registered.len() as f64);
        present
    }
}

/// Checks what a worker registers: it is kept while its lease lasts, and quoted in messages.
fn check_registration(request: &RegisterRequest) -> Result<()> {
    let texts = [
        ("address", &request.address, URI_BYTES_MAX),
        ("incarnation", &request.incarnation, LABEL_BYTES_MAX),
        ("device", &request.device, LABEL_BYTES_MAX),
        ("build", &request.build, LABEL_BYTES_MAX),
        ("state_id", &request.state_id, LABEL_BYTES_MAX),
        ("state_uri", &request.state_uri, URI_BYTES_MAX),
        ("token", &request.token, TOKEN_BYTES_MAX),
    ];
    texts
        .into_iter()
        .try_for_each(|(field, text, most)| check_bytes(field, text, most))
}

/// Sets up connections so that they notice a peer that is gone. A host that loses power closes no
/// connection; without pings its streams would hang.
fn tuned(endpoint: Endpoint) -> Endpoint {
    http2::client(endpoint)
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::workers::worker::tests::unreachable;
    use superbatch_transport::testing::frame_bytes_max;

    #[tokio::test]
    async fn a_part_of_rows_may_come_in_one_frame() {
        let accepted = frame_bytes_max(tuned).await;
        assert_eq!(accepted.unwrap(), Some(http2::FRAME_BYTES_MAX));
    }

    fn registration(address: &str, leaving: bool) -> RegisterRequest {
        RegisterRequest {
            address: address.into(),
            incarnation: "1".into(),
            leaving,
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_lease_ends_and_is_renewed() {
        let pool = Pool::new(
            Duration::from_secs(10),
            Duration::from_secs(30),
            Home::default(),
        );
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        pool.register(&registration("http://127.0.0.1:1", false), at(0))
            .unwrap();
        pool.register(&registration("http://127.0.0.1:1", false), at(9))
            .unwrap();
        assert_eq!(pool.live(at(18)).len(), 1);
        assert!(pool.live(at(20)).is_empty());
    }

    #[tokio::test]
    async fn only_the_process_that_leaves_is_removed() {
        let (lease, patience) = (Duration::from_secs(10), Duration::from_millis(20));
        let pool = Pool::new(lease, patience, Home::default());
        let (now, address) = (Instant::now(), "http://127.0.0.1:1");
        pool.register(&registration(address, false), now).unwrap();
        let another = RegisterRequest {
            incarnation: "2".into(),
            ..registration(address, true)
        };
        pool.register(&another, now).unwrap();
        assert_eq!(
            pool.live(now).len(),
            1,
            "another process was at its address"
        );
        let endless = "a".repeat(URI_BYTES_MAX + 1);
        assert!(pool.register(&registration(&endless, true), now).is_err());
        pool.register(&registration(address, true), now).unwrap();
        assert!(pool.live(now).is_empty());
    }

    #[tokio::test]
    async fn no_caller_takes_the_embedded_worker_away() {
        let (lease, patience) = (Duration::from_secs(10), Duration::from_millis(20));
        let pool = Pool::new(lease, patience, Home::default());
        let worker = unreachable(None);
        let address = EMBEDDED.to_owned();
        pool.insert(Registered {
            worker: Worker { address, ..worker },
            lease_until: None,
        });
        let now = Instant::now();
        for incarnation in ["", "1"] {
            let leaving = RegisterRequest {
                incarnation: incarnation.into(),
                ..registration(EMBEDDED, true)
            };
            pool.register(&leaving, now).unwrap();
        }
        assert_eq!(pool.live(now).len(), 1);
        pool.let_embedded_go();
        assert!(pool.live(now).is_empty());
    }

    #[tokio::test]
    async fn a_worker_of_another_state_is_refused_with_both_named() {
        let home = Home {
            id: "a".into(),
            uri: "s3://b/ours".into(),
        };
        let pool = Pool::new(Duration::from_secs(10), Duration::from_millis(20), home);
        let of = |id: &str, leaving| RegisterRequest {
            state_id: id.into(),
            state_uri: "file:///theirs".into(),
            ..registration("http://127.0.0.1:1", leaving)
        };
        let now = Instant::now();
        for id in ["b", ""] {
            let error = pool.register(&of(id, false), now).unwrap_err();
            assert_eq!(error.value("field"), Some("state"));
            assert_eq!(
                (error.value("theirs"), error.value("ours")),
                (Some("file:///theirs"), Some("s3://b/ours"))
            );
            assert!(pool.live(now).is_empty());
        }
        pool.register(&of("a", false), now).unwrap();
        assert_eq!(pool.live(now).len(), 1);
    }

    #[tokio::test]
    async fn without_workers_a_call_fails_in_bounded_time() {
        let pool = Pool::new(
            Duration::from_secs(10),
            Duration::from_millis(20),
            Home::default(),
        );
        let start = Instant::now();
        assert_eq!(pool.one().await.unwrap_err().reason(), Reason::NoWorkers);
        pool.register(
            &registration("http://127.0.0.1:1", false),
            start + Duration::from_secs(60),
        )
        .unwrap();
        assert!(pool.one().await.is_ok());
        pool.register(&registration("http://127.0.0.1:1", true), start)
            .unwrap();
        assert!(pool.live(start).is_empty());
    }

    #[tokio::test]
    async fn a_device_is_asked_for_and_a_late_word_of_a_dead_worker_hurts_no_other() {
        let pool = Pool::new(
            Duration::from_secs(10),
            Duration::from_millis(20),
            Home::default(),
        );
        let now = Instant::now();
        let on = |port: u16, incarnation: &str, device: &str| RegisterRequest {
            incarnation: incarnation.into(),
            device: device.into(),
            ..registration(&format!("http://127.0.0.1:{port}"), false)
        };
        pool.register(&on(1, "a", "cpu"), now).unwrap();
        assert_eq!(
            pool.one_on("cuda").await.unwrap_err().reason(),
            Reason::NoWorkers
        );
        pool.register(&on(2, "a", "cuda:0"), now).unwrap();
        let old = pool.one_on("cuda").await.unwrap();
        assert_eq!(old.address, "http://127.0.0.1:2");
        pool.register(&on(2, "b", "cuda:0"), now).unwrap();
        pool.lost(&old);
        assert_eq!(
            pool.live(now).len(),
            2,
            "its successor at the same address lives"
        );
        pool.lost(&pool.one_on("cuda").await.unwrap());
        assert_eq!(pool.live(now).len(), 1);
    }
}
