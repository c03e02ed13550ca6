//! The state of the catalog on which a proof was made. Whoever changes any of it makes the proof void; what Constrain and
//! Flip do is left out, or looked at in a stage of its own.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tokio_postgres::GenericClient;
use tokio_postgres::types::{ToSql, Type};

use crate::error::Result;
use crate::job::spec::TARGET_ALIAS;
use crate::job::{JobSpec, lex};
use crate::plan::{Facts, Shape, steps, sync_sql};

const STATE: &str = include_str!("sql/state.sql");
const AROUND: &str = include_str!("sql/around.sql");

/// Digests of definitions by item, such as `trigger zzz_backfilld_fill_ins on "public"."messages"`.
pub type Items = BTreeMap<String, String>;

/// What a proof depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Columns, keys, sync triggers with their functions, rules: nothing that a job changes between Expand and rollback.
    pub data: Items,
    /// Row level security, policies, and the functions that the job replaces or policies call: the flip changes it.
    pub access: Items,
}

impl State {
    /// Reads it; needs no more than the catalog.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn read(client: &impl GenericClient, spec: &JobSpec, facts: &Facts) -> Result<Self> {
        let wanted = Wanted::new(spec, facts);
        let w = &wanted;
        let lists = [
            &w.tables,
            &w.column_tables,
            &w.columns,
            &w.filled,
            &w.triggers,
            &w.made,
            &w.functions,
            &w.call_schemas,
            &w.calls,
        ];
        let parameters = lists.map(|list| (list as &(dyn ToSql + Sync), Type::TEXT_ARRAY));
        // Not prepared: the flip reads it under its lock, in one round trip.
        let rows = client.query_typed(STATE, &parameters).await?;
        let mut out = Self::default();
        for row in rows {
            let stage: &str = row.get(0);
            let items = if stage == "data" { &mut out.data } else { &mut out.access };
            items.insert(row.get(1), row.get(2));
        }
        Ok(out)
    }
}

/// What leads around the policies: rights, views, functions with their owner's rights; and the constraints and indexes of the job.
/// A proof does not depend on it, so it makes none void; the watch compares it with what the flip left.
///
/// # Errors
/// Whatever the server says.
pub async fn around(client: &impl GenericClient, spec: &JobSpec, shape: &Shape) -> Result<Items> {
    let (target, made) = (shape.target.sql(), made(spec, shape));
    let functions: Vec<&str> = spec.functions.iter().map(|f| f.signature.as_str()).collect();
    let rows = client.query(AROUND, &[&target, &made, &functions]).await?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1))).collect())
}

/// Whether an item comes from [`around`].
pub fn is_around(item: &str) -> bool {
    ["rights on ", "view ", "security definer function ", "constraint ", "index "].iter().any(|p| item.starts_with(p))
}

/// What is different, an item a line; empty if nothing is.
pub fn differences(then: &Items, now: &Items) -> Vec<String> {
    let names: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| match (then.get(name), now.get(name)) {
            (Some(a), Some(b)) if a == b => None,
            (Some(_), Some(_)) => Some(format!("{name} has changed")),
            (Some(_), None) => Some(format!("{name} is gone")),
            (None, _) => Some(format!("{name} is new")),
        })
        .map(|line| line.replace('"', ""))
        .collect()
}

/// The parameters of [`STATE`].
struct Wanted {
    tables: Vec<String>,
    column_tables: Vec<String>,
    columns: Vec<String>,
    filled: Vec<String>,
    triggers: Vec<String>,
    made: Vec<String>,
    functions: Vec<String>,
    call_schemas: Vec<String>,
    calls: Vec<String>,
}

impl Wanted {
    fn new(spec: &JobSpec, facts: &Facts) -> Self {
        let shape = &facts.shape;
        let filled: Vec<String> = spec.columns.iter().map(|c| c.name.as_str().to_owned()).collect();
        let mut columns: BTreeSet<(String, String)> = BTreeSet::new();
        let target = shape.target.sql();
        columns.extend(shape.key.iter().map(|k| (target.clone(), k.name.as_str().to_owned())));
        columns.extend(filled.iter().map(|c| (target.clone(), c.clone())));
        for shape in std::iter::once(shape).chain(&facts.agree) {
            let mut of = |alias: &str, table: &str| {
                columns.extend(shape.reads(alias).iter().map(|c| (table.to_owned(), c.as_str().to_owned())));
            };
            of(TARGET_ALIAS, &target);
            shape.joins.iter().for_each(|j| of(j.alias.as_str(), &j.table.sql()));
        }
        for key in &spec.foreign_keys {
            columns.extend(key.referenced_columns.iter().map(|c| (key.references.sql(), c.as_str().to_owned())));
        }
        let mut tables = vec![target];
        for (table, _) in &columns {
            if !tables.contains(table) {
                tables.push(table.clone());
            }
        }
        let (column_tables, columns) = columns.into_iter().unzip();
        let (call_schemas, calls) = calls(spec).into_iter().unzip();
        Self {
            tables,
            column_tables,
            columns,
            filled,
            triggers: sync_sql::triggers(shape).into_iter().map(|t| t.name).collect(),
            made: made(spec, shape),
            functions: spec.functions.iter().map(|f| f.signature.clone()).collect(),
            call_schemas,
            calls,
        }
    }
}

/// Names of the constraints and indexes that the job makes.
fn made(spec: &JobSpec, shape: &Shape) -> Vec<String> {
    let keys = spec.foreign_keys.iter().map(|k| k.name.as_str().to_owned());
    let indexes = spec.indexes.iter().map(|i| i.name.as_str().to_owned());
    let checks = (0..shape.columns.len()).map(|i| steps::not_null_check(shape, i).as_str().to_owned());
    keys.chain(indexes).chain(checks).collect()
}

/// Functions that values call, as schema and name.
fn calls(spec: &JobSpec) -> BTreeSet<(String, String)> {
    let values = spec.columns.iter().map(|c| &c.value).chain(spec.agree.iter().map(|a| &a.value));
    values.flat_map(|value| lex::qualified_calls(value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_say_what_has_changed_is_new_or_gone() {
        let items =
            |list: &[(&str, &str)]| -> Items { list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect() };
        let then = items(&[("table t", "1"), ("trigger a on \"public\".\"t\"", "1"), ("rule r", "1")]);
        let now = items(&[("table t", "1"), ("trigger a on \"public\".\"t\"", "2"), ("column c", "1")]);
        assert_eq!(differences(&then, &then), Vec::<String>::new());
        assert_eq!(
            differences(&then, &now),
            ["column c is new", "rule r is gone", "trigger a on public.t has changed"]
        );
    }
}
