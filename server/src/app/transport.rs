//! The layers between a socket and the services: limits, reflection, health, and the order of a
//! shutdown.
use super::{Shutdown, health::READINESS};
use crate::{
    access::{Access, AccessLayer},
    bounds::CALLS_MAX,
    coordinator::serve::body::uncopied,
    error::{Error, Result},
};
use std::{future::Future, time::Duration};
use superbatch_proto::{
    http2,
    v1::{FILE_DESCRIPTOR_SET, Reason},
};
use tokio::sync::{oneshot, watch};
use tonic::{
    Code, Status, body::Body, codegen::http::Response, service::Routes, transport::Server,
};
use tonic_health::server::HealthReporter;
use tower::{
    layer::util::{Identity as NoLayer, Stack},
    util::MapResponseLayer,
};

/// The services of every process.
const OF_ALL: [&str; 3] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// Reports NOT_SERVING while the device is hung.
pub(super) async fn tell_health(
    mut is_well: watch::Receiver<bool>,
    health: HealthReporter,
    services: &[&str],
) {
    while is_well.changed().await.is_ok() {
        let serving = if *is_well.borrow_and_update() {
            tonic_health::ServingStatus::Serving
        } else {
            tonic_health::ServingStatus::NotServing
        };
        for name in services.iter().copied().chain(["", READINESS]) {
            health.set_service_status(name, serving).await;
        }
    }
}

/// The largest head of a call.
const HEAD_BYTES_MAX: u32 = 16 << 10;
/// After a silence of this length the peer is pinged, and after another one without an answer the
/// connection is closed. A host that loses power closes no connection: without pings its calls
/// would keep their memory and permits for hours.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

type Mended = MapResponseLayer<fn(Response<Body>) -> Response<Body>>;

/// Returns a server with the limits and the check of tokens.
pub(super) fn builder(access: &Access) -> Server<Stack<AccessLayer, Stack<Mended, NoLayer>>> {
    let mended: Mended = MapResponseLayer::new(|response| too_large(uncopied(response)));
    http2::server(bounded(CALLS_MAX))
        .layer(mended)
        .layer(access.layer())
}

/// Returns a server for a port that answers probes only.
pub(super) fn probes() -> Server {
    bounded(16)
}

fn bounded(streams_max: u32) -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .http2_max_header_list_size(HEAD_BYTES_MAX)
        .max_concurrent_streams(streams_max)
}

/// Gives the transport's refusal of a too large message a reason. It comes as OUT_OF_RANGE without
/// details, and that code is END_OF_DATA to a trainer, which would end its training as if it had
/// succeeded.
fn too_large(response: Response<Body>) -> Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::OutOfRange && status.details().is_empty() => {
            let message = format!("{}; send less at a time", status.message());
            Status::from(Error::new(Reason::MessageTooLarge, message)).into_http()
        }
        _ => response,
    }
}

/// Returns reflection for `services` and those of every process, in the versions v1 and v1alpha:
/// older clients know only the latter.
pub(super) fn reflection(services: &[&str]) -> Result<Routes> {
    let descriptors = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        services
            .iter()
            .chain(&OF_ALL)
            .fold(builder, |builder, name| builder.with_service_name(*name))
    };
    let damaged = |e| Error::internal("the protocol's descriptors are damaged").because(e);
    let (v1, v1alpha) = (
        descriptors().build_v1().map_err(damaged)?,
        descriptors().build_v1alpha().map_err(damaged)?,
    );
    Ok(Routes::new(v1).add_service(v1alpha))
}

/// Runs a shutdown in order: report NOT_SERVING, end the calls that wait, then stop accepting. The
/// receiver gets a message when it begins.
pub(super) fn drain(
    shutdown: Shutdown,
    mut health: HealthReporter,
    services: &'static [&'static str],
    let_go: impl Future<Output = ()> + Send + 'static,
) -> (impl Future<Output = ()> + Send, oneshot::Receiver<()>) {
    let (began, stopping) = oneshot::channel();
    let drained = async move {
        shutdown.await;
        // The empty name stands for the whole server.
        for name in services.iter().copied().chain(["", READINESS]) {
            health
                .set_service_status(name, tonic_health::ServingStatus::NotServing)
                .await;
        }
        tracing::info!("draining");
        // Fails if the receiver is gone, which then needs no message.
        let _ = began.send(());
        let_go.await;
        // A health watch is a call that never ends by itself. Clearing the status ends it;
        // otherwise each watching client would hold the process for the whole grace period.
        for name in services.iter().copied().chain([""]) {
            health.clear_service_status(name).await;
        }
    };
    (drained, stopping)
}

pub(super) async fn drain_within(
    served: impl Future<Output = Result<(), tonic::transport::Error>>,
    stopping: oneshot::Receiver<()>,
    grace: Duration,
) -> Result<()> {
    let patience = async {
        match stopping.await {
            Ok(()) => tokio::time::sleep(grace).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = served => {
            ended.map_err(|e| Error::internal("serving failed").because(e))?;
            tracing::info!("stopped");
            Ok(())
        }
        () = patience => {
            tracing::warn!(seconds = grace.as_secs_f64(), "calls were still open after the grace \
            period");
            Ok(())
        }
    }
}
