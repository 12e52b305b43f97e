//! The options of object stores' clients: which names and values an operator may write.
use crate::error::{Error, Result};
use object_store::{
    ClientConfigKey, aws::AmazonS3ConfigKey, azure::AzureConfigKey, gcp::GoogleConfigKey,
};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

/// Options that an unknown one is compared with, to suggest what was meant.
const USUAL: [&str; 32] = [
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "aws_region",
    "aws_endpoint",
    "aws_allow_http",
    "aws_virtual_hosted_style_request",
    "aws_skip_signature",
    "aws_unsigned_payload",
    "aws_checksum_algorithm",
    "aws_conditional_put",
    "aws_role_arn",
    "aws_server_side_encryption",
    "aws_sse_kms_key_id",
    "aws_request_payer",
    "google_service_account",
    "google_service_account_key",
    "google_application_credentials",
    "google_base_url",
    "google_skip_signature",
    "azure_storage_account_name",
    "azure_storage_account_key",
    "azure_storage_client_id",
    "azure_storage_client_secret",
    "azure_storage_tenant_id",
    "azure_storage_sas_key",
    "azure_storage_endpoint",
    "azure_allow_http",
    "allow_http",
    "timeout",
    "connect_timeout",
    "proxy_url",
];

/// Reads options whose values may be written as YAML's booleans and numbers: `aws_allow_http:
/// true`.
pub(super) fn plain_values<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Plain {
        Bool(bool),
        Integer(i64),
        Number(f64),
        Text(String),
    }
    let read = BTreeMap::<String, Plain>::deserialize(from)?;
    let text = |value| match value {
        Plain::Bool(value) => value.to_string(),
        Plain::Integer(value) => value.to_string(),
        Plain::Number(value) => value.to_string(),
        Plain::Text(value) => value,
    };
    Ok(read
        .into_iter()
        .map(|(name, value)| (name, text(value)))
        .collect())
}

/// Refuses an option that no store knows. A client would ignore it silently.
///
/// # Errors
/// `InvalidArgument`, with the `field` and the option that was probably meant (`known`).
pub(super) fn check<'a>(names: impl IntoIterator<Item = &'a String>) -> Result<()> {
    let Some(name) = names
        .into_iter()
        .find(|name| !is_known(&name.to_ascii_lowercase()))
    else {
        return Ok(());
    };
    let near = nearest(&name.to_ascii_lowercase());
    let message = format!("there is no option storage.options.{name}; did you mean {near}?");
    Err(Error::invalid(&format!("storage.options.{name}"), message).with("known", near))
}

fn is_known(name: &str) -> bool {
    name.parse::<AmazonS3ConfigKey>().is_ok()
        || name.parse::<GoogleConfigKey>().is_ok()
        || name.parse::<AzureConfigKey>().is_ok()
        || name.parse::<ClientConfigKey>().is_ok()
}

/// Returns the usual option that is nearest to `name`, by pairs of letters that both have.
fn nearest(name: &str) -> &'static str {
    let likeness = |option: &&str| strsim::sorensen_dice(option, name);
    let near = USUAL
        .into_iter()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    near.expect("the list is not empty")
}

/// Returns whether an option's value is a secret.
pub(super) fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [
        "key",
        "secret",
        "token",
        "password",
        "credential",
        "proxy_url",
    ]
    .iter()
    .any(|word| name.contains(word))
}

/// Returns the values of those options that say which service answers for a URI: an endpoint, an
/// account. Buckets of two services may have one name. Later options replace earlier ones.
pub(super) fn place<'a>(options: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    let says = |name: &str| {
        let mut words = ["endpoint", "base_url", "account_name", "emulator"].iter();
        words.any(|word| name.contains(word)) && !is_secret(name)
    };
    let named = options.map(|(name, value)| (name.to_ascii_lowercase(), value));
    let named: BTreeMap<_, _> = named.filter(|(name, _)| says(name)).collect();
    let lines = named
        .iter()
        .map(|(name, value)| format!("{name}={value}\n"));
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::StorageConfig;

    #[test]
    fn a_misspelt_option_is_refused_with_the_nearest_known_one() {
        for (name, meant) in [
            ("aws_endpiont", "aws_endpoint"),
            ("aws_alow_http", "aws_allow_http"),
            ("azure_storage_acount_name", "azure_storage_account_name"),
            (
                "google_aplication_credentials",
                "google_application_credentials",
            ),
            ("connect_timeuot", "connect_timeout"),
        ] {
            let error = check([&name.to_owned()]).unwrap_err();
            assert_eq!(
                error.value("field"),
                Some(format!("storage.options.{name}").as_str())
            );
            assert_eq!(error.value("known"), Some(meant));
        }
        for name in USUAL.iter().chain(&["AWS_ENDPOINT", "endpoint_url"]) {
            check([&(*name).to_owned()]).unwrap();
        }
    }

    #[test]
    fn values_are_written_as_yaml_writes_them() {
        let yaml = "options: {aws_allow_http: true, timeout: 30s, aws_region: '1', \
                    http2_max_frame_size: 65536}";
        let options = serde_yaml_ng::from_str::<StorageConfig>(yaml)
            .unwrap()
            .options;
        let expected = [
            ("aws_allow_http", "true"),
            ("aws_region", "1"),
            ("http2_max_frame_size", "65536"),
            ("timeout", "30s"),
        ];
        assert_eq!(
            options,
            expected
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into()
        );
        assert!(serde_yaml_ng::from_str::<StorageConfig>("options: {aws_region: [1]}").is_err());
    }

    #[test]
    fn a_place_is_the_service_and_not_how_it_is_reached() {
        let place_of = |options: &[(&str, &str)]| {
            let owned: Vec<(String, String)> = options
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect();
            place(owned.iter().map(|(name, value)| (name, value)))
        };
        let one = place_of(&[("aws_endpoint", "https://a"), ("timeout", "9s")]);
        assert_eq!(one, place_of(&[("AWS_ENDPOINT", "https://a")]));
        let later = [("aws_endpoint", "https://b"), ("aws_endpoint", "https://a")];
        assert_eq!(one, place_of(&later));
        assert_ne!(one, place_of(&[("aws_endpoint", "https://b")]));
        let azure = |name| place_of(&[("azure_storage_account_name", name)]);
        assert_ne!(azure("a"), azure("b"));
        let secret = [
            ("aws_secret_access_key", "s"),
            ("azure_storage_account_key", "k"),
        ];
        assert_eq!(place_of(&secret), "");
    }
}
