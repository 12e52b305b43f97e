//! Pages in the Prometheus text format: how they are asked for, and their samples.
use crate::error::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use superbatch_proto::v1::Reason;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::transport::Uri;

/// Largest page that is read.
const PAGE_BYTES_MAX: u64 = 16 << 20;

/// Where a page of metrics is: plain HTTP, as services serve it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub uri: String,
    host: String,
    port: u16,
    path: String,
}

impl Page {
    /// # Errors
    /// `InvalidArgument` if it is no `http://host:port/path`.
    pub(super) fn parse(uri: &str) -> Result<Self> {
        let malformed =
            || Error::invalid("metrics", format!("{uri} is no http://host:port/metrics"));
        let parsed: Uri = uri.parse().map_err(|_| malformed())?;
        if parsed.scheme_str() != Some("http") {
            return Err(malformed());
        }
        Ok(Self {
            uri: uri.to_owned(),
            host: parsed.host().ok_or_else(malformed)?.to_owned(),
            port: parsed.port_u16().unwrap_or(80),
            path: parsed.path().to_owned(),
        })
    }

    /// Returns the host without the brackets of an IPv6 address.
    fn bare_host(&self) -> &str {
        self.host.trim_start_matches('[').trim_end_matches(']')
    }

    /// Returns whether what is sent there stays on this machine.
    fn is_here(&self) -> bool {
        let address = self.bare_host().parse::<std::net::IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// Reads the page. `bearer` is the header that holds the token; it goes to other machines only
    /// if `allow_insecure` says so, since everybody between could read it.
    ///
    /// # Errors
    /// `NoWorkers` if it does not answer; `Unauthenticated`, `PermissionDenied`.
    pub(super) async fn read(&self, bearer: Option<&str>, allow_insecure: bool) -> Result<String> {
        let is_safe = allow_insecure || self.is_here();
        let answer = self.ask(bearer.filter(|_| is_safe)).await.map_err(|e| {
            let message = format!("cannot read {}", self.uri);
            Error::new(Reason::NoWorkers, message).because(e)
        })?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let reason = match head.split(' ').nth(1) {
            Some("200") => return Ok(body.to_owned()),
            Some("401") => Reason::Unauthenticated,
            Some("403") => Reason::PermissionDenied,
            _ => {
                let status = head.lines().next().unwrap_or_default();
                let message = format!("{} answers {status:?}", self.uri);
                return Err(Error::new(Reason::NoWorkers, message));
            }
        };
        let hint = if bearer.is_some() && !is_safe {
            "the token was not sent, since it would go without TLS: run this on that machine, or \
             say --allow-insecure on a network that you trust whole"
        } else {
            "name its file by --token-file"
        };
        let message = format!("{} asks for a token of scope `admin`; {hint}", self.uri);
        Err(Error::new(reason, message).with("scope", "admin"))
    }

    async fn ask(&self, bearer: Option<&str>) -> std::io::Result<String> {
        let mut stream = TcpStream::connect((self.bare_host(), self.port)).await?;
        let authorization =
            bearer.map_or_else(String::new, |bearer| format!("Authorization: {bearer}\r\n"));
        let request = format!(
            "GET {} HTTP/1.0\r\nHost: {}\r\n{authorization}\r\n",
            self.path, self.host
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        let mut bounded = stream.take(PAGE_BYTES_MAX);
        bounded.read_to_string(&mut answer).await?;
        Ok(answer)
    }
}

/// The samples of a page, by name and labels as written. Empty if the page was not read.
#[derive(Debug, Default)]
pub(super) struct Metrics(HashMap<String, f64>);

impl Metrics {
    pub(super) fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Self(samples.filter_map(sample).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the sum over all series of `name`.
    pub(super) fn sum(&self, name: &str) -> f64 {
        let of = |key: &str| key.split('{').next() == Some(name);
        let found = self.0.iter().filter(|(key, _)| of(key));
        // The sum of no floats is -0, which would be printed with its sign.
        found.map(|(_, value)| value).sum::<f64>() + 0.0
    }

    /// Returns the values of `name` by the value of its only label.
    pub(super) fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        let start = format!("{name}{{{label}=\"");
        let value = |(key, value): (&String, &f64)| {
            let rest = key.strip_prefix(&start)?.strip_suffix("\"}")?;
            Some((rest.to_owned(), *value))
        };
        self.0.iter().filter_map(value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn an_address_is_plain_http() {
        let page = |uri: &str| Page::parse(uri).map_err(|error| error.reason());
        for uri in ["https://a:1/metrics", "a:1", "/metrics", "http://"] {
            assert_eq!(page(uri), Err(Reason::InvalidArgument), "{uri}");
        }
        for (uri, is_here) in [
            ("http://127.0.0.1:9464/metrics", true),
            ("http://[::1]:9464/metrics", true),
            ("http://localhost/metrics", true),
            ("http://10.0.0.7:9464/metrics", false),
            ("http://localhost.example/metrics", false),
        ] {
            assert_eq!(page(uri).unwrap().is_here(), is_here, "{uri}");
        }
    }

    /// Asks a server that answers once, with `status`. Returns what it was sent, and the outcome.
    async fn asked(status: &str, bearer: Option<&str>) -> (String, Result<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = format!("HTTP/1.0 {status}\r\nA: b\r\n\r\nsuperbatch_workers 3\n");
        let served = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (mut sent, mut piece) = (String::new(), [0; 1024]);
            while !sent.ends_with("\r\n\r\n") {
                let length = stream.read(&mut piece).await.unwrap();
                sent.push_str(std::str::from_utf8(&piece[..length]).unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            sent
        };
        let page = Page::parse(&format!("http://{address}/metrics")).unwrap();
        tokio::join!(served, page.read(bearer, false))
    }

    #[tokio::test]
    async fn the_token_goes_along_and_a_refusal_says_what_is_missing() {
        let (sent, page) = asked("200 OK", Some("Bearer sbt_1")).await;
        assert!(
            sent.contains("\r\nAuthorization: Bearer sbt_1\r\n"),
            "{sent}"
        );
        assert_eq!(
            Metrics::parse(&page.unwrap()).sum("superbatch_workers"),
            3.0
        );
        let (sent, refused) = asked("401 Unauthorized", None).await;
        assert!(!sent.contains("Authorization"), "{sent}");
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason(), Reason::Unauthenticated);
        assert!(
            refused.chain().contains("--token-file"),
            "{}",
            refused.chain()
        );
        let (_, refused) = asked("403 Forbidden", Some("Bearer sbt_1")).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.value("scope"), Some("admin"));
        let (_, failed) = asked("500 x", None).await;
        assert!(failed.unwrap_err().chain().contains("500 x"));
    }
}
