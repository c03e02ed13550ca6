//! What we created, and how things were before.

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use crate::error::Result;

/// Notes that an object is ours.
///
/// # Errors
/// Whatever the server says.
pub async fn created(client: &impl GenericClient, job: &str, kind: &str, ident: &str) -> Result<()> {
    // Not prepared, for one round trip: it often runs under a strong lock.
    client
        .execute_typed(
            "insert into backfilld.object (job, kind, ident) values ($1, $2, $3) on conflict do nothing",
            &[(&job, Type::TEXT), (&kind, Type::TEXT), (&ident, Type::TEXT)],
        )
        .await?;
    Ok(())
}

/// Whether an object is ours.
///
/// # Errors
/// Whatever the server says.
pub async fn is_ours(client: &impl GenericClient, job: &str, kind: &str, ident: &str) -> Result<bool> {
    let row = client
        .query_one(
            "select exists (select from backfilld.object where job = $1 and kind = $2 and ident = $3)",
            &[&job, &kind, &ident],
        )
        .await?;
    Ok(row.get(0))
}

/// Notes that an object of ours is gone.
///
/// # Errors
/// Whatever the server says.
pub async fn removed(client: &impl GenericClient, job: &str, kind: &str, ident: &str) -> Result<()> {
    client
        .execute("delete from backfilld.object where job = $1 and kind = $2 and ident = $3", &[&job, &kind, &ident])
        .await?;
    Ok(())
}

/// Keeps how something was. The first snapshot stays: a later one would hold our own changes.
///
/// # Errors
/// Whatever the server says.
pub async fn keep(
    client: &impl GenericClient,
    job: &str,
    kind: &str,
    ident: &str,
    definition: &serde_json::Value,
) -> Result<()> {
    client
        .execute(
            "insert into backfilld.snapshot (job, kind, ident, definition) values ($1, $2, $3, $4) on conflict do nothing",
            &[&job, &kind, &ident, definition],
        )
        .await?;
    Ok(())
}

/// How something was.
///
/// # Errors
/// Whatever the server says.
pub async fn kept(
    client: &impl GenericClient,
    job: &str,
    kind: &str,
    ident: &str,
) -> Result<Option<serde_json::Value>> {
    let row = client
        .query_opt(
            "select definition from backfilld.snapshot where job = $1 and kind = $2 and ident = $3",
            &[&job, &kind, &ident],
        )
        .await?;
    Ok(row.map(|r| r.get(0)))
}
