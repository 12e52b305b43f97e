//! Keeps a web server of data from leading this process to other places: to cloud providers'
//! instance metadata, which hands out credentials, or by a redirect out of the allow-list.
//! [`super::hub`] has its requests made here too.
use super::below;
use object_store::{
    ClientConfigKey as Key, ClientOptions, Result,
    client::{HttpClient, HttpConnector},
};
use reqwest::{
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::{Attempt, Policy},
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};
use url::{Host, Url};

/// Most redirects that are followed for one request.
pub(super) const REDIRECTS_MAX: usize = 5;
/// Host names under which clouds serve instance metadata.
const NAMES: [&str; 4] = [
    "metadata.google.internal",
    "metadata.goog",
    "instance-data.ec2.internal",
    "metadata",
];
/// Addresses of instance metadata that are not link-local: those of Alibaba, Oracle, Azure's wire
/// server, and of AWS over IPv6.
const ADDRESSES: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// Returns whether a URI's host is instance metadata.
pub(super) fn is_metadata(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            NAMES.contains(&name.as_str()) || name.parse().is_ok_and(is_metadata_address)
        }
        Some(Host::Ipv4(address)) => is_metadata_address(address.into()),
        Some(Host::Ipv6(address)) => is_metadata_address(address.into()),
        None => false,
    }
}

fn is_metadata_address(address: IpAddr) -> bool {
    // `::ffff:169.254.169.254` reaches the same server as the IPv4 address in it.
    let plain = address.to_canonical();
    let is_link_local = match plain {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    is_link_local || ADDRESSES.contains(&plain)
}

/// Returns why a redirect to `url` is not followed, or `None` if it may be: where the allow-list
/// has it, or `is_trusted`.
pub(super) fn refusal(url: &Url, allow: &[String], is_trusted: bool) -> Option<String> {
    // The query may hold a signature, which must not get into logs and error messages.
    let shown = &url[..url::Position::AfterPath];
    if is_metadata(url) {
        return Some(format!(
            "it was redirected to {shown}, which is instance metadata"
        ));
    }
    if !["http", "https"].contains(&url.scheme()) {
        return Some(format!(
            "it was redirected to {shown}, which is no web address"
        ));
    }
    let is_listed = || allow.is_empty() || allow.iter().any(|prefix| below(shown, prefix));
    let is_allowed = is_trusted || is_listed();
    (!is_allowed).then(|| {
        format!("it was redirected to {shown}, which is not below any prefix of storage.allow_uris")
    })
}

/// Makes clients of web servers.
#[derive(Debug)]
pub(super) struct Guarded {
    pub allow: Vec<String>,
}

impl HttpConnector for Guarded {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        let allow = self.allow.clone();
        let redirected = move |attempt: Attempt<'_>| {
            if attempt.previous().len() > REDIRECTS_MAX {
                return attempt.error("it was redirected too often");
            }
            match refusal(attempt.url(), &allow, false) {
                None => attempt.follow(),
                Some(why) => attempt.error(why),
            }
        };
        Ok(HttpClient::new(client(
            options,
            Policy::custom(redirected),
        )?))
    }
}

/// Makes a client that reaches no instance metadata. `object_store`'s own connector follows
/// redirects to any host, so this one replaces it. It must set by hand what that connector would
/// set from the options: time-outs, proxy, plain HTTP.
pub(super) fn client(options: &ClientOptions, redirects: Policy) -> Result<reqwest::Client> {
    let seconds = |key: Key, otherwise: u64| {
        let given = options.get_config_value(&key);
        let given = given.and_then(|text| humantime::parse_duration(&text).ok());
        given.unwrap_or(Duration::from_secs(otherwise))
    };
    let allows = |key: Key| options.get_config_value(&key).as_deref() == Some("true");
    let mut client = reqwest::Client::builder()
        .redirect(redirects)
        .dns_resolver(Arc::new(Resolver))
        .https_only(!allows(Key::AllowHttp))
        .timeout(seconds(Key::Timeout, 30))
        .connect_timeout(seconds(Key::ConnectTimeout, 5));
    if let Some(proxy) = options.get_config_value(&Key::ProxyUrl) {
        client = client.proxy(reqwest::Proxy::all(proxy).map_err(generic)?);
    }
    client.build().map_err(generic)
}

fn generic(source: reqwest::Error) -> object_store::Error {
    object_store::Error::Generic {
        store: "HTTP",
        source: Box::new(source),
    }
}

/// Resolves names and leaves out addresses of instance metadata. The check of the URI's text is not
/// enough: a name that an attacker owns may resolve to 169.254.169.254, and may do so only after
/// the check (DNS rebinding). Here the addresses are filtered that the connection will use.
struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let (refused, usable): (Vec<_>, Vec<_>) =
                found.partition(|address| is_metadata_address(address.ip()));
            if usable.is_empty() && !refused.is_empty() {
                let text = format!("{} stands for instance metadata", name.as_str());
                return Err(io::Error::other(text).into());
            }
            Ok(Box::new(usable.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};
    use axum::{Router, response::Redirect, routing::get};
    use superbatch_proto::v1::Reason;

    #[test]
    fn instance_metadata_is_known_by_all_its_names() {
        for uri in [
            "http://169.254.169.254/latest",
            "http://2852039166/",
            "http://0xA9FEA9FE/",
            "http://169.254.170.2/",
            "http://[::ffff:169.254.169.254]/",
            "http://[fe80::1]/",
            "http://[fd00:ec2::254]/",
            "http://METADATA.google.internal./x",
            "https://100.100.100.200/",
            "s3://169.254.169.254/x",
        ] {
            assert!(is_metadata(&Url::parse(uri).unwrap()), "{uri}");
        }
        for uri in [
            "http://10.0.0.1/",
            "https://example.com/",
            "file:///x",
            "s3://bucket/x",
        ] {
            assert!(!is_metadata(&Url::parse(uri).unwrap()), "{uri}");
        }
    }

    /// A web server with one file, and redirects to it and elsewhere.
    async fn server() -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let to = |uri: String| get(move || async move { Redirect::temporary(&uri) });
        let router = Router::new()
            .route("/data/file", get(|| async { "rows" }))
            .route("/secret/file", get(|| async { "secret" }))
            .route("/data/moved", to(format!("{address}/data/file")))
            .route("/data/out", to(format!("{address}/secret/file")))
            .route("/data/up", to(format!("{address}/data/../secret/file")))
            .route(
                "/data/meta",
                to("http://169.254.169.254/latest/meta-data".into()),
            )
            .route("/data/local", to("file:///etc/passwd".into()));
        tokio::spawn(axum::serve(listener, router).into_future());
        address
    }

    #[tokio::test]
    async fn redirects_stay_below_the_allow_list() {
        let address = server().await;
        let stores = Stores::new(StorageConfig {
            allow_uris: vec![format!("{address}/data")],
            options: [("allow_http".to_owned(), "true".to_owned())].into(),
            ..Default::default()
        });
        let read = async |name: &str| {
            let at = stores.open_allowed(&format!("{address}/data/{name}"))?;
            at.get("").await
        };
        assert_eq!(read("file").await.unwrap(), "rows");
        assert_eq!(read("moved").await.unwrap(), "rows");
        for (name, says) in [
            ("out", "not below any prefix"),
            ("up", "not below any prefix"),
            ("meta", "instance metadata"),
            ("local", ""),
        ] {
            let error = read(name).await.unwrap_err().chain();
            assert!(error.contains(says), "{name}: {error}");
        }
        let metadata = stores.open_allowed("http://169.254.169.254/latest");
        let refused = metadata.map(drop).unwrap_err();
        assert_eq!(refused.reason(), Reason::UriNotAllowed);
    }
}
