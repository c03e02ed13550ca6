//! `verify --repair`: wrong rows are derived anew, in small batches, only when an operator says so.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::proof::Proof;
use crate::error::{Error, Result, Retry};
use crate::ledger::{event, verification};
use crate::phase::{Phase, Status};
use crate::plan::{Shape, repair_sql};

/// Rows of a transaction: so few that nobody waits for their locks for long.
const BATCH: usize = 100;
/// Pages that are searched by one statement.
const PAGES: u64 = 1024;
/// Attempts at a batch that somebody is in the way of.
const ATTEMPTS: u32 = 10;
/// Pause before another attempt.
const PAUSE: Duration = Duration::from_millis(200);

/// What became of the wrong rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// Rows that have their value now.
    pub repaired: u64,
    /// Rows that were found wrong, and left: no source, no legal value, or right by now.
    pub left: u64,
    /// Rows whose update the server refused, by SQLSTATE.
    pub refused: BTreeMap<String, u64>,
}

/// Walks the table and derives what is wrong.
///
/// # Errors
/// Refused while a daemon works on the job's rows; database errors.
pub async fn run(client: &mut Client, proof: &Proof, shape: &Shape) -> Result<Repaired> {
    let mut out = Repaired::default();
    let mut low = 0;
    loop {
        let pages: i64 = client
            .query_one(
                "select pg_relation_size(to_regclass($1)) / current_setting('block_size')::int8",
                &[&shape.target.sql()],
            )
            .await?
            .get(0);
        if low >= pages.unsigned_abs() {
            break;
        }
        let rows = client.query(&proof.repairable(low, low + PAGES), &[]).await?;
        let keys: Vec<Vec<String>> = rows.iter().map(key).collect();
        for batch in keys.chunks(BATCH) {
            repair(client, shape, batch, &mut out).await?;
        }
        low += PAGES;
    }
    let detail = serde_json::json!({ "repaired": out.repaired, "left": out.left, "refused": out.refused });
    event::record(client, &shape.job, "repaired", detail).await?;
    Ok(out)
}

/// A batch; where the server refuses a row, row by row.
async fn repair(client: &mut Client, shape: &Shape, keys: &[Vec<String>], out: &mut Repaired) -> Result<()> {
    match persist(client, shape, keys).await {
        Ok(n) => {
            out.repaired += n;
            out.left += keys.len() as u64 - n;
        }
        Err(e) if e.retry() == Retry::Never && crate::error::is_about_a_row(e.sqlstate().unwrap_or_default()) => {
            for key in keys {
                match persist(client, shape, std::slice::from_ref(key)).await {
                    Ok(n) => {
                        out.repaired += n;
                        out.left += 1 - n;
                    }
                    Err(e) if crate::error::is_about_a_row(e.sqlstate().unwrap_or_default()) => {
                        *out.refused.entry(e.sqlstate().unwrap_or_default().to_owned()).or_default() += 1;
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        Err(e) => return Err(e),
    }
    Ok(())
}

/// Tries again while somebody is in the way.
async fn persist(client: &mut Client, shape: &Shape, keys: &[Vec<String>]) -> Result<u64> {
    for attempt in 1.. {
        match transaction(client, shape, keys).await {
            Err(e) if e.retry() == Retry::Smaller && attempt < ATTEMPTS => tokio::time::sleep(PAUSE).await,
            other => return other,
        }
    }
    unreachable!("the last attempt returns")
}

async fn transaction(client: &mut Client, shape: &Shape, keys: &[Vec<String>]) -> Result<u64> {
    let columns: Vec<Vec<&str>> =
        (0..shape.key.len()).map(|i| keys.iter().filter_map(|k| k.get(i)).map(String::as_str).collect()).collect();
    let parameters: Vec<&(dyn ToSql + Sync)> = columns.iter().map(|c| c as &(dyn ToSql + Sync)).collect();
    let tx = client.transaction().await?;
    idle(&tx, &shape.job).await?;
    tx.query(&repair_sql::lock(shape), &parameters).await?;
    crate::fault::point("repair-locked");
    let n = tx.execute(&repair_sql::derive(shape), &parameters).await?;
    // What a verification under way has seen of these rows is no longer so.
    verification::forget(&tx, &shape.job).await?;
    tx.commit().await?;
    Ok(n)
}

/// Refuses while a daemon works on rows; and nobody sets the job running while this transaction lasts.
async fn idle(tx: &tokio_postgres::Transaction<'_>, job: &str) -> Result<()> {
    let row = tx.query_one("select status, phase from backfilld.job where name = $1 for share", &[&job]).await?;
    let (status, phase): (String, String) = (row.get(0), row.get(1));
    let works = status == Status::RollingBack.as_str()
        || status == Status::Running.as_str() && phase != Phase::Watch.as_str() && phase != Phase::Done.as_str();
    if works {
        return Err(Error::refused(format!("job {job} is {status} in {phase}: its daemon works on the same rows"))
            .with_hint(format!("backfilld pause {job}, then again")));
    }
    Ok(())
}

fn key(row: &Row) -> Vec<String> {
    (0..row.len()).map(|i| row.get(i)).collect()
}
