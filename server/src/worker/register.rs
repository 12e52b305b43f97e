//! Keeps a worker registered with its coordinator, and reports when the worker leaves.
use crate::error::{Error, Result, from_status};
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::{future::Future, pin::pin, time::Duration};
use superbatch_proto::v1::{
    Reason, RegisterRequest, coordinator_service_client::CoordinatorServiceClient,
};
use superbatch_transport::Authorized;
use tokio::sync::watch;

/// How long a call to the coordinator may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// First and longest wait after a call that failed; each is made longer by chance, up to twofold.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// The longest lease that a worker relies on. It renews a longer one as if it were this long: a
/// coordinator that names an absurd one would never hear of the worker again.
const LEASE_MAX: Duration = Duration::from_secs(3600);

/// The coordinator to register with.
pub struct Superior {
    /// Its address, for logs.
    pub uri: String,
    pub channel: Authorized,
}

/// Keeps a worker registered until `shutdown`. It registers at once and then at every third of the
/// lease, so that two lost calls do not cost the lease. If the coordinator cannot be reached, it
/// retries with exponential backoff and jitter. At the end it reports that the worker leaves. It
/// does the same as soon as the worker is not well, and registers again once the worker is well.
///
/// `worker` is what is registered: address, incarnation, device, build and state.
///
/// # Errors
/// `InvalidArgument` if the coordinator refuses the worker for good, as it does one of another
/// state.
pub async fn keep_registered(
    coordinator: Superior,
    worker: RegisterRequest,
    mut is_well: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let mut client = CoordinatorServiceClient::new(coordinator.channel.clone());
    let mut shutdown = pin!(shutdown);
    // `None` while no call has failed since the last success.
    let mut failing: Option<ExponentialBackoff> = None;
    let mut registered = false;
    loop {
        let unwell = !*is_well.borrow_and_update();
        if unwell {
            leave(&mut client, &worker).await;
            tokio::select! {
                biased;
                () = &mut shutdown => return Ok(()),
                Ok(()) = is_well.changed() => continue,
            }
        }
        let wait = tokio::select! {
            biased;
            () = &mut shutdown => break,
            answer = register(&mut client, &worker) => match answer {
                Ok(lease) => {
                    if failing.take().is_some() || !registered {
                        let what = if registered { "registered again" } else { "registered" };
                        tracing::info!(coordinator = %coordinator.uri, "{what}");
                    }
                    registered = true;
                    lease / 3
                }
                Err(error) if error.reason() == Reason::InvalidArgument => {
                    return Err(error.about(format!("{} refuses this worker", coordinator.uri)));
                }
                Err(error) => {
                    if failing.is_none() {
                        tracing::warn!(coordinator = %coordinator.uri, error = error.chain(),
                            "cannot register; trying on");
                    }
                    let next = failing.get_or_insert_with(pauses).next();
                    next.unwrap_or(PAUSES.1)
                }
            },
        };
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            Ok(()) = is_well.changed() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    leave(&mut client, &worker).await;
    Ok(())
}

async fn leave(client: &mut CoordinatorServiceClient<Authorized>, worker: &RegisterRequest) {
    let leaving = RegisterRequest {
        leaving: true,
        ..worker.clone()
    };
    match register(client, &leaving).await {
        Ok(_) => tracing::info!("left the coordinator"),
        Err(error) => {
            tracing::warn!(
                error = error.chain(),
                "could not tell the coordinator that this worker leaves"
            );
        }
    }
}

/// Makes one call. Returns the lease that the coordinator grants.
async fn register(
    client: &mut CoordinatorServiceClient<Authorized>,
    worker: &RegisterRequest,
) -> Result<Duration> {
    let call = tokio::time::timeout(CALL_TIMEOUT, client.register(worker.clone()));
    let answer = call
        .await
        .map_err(|_| Error::new(Reason::NoWorkers, "the coordinator did not answer in time"))?;
    let lease = answer
        .map_err(|status| from_status(status, Reason::NoWorkers))?
        .into_inner()
        .lease_seconds;
    granted(lease)
}

/// Returns the lease of `seconds`, as far as a worker relies on it.
///
/// # Errors
/// `Internal` for what is no length of time, or none at all.
fn granted(seconds: f64) -> Result<Duration> {
    let most = LEASE_MAX.as_secs_f64();
    let lease = Duration::try_from_secs_f64(if seconds > most { most } else { seconds });
    let lease = lease.ok().filter(|lease| !lease.is_zero());
    lease.ok_or_else(|| Error::internal(format!("the coordinator granted a lease of {seconds} s")))
}

/// Returns the waits after failures in a row. They are random in part: all workers lose a restarted
/// coordinator at the same moment, and must not come back to it at the same moment.
fn pauses() -> ExponentialBackoff {
    let (first, most) = PAUSES;
    let pauses = ExponentialBuilder::default()
        .with_min_delay(first)
        .with_max_delay(most)
        .without_max_times()
        .with_jitter();
    pauses.build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::{
        RegisterResponse,
        coordinator_service_server::{CoordinatorService, CoordinatorServiceServer},
    };
    use superbatch_transport::{Bearer, Dialer};
    use tokio::{
        net::TcpListener,
        sync::{mpsc, oneshot},
    };
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status, transport::Server};

    #[test]
    fn waits_grow_to_a_limit_and_are_spread() {
        let (first, most) = PAUSES;
        let waits: Vec<Duration> = pauses().take(60).collect();
        assert_eq!(waits.len(), 60, "a worker never gives up");
        assert!(first <= waits[0] && waits[0] <= first * 2);
        assert!(waits[59] >= most && waits.iter().all(|wait| *wait <= most * 2));
        let others: Vec<Duration> = pauses().take(60).collect();
        assert_ne!(waits, others, "two workers come at different moments");
    }

    #[test]
    fn a_lease_of_any_length_is_renewed() {
        assert_eq!(granted(0.03).unwrap(), Duration::from_millis(30));
        for absurd in [1e15, f64::MAX, f64::INFINITY] {
            assert_eq!(granted(absurd).unwrap(), LEASE_MAX);
        }
        for nonsense in [0.0, -1.0, f64::NAN] {
            granted(nonsense).unwrap_err();
        }
    }

    /// Refuses the first call, grants short leases after that, and hands over what it was told.
    struct Forgetful(mpsc::Sender<RegisterRequest>);

    #[tonic::async_trait]
    impl CoordinatorService for Forgetful {
        async fn register(
            &self,
            request: Request<RegisterRequest>,
        ) -> Result<Response<RegisterResponse>, Status> {
            let first = self.0.capacity() == self.0.max_capacity();
            self.0
                .send(request.into_inner())
                .await
                .map_err(|_| Status::cancelled("the test is over"))?;
            if first {
                Err(Status::unavailable("starting"))
            } else {
                Ok(Response::new(RegisterResponse {
                    lease_seconds: 0.03,
                }))
            }
        }
    }

    /// Wants no worker at all.
    struct Aloof;

    #[tonic::async_trait]
    impl CoordinatorService for Aloof {
        async fn register(
            &self,
            _: Request<RegisterRequest>,
        ) -> Result<Response<RegisterResponse>, Status> {
            Err(Error::invalid("state", "another state").into())
        }
    }

    async fn serve(service: impl CoordinatorService) -> Superior {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let server = Server::builder().add_service(CoordinatorServiceServer::new(service));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = Dialer::default().connect_lazy(&uri, |e| e).unwrap();
        let channel = Authorized::new(channel, Bearer::default());
        Superior { uri, channel }
    }

    #[tokio::test]
    async fn a_worker_that_is_refused_for_good_ends() {
        let (_well, is_well) = watch::channel(true);
        let worker = RegisterRequest::default();
        let never = std::future::pending();
        let ended = keep_registered(serve(Aloof).await, worker, is_well, never).await;
        assert_eq!(ended.unwrap_err().value("field"), Some("state"));
    }

    #[tokio::test]
    async fn a_worker_registers_until_it_leaves() {
        let (told, mut heard) = mpsc::channel(64);
        let worker = RegisterRequest {
            address: "http://10.0.0.7:7001".into(),
            ..Default::default()
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let coordinator = serve(Forgetful(told)).await;
        let shutdown = async { drop(stopped.await) };
        let (well, is_well) = watch::channel(true);
        let keeping = tokio::spawn(keep_registered(
            coordinator,
            worker.clone(),
            is_well,
            shutdown,
        ));
        let mut calls = Vec::new();
        while calls.len() < 3 {
            calls.push(heard.recv().await.unwrap());
        }
        assert!(calls.iter().all(|call| *call == worker));
        well.send_replace(false);
        let leaving = RegisterRequest {
            leaving: true,
            ..worker.clone()
        };
        while heard.recv().await.unwrap() != leaving {}
        assert!(heard.try_recv().is_err(), "no word while it is not well");
        well.send_replace(true);
        assert_eq!(heard.recv().await.unwrap(), worker, "it is back");
        stop.send(()).unwrap();
        keeping.await.unwrap().unwrap();
        let mut last = None;
        while let Ok(call) = heard.try_recv() {
            last = Some(call);
        }
        assert_eq!(
            last,
            Some(RegisterRequest {
                leaving: true,
                ..worker
            })
        );
    }
}
