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
    /// The same as Unix time in milliseconds.
    #[serde(skip)]
    pub at_ms: i64,
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
            "select at::text, kind, detail, actor, (extract(epoch from at) * 1000)::int8 from backfilld.event where job = $1 order by id desc limit $2",
            &[&job, &limit],
        )
        .await?;
    Ok(rows.iter().map(event).collect())
}

/// The number of a job's newest event; 0: there is none.
///
/// # Errors
/// Whatever the server says.
pub async fn newest(client: &impl GenericClient, job: &str) -> Result<i64> {
    let sql = "select coalesce(max(id), 0) from backfilld.event where job = $1";
    Ok(client.query_one(sql, &[&job]).await?.get(0))
}

/// The events of a job behind a number, oldest first, with their numbers; a thousand at most.
///
/// # Errors
/// Whatever the server says.
pub async fn after(client: &impl GenericClient, job: &str, id: i64) -> Result<Vec<(i64, Event)>> {
    let rows = client
        .query(
            "select at::text, kind, detail, actor, (extract(epoch from at) * 1000)::int8, id
             from backfilld.event where job = $1 and id > $2 order by id limit 1000",
            &[&job, &id],
        )
        .await?;
    Ok(rows.iter().map(|r| (r.get(5), event(r))).collect())
}

fn event(r: &tokio_postgres::Row) -> Event {
    Event { at: r.get(0), at_ms: r.get(4), kind: r.get(1), detail: r.get(2), actor: r.get(3) }
}

/// The phases that a job has been through: name, begin and end, Unix time in milliseconds. What an earlier job of the same
/// name did is left out.
///
/// # Errors
/// Whatever the server says.
pub async fn phases(client: &impl GenericClient, job: &str) -> Result<Vec<(String, i64, i64)>> {
    let rows = client
        .query(
            "select e.detail ->> 'phase', (extract(epoch from j.created_at) * 1000)::int8,
                    (extract(epoch from e.at) * 1000)::int8
             from backfilld.event e join backfilld.job j on j.name = e.job and e.at >= j.created_at
             where e.job = $1 and e.kind = 'phase' and e.detail ? 'phase' order by e.id",
            &[&job],
        )
        .await?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect())
}
