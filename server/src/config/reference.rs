//! The settings as a page and as a commented file, from the schema that serde and the comments
//! define.
use super::{ADDRESS, Config};
use schemars::generate::SchemaSettings;
use serde_json::Value;

/// The kind of a setting's value, as far as reading needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Settings of its own.
    Section,
    /// A free mapping of names to text.
    Mapping,
    Text {
        nullable: bool,
    },
    /// Numbers, booleans, lists.
    Other,
}

/// One setting or section.
pub(super) struct Field {
    /// Keys joined by dots.
    pub path: String,
    pub kind: Kind,
    /// The type, for people.
    type_name: String,
    /// The expected value, for error messages.
    pub wanted: String,
    default: Value,
    meaning: String,
}

/// Returns all settings and sections. The fields of a section are together and after it, settings
/// before sections.
pub(super) fn fields() -> Vec<Field> {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<Config>();
    let defaults = serde_json::to_value(Config::default()).unwrap_or_default();
    let mut fields = Vec::new();
    collect_fields("", schema.as_value(), &defaults, &mut fields);
    fields
}

fn collect_fields(section: &str, schema: &Value, defaults: &Value, fields: &mut Vec<Field>) {
    let Some(properties) = schema["properties"].as_object() else {
        return;
    };
    let is_section = |schema: &Value| schema["properties"].is_object();
    let mut properties: Vec<_> = properties.iter().collect();
    properties.sort_by_key(|(key, schema)| (is_section(schema), *key));
    for (key, schema) in properties {
        let path = if section.is_empty() {
            key.clone()
        } else {
            format!("{section}.{key}")
        };
        let meaning = schema["description"]
            .as_str()
            .unwrap_or_default()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        let (kind, type_name) = describe(schema);
        let wanted = if key.ends_with("listen") {
            ADDRESS.to_owned()
        } else {
            describe_values(schema)
        };
        let wanted = if type_name.ends_with(" or null") {
            wanted + ", or null"
        } else {
            wanted
        };
        fields.push(Field {
            path: path.clone(),
            kind,
            type_name,
            wanted,
            default: defaults[key].clone(),
            meaning,
        });
        if kind == Kind::Section {
            collect_fields(&path, schema, &defaults[key], fields);
        }
    }
}

fn describe(schema: &Value) -> (Kind, String) {
    if schema["properties"].is_object() {
        return (Kind::Section, "section".into());
    }
    if let Some(choices) = schema["enum"].as_array() {
        let choices: Vec<String> = choices
            .iter()
            .filter_map(Value::as_str)
            .map(|choice| format!("`{choice}`"))
            .collect();
        return (Kind::Text { nullable: false }, choices.join(", "));
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    };
    let nullable = types.contains(&"null");
    let kind = match types.iter().find(|name| **name != "null") {
        Some(&"string") => Kind::Text { nullable },
        Some(&"object") => Kind::Mapping,
        _ => Kind::Other,
    };
    let names: Vec<&str> = types
        .into_iter()
        .map(|name| match name {
            "string" => "text",
            "array" => "list of text",
            "object" => "mapping of text",
            other => other,
        })
        .collect();
    (kind, names.join(" or "))
}

/// Returns a description of the values that fit a setting.
fn describe_values(schema: &Value) -> String {
    if let Some(choices) = schema["enum"].as_array() {
        let choices: Vec<&str> = choices.iter().filter_map(Value::as_str).collect();
        return format!("one of {}", choices.join(", "));
    }
    let is = |name: &str| match &schema["type"] {
        Value::Array(types) => types.iter().any(|found| found == name),
        one => one == name,
    };
    let wanted = match () {
        () if is("integer") && schema["format"] == "uint32" => {
            "a whole number from 0 to 4294967295"
        }
        () if is("integer") => "a whole number, at least 0",
        () if is("number") => "a number",
        () if is("boolean") => "true or false",
        () if is("array") => "a list of text, such as [a, b]",
        () if is("object") => "a mapping of names to text, such as {name: text}",
        () => "text",
    };
    wanted.to_owned()
}

/// The beginning of the page.
const PREFACE: &str = "\
# Configuration

One YAML file (`superbatch serve --config FILE`); `superbatch check-config --defaults` prints one
with all defaults, and
`superbatch check-config --config FILE` checks yours. Unknown keys are refused.

Environment variables come before the file: `SUPERBATCH_` and the setting's path in capitals, its
dots as two underscores,
so that `SUPERBATCH_COORDINATOR__LEASE_SECONDS=30` sets `coordinator.lease_seconds`. A variable
holds what the file would
have after the key, so a list is written in brackets, `SUPERBATCH_STORAGE__ALLOW_URIS='[s3://data,
s3://models]'`, and
replaces the file's. Of a mapping, each entry may have a variable of its own:
`SUPERBATCH_STORAGE__OPTIONS__AWS_REGION=eu-west-1`. Text is taken as it is; where `null` is
allowed, empty text means it.

Generated from `server/src/config` by `make docs`.

| setting | type | default | meaning |
|---|---|---|---|
";

/// Returns the page `docs/configuration.md`.
pub fn reference() -> String {
    let mut page = String::from(PREFACE);
    for field in fields().iter().filter(|field| field.kind != Kind::Section) {
        let Field {
            path,
            type_name,
            default,
            meaning,
            ..
        } = field;
        page.push_str(&format!(
            "| `{path}` | {type_name} | `{default}` | {} |\n",
            meaning.replace('|', "\\|")
        ));
    }
    page
}

/// Returns a configuration file with all defaults, each under its comment.
pub fn commented_yaml() -> String {
    let mut file = String::from(
        "# Superbatch's configuration. Everything here is the default; leave out what you do not \
        change.\n",
    );
    for field in fields() {
        let depth = field.path.matches('.').count();
        let (indent, key) = (
            "  ".repeat(depth),
            field.path.rsplit('.').next().unwrap_or_default(),
        );
        if depth == 0 {
            file.push('\n');
        }
        file.push_str(&format!("{indent}# {}\n", field.meaning));
        let value = if field.kind == Kind::Section {
            String::new()
        } else {
            format!(" {}", field.default)
        };
        file.push_str(&format!("{indent}{key}:{value}\n"));
    }
    file
}
