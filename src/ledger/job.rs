//! A job's row: what it is, where it is, and what an operator asked for.

use tokio_postgres::{GenericClient, Row};

use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::phase::{Phase, Status};

/// Version of the meaning of stored jobs and checkpoints. Older binaries refuse newer ones (hazard 60).
pub const FORMAT_VERSION: i32 = 1;

/// A job's row.
#[derive(Debug, Clone)]
pub struct JobRow {
    /// Its name.
    pub name: String,
    /// The job as it was started.
    pub spec: serde_json::Value,
    /// Hash of what may not change while it runs.
    pub spec_hash: String,
    /// Where it is.
    pub phase: Phase,
    /// Since when, Unix time in milliseconds on the server's clock.
    pub phase_since_ms: i64,
    /// Whether it moves.
    pub status: Status,
    /// Why it stands.
    pub reason: String,
    /// What to do about it.
    pub hint: String,
    /// Hold points that were released.
    pub released: Vec<String>,
    /// Rollback shall drop the columns too.
    pub drop_column: bool,
}

const COLUMNS: &str = "name, spec, spec_hash, phase, status, reason, hint, released, drop_column, format_version, \
     (extract(epoch from phase_since) * 1000)::int8";

fn parse(row: &Row) -> Result<JobRow> {
    let format: i32 = row.get(9);
    if format > FORMAT_VERSION {
        return Err(Error::refused(format!(
            "job {} was started by a newer backfilld (format {format}, this one knows {FORMAT_VERSION})",
            row.get::<_, String>(0)
        ))
        .with_hint("run that version"));
    }
    Ok(JobRow {
        name: row.get(0),
        spec: row.get(1),
        spec_hash: row.get(2),
        phase: row.get::<_, String>(3).parse().map_err(Error::internal)?,
        phase_since_ms: row.get(10),
        status: row.get::<_, String>(4).parse().map_err(Error::internal)?,
        reason: row.get(5),
        hint: row.get(6),
        released: row.get(7),
        drop_column: row.get(8),
    })
}

/// The job's row, if there is one.
///
/// # Errors
/// Whatever the server says; refused for a row of a newer version.
pub async fn find(client: &impl GenericClient, name: &str) -> Result<Option<JobRow>> {
    let sql = format!("select {COLUMNS} from backfilld.job where name = $1");
    client.query_opt(&sql, &[&name]).await?.as_ref().map(parse).transpose()
}

/// The job's row.
///
/// # Errors
/// Refused, naming the jobs that exist, if there is none of this name.
pub async fn get(client: &impl GenericClient, name: &str) -> Result<JobRow> {
    if let Some(job) = find(client, name).await? {
        return Ok(job);
    }
    let names: Vec<String> =
        client.query("select name from backfilld.job order by name", &[]).await?.iter().map(|r| r.get(0)).collect();
    let known = if names.is_empty() { "there is none".to_owned() } else { format!("known: {}", names.join(", ")) };
    Err(Error::refused(format!("no job {name:?} in this database")).with_hint(known))
}

/// All jobs, by name.
///
/// # Errors
/// Whatever the server says.
pub async fn all(client: &impl GenericClient) -> Result<Vec<JobRow>> {
    let sql = format!("select {COLUMNS} from backfilld.job order by name");
    client.query(&sql, &[]).await?.iter().map(parse).collect()
}

/// Enters the job, or compares it with the one that was started. What may change while it runs is taken over.
///
/// # Errors
/// Refused, with the differences, if the job was started with another content.
pub async fn register(client: &impl GenericClient, spec: &JobSpec) -> Result<JobRow> {
    let json = serde_json::to_value(spec).map_err(|e| Error::internal("job as JSON").with_source(e))?;
    let hash = spec.hash();
    client
        .execute(
            "insert into backfilld.job (name, spec, spec_hash, format_version) values ($1, $2, $3, $4)
             on conflict (name) do nothing",
            &[&spec.name, &json, &hash, &FORMAT_VERSION],
        )
        .await?;
    let row = get(client, &spec.name).await?;
    if row.spec_hash != hash {
        let differences = crate::job::load::diff(&row.spec, &json);
        return Err(Error::refused(format!(
            "job {} was started with another content (phase {}): {}",
            spec.name,
            row.phase,
            differences.join("; ")
        ))
        .with_hint(
            "put the file back, or roll the job back and start again: backfilld rollback; backfilld uninstall; or give \
             the changed job another name",
        ));
    }
    if row.spec != json {
        client
            .execute(
                "update backfilld.job set spec = $2, updated_at = clock_timestamp() where name = $1",
                &[&spec.name, &json],
            )
            .await?;
    }
    get(client, &spec.name).await
}

/// Stores a phase, if the job is still in `from`.
///
/// # Errors
/// Whatever the server says.
pub async fn set_phase(client: &impl GenericClient, name: &str, from: Phase, to: Phase) -> Result<()> {
    client
        .execute(
            "update backfilld.job set phase = $3, phase_since = clock_timestamp(), updated_at = clock_timestamp()
             where name = $1 and phase = $2 and phase <> $3",
            &[&name, &from.as_str(), &to.as_str()],
        )
        .await?;
    Ok(())
}

/// How the reason of a running job begins whose batches wait.
pub const WAITING: &str = "waiting: ";

/// Takes back the reason that batches waited, whoever stored it. Every other reason, such as what a watch has found, stays.
///
/// # Errors
/// Whatever the server says.
pub async fn no_longer_waits(client: &impl GenericClient, name: &str) -> Result<()> {
    client
        .execute(
            "update backfilld.job set reason = '', hint = '', updated_at = clock_timestamp()
             where name = $1 and status = 'running' and starts_with(reason, $2)",
            &[&name, &WAITING],
        )
        .await?;
    Ok(())
}

/// Stores a status with reason and hint. `from`: only if the status is one of these. Gives whether it was stored.
///
/// # Errors
/// Whatever the server says.
pub async fn set_status(
    client: &impl GenericClient,
    name: &str,
    from: &[Status],
    status: Status,
    reason: &str,
    hint: &str,
) -> Result<bool> {
    let from: Vec<&str> = from.iter().map(|s| s.as_str()).collect();
    let n = client
        .execute(
            "update backfilld.job set status = $2, reason = $3, hint = $4, updated_at = clock_timestamp()
             where name = $1 and (cardinality($5::text[]) = 0 or status = any($5))",
            &[&name, &status.as_str(), &reason, &hint, &from],
        )
        .await?;
    Ok(n == 1)
}
