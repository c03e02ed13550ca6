//! The rules a job must meet that need no database. Each problem is one line that names the key.

use std::time::Duration;

use super::lex;
use super::spec::{Batching, JobSpec, Join, Policy, PolicyCommand, TARGET_ALIAS};

/// Longest job name: with prefix and suffix it has to fit into a trigger's 63 bytes.
const MAX_NAME: usize = 38;

/// All problems of a job, empty if it is sound.
pub fn validate(spec: &JobSpec) -> Vec<String> {
    let mut out = Vec::new();
    name(spec, &mut out);
    joins("source", &spec.source, &mut out);
    columns(spec, &mut out);
    constraints(spec, &mut out);
    policies(spec, &mut out);
    for (i, agree) in spec.agree.iter().enumerate() {
        joins(&format!("agree[{i}].source"), &agree.source, &mut out);
        let aliases: Vec<&str> =
            std::iter::once(TARGET_ALIAS).chain(agree.source.iter().map(|j| j.alias.as_str())).collect();
        expression(&format!("agree[{i}].value"), &agree.value, &aliases, &mut out);
    }
    for (i, function) in spec.functions.iter().enumerate() {
        if !function.signature.contains('.') || !function.signature.trim_end().ends_with(')') {
            out.push(format!(
                "functions[{i}].signature: expected schema.name(argument types), found {:?}",
                function.signature
            ));
        }
    }
    batching(&spec.batching, &mut out);
    out.extend(super::throttle::problems(&spec.throttle));
    out.extend(super::access::problems(spec));
    out.extend(super::report::problems(&spec.report));
    let pages = spec.verification.chunk_pages;
    if !(128..=1_000_000).contains(&pages) {
        out.push(format!("verification.chunk_pages: expected 128 to 1000000, found {pages}"));
    }
    if let Some(watch) = &spec.watch {
        let day = Duration::from_secs(86_400);
        if watch.lasts > day * 90 {
            out.push("watch.for: expected at most 90d".into());
        }
        if watch.every < Duration::from_millis(100) || watch.every > day {
            out.push("watch.every: expected 100ms to 1d".into());
        }
    }
    out
}

fn name(spec: &JobSpec, out: &mut Vec<String>) {
    let name = &spec.name;
    let starts = name.starts_with(|c: char| c.is_ascii_lowercase());
    let rest = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !starts || !rest || name.len() > MAX_NAME {
        out.push(format!("name: expected 1 to {MAX_NAME} of a-z, 0-9 and _, starting with a letter; found {name:?}"));
    }
}

fn joins(path: &str, joins: &[Join], out: &mut Vec<String>) {
    let mut known = vec![TARGET_ALIAS];
    for (i, join) in joins.iter().enumerate() {
        let alias = join.alias.as_str();
        if known.contains(&alias) {
            out.push(format!("{path}[{i}].alias: {alias:?} is taken; {TARGET_ALIAS:?} is the target"));
        }
        if !alias.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            || !alias.starts_with(|c: char| c.is_ascii_lowercase())
            || alias.len() > 20
        {
            out.push(format!("{path}[{i}].alias: expected up to 20 of a-z, 0-9, _; found {alias:?}"));
        }
        if matches!(alias, "old" | "new" | "d") {
            out.push(format!("{path}[{i}].alias: {alias:?} has a meaning of its own in triggers; choose another"));
        }
        if join.on.is_empty() {
            out.push(format!("{path}[{i}].on: expected at least one column = \"alias.column\""));
        }
        for (column, reference) in &join.on {
            if !known.contains(&reference.alias.as_str()) {
                out.push(format!(
                    "{path}[{i}].on.{column}: alias {:?} is not known here; known are {known:?}",
                    reference.alias.as_str()
                ));
            }
        }
        known.push(alias);
    }
}

fn columns(spec: &JobSpec, out: &mut Vec<String>) {
    if spec.columns.is_empty() {
        out.push("columns: expected at least one".into());
    }
    let aliases = spec.aliases();
    for (i, column) in spec.columns.iter().enumerate() {
        let path = format!("columns[{i}]");
        if spec.columns[..i].iter().any(|c| c.name == column.name) {
            out.push(format!("{path}.name: {:?} is there twice", column.name.as_str()));
        }
        expression(&format!("{path}.value"), &column.value, &aliases, out);
        let own =
            |r: &lex::Reference| r.alias == TARGET_ALIAS && spec.columns.iter().any(|c| c.name.as_str() == r.column);
        if lex::references(&column.value, &aliases).is_ok_and(|refs| refs.iter().any(own)) {
            out.push(format!("{path}.value: uses a column that this job fills"));
        }
        if let Some(sql_type) = &column.sql_type
            && let Err(e) = lex::check_expression(sql_type)
        {
            out.push(format!("{path}.type: {e}"));
        }
    }
    if spec.target.key.iter().any(|k| spec.columns.iter().any(|c| c.name == *k)) {
        out.push("target.key: cannot be a column that this job fills".into());
    }
    for (i, join) in spec.source.iter().enumerate() {
        let own = join
            .on
            .values()
            .find(|r| r.alias.as_str() == TARGET_ALIAS && spec.columns.iter().any(|c| c.name == r.column));
        if let Some(r) = own {
            out.push(format!("source[{i}].on: {:?} is a column that this job fills", r.column.as_str()));
        }
        if join.table == spec.target.table {
            out.push(format!(
                "source[{i}].table: a source that is the target itself is not implemented in this version"
            ));
        }
    }
}

fn expression(path: &str, text: &str, aliases: &[&str], out: &mut Vec<String>) {
    if let Err(e) = lex::check_expression(text) {
        out.push(format!("{path}: {e}"));
    } else if let Err(e) = lex::references(text, aliases) {
        out.push(format!("{path}: {e}"));
    }
}

fn constraints(spec: &JobSpec, out: &mut Vec<String>) {
    let mut names: Vec<&str> = Vec::new();
    for (i, key) in spec.foreign_keys.iter().enumerate() {
        let path = format!("foreign_keys[{i}]");
        if key.columns.is_empty() || key.columns.len() != key.referenced_columns.len() {
            out.push(format!("{path}: expected as many columns as referenced_columns, at least one"));
        }
        if names.contains(&key.name.as_str()) {
            out.push(format!("{path}.name: {:?} is there twice", key.name.as_str()));
        }
        if key.columns.len() > 1 {
            out.push(format!("{path}.columns: composite foreign keys are not implemented in this version"));
        }
        if !key.columns.iter().any(|c| spec.columns.iter().any(|own| own.name == *c)) {
            out.push(format!("{path}.columns: expected a column that this job fills"));
        }
        names.push(key.name.as_str());
    }
    let mut names: Vec<&str> = Vec::new();
    for (i, index) in spec.indexes.iter().enumerate() {
        if index.columns.is_empty() {
            out.push(format!("indexes[{i}].columns: expected at least one column"));
        }
        if names.contains(&index.name.as_str()) {
            out.push(format!("indexes[{i}].name: {:?} is there twice", index.name.as_str()));
        }
        if let Some(Err(e)) = index.predicate.as_deref().map(lex::check_expression) {
            out.push(format!("indexes[{i}].where: {e}"));
        }
        names.push(index.name.as_str());
    }
}

fn policies(spec: &JobSpec, out: &mut Vec<String>) {
    let Some(policies) = &spec.policies else { return };
    for name in &policies.keep {
        if policies.replace.contains(name) {
            out.push(format!("policies: {name:?} is both in replace and in keep"));
        }
    }
    for (i, policy) in policies.create.iter().enumerate() {
        let path = format!("policies.create[{i}]");
        let name = policy.name.as_str();
        if policies.create[..i].iter().any(|p| p.name == policy.name) {
            out.push(format!("{path}.name: {name:?} is there twice"));
        }
        if policies.keep.iter().any(|n| n == name) {
            out.push(format!("{path}.name: {name:?} is also in keep"));
        }
        policy_clauses(&path, policy, out);
    }
}

fn policy_clauses(path: &str, policy: &Policy, out: &mut Vec<String>) {
    if policy.roles.is_empty() {
        out.push(format!("{path}.roles: name the roles; [\"public\"] if it really is for everyone"));
    }
    for (key, clause) in [("using", &policy.using), ("check", &policy.check)] {
        if let Some(Err(e)) = clause.as_deref().map(lex::check_expression) {
            out.push(format!("{path}.{key}: {e}"));
        }
    }
    let (using, check) = match policy.command {
        PolicyCommand::Select | PolicyCommand::Delete => (true, false),
        PolicyCommand::Insert => (false, true),
        PolicyCommand::All | PolicyCommand::Update => (true, true),
    };
    for (key, allowed, given) in [("using", using, policy.using.is_some()), ("check", check, policy.check.is_some())] {
        if given && !allowed {
            out.push(format!("{path}.{key}: a policy for {} has none", policy.command.sql()));
        }
        if !given && allowed {
            // Left out, an UPDATE's check falls back to USING; we want it said.
            out.push(format!("{path}.{key}: expected, since the policy is for {}", policy.command.sql()));
        }
    }
}

/// The rules of `[batching]`.
pub(super) fn batching(b: &Batching, out: &mut Vec<String>) {
    let (low, high) = (Duration::from_millis(1), Duration::from_secs(5));
    if b.target_duration < low || b.target_duration > high {
        out.push("batching.target_duration: expected 1ms to 5s".into());
    }
    if b.pause > Duration::from_secs(3600) {
        out.push("batching.pause: expected at most 1h".into());
    }
    if let Some(n) = b.lanes.filter(|n| !(1..=8).contains(n)) {
        out.push(format!("batching.lanes: expected 1 to 8, found {n}"));
    }
    if b.growth_percent.is_some_and(|n| !(1..=100).contains(&n)) {
        out.push("batching.growth_percent: expected 1 to 100; without it the daemon runs no vacuum".into());
    }
    if b.horizon_wait > Duration::from_secs(86_400) {
        out.push("batching.horizon_wait: expected at most 1d".into());
    }
    if b.min_rows == 0 || b.min_rows > b.initial_rows || b.initial_rows > b.max_rows || b.max_rows > 1_000_000 {
        out.push(format!(
            "batching: expected 1 <= min_rows <= initial_rows <= max_rows <= 1000000, found {} / {} / {}",
            b.min_rows, b.initial_rows, b.max_rows
        ));
    }
}
