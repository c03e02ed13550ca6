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

    /// Notes how many of a kind there are.
    pub fn count(&mut self, kind: &str, n: i64) {
        self.counts.insert(kind.to_owned(), n);
        self.passed = self.findings() == 0;
    }

    /// Notes findings that are not about rows, in words.
    pub fn add(&mut self, kind: &str, found: Vec<String>) {
        self.count(kind, found.len() as i64);
        if !found.is_empty() {
            self.samples.insert(kind.to_owned(), found.into_iter().map(|f| vec![f]).collect());
        }
    }

    /// `nulls 3, drift 1`, or `nothing`.
    pub fn summary(&self) -> String {
        let found: Vec<String> = self.counts.iter().filter(|c| *c.1 > 0).map(|(k, n)| format!("{k} {n}")).collect();
        if found.is_empty() { "nothing".into() } else { found.join(", ") }
    }
}

/// Stores a verdict. `state`: the catalog on which it was made, read before the first row was.
///
/// # Errors
/// Whatever the server says.
pub async fn store(
    client: &impl GenericClient,
    job: &str,
    job_hash: &str,
    server: &ServerIdentity,
    state: &serde_json::Value,
    v: &Verdict,
) -> Result<()> {
    let counts = serde_json::to_value(&v.counts).unwrap_or_default();
    let samples = serde_json::to_value(&v.samples).unwrap_or_default();
    client
        .execute(
            "insert into backfilld.verdict
               (job, passed, rows_checked, counts, samples, job_hash, system_identifier, timeline, state, duration_ms)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            &[
                &job,
                &v.passed,
                &v.rows_checked,
                &counts,
                &samples,
                &job_hash,
                &server.system_identifier,
                &server.timeline,
                &state,
                &v.duration_ms,
            ],
        )
        .await?;
    Ok(())
}

/// What a stored verdict says, and for what.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Nothing wrong was found.
    pub passed: bool,
    /// Hash of the job's content.
    pub job_hash: String,
    /// The server it was made on.
    pub server: ServerIdentity,
    /// The catalog it was made on; `None`: an older version made it.
    pub state: Option<serde_json::Value>,
}

/// The newest verdict of a job.
///
/// # Errors
/// Whatever the server says.
pub async fn last(client: &impl GenericClient, job: &str) -> Result<Option<Stored>> {
    let row = client
        .query_opt(
            "select passed, job_hash, system_identifier, timeline, state
             from backfilld.verdict where job = $1 order by id desc limit 1",
            &[&job],
        )
        .await?;
    Ok(row.map(|r| Stored {
        passed: r.get(0),
        job_hash: r.get(1),
        server: ServerIdentity { system_identifier: r.get(2), timeline: r.get(3) },
        state: r.get(4),
    }))
}

/// The newest verdict of a job without its samples, and when it was stored, Unix time in milliseconds.
///
/// # Errors
/// Whatever the server says.
pub async fn latest(client: &impl GenericClient, job: &str) -> Result<Option<(i64, Verdict)>> {
    let row = client
        .query_opt(
            "select (extract(epoch from at) * 1000)::int8, passed, rows_checked, counts, duration_ms
             from backfilld.verdict where job = $1 order by id desc limit 1",
            &[&job],
        )
        .await?;
    Ok(row.map(|r| {
        let counts = serde_json::from_value(r.get(3)).unwrap_or_default();
        let verdict = Verdict {
            passed: r.get(1),
            rows_checked: r.get(2),
            counts,
            samples: BTreeMap::new(),
            duration_ms: r.get(4),
        };
        (r.get(0), verdict)
    }))
}

/// Stores the catalog as the flip leaves it, in the flip's transaction.
///
/// # Errors
/// Whatever the server says.
pub async fn store_flipped(client: &impl GenericClient, job: &str, state: &serde_json::Value) -> Result<()> {
    client
        .execute(
            "insert into backfilld.flipped (job, state) values ($1, $2)
             on conflict (job) do update set state = excluded.state, at = excluded.at",
            &[&job, &state],
        )
        .await?;
    Ok(())
}

/// The catalog as the flip left it; `None` before the flip.
///
/// # Errors
/// Whatever the server says.
pub async fn flipped(client: &impl GenericClient, job: &str) -> Result<Option<serde_json::Value>> {
    let row = client.query_opt("select state from backfilld.flipped where job = $1", &[&job]).await?;
    Ok(row.map(|r| r.get(0)))
}

/// The flip was taken back.
///
/// # Errors
/// Whatever the server says.
pub async fn forget_flipped(client: &impl GenericClient, job: &str) -> Result<()> {
    client.execute("delete from backfilld.flipped where job = $1", &[&job]).await?;
    Ok(())
}
