//! EXPLAIN (ANALYZE, BUFFERS) of the application's queries as their roles, before the flip and after it, for owners with few
//! rows, a median number, and the most. A query that cannot be measured is told as such; it never stops a job.

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;
use tracing::{info, warn};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::report::{Report, ReportQuery};
use crate::ledger::lease;
use crate::ledger::plans::{self, QueryPlan, Stage};
use crate::plan::owners_sql;

/// Runs that are counted, after one that fills caches; odd, so that the median is one of them.
const RUNS: usize = 5;
/// A first run that takes longer is the only one.
const SLOW: Duration = Duration::from_secs(1);
/// Finding the owners reads the table once, or a sample of it.
const OWNERS_TIMEOUT: Duration = Duration::from_secs(120);

/// Whose rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// `small`, `median` or `large`.
    pub label: String,
    /// The value of the job's first column.
    pub key: String,
    /// Rows of the target with it.
    pub rows: i64,
}

/// What one query took.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Planning and execution, milliseconds, median.
    pub time_ms: f64,
    /// Blocks touched.
    pub buffers: i64,
    /// Nodes, outermost first, indented by depth; without conditions, which can hold values.
    pub nodes: Vec<String>,
}

/// Measures the job's queries and stores what came of it.
///
/// # Errors
/// Lease lost, interrupted, or the job has another status by now.
pub async fn capture(ctx: &Context, stage: Stage) -> Result<()> {
    if ctx.spec.report.queries.is_empty() {
        return Ok(());
    }
    // It only reads; dropped half way, the server ends a statement whose client is gone.
    let done = tokio::select! {
        done = measure_all(ctx, stage) => done,
        why = ctx.told_to_stop() => return Err(why),
    };
    if let Err(e) = done {
        ctx.check()?;
        warn!(
            job = ctx.job(),
            sqlstate = e.sqlstate(),
            "the queries of the report could not be measured: {}",
            e.line()
        );
    }
    Ok(())
}

async fn measure_all(ctx: &Context, stage: Stage) -> Result<()> {
    let session = ctx.connect("report").await?;
    ctx.progress.update(|p| p.note = format!("measuring queries {} the flip", stage.as_str()));
    let owners = owners(ctx, &session.client, stage).await?;
    let report = &ctx.spec.report;
    for query in &report.queries {
        for owner in &owners {
            let measured = measure(&session.client, report, query, &owner.key).await;
            if session.client.is_closed() {
                measured?;
                return Err(Error::internal("the connection is gone"));
            }
            store(ctx, stage, query, owner, measured).await?;
        }
    }
    info!(
        job = ctx.job(),
        queries = report.queries.len(),
        owners = owners.len(),
        "measured queries {} the flip",
        stage.as_str()
    );
    Ok(())
}

/// After the flip those of before, so that the same is compared.
async fn owners(ctx: &Context, client: &Client, stage: Stage) -> Result<Vec<Owner>> {
    if stage == Stage::After {
        let mut known: Vec<Owner> = Vec::new();
        for p in plans::all(client, ctx.job()).await?.into_iter().filter(|p| p.stage == Stage::Before) {
            if !known.iter().any(|o| o.label == p.owner) {
                known.push(Owner { label: p.owner, key: p.owner_key, rows: p.owner_rows });
            }
        }
        if !known.is_empty() {
            return Ok(known);
        }
    }
    let Some(sql) = owners_sql::owners(&ctx.facts.shape, ctx.facts.target.rows_estimate) else { return Ok(Vec::new()) };
    client.batch_execute(&format!("set statement_timeout = {}", OWNERS_TIMEOUT.as_millis())).await?;
    let rows = client.query(&sql, &[]).await?;
    Ok(rows.iter().map(|r| Owner { label: r.get(0), key: r.get(1), rows: r.get(2) }).collect())
}

async fn store(
    ctx: &Context,
    stage: Stage,
    query: &ReportQuery,
    owner: &Owner,
    measured: Result<Measured>,
) -> Result<()> {
    let (measured, error) = match measured {
        Ok(m) => (Some(m), String::new()),
        Err(e) => {
            // The message of a failed query can quote values; the code cannot.
            let code = e.sqlstate().unwrap_or("no SQLSTATE").to_owned();
            warn!(
                job = ctx.job(),
                sqlstate = code,
                query = query.name,
                owner = owner.label,
                "a query of the report failed"
            );
            let timeout = humantime::format_duration(ctx.spec.report.statement_timeout);
            (None, if code == "57014" { format!("cancelled after {timeout}") } else { format!("failed with {code}") })
        }
    };
    let plan = QueryPlan {
        stage,
        query: query.name.clone(),
        role: query.role.as_str().to_owned(),
        owner: owner.label.clone(),
        owner_key: owner.key.clone(),
        owner_rows: owner.rows,
        time_ms: measured.as_ref().map(|m| m.time_ms),
        buffers: measured.as_ref().map(|m| m.buffers),
        nodes: measured.map(|m| m.nodes).unwrap_or_default(),
        error,
    };
    let mut client = ctx.client().await?;
    let tx = client.transaction().await?;
    lease::fence(&*tx, &ctx.lease).await?;
    plans::put(&*tx, ctx.job(), &plan).await?;
    Ok(tx.commit().await?)
}

/// Runs one query as its role, for one user, in a read-only transaction that is rolled back.
///
/// # Errors
/// Whatever the server says.
pub async fn measure(client: &Client, report: &Report, query: &ReportQuery, user: &str) -> Result<Measured> {
    let done = async {
        enter(client, report, query, user).await?;
        run(client, query).await
    }
    .await;
    client.batch_execute("rollback").await?;
    done
}

/// Begins a read-only transaction as the query's role and user, under row level security.
///
/// # Errors
/// Whatever the server says.
pub async fn enter(client: &Client, report: &Report, query: &ReportQuery, user: &str) -> Result<()> {
    client
        .batch_execute(&format!(
            "begin transaction isolation level read committed read only; set local row_security = on; \
             set local statement_timeout = {}; set local lock_timeout = '2s'; set local role {}",
            report.statement_timeout.as_millis(),
            query.role.sql()
        ))
        .await?;
    for (name, value) in report.settings_for(query.role.as_str(), user) {
        client.query_one("select set_config($1, $2, true)", &[name, &value]).await?;
    }
    Ok(())
}

async fn run(client: &Client, query: &ReportQuery) -> Result<Measured> {
    let explain = format!("explain (analyze, buffers, format json) {}", query.sql);
    let mut runs: Vec<Value> = Vec::new();
    let began = std::time::Instant::now();
    let first: Value = client.query_one(&explain, &[]).await?.get(0);
    if began.elapsed() > SLOW {
        runs.push(first);
    } else {
        for _ in 0..RUNS {
            runs.push(client.query_one(&explain, &[]).await?.get(0));
        }
    }
    let number = |v: &Value| v.as_f64().unwrap_or_default();
    let time = |run: &Value| number(&run[0]["Planning Time"]) + number(&run[0]["Execution Time"]);
    runs.sort_by(|a, b| time(a).total_cmp(&time(b)));
    let median = &runs[runs.len() / 2];
    let plan = &median[0]["Plan"];
    let mut nodes = Vec::new();
    collect(plan, 0, &mut nodes);
    let buffers = number(&plan["Shared Hit Blocks"]) + number(&plan["Shared Read Blocks"]);
    Ok(Measured { time_ms: time(median), buffers: buffers as i64, nodes })
}

/// `  Index Scan using i on t: 50 rows, 3 loops`.
fn collect(plan: &Value, depth: usize, nodes: &mut Vec<String>) {
    let text = |key: &str| plan[key].as_str();
    let Some(kind) = text("Node Type") else { return };
    let mut line = format!("{}{kind}", "  ".repeat(depth));
    for (word, key) in [("using", "Index Name"), ("on", "Relation Name"), ("as", "Subplan Name")] {
        if let Some(name) = text(key) {
            line.push_str(&format!(" {word} {name}"));
        }
    }
    let (rows, loops) = (&plan["Actual Rows"], plan["Actual Loops"].as_f64().unwrap_or(1.0));
    line.push_str(&format!(": {} rows", rows.as_f64().unwrap_or_default()));
    if loops != 1.0 {
        line.push_str(&format!(", {loops} loops"));
    }
    nodes.push(line);
    plan["Plans"].as_array().into_iter().flatten().for_each(|child| collect(child, depth + 1, nodes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_name_what_they_read_and_no_condition() {
        let plan = serde_json::json!({
            "Node Type": "Limit", "Actual Rows": 1, "Actual Loops": 1,
            "Plans": [{ "Node Type": "Index Scan", "Index Name": "i", "Relation Name": "t", "Actual Rows": 2, "Actual Loops": 3,
                        "Index Cond": "(a = 'secret')" }],
        });
        let mut nodes = Vec::new();
        collect(&plan, 0, &mut nodes);
        assert_eq!(nodes, ["Limit: 1 rows", "  Index Scan using i on t: 2 rows, 3 loops"]);
    }
}
