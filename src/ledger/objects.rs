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
    // As there.
    client
        .execute_typed(
            "delete from backfilld.object where job = $1 and kind = $2 and ident = $3",
            &[(&job, Type::TEXT), (&kind, Type::TEXT), (&ident, Type::TEXT)],
        )
        .await?;
    Ok(())
}

/// Names of the objects of a kind that are ours.
///
/// # Errors
/// Whatever the server says.
pub async fn all(client: &impl GenericClient, job: &str, kind: &str) -> Result<Vec<String>> {
    let rows = client
        .query("select ident from backfilld.object where job = $1 and kind = $2 order by ident", &[&job, &kind])
        .await?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
}

/// Notes that all of some kinds are gone.
///
/// # Errors
/// Whatever the server says.
pub async fn all_removed(client: &impl GenericClient, job: &str, kinds: &[&str]) -> Result<()> {
    // Not prepared, for one round trip: it often runs under a strong lock.
    client
        .execute_typed(
            "delete from backfilld.object where job = $1 and kind = any ($2)",
            &[(&job, Type::TEXT), (&kinds, Type::TEXT_ARRAY)],
        )
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
