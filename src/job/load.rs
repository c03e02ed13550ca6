//! Reads a job directory and validates it, before any database is asked.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::lex;
use super::spec::{JobSpec, TARGET_ALIAS};
use super::validate::validate;
use crate::error::{Error, Result};

/// Keys that the format knows and this version does not do. They are refused by name, never half done.
const NOT_IMPLEMENTED: &[(&str, &str)] = &[
    ("hooks", "a hook in a job (hooks are settings of the daemon, docs/control.md)"),
    ("target.partitions", "partitioned targets"),
    ("columns.exists", "columns that exist already"),
    ("columns.on_conflict", "columns that exist already"),
    ("constraints", "composite foreign keys that replace the triggers"),
    ("side_effects.guard", "guards in the WHEN clause of the application's triggers"),
];

/// Loads `path`: a directory with `job.toml`, or the file itself.
///
/// # Errors
/// Input errors that name file, key, what was expected and what was found.
pub fn load(path: &Path) -> Result<JobSpec> {
    let file = if path.is_dir() { path.join("job.toml") } else { path.to_owned() };
    let text = read(&file)?;
    let dir = file.parent().map_or_else(|| PathBuf::from("."), Path::to_owned);
    parse(&text, &file.display().to_string(), |name| read(&dir.join(name)))
}

/// Parses the text of a `job.toml`; `read_file` gives the text of the SQL files beside it.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, origin: &str, read_file: impl Fn(&str) -> Result<String>) -> Result<JobSpec> {
    let bad = |message: String| Error::input(format!("{origin}: {message}"));
    let table: toml::Table = toml::from_str(text).map_err(|e| bad(e.to_string().trim_end().to_owned()))?;
    if let Some((key, what)) = NOT_IMPLEMENTED.iter().find(|(key, _)| has_key(&table, key)) {
        return Err(bad(format!("{key}: {what} is not implemented in this version"))
            .with_hint("remove the key; docs/job-reference.md lists what there is"));
    }
    let mut spec: JobSpec = toml::from_str(text).map_err(|e| {
        bad(e.to_string().trim_end().to_owned()).with_hint("docs/job-reference.md lists every key with its type")
    })?;
    for (i, function) in spec.functions.iter_mut().enumerate() {
        let key = format!("functions[{i}].file");
        if !function.statements.is_empty() {
            return Err(bad(format!("functions[{i}].statements: not a key of job.toml; name a file")));
        }
        if Path::new(&function.file).is_absolute() || function.file.split('/').any(|part| part == "..") {
            return Err(bad(format!("{key}: {:?} must be a file beside job.toml", function.file)));
        }
        let sql = read_file(&function.file).map_err(|e| e.context(format!("{origin}: {key}")))?;
        function.statements = function_statements(&sql).map_err(|m| Error::input(format!("{}: {m}", function.file)))?;
    }
    let problems = validate(&spec);
    if problems.is_empty() {
        return Ok(spec);
    }
    Err(bad(problems.join(&format!("\n{origin}: "))))
}

fn has_key(table: &toml::Table, path: &str) -> bool {
    match path.split_once('.') {
        None => table.contains_key(path),
        Some((head, rest)) => match table.get(head) {
            Some(toml::Value::Table(t)) => has_key(t, rest),
            Some(toml::Value::Array(a)) => a.iter().any(|v| v.as_table().is_some_and(|t| has_key(t, rest))),
            _ => false,
        },
    }
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).map_err(|e| {
        let hint = if e.kind() == std::io::ErrorKind::NotFound {
            "give the job's directory (with its job.toml), such as deploy/jobs/messages_auth_user_id"
        } else {
            "the file must be readable UTF-8 text"
        };
        Error::input(format!("cannot read {}", file.display())).with_source(e).with_hint(hint)
    })
}

/// The statements of a function file. Only statements about functions pass: anything else (a `commit`, a `drop`) would
/// break the promise that the flip is one transaction and can be undone.
fn function_statements(sql: &str) -> Result<Vec<String>, String> {
    let statements = lex::split_statements(sql)?;
    for (i, statement) in statements.iter().enumerate() {
        let words = lex::leading_words(statement, 5)?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let allowed = matches!(
            words.as_slice(),
            ["create", "or", "replace", "function" | "procedure", ..]
                | ["comment", "on", "function" | "procedure", ..]
                | ["alter", "function" | "procedure", ..]
        ) || (matches!(words.first(), Some(&"grant" | &"revoke"))
            && lex::tokens(statement)?.iter().any(|t| t.value == "function" || t.value == "procedure"));
        if !allowed {
            return Err(format!(
                "statement {}: expected create or replace function, comment on function, alter function, grant or \
                 revoke on function; found {:?}",
                i + 1,
                words.join(" ")
            ));
        }
    }
    if statements.is_empty() {
        return Err("no statement in it".into());
    }
    Ok(statements)
}

impl JobSpec {
    /// SHA-256, in hex, of everything that changes what the job does. What may be changed while the job runs (batch
    /// sizes, hold points, descriptions) is left out.
    pub fn hash(&self) -> String {
        let mut fixed = serde_json::to_value(self).unwrap_or_default();
        if let Some(keys) = fixed.as_object_mut() {
            // By name, not set to their defaults: a default that a later version changes or adds must not matter either.
            for key in ["throttle", "verification", "access", "watch", "report", "hold_before", "description"] {
                keys.remove(key);
            }
            if let Some(batching) = keys.get_mut("batching").and_then(|b| b.as_object_mut()) {
                batching.retain(|key, _| key == "strategy");
            }
        }
        let json = pruned(fixed).to_string();
        Sha256::digest(json.as_bytes()).iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Every alias that expressions may use: `t`, then the sources in order.
    pub fn aliases(&self) -> Vec<&str> {
        std::iter::once(TARGET_ALIAS).chain(self.source.iter().map(|j| j.alias.as_str())).collect()
    }
}

/// Without what says nothing (null, false, empty), so that a key which a later version adds, and a job does not use, leaves
/// the hashes of jobs that are under way as they are.
fn pruned(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value::{Array, Bool, Null, Object, String};
    let says_nothing = |v: &serde_json::Value| match v {
        Null | Bool(false) => true,
        String(s) => s.is_empty(),
        Array(a) => a.is_empty(),
        Object(o) => o.is_empty(),
        _ => false,
    };
    match value {
        Object(o) => {
            let kept = o.into_iter().map(|(k, v)| (k, pruned(v))).filter(|(_, v)| !says_nothing(v));
            Object(kept.collect())
        }
        Array(a) => Array(a.into_iter().map(pruned).collect()),
        other => other,
    }
}

/// The paths at which two versions of a job differ, with both values, for the refusal of a changed job.
pub fn diff(old: &serde_json::Value, new: &serde_json::Value) -> Vec<String> {
    fn walk(path: &str, a: &serde_json::Value, b: &serde_json::Value, out: &mut Vec<String>) {
        use serde_json::Value::{Array, Object};
        match (a, b) {
            _ if a == b => {}
            (Object(x), Object(y)) => {
                let keys: std::collections::BTreeSet<&String> = x.keys().chain(y.keys()).collect();
                for key in keys {
                    let null = &serde_json::Value::Null;
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(&path, x.get(key).unwrap_or(null), y.get(key).unwrap_or(null), out);
                }
            }
            (Array(x), Array(y)) if x.len() == y.len() => {
                for (i, (x, y)) in x.iter().zip(y).enumerate() {
                    walk(&format!("{path}[{i}]"), x, y, out);
                }
            }
            _ => out.push(format!("{path}: was {a}, is {b}")),
        }
    }
    let mut out = Vec::new();
    walk("", old, new, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        name = "fill"
        target.table = "public.messages"
        [[source]]
        alias = "c"
        table = "public.conversations"
        on = { id = "t.conversation_id" }
        [[columns]]
        name = "owner"
        value = "c.owner"
    "#;

    fn no_file(name: &str) -> Result<String> {
        Err(Error::input(format!("no {name}")))
    }

    fn refusal(text: &str) -> String {
        parse(text, "job.toml", no_file).expect_err("is refused").to_string()
    }

    #[test]
    fn the_shipped_job_loads() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs/messages_auth_user_id");
        let spec = load(&dir).expect("loads");
        assert_eq!(spec.name, "messages_auth_user_id");
        assert_eq!(spec.functions[0].statements.len(), 2);
    }

    #[test]
    fn a_short_job_is_enough() {
        let spec = parse(SMALL, "job.toml", no_file).expect("parses");
        assert_eq!(spec.columns[0].name.as_str(), "owner");
    }

    #[test]
    fn unknown_and_unimplemented_keys_are_named() {
        assert!(refusal(&format!("{SMALL}\nbogus = 1")).contains("bogus"));
        assert!(refusal(&format!("{SMALL}\nexists = true")).contains("columns.exists"));
        assert!(refusal(&format!("hooks = 1\n{SMALL}")).contains("hooks"));
    }

    #[test]
    fn a_function_file_cannot_end_the_transaction() {
        assert!(function_statements("create or replace function f() returns int as 'x'; commit;").is_err());
        assert!(function_statements("drop table x").is_err());
        assert!(function_statements("").is_err());
    }

    #[test]
    fn the_hash_ignores_what_may_change_while_running() {
        let a = parse(SMALL, "job.toml", no_file).expect("parses");
        let mut b = a.clone();
        b.batching.max_rows = 77;
        b.batching.lanes = Some(4);
        b.throttle.duty = 0.5;
        assert_eq!(a.hash(), b.hash());
        assert!(
            !pruned(serde_json::to_value(&a).unwrap()).to_string().contains("null"),
            "says nothing of what is not there"
        );
        b.columns[0].not_null = true;
        assert_ne!(a.hash(), b.hash());
        let lines = diff(&serde_json::to_value(&a).unwrap(), &serde_json::to_value(&b).unwrap());
        assert!(lines.contains(&"columns[0].not_null: was false, is true".to_owned()), "{lines:?}");
    }
}
