//! File < environment < flags, merged by the `config` crate and read strictly by our own schema.
//!
//! `config` would convert between types silently (`true` to 1, 4.7 to 5), and its `try_parsing` turns the password
//! `0123` into `123`. So every value keeps the type its source gave it until the schema says what it must be: text from
//! the environment or a flag is parsed as what the key needs, a value from the file must already have the right type.

use std::collections::BTreeMap;
use std::path::Path;

use config::{Config, Environment, FileFormat, Source, Value, ValueKind};
use serde_json::{Map, Value as Json};

use super::Settings;
use super::show::{Format, Reference, reference};
use crate::error::{Error, Result};

const PREFIX: &str = "BACKFILLD_";
/// Variables of ours that are no settings: read by the command line, the test suite and the benchmarks.
const NOT_SETTINGS: [&str; 4] = ["BACKFILLD_CONFIG", "BACKFILLD_PG_BIN", "BACKFILLD_TEST_", "BACKFILLD_BENCH_"];

/// The process environment; variables that are not UTF-8 are left out unless they are ours.
pub(super) fn process_environment() -> Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    for (key, value) in std::env::vars_os() {
        let Ok(key) = key.into_string() else { continue };
        match value.into_string() {
            Ok(value) => {
                out.insert(key, value);
            }
            Err(_) if key.starts_with(PREFIX) => {
                return Err(Error::input(format!("environment variable {key} is not UTF-8")));
            }
            Err(_) => {}
        }
    }
    Ok(out)
}

/// Merges the three layers. The second result says for each key that is set where its value came from.
pub(super) fn merge(
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
    flags: Vec<(String, String)>,
) -> Result<(Settings, BTreeMap<String, String>)> {
    let keys = reference();
    let mut sources = BTreeMap::new();
    let mut builder = Config::builder();

    if let Some(path) = file {
        let text = read_file(path)?;
        for key in check_file(path, &text, &keys)? {
            sources.insert(key, path.display().to_string());
        }
        builder = builder.add_source(config::File::from_str(&text, FileFormat::Toml));
    }

    let ours = our_variables(environment, &keys)?;
    for name in ours.keys() {
        sources.insert(key_of(name), name.clone());
    }
    let environment = Environment::with_prefix(PREFIX.trim_end_matches('_')).prefix_separator("_").separator("__");
    builder = builder.add_source(environment.source(Some(ours.into_iter().collect())));

    for (key, value) in flags {
        if !keys.iter().any(|k| k.key == key) {
            return Err(unknown_key(&key, "the command line", &keys));
        }
        sources.insert(key.clone(), "command line".into());
        builder = builder.set_override(&key, value).map_err(merge_failed)?;
    }

    let merged = builder.build().map_err(merge_failed)?;
    let tree = merged.collect().map_err(merge_failed)?;
    let mut json = Map::new();
    for key in &keys {
        let Some(value) = find(&tree, &key.key) else {
            sources.remove(&key.key);
            continue;
        };
        let source = sources.get(&key.key).map_or("", String::as_str);
        match typed(key, value, source, file)? {
            Some(value) => insert(&mut json, &key.key, value),
            None => {
                sources.remove(&key.key);
            }
        }
    }
    let settings = serde_json::from_value(Json::Object(json))
        .map_err(|e| Error::internal("the settings do not fit their own schema").with_source(e))?;
    Ok((settings, sources))
}

fn read_file(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| {
        Error::input(format!("cannot read settings file {}", path.display()))
            .with_source(e)
            .with_hint("name an existing file with --config or BACKFILLD_CONFIG; `backfilld config show` prints one")
    })
}

/// The keys the file sets. Parse errors name the place, never the text: it may hold a password.
fn check_file(path: &Path, text: &str, keys: &[Reference]) -> Result<Vec<String>> {
    let table: toml::Table = toml::from_str(text).map_err(|e| {
        let at = e.span().map_or(String::new(), |span| {
            let before = text.get(..span.start).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            format!(":{line}:{column}")
        });
        Error::input(format!("{}{at}: not valid TOML: {}", path.display(), e.message()))
    })?;
    let mut found = Vec::new();
    for (name, value) in &table {
        let is_section = keys.iter().any(|k| k.section() == Some(name.as_str()));
        match value {
            toml::Value::Table(section) if is_section => {
                for key in section.keys() {
                    found.push(format!("{name}.{key}"));
                }
            }
            _ if is_section => {
                return Err(Error::input(format!(
                    "{}: `{name}`: expected a table `[{name}]`, found {}",
                    path.display(),
                    value.type_str()
                )));
            }
            _ => found.push(name.clone()),
        }
    }
    match found.iter().find(|f| !keys.iter().any(|k| &k.key == *f)) {
        Some(unknown) => Err(unknown_key(unknown, &path.display().to_string(), keys)),
        None => Ok(found),
    }
}

/// Our variables out of the environment. Kubernetes sets `BACKFILLD_PORT`, `BACKFILLD_SERVICE_HOST` and the like for a
/// service named backfilld, so only what looks like one of our keys has to be one.
fn our_variables(environment: &BTreeMap<String, String>, keys: &[Reference]) -> Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    for (name, value) in environment {
        if !name.starts_with(PREFIX) || NOT_SETTINGS.iter().any(|n| name.starts_with(n)) {
            continue;
        }
        if keys.iter().any(|k| k.variable() == *name) {
            out.insert(name.clone(), value.clone());
            continue;
        }
        let rest = name.trim_start_matches(PREFIX);
        let looks_ours = rest.contains("__")
            || keys.iter().filter_map(Reference::section).any(|section| {
                rest.to_ascii_lowercase().strip_prefix(section).is_some_and(|r| r.is_empty() || r.starts_with('_'))
            });
        if looks_ours {
            let wanted = nearest(name, keys.iter().map(Reference::variable));
            return Err(Error::input(format!("unknown environment variable {name}"))
                .with_hint(format!("did you mean {wanted}? sections and keys are separated by two underscores")));
        }
    }
    Ok(out)
}

fn key_of(variable: &str) -> String {
    variable.trim_start_matches(PREFIX).to_ascii_lowercase().replace("__", ".")
}

fn unknown_key(key: &str, place: &str, keys: &[Reference]) -> Error {
    let wanted = nearest(key, keys.iter().map(|k| k.key.clone()));
    Error::input(format!("{place}: unknown setting `{key}`"))
        .with_hint(format!("did you mean `{wanted}`? docs/settings.md lists them all"))
}

fn find<'a>(tree: &'a config::Map<String, Value>, path: &str) -> Option<&'a Value> {
    let mut parts = path.split('.');
    let mut value = tree.get(parts.next()?)?;
    for part in parts {
        value = match &value.kind {
            ValueKind::Table(table) => table.get(part)?,
            _ => return None,
        };
    }
    Some(value)
}

fn insert(json: &mut Map<String, Json>, path: &str, value: Json) {
    match path.split_once('.') {
        None => {
            json.insert(path.to_owned(), value);
        }
        Some((section, rest)) => {
            let entry = json.entry(section).or_insert_with(|| Json::Object(Map::new()));
            if let Json::Object(inner) = entry {
                insert(inner, rest, value);
            }
        }
    }
}

/// The value as its key needs it; `None` for an optional key that was set to nothing.
fn typed(key: &Reference, value: &Value, source: &str, file: Option<&Path>) -> Result<Option<Json>> {
    let from_file = file.is_some_and(|f| f.display().to_string() == source);
    let wrong = |found: String| {
        let shown = if key.secret() { "something else".into() } else { found };
        let expected = key.expected();
        Error::input(format!("{source}: `{}`: expected {expected}, found {shown}", key.key))
    };
    let text = match &value.kind {
        ValueKind::String(s) => Some(s.as_str()),
        _ => None,
    };
    if key.optional && text.is_some_and(str::is_empty) {
        return Ok(None);
    }
    let json = match (key.format, &value.kind, text) {
        (Format::Integer, ValueKind::I64(n), _) => Some(Json::from(*n)),
        (Format::Integer, _, Some(s)) if !from_file => s.trim().parse::<i64>().ok().map(Json::from),
        (Format::Bool, ValueKind::Boolean(b), _) => Some(Json::from(*b)),
        (Format::Bool, _, Some(s)) if !from_file => boolean(s).map(Json::from),
        (Format::Duration, _, Some(s)) => humantime::parse_duration(s).ok().map(|_| Json::from(s)),
        (Format::Choice, _, Some(s)) => key.choices.iter().any(|c| c == s).then(|| Json::from(s)),
        (Format::Text | Format::Secret | Format::Conninfo, _, Some(s)) => Some(Json::from(s)),
        _ => None,
    };
    let in_range = match (&json, key.format) {
        (Some(n), Format::Integer) => n.as_i64().is_some_and(|n| key.range.contains(&n)),
        _ => true,
    };
    match json {
        Some(json) if in_range => Ok(Some(json)),
        _ => Err(wrong(describe(&value.kind))),
    }
}

fn boolean(s: &str) -> Option<bool> {
    match s.trim().to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "1" => Some(true),
        "false" | "off" | "no" | "0" => Some(false),
        _ => None,
    }
}

fn describe(kind: &ValueKind) -> String {
    match kind {
        ValueKind::String(s) => format!("{s:?}"),
        ValueKind::Boolean(b) => format!("the boolean {b}"),
        ValueKind::Float(f) => format!("the number {f}"),
        ValueKind::Array(_) => "an array".into(),
        ValueKind::Table(_) => "a table".into(),
        ValueKind::Nil => "nothing".into(),
        other => format!("the number {other}"),
    }
}

/// The candidate with the smallest edit distance to `wrong`.
fn nearest(wrong: &str, candidates: impl Iterator<Item = String>) -> String {
    candidates.min_by_key(|c| distance(&wrong.to_lowercase(), &c.to_lowercase())).unwrap_or_default()
}

/// Levenshtein distance in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn merge_failed(e: config::ConfigError) -> Error {
    Error::internal("cannot merge the settings").with_source(e)
}
