//! `superbatch health`: asks a process whether it serves, as a probe does.
use crate::{
    config::{self, Config},
    error::{Error, Result, from_status},
};
use clap::Args;
use std::{path::PathBuf, time::Duration};
use superbatch_proto::v1::Reason;
use superbatch_transport::{Dialer, Trust};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Exits with 0 if the process serves. For containers without a shell.
#[derive(Args)]
pub struct HealthArgs {
    /// Where to ask, such as http://127.0.0.1:50053. Without it: `health_listen` of the settings,
    /// or else `listen`
    #[arg(long, value_name = "URI")]
    address: Option<String>,
    /// What to check: liveness, readiness, or a gRPC service's name
    #[arg(long, value_name = "NAME", default_value = "readiness")]
    service: String,
    /// How long to wait for the answer
    #[arg(long, value_name = "TIME", default_value = "5s",
        value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Certificate authority that verifies an https:// address. Comes before `tls.ca` of the
    /// settings
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// YAML file of settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// # Errors
/// `ShuttingDown` if the process answers that it does not serve; the cause if it does not answer.
pub async fn run(args: &HealthArgs) -> Result<String> {
    let config = match (&args.config, &args.address) {
        // A probe of a given address must work even if the settings are invalid.
        (None, Some(_)) => Config::default(),
        _ => Config::load(args.config.as_deref(), config::environment())?,
    };
    let address = args.address.clone().unwrap_or_else(|| own_address(&config));
    let dialer = Dialer::new(Trust {
        ca: args.ca.clone().or(config.tls.ca),
        cert: config.tls.client_cert.or(config.tls.cert),
        key: config.tls.client_key.or(config.tls.key),
        server_name: None,
    });
    let asked = async {
        let unreachable = |e: tonic::transport::Error| {
            let message = format!("nothing answers at {address}");
            Error::new(Reason::NoWorkers, message).because(e)
        };
        let channel = dialer.connect(&address, |endpoint| endpoint).await;
        let mut health = HealthClient::new(channel.map_err(unreachable)?);
        let request = HealthCheckRequest {
            service: args.service.clone(),
        };
        let answer = health.check(request).await;
        let answer = answer.map_err(|status| {
            let about = format!("{address} cannot say whether {} serves", args.service);
            from_status(status, Reason::NoWorkers).about(about)
        })?;
        Ok::<_, Error>(answer.into_inner().status())
    };
    let status = tokio::time::timeout(args.timeout, asked)
        .await
        .map_err(|_| {
            let message = format!("{address} did not answer in {:?}", args.timeout);
            Error::new(Reason::NoWorkers, message)
        })??;
    if status == ServingStatus::Serving {
        return Ok("serving\n".into());
    }
    let message = format!("{address} says that {} does not serve", args.service);
    Err(Error::new(Reason::ShuttingDown, message))
}

/// Returns the address at which the process of these settings answers on this machine.
fn own_address(config: &Config) -> String {
    let (scheme, mut address) = match config.health_listen {
        Some(address) => ("http", address),
        None if config.tls.is_on() => ("https", config.listen),
        None => ("http", config.listen),
    };
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            std::net::SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    format!("{scheme}://{address}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_address_is_one_that_can_be_reached() {
        let mut config = Config::default();
        assert_eq!(own_address(&config), "http://127.0.0.1:50051");
        config.tls.cert = Some("cert.pem".into());
        assert_eq!(own_address(&config), "https://127.0.0.1:50051");
        config.health_listen = Some("0.0.0.0:50053".parse().unwrap());
        assert_eq!(own_address(&config), "http://127.0.0.1:50053");
        config.health_listen = Some("[::]:50053".parse().unwrap());
        assert_eq!(own_address(&config), "http://[::1]:50053");
    }
}
