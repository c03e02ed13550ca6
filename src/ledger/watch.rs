//! What the watch after the flip has seen.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_postgres::GenericClient;

use crate::error::{Error, Result};

/// What is wrong, in words, by kind.
pub type Findings = BTreeMap<String, Vec<String>>;

/// How far a watch is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watched {
    /// Seconds since the flip, by the server's clock.
    pub seconds: i64,
    /// Complete looks at everything.
    pub passes: i64,
    /// The file whose pages are counted.
    pub filenode: u32,
    /// The next page to compare.
    pub page: i64,
    /// First pages of ranges with wrong rows.
    pub dirty: Vec<i64>,
    /// What was wrong at the last look.
    pub findings: Findings,
}

/// Reads how far it is; begins it, with the time of the flip, if it is new.
///
/// # Errors
/// Whatever the server says.
pub async fn begin(client: &impl GenericClient, job: &str) -> Result<Watched> {
    client
        .execute(
            "insert into backfilld.watch (job, since)
             select $1, coalesce((select at from backfilld.flipped where job = $1), clock_timestamp()) on conflict do nothing",
            &[&job],
        )
        .await?;
    let row = client
        .query_one(
            "select extract(epoch from clock_timestamp() - since)::int8, passes, filenode, page, dirty, findings
             from backfilld.watch where job = $1",
            &[&job],
        )
        .await?;
    Ok(Watched {
        seconds: row.get(0),
        passes: row.get(1),
        filenode: row.get(2),
        page: row.get(3),
        dirty: row.get(4),
        findings: serde_json::from_value(row.get(5))
            .map_err(|e| Error::internal("findings of the watch").with_source(e))?,
    })
}

/// A watch, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// When it began: the flip, UTC.
    pub since: String,
    /// When it ends, if nothing is wrong then, UTC. `None`: the job has no `[watch]` any more.
    pub until: Option<String>,
    /// Its time is over.
    pub over: bool,
    /// Complete looks at everything.
    pub passes: i64,
    /// The last of them, UTC. `None`: none yet.
    pub checked_at: Option<String>,
    /// What is wrong, in words, by kind.
    pub findings: Findings,
}

/// The watch of a job that lasts so many seconds; `None` before it begins.
///
/// # Errors
/// Whatever the server says.
pub async fn shown(client: &impl GenericClient, job: &str, lasts: Option<f64>) -> Result<Option<Shown>> {
    let row = client
        .query_opt(
            "select to_char(since at time zone 'UTC', f), to_char((since + make_interval(secs => $2)) at time zone 'UTC', f),
                    coalesce(clock_timestamp() >= since + make_interval(secs => $2), false), passes,
                    to_char(checked_at at time zone 'UTC', f), findings
             from backfilld.watch, (values ('YYYY-MM-DD HH24:MI:SS')) as x(f) where job = $1",
            &[&job, &lasts],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Shown {
        since: row.get(0),
        until: row.get(1),
        over: row.get(2),
        passes: row.get(3),
        checked_at: row.get(4),
        findings: serde_json::from_value(row.get(5))
            .map_err(|e| Error::internal("findings of the watch").with_source(e))?,
    }))
}

/// Stores what a look has seen.
///
/// # Errors
/// Whatever the server says.
pub async fn store(client: &impl GenericClient, job: &str, w: &Watched) -> Result<()> {
    let findings = serde_json::to_value(&w.findings).unwrap_or_default();
    client
        .execute(
            "update backfilld.watch set checked_at = clock_timestamp(), passes = $2, filenode = $3, page = $4, dirty = $5,
               findings = $6 where job = $1",
            &[&job, &w.passes, &w.filenode, &w.page, &w.dirty, &findings],
        )
        .await?;
    Ok(())
}

/// Forgets it, when the flip is taken back.
///
/// # Errors
/// Whatever the server says.
pub async fn forget(client: &impl GenericClient, job: &str) -> Result<()> {
    client.execute("delete from backfilld.watch where job = $1", &[&job]).await?;
    Ok(())
}
