//! What the verifier found, bound to the state of the world on which it holds (I6).

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_postgres::GenericClient;

use crate::error::Result;

/// Which server, and which of its histories: a failover changes the timeline, a restore elsewhere the identifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerIdentity {
    /// `system_identifier` of `pg_control_system()`.
    pub system_identifier: String,
    /// Timeline of the running server.
    pub timeline: i32,
}

impl ServerIdentity {
    /// Reads it.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn read(client: &impl GenericClient) -> Result<Self> {
        // The running timeline stands in the name of the current WAL file; pg_control_checkpoint() lags behind until
        // the first checkpoint after a promotion.
        let row = client
            .query_one(
                "select (select system_identifier from pg_control_system())::text,
                        case when pg_is_in_recovery() then (select timeline_id from pg_control_checkpoint())
                             else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int4 end",
                &[],
            )
            .await?;
        Ok(Self { system_identifier: row.get(0), timeline: row.get(1) })
    }
}

/// The result of a verification.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Nothing wrong was found.
    pub passed: bool,
    /// Target rows looked at.
    pub rows_checked: i64,
    /// Findings by kind; a kind with zero was looked for.
    pub counts: BTreeMap<String, i64>,
    /// Keys of some of the rows found, by kind.
    pub samples: BTreeMap<String, Vec<Vec<String>>>,
    /// How long it took, in milliseconds.
    pub duration_ms: i64,
}

impl Verdict {
    /// Total number of findings.
    pub fn findings(&self) -> i64 {
        self.counts.values().sum()
    }

    /// `nulls 3, drift 1`, or `nothing`.
    pub fn summary(&self) -> String {
        let found: Vec<String> = self.counts.iter().filter(|c| *c.1 > 0).map(|(k, n)| format!("{k} {n}")).collect();
        if found.is_empty() { "nothing".into() } else { found.join(", ") }
    }
}

/// Stores a verdict.
///
/// # Errors
/// Whatever the server says.
pub async fn store(
    client: &impl GenericClient,
    job: &str,
    job_hash: &str,
    server: &ServerIdentity,
    v: &Verdict,
) -> Result<()> {
    let counts = serde_json::to_value(&v.counts).unwrap_or_default();
    let samples = serde_json::to_value(&v.samples).unwrap_or_default();
    client
        .execute(
            "insert into backfilld.verdict
               (job, passed, rows_checked, counts, samples, job_hash, system_identifier, timeline, duration_ms)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            &[
                &job,
                &v.passed,
                &v.rows_checked,
                &counts,
                &samples,
                &job_hash,
                &server.system_identifier,
                &server.timeline,
                &v.duration_ms,
            ],
        )
        .await?;
    Ok(())
}

/// Whether the newest verdict of the job passed, for this job's content, on this server and timeline.
///
/// # Errors
/// Whatever the server says.
pub async fn holds(client: &impl GenericClient, job: &str, job_hash: &str, server: &ServerIdentity) -> Result<bool> {
    let row = client
        .query_opt(
            "select passed and job_hash = $2 and system_identifier = $3 and timeline = $4
             from backfilld.verdict where job = $1 order by id desc limit 1",
            &[&job, &job_hash, &server.system_identifier, &server.timeline],
        )
        .await?;
    Ok(row.is_some_and(|r| r.get(0)))
}
