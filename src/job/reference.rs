//! docs/job-reference.md: every key of job.toml, made from the types' JSON Schema and from an example that uses each key
//! once.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::Value as Json;

use super::load::parse;
use super::spec::JobSpec;
use crate::error::Result;

/// The least that a job says. README.md shows it.
const SHORTEST: &str = include_str!("examples/shortest.toml");
/// A job that says everything once.
const EVERY_KEY: &str = include_str!("examples/every_key.toml");
/// The SQL file that [`EVERY_KEY`] names.
const ADD_LINE: &str = "create or replace function billing.add_line(bigint, text, numeric) returns void \
                        language sql as 'select'";

/// A table of job.toml: its heading, where it is in the schema and in the example, and its keys in reading order.
struct Section {
    heading: &'static str,
    /// JSON pointer into the schema, to the object with the keys; empty for the top level.
    schema: &'static str,
    /// Path in the example.
    example: &'static [&'static str],
    order: String,
}

/// docs/job-reference.md.
///
/// # Errors
/// None, as long as the example is a valid job; a test holds it to that.
fn reference_markdown() -> Result<String> {
    let example = parse(EVERY_KEY, "every_key.toml", |_| Ok(ADD_LINE.to_owned()))?;
    let values: toml::Table = EVERY_KEY.parse().map_err(|e| crate::Error::internal("example").with_source(e))?;
    let settings = schemars::generate::SchemaSettings::default().with(|s| s.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<JobSpec>().to_value();
    let mut out = format!(
        "# job.toml\n\n\
         A job is a directory with a `job.toml` and the SQL files that it names. The shortest useful one:\n\n\
         ```toml\n{SHORTEST}```\n\n\
         deploy/jobs/messages_auth_user_id is one that uses most of what there is. Unknown keys, wrong types and\n\
         missing files are errors that name the key. `docs/job.schema.json` (also `backfilld config job-schema`) is the\n\
         JSON Schema, for editors that complete and check TOML. Keys that change what a job does cannot change once\n\
         it has started; `description`, `access`, `batching`, `verification`, `watch`, `report` and `hold_before` can, with\n\
         the next start of the daemon.\n\n\
         Names of tables are written as in SQL: `public.messages`, `public.\"Messages\"`. All other names (columns,\n\
         indexes, constraints, policies, roles) are written exactly as they are, without quotes.\n\n\
         Expressions see the target as `t` and each source by its alias. They are evaluated with `search_path =\n\
         pg_catalog, pg_temp`, so functions and types outside `pg_catalog` need their schema.\n\n\
         This page is made from the comments in src/job/spec.rs and the files beside it.\n"
    );
    for section in sections(&example) {
        let node = schema.pointer(section.schema).unwrap_or(&Json::Null);
        let _ = writeln!(out, "\n## {}", section.heading);
        let text = one_line(&node["description"]);
        if !section.schema.is_empty() && !text.is_empty() {
            let _ = writeln!(out, "\n{text}");
        }
        let required: Vec<&str> = node["required"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
        let mut keys: Vec<(&String, &Json)> = node["properties"].as_object().into_iter().flatten().collect();
        keys.sort_by_key(|(name, _)| section.order.find(&format!("\"{name}\":")).unwrap_or(usize::MAX));
        let shown = find(&values, section.example);
        for (name, property) in keys {
            let shown = shown.as_ref().and_then(|t| t.get(name));
            key(&mut out, name, property, required.contains(&name.as_str()), shown);
        }
    }
    Ok(out)
}

fn sections(e: &JobSpec) -> Vec<Section> {
    let section = |heading, schema, example, order| Section { heading, schema, example, order };
    let policies = e.policies.as_ref();
    vec![
        section("Top level", "", &[], text(e)),
        section("[target]", "/properties/target", &["target"], text(&e.target)),
        section("[[source]]", "/properties/source/items", &["source"], text(&e.source.last())),
        section("[[columns]]", "/properties/columns/items", &["columns"], text(&e.columns.first())),
        section("[[foreign_keys]]", "/properties/foreign_keys/items", &["foreign_keys"], text(&e.foreign_keys.first())),
        section("[[indexes]]", "/properties/indexes/items", &["indexes"], text(&e.indexes.first())),
        section("[[functions]]", "/properties/functions/items", &["functions"], text(&e.functions.first())),
        section("[policies]", "/properties/policies", &["policies"], text(&policies)),
        section(
            "[[policies.create]]",
            "/properties/policies/properties/create/items",
            &["policies", "create"],
            text(&policies.and_then(|p| p.create.first())),
        ),
        section("[[agree]]", "/properties/agree/items", &["agree"], text(&e.agree.first())),
        section("[access]", "/properties/access", &["access"], text(&e.access)),
        section(
            "[[access.calls]]",
            "/properties/access/properties/calls/items",
            &["access", "calls"],
            text(&e.access.as_ref().and_then(|a| a.calls.first())),
        ),
        section(
            "[[access.accept]]",
            "/properties/access/properties/accept/items",
            &["access", "accept"],
            text(&e.access.as_ref().and_then(|a| a.accept.first())),
        ),
        section("[side_effects]", "/properties/side_effects", &["side_effects"], text(&e.side_effects)),
        section("[batching]", "/properties/batching", &["batching"], text(&e.batching)),
        section("[throttle]", "/properties/throttle", &["throttle"], text(&e.throttle)),
        section(
            "[[throttle.queries]]",
            "/properties/throttle/properties/queries/items",
            &["throttle", "queries"],
            text(&e.throttle.queries.first()),
        ),
        section(
            "[[throttle.http]]",
            "/properties/throttle/properties/http/items",
            &["throttle", "http"],
            text(&e.throttle.http.first()),
        ),
        section(
            "[[throttle.windows]]",
            "/properties/throttle/properties/windows/items",
            &["throttle", "windows"],
            text(&e.throttle.windows.first()),
        ),
        section("[verification]", "/properties/verification", &["verification"], text(&e.verification)),
        section("[watch]", "/properties/watch", &["watch"], text(&e.watch)),
        section("[report]", "/properties/report", &["report"], text(&e.report)),
        section(
            "[[report.queries]]",
            "/properties/report/properties/queries/items",
            &["report", "queries"],
            text(&e.report.queries.first()),
        ),
    ]
}

/// The schema is sorted by name; serialized text keeps the order in which a reader wants it.
fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// The table of the example at `path`; of a list of tables all their keys, the last one's first.
fn find(table: &toml::Table, path: &[&str]) -> Option<toml::Table> {
    let Some((head, rest)) = path.split_first() else { return Some(table.clone()) };
    match table.get(*head)? {
        toml::Value::Table(inner) => find(inner, rest),
        toml::Value::Array(list) => {
            let tables = list.iter().filter_map(|t| find(t.as_table()?, rest));
            tables.reduce(|mut all, next| {
                all.extend(next);
                all
            })
        }
        _ => None,
    }
}

fn key(out: &mut String, name: &str, property: &Json, required: bool, example: Option<&toml::Value>) {
    let any_of = property["anyOf"].as_array();
    let shape = any_of.and_then(|any| any.iter().find(|a| a["type"] != "null")).unwrap_or(property);
    let _ = writeln!(out, "\n### `{name}`\n\n{}\n", one_line(&property["description"]));
    let _ = writeln!(out, "- Value: {}", expected(shape, property));
    for choice in shape["oneOf"].as_array().into_iter().chain(shape["items"]["oneOf"].as_array()).flatten() {
        let _ = writeln!(out, "  - `{}`: {}", choice["const"], one_line(&choice["description"]));
    }
    let _ = match &property["default"] {
        _ if required => writeln!(out, "- Required"),
        Json::Null => writeln!(out, "- Default: none"),
        // The defaults of a table are those of its keys.
        Json::Object(_) => Ok(()),
        default => writeln!(out, "- Default: `{default}`"),
    };
    // Tables have a section of their own.
    match example {
        Some(toml::Value::Table(t)) if shape["additionalProperties"]["type"] == "string" || name == "critical" => {
            let bare = |k: &str| k.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            let quoted = |k: &str| if bare(k) { k.to_owned() } else { format!("\"{k}\"") };
            let pairs: Vec<String> = t.iter().map(|(k, v)| format!("{} = {}", quoted(k), literal(v))).collect();
            let _ = writeln!(out, "- Example: `{name} = {{ {} }}`", pairs.join(", "));
        }
        Some(toml::Value::Table(_)) | None => {}
        Some(toml::Value::Array(list)) if list.iter().any(toml::Value::is_table) => {}
        Some(value) => {
            let _ = writeln!(out, "- Example: `{name} = {}`", literal(value));
        }
    }
}

/// A scalar or a list of them, which TOML and JSON write alike.
fn literal(value: &toml::Value) -> String {
    match value {
        toml::Value::Array(list) => format!("[{}]", list.iter().map(literal).collect::<Vec<_>>().join(", ")),
        other => text(other),
    }
}

fn expected(shape: &Json, property: &Json) -> &'static str {
    let text = property["type"].to_string() + &shape["type"].to_string();
    let of_objects = shape["items"]["type"] == "object";
    if shape["oneOf"].is_array() {
        "one of"
    } else if shape["items"]["oneOf"].is_array() {
        "a list of"
    } else if text.contains("array") {
        if of_objects { "a list of tables, see below" } else { "a list of strings" }
    } else if text.contains("object") {
        match shape["additionalProperties"]["type"].as_str() {
            Some("string") => "a table of strings",
            Some("number") => "a table of numbers",
            _ => "a table, see below",
        }
    } else if text.contains("integer") {
        "an integer"
    } else if text.contains("boolean") {
        "true or false"
    } else if property["default"].as_str().is_some_and(|d| d.parse::<humantime::Duration>().is_ok()) {
        "a duration such as \"100ms\" or \"2s\""
    } else {
        "a string"
    }
}

fn one_line(text: &Json) -> String {
    text.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_are_up_to_date() {
        let schema = serde_json::to_string_pretty(&super::super::spec::json_schema()).unwrap() + "\n";
        for (path, made) in [("docs/job-reference.md", reference_markdown().unwrap()), ("docs/job.schema.json", schema)]
        {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
            if std::env::var_os("BACKFILLD_TEST_BLESS").is_some() {
                std::fs::write(&path, &made).unwrap();
            }
            let kept = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(kept == made, "{} is stale; run the test with BACKFILLD_TEST_BLESS=1", path.display());
        }
    }

    #[test]
    fn every_key_is_explained_and_has_an_example() {
        let text = reference_markdown().unwrap();
        for entry in text.split("\n### ").skip(1) {
            let name = entry.split('`').nth(1).unwrap();
            let table = entry.contains("see below");
            assert!(table || entry.contains(&format!("- Example: `{name} = ")), "no example: {entry}");
            assert!(entry.lines().nth(2).is_some_and(|l| l.ends_with(['.', ')'])), "no description: {entry}");
        }
        let keys = |schema: &Json| schema["properties"].as_object().map_or(0, serde_json::Map::len);
        let schema = super::super::spec::json_schema();
        let all = keys(&schema) + schema["$defs"].as_object().unwrap().values().map(keys).sum::<usize>();
        assert_eq!(text.matches("\n### `").count(), all);
    }

    #[test]
    fn the_shortest_job_is_a_job_and_stands_in_the_readme() {
        let job = parse(SHORTEST, "job.toml", |_| Err(crate::Error::input("no file"))).unwrap();
        assert_eq!(job.columns.len(), 1);
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
        assert!(readme.contains(SHORTEST), "README.md shows another shortest job than src/job/examples/shortest.toml");
    }
}
