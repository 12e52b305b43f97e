//! Reads a [`Config`] from a file and the environment. A misspelt key is refused, and the error
//! names the key that was probably meant.
use super::{
    Config,
    reference::{Field, Kind, fields},
};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, path::Path};
use strsim::levenshtein;

/// The prefix of every variable of this program.
const PREFIX: &str = "SUPERBATCH_";
/// Prefixes of the variables that object stores' own tools read: credentials, regions, endpoints.
const CREDENTIALS: [&str; 4] = ["AWS_", "AZURE_", "GOOGLE_", "HF_"];
/// Further ones, by which the token of the Hugging Face hub is found.
const OF_HUB: [&str; 3] = ["HUGGING_FACE_HUB_TOKEN", "XDG_CACHE_HOME", "HOME"];
/// An unknown variable without `__` is refused only if its name is this close to a known one.
/// Others are ignored: Kubernetes sets `SUPERBATCH_PORT` and the like for a service named
/// superbatch, and a refusal would keep the pod from starting.
const TYPO_EDITS_MAX: usize = 2;

/// Returns the environment of this process, for [`Config::load`]. Variables that are not Unicode
/// are left out.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

impl Config {
    /// Reads and validates the configuration of a YAML file (the defaults if there is none).
    /// Variables of `environment` come before it: `SUPERBATCH_COORDINATOR__LEASE_SECONDS` is
    /// `coordinator.lease_seconds`.
    ///
    /// # Errors
    /// `InvalidArgument`, with the `field`.
    pub fn load(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        let of_file = |error: Error| match path {
            Some(path) => error.about(path.display()),
            None => error,
        };
        let tree = path.map_or(Ok(Value::Null), read)?;
        Self::of_tree(tree, environment, of_file)
    }

    /// As [`Config::load`], of a file that holds `yaml`.
    pub(crate) fn of(
        yaml: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        Self::of_tree(parsed(yaml, "the file")?, environment, |error| error)
    }

    /// `of_file` puts the file before an error that is its.
    fn of_tree(
        mut tree: Value,
        environment: impl IntoIterator<Item = (String, String)>,
        of_file: impl Fn(Error) -> Error,
    ) -> Result<Self> {
        let fields = fields();
        check_section("", &mut tree, &fields).map_err(&of_file)?;
        let mut credentials = BTreeMap::new();
        for (name, value) in environment {
            let is_credential = CREDENTIALS.iter().any(|prefix| name.starts_with(prefix));
            if is_credential || OF_HUB.contains(&name.as_str()) {
                credentials.insert(name.to_lowercase(), value.clone());
            }
            let Some(name_in_file) = name.strip_prefix(PREFIX) else {
                continue;
            };
            let path = name_in_file.to_lowercase().replace("__", ".");
            set(&mut tree, &name, &path, value, &fields)?;
        }
        let mut config: Self = serde_path_to_error::deserialize(&tree).map_err(|e| {
            let path = e.path().to_string();
            let path = setting_of(&path, &fields);
            of_file(wrong_value(path, e.into_inner(), &tree, &fields))
        })?;
        config.storage.environment = credentials;
        config.validate().map_err(of_file)?;
        Ok(config)
    }
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::invalid("config", format!("cannot read {}", path.display())).because(e)
    })?;
    parsed(&text, path.display())
}

fn parsed(text: &str, what: impl std::fmt::Display) -> Result<Value> {
    serde_yaml_ng::from_str(text)
        .map_err(|e| Error::invalid("config", format!("{what} is not YAML")).because(e))
}

fn below(section: &str, key: &str) -> String {
    if section.is_empty() {
        key.to_owned()
    } else {
        format!("{section}.{key}")
    }
}

/// Checks the keys of a section, and those below. An empty section becomes an empty mapping.
fn check_section(section: &str, tree: &mut Value, fields: &[Field]) -> Result<()> {
    if tree.is_null() {
        *tree = Value::Object(Map::new());
    }
    let Value::Object(entries) = tree else {
        let what = if section.is_empty() {
            "the configuration"
        } else {
            section
        };
        return Err(Error::invalid(
            section,
            format!("{what} must be a mapping of keys to values"),
        ));
    };
    for (key, value) in entries {
        let path = below(section, key);
        match fields.iter().find(|field| field.path == path) {
            Some(Field {
                kind: Kind::Section,
                ..
            }) => check_section(&path, value, fields)?,
            Some(_) => {}
            None => return Err(unknown(&path, &path, fields)),
        }
    }
    Ok(())
}

/// Sets the value of the variable `name`.
fn set(tree: &mut Value, name: &str, path: &str, text: String, fields: &[Field]) -> Result<()> {
    let (section, key) = path.rsplit_once('.').unwrap_or(("", path));
    let (field, is_entry) = match fields.iter().find(|field| field.path == path) {
        Some(field) => (field, false),
        // An entry of a free mapping, such as storage.options.aws_region.
        None => match fields
            .iter()
            .find(|field| field.path == section && field.kind == Kind::Mapping)
        {
            Some(field) => (field, true),
            None if path.contains('.') => return Err(unknown(name, path, fields)),
            None => {
                let near = fields
                    .iter()
                    .any(|f| !f.path.contains('.') && levenshtein(&f.path, path) <= TYPO_EDITS_MAX);
                return if near && path.len() > TYPO_EDITS_MAX * 2 {
                    Err(unknown(name, path, fields))
                } else {
                    Ok(())
                };
            }
        },
    };
    let value = match field.kind {
        Kind::Section => {
            return Err(Error::invalid(
                path,
                format!("{name} is a section; set {name}__KEY"),
            ));
        }
        Kind::Text { nullable: true } if text.is_empty() => Value::Null,
        Kind::Text { .. } => Value::String(text),
        Kind::Mapping if is_entry => Value::String(text),
        Kind::Mapping | Kind::Other => serde_yaml_ng::from_str(&text).map_err(|e| {
            Error::invalid(path, format!("{name} cannot be read as a value")).because(e)
        })?,
    };
    let mut at = tree;
    for key in section.split('.').filter(|key| !key.is_empty()) {
        if !at[key].is_object() {
            at[key] = Value::Object(Map::new());
        }
        at = &mut at[key];
    }
    at[key] = value;
    Ok(())
}

fn unknown(name: &str, path: &str, fields: &[Field]) -> Error {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    // The last part of the key decides first, so that a key in a wrong section is recognised; then
    // the nearest section.
    let near = fields.iter().min_by_key(|field| {
        (
            levenshtein(&last(&field.path), &last(path)),
            levenshtein(&field.path, path),
        )
    });
    let near = near.map_or("", |field| &field.path);
    Error::invalid(
        path,
        format!("there is no setting {name}; did you mean {near}?"),
    )
    .with("known", near)
}

/// Says what the value at `path` should be in the words of the reference page, since serde's are
/// those of Rust.
fn wrong_value(path: &str, cause: serde_json::Error, tree: &Value, fields: &[Field]) -> Error {
    let mut value = tree;
    for key in path.split('.') {
        value = value.get(key).unwrap_or(&Value::Null);
    }
    match fields.iter().find(|field| field.path == path) {
        Some(field) => Error::invalid(
            path,
            format!("{path} cannot be {value}; give {}", field.wanted),
        ),
        // An entry of a free mapping.
        None => Error::invalid(path, format!("{path} cannot be {value}; give text")).because(cause),
    }
}

/// Returns the setting in which a value is wrong: an item of a list is not a setting by itself.
fn setting_of<'a>(path: &'a str, fields: &[Field]) -> &'a str {
    let list = path.split('[').next().unwrap_or(path);
    if fields.iter().any(|field| field.path == list) {
        list
    } else {
        path
    }
}
