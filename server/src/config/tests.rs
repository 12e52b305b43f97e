use super::*;
use std::{collections::BTreeMap, io::Write};

fn load(yaml: &str, environment: &[(&str, &str)]) -> Result<Config> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(yaml.as_bytes()).unwrap();
    let environment = environment
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()));
    Config::load(Some(file.path()), environment)
}

/// The field that is to blame, and the known one that is near.
fn refusal_and_field(result: Result<Config>) -> (String, Option<String>) {
    let error = result.unwrap_err();
    (
        error.value("field").unwrap().to_owned(),
        error.value("known").map(str::to_owned),
    )
}

fn leaves(path: &str, value: &serde_json::Value, found: &mut Vec<String>) {
    match value.as_object() {
        Some(entries) if !entries.is_empty() => {
            for (key, value) in entries {
                leaves(
                    &if path.is_empty() {
                        key.clone()
                    } else {
                        format!("{path}.{key}")
                    },
                    value,
                    found,
                );
            }
        }
        _ => found.push(path.to_owned()),
    }
}

#[test]
fn defaults_are_valid_and_a_file_may_be_empty() {
    assert_eq!(Config::load(None, []).unwrap(), Config::default());
    assert_eq!(load("", &[]).unwrap(), Config::default());
    assert_eq!(
        load("coordinator:\nlog: {}", &[]).unwrap(),
        Config::default()
    );
    let uri = Config::default().state_uri().unwrap();
    assert!(
        uri.starts_with("file:///") && uri.ends_with("/superbatch-state"),
        "{uri}"
    );
}

#[test]
fn a_misspelt_key_is_refused_and_the_known_one_named() {
    let cases = [
        ("lisen: 127.0.0.1:1", "lisen", "listen"),
        (
            "coordinator: {leese_seconds: 3}",
            "coordinator.leese_seconds",
            "coordinator.lease_seconds",
        ),
        (
            "lease_seconds: 3",
            "lease_seconds",
            "coordinator.lease_seconds",
        ),
        ("log: {fromat: json}", "log.fromat", "log.format"),
    ];
    for (yaml, field, known) in cases {
        assert_eq!(
            refusal_and_field(load(yaml, &[])),
            (field.into(), Some(known.into())),
            "{yaml}"
        );
    }
}

#[test]
fn a_value_of_another_type_is_blamed_on_its_field() {
    for (yaml, field) in [
        ("coordinator: {max_runs: many}", "coordinator.max_runs"),
        ("listen: here", "listen"),
        ("log: {format: xml}", "log.format"),
        ("coordinator: 3", "coordinator"),
        (
            "coordinator: {lease_seconds: 0}",
            "coordinator.lease_seconds",
        ),
        (
            "coordinator: {grace_seconds: .inf}",
            "coordinator.grace_seconds",
        ),
        (
            "coordinator: {push_bytes_max: 0}",
            "coordinator.push_bytes_max",
        ),
        (
            "coordinator: {sub_batch_size_max: 9, super_batch_size_max: 8}",
            "coordinator.sub_batch_size_max",
        ),
        (
            "coordinator: {selector_device: 'cuda:0'}",
            "coordinator.selector_device",
        ),
        (
            "coordinator: {selector_device: torch}",
            "coordinator.selector_device",
        ),
        (
            "coordinator: {selector_device: workers}",
            "coordinator.selector_device",
        ),
        ("- 1", ""),
    ] {
        assert_eq!(refusal_and_field(load(yaml, &[])).0, field, "{yaml}");
    }
}

#[test]
fn what_would_fit_is_said_in_words_and_not_in_those_of_rust() {
    let address = "an IP address and port such as 127.0.0.1:50051";
    for (yaml, says) in [
        (
            "listen: localhost:50171",
            format!("listen cannot be \"localhost:50171\"; give {address}"),
        ),
        (
            "metrics_listen: 9",
            format!("metrics_listen cannot be 9; give {address}, or null"),
        ),
        (
            "worker_role: {metrics_listen: x}",
            format!("worker_role.metrics_listen cannot be \"x\"; give {address}, or null"),
        ),
        (
            "coordinator: {max_runs: -1}",
            "coordinator.max_runs cannot be -1; give a whole number from 0 to 4294967295".into(),
        ),
        (
            "coordinator: {push_bytes_max: 1.5}",
            "give a whole number, at least 0".into(),
        ),
        (
            "coordinator: {lease_seconds: soon}",
            "coordinator.lease_seconds cannot be \"soon\"; give a number".into(),
        ),
        (
            "coordinator: {workers_embedded: 1}",
            "give true or false".into(),
        ),
        (
            "coordinator: {advertise_address: 1}",
            "give text, or null".into(),
        ),
        (
            "storage: {allow_uris: s3://a}",
            "storage.allow_uris cannot be \"s3://a\"; give a list of text, such as [a, b]".into(),
        ),
        (
            "storage: {options: [a]}",
            "give a mapping of names to text, such as {name: text}".into(),
        ),
        (
            "storage: {options: {aws_region: [7]}}",
            "storage.options".into(),
        ),
        (
            "log: {format: xml}",
            "log.format cannot be \"xml\"; give one of text, json".into(),
        ),
        ("state: [1]", "state cannot be [1]; give text".into()),
    ] {
        let said = load(yaml, &[]).unwrap_err().chain();
        assert!(said.contains(&says), "{yaml}: {said}");
    }
    assert_eq!(
        crate::config::address("localhost:1").unwrap_err(),
        format!("give {address}")
    );
}

#[test]
fn state_goes_where_it_can_be_kept() {
    let at = |uri: &str| load(&format!("state: '{uri}'"), &[]);
    for uri in [
        "s3://b/p",
        "gs://b/p",
        "az://c/p",
        "memory:///x",
        "file:///x",
        "./x",
        "/x",
        "https://a.blob.core.windows.net/c/p",
    ] {
        assert!(at(uri).is_ok(), "{uri}");
    }
    for (uri, says) in [
        ("http://foo/bar", "use file, s3, gs, az or memory"),
        ("https://foo/bar", "use file, s3, gs, az or memory"),
        (
            "what://x",
            "use file, s3, gs, az or memory, or for data that is only read http, https or hf",
        ),
        ("file://pool/x", "three slashes"),
        ("s3://", "cannot use 's3://'"),
    ] {
        let error = at(uri).unwrap_err();
        assert!(
            error.value("field") == Some("state") && error.chain().contains(says),
            "{uri}: {}",
            error.chain()
        );
    }
}

#[test]
fn the_environment_comes_before_the_file() {
    let variables = [
        ("SUPERBATCH_STATE", "memory:///s"),
        ("SUPERBATCH_METRICS_LISTEN", ""),
        ("SUPERBATCH_COORDINATOR__MAX_RUNS", "7"),
        ("SUPERBATCH_COORDINATOR__WORKERS_EMBEDDED", "false"),
        ("SUPERBATCH_STORAGE__ALLOW_URIS", "[s3://a, s3://b]"),
        ("SUPERBATCH_STORAGE__OPTIONS__AWS_REGION", "007"),
        ("SUPERBATCH_LOG__FORMAT", "json"),
        // Kubernetes' own for a service of our name, and others that are not ours.
        ("SUPERBATCH_PORT", "tcp://10.0.0.1:50051"),
        ("SUPERBATCH_PORT_50051_TCP_ADDR", "10.0.0.1"),
        ("SUPERBATCH_SERVICE_HOST", "10.0.0.1"),
        ("PATH", "/bin"),
    ];
    let config = load("state: ./x\ncoordinator: {max_runs: 3, max_ruins: 2}", &[]);
    assert_eq!(
        refusal_and_field(config).1.as_deref(),
        Some("coordinator.max_runs")
    );
    let config = load(
        "state: ./x\ncoordinator: {max_runs: 3, lease_seconds: 4}",
        &variables,
    )
    .unwrap();
    assert_eq!(
        (config.state.as_str(), config.metrics_listen),
        ("memory:///s", None)
    );
    assert_eq!(
        (
            config.coordinator.max_runs,
            config.coordinator.lease_seconds
        ),
        (7, 4.0)
    );
    assert!(!config.coordinator.workers_embedded);
    assert_eq!(config.storage.allow_uris, ["s3://a", "s3://b"]);
    assert_eq!(
        config.storage.options,
        BTreeMap::from([("aws_region".into(), "007".into())]),
        "options are text"
    );
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn a_misspelt_variable_is_refused() {
    for (name, known) in [
        ("SUPERBATCH_COORDINATOR__MAX_RUN", "coordinator.max_runs"),
        ("SUPERBATCH_LISTN", "listen"),
        (
            "SUPERBATCH_COORDINATR__LEASE_SECONDS",
            "coordinator.lease_seconds",
        ),
    ] {
        assert_eq!(
            refusal_and_field(load("", &[(name, "1")])).1.as_deref(),
            Some(known),
            "{name}"
        );
    }
    assert_eq!(
        refusal_and_field(load("", &[("SUPERBATCH_COORDINATOR", "{}")])).0,
        "coordinator"
    );
}

#[test]
fn listening_beyond_loopback_needs_tls_and_tokens() {
    for (yaml, field) in [
        ("listen: 0.0.0.0:50051", "listen"),
        ("listen: '[::]:50051'", "listen"),
        ("metrics_listen: 0.0.0.0:9464", "metrics_listen"),
        ("worker_role: {listen: 10.0.0.1:1}", "worker_role.listen"),
        ("page_listen: 0.0.0.0:9465", "page_listen"),
        (
            "{listen: 10.0.0.1:1, tls: {cert: c, key: k}, storage: {allow_uris: [s3://b]}}",
            "listen",
        ),
        (
            "{listen: 10.0.0.1:1, auth: {tokens_file: t}, storage: {allow_uris: [s3://b]}}",
            "listen",
        ),
        (
            "{listen: 10.0.0.1:1, tls: {cert: c, key: k}, auth: {tokens_file: t}}",
            "storage.allow_uris",
        ),
        ("tls: {cert: c}", "tls.key"),
        ("tls: {client_key: k}", "tls.client_cert"),
        ("tls: {client_ca: c}", "tls.cert"),
        ("auth: {metrics: true}", "auth.tokens_file"),
        (
            "{listen: 10.0.0.1:1, allow_insecure: true}",
            "storage.allow_uris",
        ),
    ] {
        assert_eq!(refusal_and_field(load(yaml, &[])).0, field, "{yaml}");
    }
    let open = "allow_insecure: true, storage: {allow_uris: [s3://b/data]}";
    assert!(load(&format!("{{listen: 10.0.0.1:1, {open}}}"), &[]).is_ok());
    assert!(load("listen: '[::1]:50051'", &[]).is_ok());
    let safe = "{listen: 10.0.0.1:1, metrics_listen: 10.0.0.1:2, health_listen: 10.0.0.1:3, \
                worker_role: {listen: 10.0.0.1:4}, tls: {cert: c, key: k}, \
                auth: {tokens_file: t, metrics: true}, storage: {allow_uris: [s3://b]}}";
    assert!(load(safe, &[]).is_ok());
}

#[test]
fn others_are_told_an_address_that_they_can_reach() {
    let open = "allow_insecure: true, storage: {allow_uris: [s3://b/data]}";
    for (yaml, field) in [
        ("listen: 0.0.0.0:1", "coordinator.advertise_address"),
        ("listen: '[::]:1'", "coordinator.advertise_address"),
        (
            "worker_role: {listen: 0.0.0.0:1}",
            "worker_role.advertise_address",
        ),
    ] {
        assert_eq!(
            refusal_and_field(load(&format!("{{{yaml}, {open}}}"), &[])).0,
            field,
            "{yaml}"
        );
    }
    for field in [
        "coordinator.advertise_address",
        "worker_role.advertise_address",
        "worker_role.coordinator",
    ] {
        let (section, key) = field.split_once('.').unwrap();
        for uri in ["superbatch-0:1", "10.0.0.1", "s3://bucket/x", ""] {
            assert_eq!(
                refusal_and_field(load(&format!("{section}: {{{key}: '{uri}'}}"), &[])).0,
                field,
                "{uri}"
            );
        }
    }
    let told = "listen: 0.0.0.0:1, coordinator: {advertise_address: http://superbatch-0:1}";
    assert!(load(&format!("{{{told}, {open}}}"), &[]).is_ok());
}

#[test]
fn the_reference_lists_every_field_with_its_meaning() {
    let page = reference();
    let mut paths = Vec::new();
    leaves(
        "",
        &serde_json::to_value(Config::default()).unwrap(),
        &mut paths,
    );
    assert!(paths.len() > 20);
    for path in paths {
        let line = page
            .lines()
            .find(|line| line.starts_with(&format!("| `{path}` |")));
        let cells: Vec<&str> = line
            .unwrap_or_else(|| panic!("{path} is not listed"))
            .split(" | ")
            .collect();
        assert!(
            cells.len() == 4 && cells[1..].iter().all(|cell| cell.len() >= 3),
            "{path}: {cells:?}"
        );
    }
}

#[test]
fn the_commented_file_is_the_defaults() {
    let yaml = commented_yaml();
    assert_eq!(load(&yaml, &[]).unwrap(), Config::default());
    let threads = "  # Threads of selection on the coordinator's CPU. 0 is one for each core.\n  \
                   selector_threads: 0\n";
    assert!(yaml.contains(threads), "{yaml}");
}
