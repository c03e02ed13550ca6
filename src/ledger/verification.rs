//! How far a verification is, and the keys it found.

use std::collections::BTreeMap;

use tokio_postgres::GenericClient;

use super::verdict::ServerIdentity;
use crate::error::Result;

/// On what a verification is made.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// Hash of the job's content.
    pub job_hash: String,
    /// The server.
    pub server: ServerIdentity,
    /// The catalog.
    pub state: serde_json::Value,
}

/// What was stored of a verification that did not end, if it was made on the same.
///
/// # Errors
/// Whatever the server says.
pub async fn find(client: &impl GenericClient, job: &str, basis: &Basis) -> Result<Option<serde_json::Value>> {
    let row = client
        .query_opt(
            "select walk from backfilld.verification
             where job = $1 and job_hash = $2 and system_identifier = $3 and timeline = $4 and state = $5",
            &[&job, &basis.job_hash, &basis.server.system_identifier, &basis.server.timeline, &basis.state],
        )
        .await?;
    Ok(row.map(|r| r.get(0)))
}

/// Stores how far it is.
///
/// # Errors
/// Whatever the server says.
pub async fn save(client: &impl GenericClient, job: &str, basis: &Basis, walk: &serde_json::Value) -> Result<()> {
    client
        .execute(
            "insert into backfilld.verification (job, job_hash, system_identifier, timeline, state, walk)
             values ($1, $2, $3, $4, $5, $6)
             on conflict (job) do update set job_hash = excluded.job_hash, system_identifier = excluded.system_identifier,
               timeline = excluded.timeline, state = excluded.state, walk = excluded.walk, updated_at = clock_timestamp()",
            &[&job, &basis.job_hash, &basis.server.system_identifier, &basis.server.timeline, &basis.state, walk],
        )
        .await?;
    Ok(())
}

/// Forgets it: it ended, or what it has seen no longer counts.
///
/// # Errors
/// Whatever the server says.
pub async fn forget(client: &impl GenericClient, job: &str) -> Result<()> {
    client.execute("delete from backfilld.verification where job = $1", &[&job]).await?;
    Ok(())
}

/// Replaces the keys that were found. `origin`: `verify` or `watch`.
///
/// # Errors
/// Whatever the server says.
pub async fn store_findings(
    client: &impl GenericClient,
    job: &str,
    origin: &str,
    found: &BTreeMap<String, Vec<Vec<String>>>,
) -> Result<()> {
    client.execute("delete from backfilld.finding where job = $1 and origin = $2", &[&job, &origin]).await?;
    for (kind, keys) in found {
        for key in keys {
            client
                .execute(
                    "insert into backfilld.finding (job, origin, kind, key) values ($1, $2, $3, $4) on conflict do nothing",
                    &[&job, &origin, kind, key],
                )
                .await?;
        }
    }
    Ok(())
}
