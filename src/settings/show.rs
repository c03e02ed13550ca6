//! Settings as a person sees them: the reference of all keys, an example file, the effective values without secrets.

use std::fmt::Write as _;
use std::ops::RangeInclusive;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Serializer;
use serde_json::Value as Json;

use super::{Settings, conninfo};
use crate::error::{Error, Result};

/// What a value looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Secret,
    Conninfo,
    Integer,
    Bool,
    Duration,
    Choice,
}

/// One setting as docs/settings.md describes it; made from the doc comments by way of the JSON Schema.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Path such as `database.pool_size`.
    pub key: String,
    /// What it means, one paragraph.
    pub description: String,
    /// The default as TOML, or `None` where nothing is set or it depends on the machine.
    pub default: Option<String>,
    pub(super) format: Format,
    pub(super) optional: bool,
    pub(super) choices: Vec<String>,
    pub(super) range: RangeInclusive<i64>,
}

impl Reference {
    /// The environment variable that sets it.
    pub fn variable(&self) -> String {
        format!("BACKFILLD_{}", self.key.replace('.', "__").to_ascii_uppercase())
    }

    pub(super) fn section(&self) -> Option<&str> {
        self.key.split_once('.').map(|(section, _)| section)
    }

    pub(super) fn secret(&self) -> bool {
        matches!(self.format, Format::Secret | Format::Conninfo)
    }

    pub(super) fn expected(&self) -> String {
        match self.format {
            Format::Text | Format::Secret => "a string".into(),
            Format::Conninfo => "a connection string".into(),
            Format::Integer => format!("an integer from {} to {}", self.range.start(), self.range.end()),
            Format::Bool => "true or false".into(),
            Format::Duration => "a duration such as \"15s\", \"150ms\" or \"10m\"".into(),
            Format::Choice => format!("one of {}", self.choices.join(", ")),
        }
    }
}

/// All settings in the order of the source.
pub fn reference() -> Vec<Reference> {
    let schema = schema();
    let defaults = serde_json::to_value(Settings::default()).unwrap_or_default();
    let mut scalars = Vec::new();
    let mut sections = Vec::new();
    for (name, property) in properties(&schema) {
        if property.get("properties").is_some() {
            for (key, inner) in properties(property) {
                let default = defaults.pointer(&format!("/{name}/{key}"));
                sections.push(one(format!("{name}.{key}"), inner, default));
            }
        } else {
            // `instance`: the default is the host's name and has no place in a reference.
            scalars.push(one(name.clone(), property, None));
        }
    }
    scalars.append(&mut sections);
    // The schema is sorted by name; serialized text keeps the order in which a reader wants it.
    let text = serde_json::to_string(&Settings::default()).unwrap_or_default();
    scalars.sort_by_key(|reference| {
        let section = reference.section().and_then(|s| text.find(&format!("\"{s}\":"))).unwrap_or_default();
        let name = reference.key.rsplit('.').next().unwrap_or_default();
        (section, text[section..].find(&format!("\"{name}\":")))
    });
    scalars
}

/// Refuses a secret that comes from a command line, which every user of the machine can read.
///
/// # Errors
/// An input error with the key, and not the value.
pub fn refuse_secret(key: &str, value: &str) -> Result<()> {
    let format = reference().into_iter().find(|r| r.key == key).map(|r| r.format);
    let (secret, instead) = match format {
        Some(Format::Secret) => (true, format!("use {key}_file where there is one, or the environment")),
        Some(Format::Conninfo) => {
            (conninfo::has_password(value), "use BACKFILLD_DATABASE__URL or database.password_file".to_owned())
        }
        _ => (false, String::new()),
    };
    if !secret {
        return Ok(());
    }
    Err(Error::input(format!("--set {key}: a secret on a command line could be read by every user of this machine"))
        .with_hint(instead))
}

fn schema() -> Json {
    let settings = schemars::generate::SchemaSettings::default().with(|s| s.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<Settings>().to_value()
}

fn one_line(text: &Json) -> String {
    text.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn properties(schema: &Json) -> impl Iterator<Item = (&String, &Json)> {
    schema.get("properties").and_then(Json::as_object).into_iter().flatten()
}

fn one(key: String, property: &Json, default: Option<&Json>) -> Reference {
    // An optional enum is `anyOf: [enum, null]`.
    let any_of = property.get("anyOf").and_then(Json::as_array);
    let shape = any_of.and_then(|any| any.iter().find(|a| a["type"] != "null")).unwrap_or(property);
    let types: Vec<&str> = match &property["type"] {
        Json::String(one) => vec![one],
        Json::Array(many) => many.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    };
    let mut choices: Vec<String> = Vec::new();
    for choice in shape["oneOf"].as_array().into_iter().chain(shape["enum"].as_array()).flatten() {
        choices.extend(choice.as_str().or_else(|| choice["const"].as_str()).map(str::to_owned));
    }
    let format = match (property["format"].as_str(), choices.is_empty()) {
        (Some("secret"), _) => Format::Secret,
        (Some("conninfo"), _) => Format::Conninfo,
        (Some("duration"), _) => Format::Duration,
        (_, false) => Format::Choice,
        _ if types.contains(&"integer") => Format::Integer,
        _ if types.contains(&"boolean") => Format::Bool,
        _ => Format::Text,
    };
    let limit = |name: &str, fallback| property[name].as_i64().unwrap_or(fallback);
    Reference {
        key,
        description: one_line(&property["description"]),
        default: default.filter(|d| !d.is_null()).map(ToString::to_string),
        format,
        optional: any_of.is_some() || types.contains(&"null"),
        choices,
        range: limit("minimum", 0)..=limit("maximum", i64::from(u32::MAX)),
    }
}

/// docs/settings.md.
pub fn reference_markdown() -> String {
    let mut out = String::from(
        "# Settings\n\n\
         A value comes from the command line, else from the environment, else from the settings file (TOML), else it has\n\
         its default. `backfilld config show` prints what is in effect and where it came from, without secrets;\n\
         `backfilld config check` says what is wrong. Unknown keys are errors. deploy/backfilld.toml is an example.\n\n\
         This page is made from the comments in src/settings/mod.rs.\n",
    );
    let schema = schema();
    let mut section = None;
    for key in reference() {
        if key.section().map(str::to_owned) != section {
            section = key.section().map(str::to_owned);
            let name = section.as_deref().unwrap_or_default();
            let text = one_line(&schema["properties"][name]["description"]);
            let _ = writeln!(out, "\n## {name}\n\n{text}");
        }
        let _ = writeln!(out, "\n### `{}`\n\n{}\n", key.key, key.description);
        let _ = writeln!(out, "- Value: {}", key.expected());
        if let Some(default) = &key.default {
            let _ = writeln!(out, "- Default: `{default}`");
        }
        let _ = writeln!(out, "- Environment: `{}`", key.variable());
    }
    out
}

/// deploy/backfilld.toml: every key commented out with its default.
pub fn example() -> String {
    let mut out = String::from(
        "# Settings of backfilld. Every line here is a comment; what is not set has the default shown.\n\
         # docs/settings.md explains the order of precedence.\n",
    );
    let mut section = None;
    for key in reference() {
        if key.section().map(str::to_owned) != section {
            section = key.section().map(str::to_owned);
            let _ = writeln!(out, "\n[{}]", section.as_deref().unwrap_or_default());
        }
        out.push('\n');
        for line in wrap(&key.description, 110) {
            let _ = writeln!(out, "# {line}");
        }
        let name = key.key.rsplit('.').next().unwrap_or_default();
        let value = key.default.clone().unwrap_or_else(|| match (name, key.format) {
            ("url" | "ddl_url", _) => "\"postgresql://backfilld@db.example.com:5432/app?sslmode=verify-full\"".into(),
            ("port", _) => "5432".into(),
            (_, Format::Choice) => "\"prefer\"".into(),
            _ => "\"\"".into(),
        });
        let _ = writeln!(out, "#{name} = {value}");
    }
    out
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

impl Settings {
    /// The effective settings as TOML with each value's source as a comment. Secrets are `***`, also inside URLs.
    pub fn show(&self) -> String {
        let values = serde_json::to_value(self).unwrap_or_default();
        let mut out = String::new();
        let mut section = None;
        for key in reference() {
            let Some(value) = values.pointer(&format!("/{}", key.key.replace('.', "/"))).filter(|v| !v.is_null())
            else {
                continue;
            };
            if key.section().map(str::to_owned) != section {
                section = key.section().map(str::to_owned);
                let _ = writeln!(out, "\n[{}]", section.as_deref().unwrap_or_default());
            }
            let name = key.key.rsplit('.').next().unwrap_or_default();
            let source = self.sources.get(&key.key).map_or("default", String::as_str);
            let _ = writeln!(out, "{name} = {value}  # {source}");
        }
        if let Ok(target) = self.database.target() {
            let _ =
                writeln!(out, "\n# with libpq's environment and password file: {target}, TLS {:?}", target.tls.mode);
        }
        out
    }
}

/// Serializes a secret as `***`.
pub(super) fn secret<S: Serializer>(value: &Option<SecretString>, s: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(_) => s.serialize_str("***"),
        None => s.serialize_none(),
    }
}

/// Serializes a connection string with its password as `***`.
pub(super) fn secret_conninfo<S: Serializer>(value: &Option<SecretString>, s: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => s.serialize_str(&conninfo::redact(value.expose_secret())),
        None => s.serialize_none(),
    }
}
