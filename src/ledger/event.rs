//! What happened, for people and for the audit.

use tokio_postgres::GenericClient;

use crate::error::Result;

/// Notes that something happened. `detail` holds names and numbers, never row values.
///
/// # Errors
/// Whatever the server says.
pub async fn record(client: &impl GenericClient, job: &str, kind: &str, detail: serde_json::Value) -> Result<()> {
    client
        .execute("insert into backfilld.event (job, kind, detail) values ($1, $2, $3)", &[&job, &kind, &detail])
        .await?;
    Ok(())
}

/// An event as stored.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Event {
    /// When, as the server writes a `timestamptz` in UTC.
    pub at: String,
    /// What.
    pub kind: String,
    /// Names and numbers.
    pub detail: serde_json::Value,
    /// The database login that wrote it.
    pub actor: String,
}

/// The latest events of a job, newest first.
///
/// # Errors
/// Whatever the server says.
pub async fn latest(client: &impl GenericClient, job: &str, limit: i64) -> Result<Vec<Event>> {
    let rows = client
        .query(
            "select at::text, kind, detail, actor from backfilld.event where job = $1 order by id desc limit $2",
            &[&job, &limit],
        )
        .await?;
    Ok(rows.iter().map(|r| Event { at: r.get(0), kind: r.get(1), detail: r.get(2), actor: r.get(3) }).collect())
}
