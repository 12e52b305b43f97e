//! Builds a store's client from a URI and options.
use super::{StorageConfig, disk::Disk, guard::Guarded, hub, retried::LoggingConnector, uri::Kind};
use crate::error::{Error, Result};
use object_store::{
    ClientConfigKey, ObjectStore, ObjectStoreScheme,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::GoogleCloudStorageBuilder,
    http::HttpBuilder,
    memory::InMemory,
};
use std::sync::Arc;
use url::{Position, Url};

/// A client's builder for `url`, with the options that this store's client knows.
macro_rules! configured {
    ($builder:ty, $url:expr, $config:expr, $connector:expr) => {{
        let options = all_options($config);
        let builder = <$builder>::new()
            .with_url($url)
            .with_http_connector($connector);
        options.fold(builder, |builder, (name, value)| {
            // An option of another store is no error: one configuration serves `s3://` data and
            // `gs://` state. `StorageConfig::validate` has refused the names that no store knows.
            match name.to_ascii_lowercase().parse() {
                Ok(key) => builder.with_config(key, value),
                Err(_) => builder,
            }
        })
    }};
}

/// Returns all options. A builder keeps the last value of a key, so the operator's options come
/// after the environment's, which they replace.
pub(super) fn all_options(config: &StorageConfig) -> impl Iterator<Item = (&String, &String)> {
    config.environment.iter().chain(&config.options)
}

/// Makes the client of a store. No connection is opened yet.
///
/// # Errors
/// `InvalidArgument`, with `field` if an option is the cause.
pub(super) fn connect(
    kind: &Kind,
    url: &Url,
    config: &StorageConfig,
) -> Result<Arc<dyn ObjectStore>> {
    use ObjectStoreScheme as S;
    let scheme = match kind {
        Kind::Hub => return hub::connect(config),
        Kind::Store(scheme) => scheme,
    };
    let unusable = |e: object_store::Error| unusable(url).because(e);
    Ok(match scheme {
        S::Local => Arc::new(Disk::new()),
        S::Memory => Arc::new(InMemory::new()),
        S::AmazonS3 => {
            let builder = configured!(
                AmazonS3Builder,
                url.as_str(),
                config,
                LoggingConnector::default()
            );
            let get = |key| builder.get_config_value(&key);
            let endpoint =
                get(AmazonS3ConfigKey::S3Endpoint).or_else(|| get(AmazonS3ConfigKey::Endpoint));
            let allowed = get(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp));
            check_plain_http(endpoint.as_deref(), allowed, "aws_allow_http")?;
            Arc::new(builder.build().map_err(unusable)?)
        }
        S::GoogleCloudStorage => Arc::new(
            configured!(
                GoogleCloudStorageBuilder,
                url.as_str(),
                config,
                LoggingConnector::default()
            )
            .build()
            .map_err(unusable)?,
        ),
        S::MicrosoftAzure => {
            let builder = configured!(
                MicrosoftAzureBuilder,
                url.as_str(),
                config,
                LoggingConnector::default()
            );
            let get = |key| builder.get_config_value(&key);
            let endpoint = get(AzureConfigKey::Endpoint);
            let emulated = get(AzureConfigKey::UseEmulator).filter(|value| is_true(value));
            let allowed =
                emulated.or_else(|| get(AzureConfigKey::Client(ClientConfigKey::AllowHttp)));
            check_plain_http(endpoint.as_deref(), allowed, "azure_allow_http")?;
            Arc::new(builder.build().map_err(unusable)?)
        }
        S::Http => {
            let guarded = LoggingConnector::over(Guarded {
                allow: config.allow_uris.clone(),
            });
            let builder = configured!(HttpBuilder, &url[..Position::BeforePath], config, guarded);
            check_plain_http(Some(url.as_str()), allow_http(config), "allow_http")?;
            Arc::new(builder.build().map_err(unusable)?)
        }
        _ => return Err(self::unusable(url)),
    })
}

fn unusable(url: &Url) -> Error {
    Error::invalid("uri", format!("cannot use '{url}'")).with("uri", url)
}

/// Returns the option that allows plain HTTP to web servers.
pub(super) fn allow_http(config: &StorageConfig) -> Option<String> {
    let mut options = all_options(config);
    let found = options.find(|(name, _)| name.eq_ignore_ascii_case("allow_http"));
    found.map(|(_, value)| value.clone())
}

pub(super) fn check_plain_http(
    endpoint: Option<&str>,
    allowed: Option<String>,
    option: &str,
) -> Result<()> {
    let Some(endpoint) = endpoint.filter(|endpoint| endpoint.starts_with("http://")) else {
        return Ok(());
    };
    if allowed.is_some_and(|value| is_true(&value)) {
        return Ok(());
    }
    let field = format!("storage.options.{option}");
    let variable = option.to_ascii_uppercase();
    let variable = if option == "allow_http" {
        String::new()
    } else {
        format!(" ({variable}=true in the environment)")
    };
    let message = format!(
        "{endpoint} is plain HTTP, which anyone between can read; to allow it set {field}: \
        true{variable}"
    );
    Err(Error::invalid(&field, message))
}

/// Returns whether `object_store` reads `value` as true. The check for plain HTTP must agree
/// with the client, else it would refuse what the client allows, or the reverse.
pub(super) fn is_true(value: &str) -> bool {
    ["1", "true", "on", "yes", "y"]
        .iter()
        .any(|truth| value.eq_ignore_ascii_case(truth))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Stores;

    fn opened(uri: &str, options: &[(&str, &str)]) -> Result<()> {
        let options = options
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Stores::new(StorageConfig {
            options,
            ..Default::default()
        })
        .open(uri)
        .map(drop)
    }

    #[test]
    fn plain_http_has_to_be_allowed_by_name() {
        let endpoint = ("aws_endpoint", "http://127.0.0.1:9000");
        let region = ("aws_region", "us-east-1");
        let azure = [
            ("azure_storage_endpoint", "http://127.0.0.1:9000"),
            ("account_name", "a"),
            ("account_key", "a2V5"),
        ];
        for (uri, options, field) in [
            ("s3://b/p", &[endpoint, region][..], "aws_allow_http"),
            ("az://b/p", &azure[..], "azure_allow_http"),
            ("http://127.0.0.1:9000/p", &[][..], "allow_http"),
        ] {
            let error = opened(uri, options).unwrap_err();
            assert_eq!(
                error.value("field"),
                Some(format!("storage.options.{field}").as_str()),
                "{}",
                error.chain()
            );
            opened(uri, &[options, &[(field, "true")]].concat()).unwrap();
        }
        opened(
            "s3://b/p",
            &[("aws_endpoint", "https://127.0.0.1:9000"), region],
        )
        .unwrap();
    }

    #[test]
    fn options_of_no_store_are_refused() {
        assert_eq!(
            opened("memory:///p", &[("aws_endpiont", "https://s")])
                .unwrap_err()
                .value("known"),
            Some("aws_endpoint")
        );
    }
}
