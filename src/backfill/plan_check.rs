//! Looks at the plan of a batch, at the first one of a connection and now and then later: statistics change in the middle of
//! a job, and a batch must not become a scan of the whole table.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::GenericClient;
use tokio_postgres::types::ToSql;

use crate::error::{Error, Result};
use crate::pg::ident::QualifiedName;
use crate::plan::steps;

/// How often a plan is looked at: a bad one costs this long at most, and an EXPLAIN a millisecond.
const EVERY: Duration = Duration::from_secs(10);
/// A table that each batch reads from end to end may have this many pages: as many as a handful of batches touch anyway.
const SMALL_PAGES: i64 = 128;

/// When the next look is due.
#[derive(Debug, Default)]
pub struct PlanCheck {
    last: Option<Instant>,
}

impl PlanCheck {
    /// Explains `sql`, the batch's statement, where that is due.
    ///
    /// # Errors
    /// Failed if the plan reads a large table from end to end; database errors.
    pub async fn look(
        &mut self,
        client: &impl GenericClient,
        walk: steps::Walk,
        target: &QualifiedName,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<()> {
        if self.last.is_some_and(|at| at.elapsed() < EVERY) {
            return Ok(());
        }
        let explain = format!("explain (verbose, costs off, format json) {sql}");
        let plan: Value = client.query_one(&explain, params).await?.get(0);
        let scans = scans(&plan);
        for scan in &scans {
            let is_target = scan.schema == target.schema.as_str() && scan.table == target.name.as_str();
            if is_target && scan.alias == "t" {
                if !scan.is_bounded(walk) {
                    return Err(refusal(scan, walk));
                }
            } else if !scan.has_condition && pages(client, scan).await? > SMALL_PAGES {
                return Err(refusal(scan, walk));
            }
        }
        self.last = Some(Instant::now());
        Ok(())
    }
}

fn refusal(scan: &Scan, walk: steps::Walk) -> Error {
    let wanted = match walk {
        steps::Walk::Heap => "a TID range scan of the target, and an index scan of each source",
        steps::Walk::Keyset => "an index scan of the target by its key, and one of each source",
    };
    Error::failed(format!("each batch would read all of {}.{} ({})", scan.schema, scan.table, scan.node)).with_hint(format!(
        "expected {wanted}; analyze both tables, look for an index on the join columns and for planner settings of this \
         login (alter role ... set enable_...), then resume"
    ))
}

async fn pages(client: &impl GenericClient, scan: &Scan) -> Result<i64> {
    let sql = "select pg_relation_size(c.oid) / current_setting('block_size')::int8
               from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2";
    Ok(client.query_opt(sql, &[&scan.schema, &scan.table]).await?.map_or(0, |r| r.get(0)))
}

/// One scan of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Scan {
    node: String,
    schema: String,
    table: String,
    alias: String,
    /// It reads a part of the table: by an index condition or a TID.
    has_condition: bool,
}

impl Scan {
    fn is_bounded(&self, walk: steps::Walk) -> bool {
        match walk {
            steps::Walk::Heap => self.node == "Tid Range Scan" && self.has_condition,
            steps::Walk::Keyset => self.has_condition,
        }
    }
}

/// All scans of an `explain (format json)`.
fn scans(plan: &Value) -> Vec<Scan> {
    let mut out = Vec::new();
    let mut todo = vec![&plan[0]["Plan"]];
    while let Some(node) = todo.pop() {
        let kind = node["Node Type"].as_str().unwrap_or_default();
        let children = node["Plans"].as_array();
        if kind.ends_with("Scan") && node["Relation Name"].is_string() {
            let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
            // The condition of a bitmap stands in the index scans below it.
            let below = children.is_some_and(|c| c.iter().any(|n| !n["Index Cond"].is_null() || !n["Plans"].is_null()));
            out.push(Scan {
                node: kind.to_owned(),
                schema: text("Schema"),
                table: text("Relation Name"),
                alias: text("Alias"),
                has_condition: !node["Index Cond"].is_null() || !node["TID Cond"].is_null() || below,
            });
        }
        todo.extend(children.into_iter().flatten());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(target: Value, source: Value) -> Value {
        json!([{ "Plan": { "Node Type": "ModifyTable", "Relation Name": "messages", "Plans": [
            { "Node Type": "Nested Loop", "Plans": [target, source] } ] } }])
    }

    #[test]
    fn scans_are_found_with_their_conditions() {
        let tid = json!({ "Node Type": "Tid Range Scan", "Relation Name": "messages", "Schema": "public", "Alias": "t",
            "TID Cond": "((t.ctid >= '(0,0)'::tid))" });
        let index = json!({ "Node Type": "Index Scan", "Relation Name": "conversations", "Schema": "public", "Alias": "c",
            "Index Cond": "(c.id = t.conversation_id)" });
        let found = scans(&plan(tid.clone(), index));
        assert!(found.iter().all(|s| s.has_condition) && found.len() == 2, "{found:?}");
        assert!(found.iter().find(|s| s.alias == "t").expect("the target is scanned").is_bounded(steps::Walk::Heap));
        let seq = json!({ "Node Type": "Seq Scan", "Relation Name": "messages", "Schema": "public", "Alias": "t" });
        let whole =
            json!({ "Node Type": "Index Scan", "Relation Name": "conversations", "Schema": "public", "Alias": "c" });
        assert!(scans(&plan(seq, whole)).iter().all(|s| !s.has_condition && !s.is_bounded(steps::Walk::Keyset)));
        let bitmap = json!({ "Node Type": "Bitmap Heap Scan", "Relation Name": "conversations", "Schema": "public", "Alias": "c",
            "Plans": [{ "Node Type": "Bitmap Index Scan", "Index Cond": "(id = 1)" }] });
        assert!(scans(&plan(tid, bitmap)).iter().all(|s| s.has_condition));
    }
}
