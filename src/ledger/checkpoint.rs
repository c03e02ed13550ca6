//! Checkpoints and quarantine. A checkpoint is written in the transaction of the batch it speaks of (I4).

use serde::Serialize;
use tokio_postgres::GenericClient;

use crate::error::Result;

/// How far one lane is.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// The walk: `keyset` or `heap`.
    pub strategy: String,
    /// Last key done, as text; `None`: nothing yet.
    pub cursor: Option<Vec<String>>,
    /// Last key to do; `None`: the table was empty.
    pub upper: Option<Vec<String>>,
    /// Which sweep over the table this is, from 1.
    pub sweep: i32,
    /// This sweep reached its end.
    pub finished: bool,
    /// Size of the next batch: rows of a keyset walk, pages of a walk in heap order.
    pub batch_rows: i32,
    /// Rows looked at, over all sweeps.
    pub rows_scanned: i64,
    /// Rows filled, over all sweeps.
    pub rows_updated: i64,
    /// Batches committed.
    pub batches: i64,
    /// Rows of the table, estimated when the backfill began.
    pub rows_estimate: i64,
}

/// Reads a lane's checkpoint.
///
/// # Errors
/// Whatever the server says.
pub async fn find(client: &impl GenericClient, job: &str, lane: i32) -> Result<Option<Checkpoint>> {
    let row = client
        .query_opt(
            "select strategy, cursor, upper, sweep, finished, batch_rows, rows_scanned, rows_updated, batches, rows_estimate
             from backfilld.checkpoint where job = $1 and lane = $2",
            &[&job, &lane],
        )
        .await?;
    Ok(row.map(|r| Checkpoint {
        strategy: r.get(0),
        cursor: r.get(1),
        upper: r.get(2),
        sweep: r.get(3),
        finished: r.get(4),
        batch_rows: r.get(5),
        rows_scanned: r.get(6),
        rows_updated: r.get(7),
        batches: r.get(8),
        rows_estimate: r.get(9),
    }))
}

/// Removes all lanes but the first, which takes over what they had filled.
///
/// # Errors
/// Whatever the server says.
pub async fn fold(client: &impl GenericClient, job: &str) -> Result<()> {
    client
        .execute(
            "with gone as (delete from backfilld.checkpoint where job = $1 and lane > 0
                           returning rows_updated, rows_estimate, batches)
             update backfilld.checkpoint as c set rows_updated = c.rows_updated + g.updated,
               rows_estimate = c.rows_estimate + g.estimate, batches = c.batches + g.batches
             from (select coalesce(sum(rows_updated), 0)::int8 as updated, coalesce(sum(rows_estimate), 0)::int8 as estimate,
                          coalesce(sum(batches), 0)::int8 as batches from gone) as g
             where c.job = $1 and c.lane = 0",
            &[&job],
        )
        .await?;
    Ok(())
}

/// The checkpoint of all lanes together: sums, and the first lane's rest. `None` before the backfill began.
///
/// # Errors
/// Whatever the server says.
pub async fn total(client: &impl GenericClient, job: &str) -> Result<Option<Checkpoint>> {
    let Some(first) = find(client, job, 0).await? else { return Ok(None) };
    let row = client
        .query_one(
            "select sum(rows_scanned)::int8, sum(rows_updated)::int8, sum(batches)::int8, sum(rows_estimate)::int8,
                    bool_and(finished)
             from backfilld.checkpoint where job = $1",
            &[&job],
        )
        .await?;
    Ok(Some(Checkpoint {
        rows_scanned: row.get(0),
        rows_updated: row.get(1),
        batches: row.get(2),
        rows_estimate: row.get(3),
        finished: row.get(4),
        ..first
    }))
}

/// Writes a lane's checkpoint whole: at the start of a sweep.
///
/// # Errors
/// Whatever the server says.
pub async fn put(client: &impl GenericClient, job: &str, lane: i32, c: &Checkpoint) -> Result<()> {
    client
        .execute(
            "insert into backfilld.checkpoint as k (job, lane, strategy, cursor, upper, sweep, finished, batch_rows,
               rows_scanned, rows_updated, batches, rows_estimate)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
             on conflict (job, lane) do update set strategy = excluded.strategy, cursor = excluded.cursor,
               upper = excluded.upper, sweep = excluded.sweep, finished = excluded.finished,
               batch_rows = excluded.batch_rows, rows_scanned = excluded.rows_scanned,
               rows_updated = excluded.rows_updated, batches = excluded.batches,
               rows_estimate = excluded.rows_estimate, filenode = null, updated_at = clock_timestamp()",
            &[
                &job,
                &lane,
                &c.strategy,
                &c.cursor,
                &c.upper,
                &c.sweep,
                &c.finished,
                &c.batch_rows,
                &c.rows_scanned,
                &c.rows_updated,
                &c.batches,
                &c.rows_estimate,
            ],
        )
        .await?;
    Ok(())
}

/// The statement that moves a lane's checkpoint by one batch. Parameters: job, lane, cursor, rows scanned, rows updated,
/// size of the next batch, finished.
pub const ADVANCE: &str = "update backfilld.checkpoint set cursor = coalesce($3, cursor), rows_scanned = rows_scanned + $4,
     rows_updated = rows_updated + $5, batch_rows = $6, finished = $7, batches = batches + 1, updated_at = clock_timestamp()
     where job = $1 and lane = $2";

/// Puts a row that cannot be updated aside. The message is the server's primary message, never its detail.
///
/// # Errors
/// Whatever the server says.
pub async fn quarantine(
    client: &impl GenericClient,
    job: &str,
    key: &[String],
    sqlstate: &str,
    message: &str,
) -> Result<()> {
    client
        .execute(
            "insert into backfilld.quarantine (job, key, sqlstate, message) values ($1, $2, $3, $4)
             on conflict (job, key) do update set sqlstate = excluded.sqlstate, message = excluded.message,
               found_at = clock_timestamp()",
            &[&job, &key, &sqlstate, &message],
        )
        .await?;
    Ok(())
}

/// Number of rows in quarantine about which nobody has decided.
///
/// # Errors
/// Whatever the server says.
pub async fn quarantined(client: &impl GenericClient, job: &str) -> Result<i64> {
    let sql = "select count(*) from backfilld.quarantine where job = $1 and accepted_at is null";
    Ok(client.query_one(sql, &[&job]).await?.get(0))
}

/// Number of rows that an operator accepted without a value.
///
/// # Errors
/// Whatever the server says.
pub async fn accepted(client: &impl GenericClient, job: &str) -> Result<i64> {
    let sql = "select count(*) from backfilld.quarantine where job = $1 and accepted_at is not null";
    Ok(client.query_one(sql, &[&job]).await?.get(0))
}

/// A row in quarantine.
#[derive(Debug, Clone, Serialize)]
pub struct Aside {
    /// Its key.
    pub key: Vec<String>,
    /// Why it could not be updated.
    pub sqlstate: String,
    /// The same for people; never values.
    pub message: String,
    /// When.
    pub found_at: String,
    /// When an operator accepted that it has no value.
    pub accepted_at: Option<String>,
    /// The login that did.
    pub accepted_by: Option<String>,
    /// Why.
    pub accepted_why: Option<String>,
}

/// All rows in quarantine, the oldest first.
///
/// # Errors
/// Whatever the server says.
pub async fn aside(client: &impl GenericClient, job: &str) -> Result<Vec<Aside>> {
    let rows = client
        .query(
            "select key, sqlstate, message, found_at::text, accepted_at::text, accepted_by, accepted_why
             from backfilld.quarantine where job = $1 order by found_at, key",
            &[&job],
        )
        .await?;
    let aside = |r: &tokio_postgres::Row| Aside {
        key: r.get(0),
        sqlstate: r.get(1),
        message: r.get(2),
        found_at: r.get(3),
        accepted_at: r.get(4),
        accepted_by: r.get(5),
        accepted_why: r.get(6),
    };
    Ok(rows.iter().map(aside).collect())
}

/// Takes a row out of quarantine.
///
/// # Errors
/// Whatever the server says.
pub async fn release(client: &impl GenericClient, job: &str, key: &[String]) -> Result<()> {
    client.execute("delete from backfilld.quarantine where job = $1 and key = $2", &[&job, &key]).await?;
    Ok(())
}

/// Notes that an operator, the session's login, accepts that a row has no value.
///
/// # Errors
/// Whatever the server says.
pub async fn accept(client: &impl GenericClient, job: &str, key: &[String], why: &str) -> Result<()> {
    client
        .execute(
            "update backfilld.quarantine set accepted_at = clock_timestamp(), accepted_by = session_user, accepted_why = $3
             where job = $1 and key = $2",
            &[&job, &key, &why],
        )
        .await?;
    Ok(())
}

/// Empties the quarantine but for accepted rows, before a new sweep that tries those rows again.
///
/// # Errors
/// Whatever the server says.
pub async fn clear_quarantine(client: &impl GenericClient, job: &str) -> Result<()> {
    client.execute("delete from backfilld.quarantine where job = $1 and accepted_at is null", &[&job]).await?;
    Ok(())
}
