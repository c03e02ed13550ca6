//! One batch: a bounded piece of rows and its checkpoint in one fenced transaction (I4).

use std::time::Duration;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient, Statement};
use tracing::Span;

use super::plan_check::PlanCheck;
use crate::context::Context;
use crate::error::{self, Error, Result};
use crate::fault;
use crate::ledger::checkpoint::{self, Checkpoint};
use crate::ledger::lease;
use crate::pg::connect::Session;
use crate::phase::Status;
use crate::plan::steps::Walk;
use crate::plan::{Shape, batch_sql};
use crate::throttle::Flight;

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Batch {
    /// It committed.
    Committed {
        /// Its size in the sizer's unit: rows of a keyset walk, pages of a walk in heap order.
        units: u32,
        /// Rows walked over.
        scanned: u32,
        /// Rows filled.
        updated: u32,
        /// From `begin` to the answer to `commit`.
        took: Duration,
    },
    /// There was nothing left; the checkpoint says so.
    End,
    /// The job's status is no longer `running`; nothing was done.
    NotRunning,
    /// The table was rewritten; the checkpoint counts pages of a file that is gone, and has not moved.
    Rewritten,
}

/// Where an attempt failed, so that the caller can put a single row aside.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: Error,
    /// The batch's range, if it was known: last key and number of rows.
    pub range: Option<(Vec<String>, u32)>,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, range: None }
    }
}

impl From<tokio_postgres::Error> for Failed {
    fn from(error: tokio_postgres::Error) -> Self {
        Self { error: error.into(), range: None }
    }
}

/// Notes in a batch's span what became of it, and ends it: the pause that follows is none of it.
pub(super) fn note(span: Span, ended: &std::result::Result<Batch, Failed>) {
    match ended {
        Ok(Batch::Committed { scanned, updated, .. }) => {
            span.record("rows_scanned", scanned).record("rows_updated", updated);
        }
        Ok(_) => {}
        Err(failed) => {
            span.record("sqlstate", failed.error.sqlstate()).record("otel.status_code", "ERROR");
        }
    }
}

/// The statements of one sweep, prepared once per connection. Which of them have a lower or an upper end depends on the
/// checkpoint: the first batch of a sweep has no key to start behind.
pub struct Statements {
    fence: Statement,
    advance: Statement,
    bound: [Statement; 2],
    fill: [Statement; 2],
    recheck: Option<[Statement; 2]>,
    fill_sql: [String; 2],
    plan_check: PlanCheck,
}

impl Statements {
    /// Prepares them.
    ///
    /// # Errors
    /// What the server says about the job's expressions.
    pub async fn prepare(client: &Client, shape: &Shape) -> Result<Self> {
        let range = [batch_sql::key_range(shape, false), batch_sql::key_range(shape, true)];
        let recheck = match (batch_sql::recheck(shape, &range[0]), batch_sql::recheck(shape, &range[1])) {
            (Some(first), Some(next)) => Some([client.prepare(&first).await?, client.prepare(&next).await?]),
            _ => None,
        };
        Ok(Self {
            fence: client.prepare(lease::FENCE).await?,
            advance: client.prepare(checkpoint::ADVANCE).await?,
            bound: [
                client.prepare(&batch_sql::bound(shape, false, true)).await?,
                client.prepare(&batch_sql::bound(shape, true, true)).await?,
            ],
            fill: [
                client.prepare(&batch_sql::fill(shape, &range[0])).await?,
                client.prepare(&batch_sql::fill(shape, &range[1])).await?,
            ],
            recheck,
            fill_sql: range.map(|range| batch_sql::fill(shape, &range)),
            plan_check: PlanCheck::default(),
        })
    }
}

/// Runs the batch behind `checkpoint` with up to `rows` rows. On success the checkpoint in the database has moved, and the
/// caller reads nothing: it applies the result to its own copy.
///
/// # Errors
/// What the server says, with the range that was tried; nothing of it is committed then, unless the connection broke in
/// `commit`: then only the checkpoint in the database knows.
pub async fn run(
    ctx: &Context,
    session: &mut Session,
    statements: &mut Statements,
    checkpoint: &mut Checkpoint,
    rows: u32,
    flight: &mut Flight<'_>,
    next_rows: impl FnOnce(u32, Duration) -> u32,
) -> std::result::Result<Batch, Failed> {
    let Some(upper) = checkpoint.upper.clone() else { return finish(ctx, session, statements, checkpoint).await };
    let tx = session.client.transaction().await?;
    flight.trip();
    let after = usize::from(checkpoint.cursor.is_some());
    let limit = i64::from(rows);
    let bound: Vec<&(dyn ToSql + Sync)> = std::iter::once(&limit as &(dyn ToSql + Sync))
        .chain(checkpoint.cursor.iter().flatten().map(as_param))
        .chain(upper.iter().map(as_param))
        .collect();
    let lease = &ctx.lease;
    let fence: [&(dyn ToSql + Sync); 3] = [&lease.job, &lease.epoch, &lease.holder];
    // Both statements go out together: one round trip.
    let (status, bound) =
        tokio::join!(tx.query_opt(&statements.fence, &fence), tx.query_opt(&statements.bound[after], &bound));
    flight.trip();
    let fenced = status?.ok_or_else(|| lease::lost(ctx.job()))?;
    let status: String = fenced.get(0);
    ctx.live.saw(fenced.get(1));
    if status != Status::Running.as_str() {
        tx.rollback().await?;
        return Ok(Batch::NotRunning);
    }
    let Some(bound) = bound? else {
        tx.rollback().await?;
        return finish(ctx, session, statements, checkpoint).await;
    };
    let scanned = bound.get::<_, i64>(0) as u32;
    let last: Vec<String> = (1..bound.len()).map(|i| bound.get(i)).collect();
    let range: Vec<&(dyn ToSql + Sync)> =
        checkpoint.cursor.iter().flatten().map(as_param).chain(last.iter().map(as_param)).collect();
    let failed = |e: tokio_postgres::Error| Failed { error: e.into(), range: Some((last.clone(), scanned)) };
    let target = &ctx.facts.shape.target;
    statements.plan_check.look(&tx, Walk::Keyset, target, &statements.fill_sql[after], &range).await?;
    let updated = tx.execute(&statements.fill[after], &range).await.map_err(failed)?;
    flight.trip();
    if let Some(recheck) = &statements.recheck {
        tx.execute(&recheck[after], &range).await.map_err(failed)?;
        flight.trip();
    }
    let next = next_rows(scanned, flight.worked()) as i32;
    let (done_scanned, done_updated) = (i64::from(scanned), updated as i64);
    let advance: [&(dyn ToSql + Sync); 7] = [&ctx.spec.name, &0i32, &last, &done_scanned, &done_updated, &next, &false];
    fault::point("before-checkpoint");
    tx.execute(&statements.advance, &advance).await?;
    flight.trip();
    fault::point("before-commit");
    tx.commit().await?;
    flight.trip();
    fault::point("after-commit");
    checkpoint.cursor = Some(last.clone());
    checkpoint.rows_scanned += done_scanned;
    checkpoint.rows_updated += done_updated;
    checkpoint.batches += 1;
    checkpoint.batch_rows = next;
    Ok(Batch::Committed { units: scanned, scanned, updated: updated as u32, took: flight.took() })
}

async fn finish(
    ctx: &Context,
    session: &mut Session,
    statements: &Statements,
    checkpoint: &mut Checkpoint,
) -> std::result::Result<Batch, Failed> {
    let tx = session.client.transaction().await?;
    lease::fence(&tx, &ctx.lease).await?;
    let none: Option<Vec<String>> = None;
    let advance: [&(dyn ToSql + Sync); 7] = [&ctx.spec.name, &0i32, &none, &0i64, &0i64, &checkpoint.batch_rows, &true];
    tx.execute(&statements.advance, &advance).await?;
    tx.commit().await?;
    checkpoint.finished = true;
    Ok(Batch::End)
}

/// Puts the one row of a batch aside and moves the checkpoint behind it, in a transaction of its own.
///
/// # Errors
/// What the server says.
pub async fn set_aside(
    ctx: &Context,
    session: &mut Session,
    statements: &Statements,
    checkpoint: &mut Checkpoint,
    key: &[String],
    error: &Error,
) -> Result<()> {
    let tx = session.client.transaction().await?;
    lease::fence(&tx, &ctx.lease).await?;
    quarantine(ctx, &tx, key, error).await?;
    let cursor = key.to_vec();
    let advance: [&(dyn ToSql + Sync); 7] =
        [&ctx.spec.name, &0i32, &cursor, &1i64, &0i64, &checkpoint.batch_rows, &false];
    tx.execute(&statements.advance, &advance).await?;
    tx.commit().await?;
    checkpoint.cursor = Some(cursor);
    checkpoint.rows_scanned += 1;
    checkpoint.batches += 1;
    Ok(())
}

/// Notes a row that cannot be updated.
///
/// # Errors
/// What the server says.
pub async fn quarantine(
    ctx: &Context,
    tx: &tokio_postgres::Transaction<'_>,
    key: &[String],
    error: &Error,
) -> Result<()> {
    let (sqlstate, message) = reason(tx, &ctx.facts.shape, error).await?;
    checkpoint::quarantine(tx, ctx.job(), key, &sqlstate, &message).await
}

/// SQLSTATE, and what it means, with the name of a constraint of the table. Not the server's own message: a trigger may raise
/// any SQLSTATE with a text of its own, and errors of conversions quote the value.
///
/// # Errors
/// What the server says.
pub async fn reason(client: &impl GenericClient, shape: &Shape, error: &Error) -> Result<(String, String)> {
    let sqlstate = error.sqlstate().unwrap_or("?????").to_owned();
    let what = error::meaning(&sqlstate);
    if !sqlstate.starts_with("23") {
        return Ok((sqlstate, what.into()));
    }
    let names = client
        .query("select conname::text from pg_constraint where conrelid = to_regclass($1)", &[&shape.target.sql()])
        .await?;
    let named = names.iter().map(|r| r.get::<_, String>(0)).find(|n| error.to_string().contains(&format!("\"{n}\"")));
    Ok((sqlstate, named.map_or(what.into(), |n| format!("{what} \"{n}\""))))
}

fn as_param(text: &String) -> &(dyn ToSql + Sync) {
    text
}
