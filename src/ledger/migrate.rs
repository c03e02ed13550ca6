//! Creates and upgrades our own tables, from `migrations/`.

use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio_postgres::Client;

use crate::error::{Error, Result};

/// Every migration in order: version, file name, SQL. Files are never changed once released; new ones are added.
pub const MIGRATIONS: &[(i32, &str, &str)] = &[
    (1, "0001_ledger.sql", include_str!("../../migrations/0001_ledger.sql")),
    (2, "0002_heap_cursor.sql", include_str!("../../migrations/0002_heap_cursor.sql")),
    (3, "0003_lanes.sql", include_str!("../../migrations/0003_lanes.sql")),
    (4, "0004_access.sql", include_str!("../../migrations/0004_access.sql")),
    (5, "0005_verdict_state.sql", include_str!("../../migrations/0005_verdict_state.sql")),
    (6, "0006_control.sql", include_str!("../../migrations/0006_control.sql")),
    (7, "0007_pulse.sql", include_str!("../../migrations/0007_pulse.sql")),
    (8, "0008_proof.sql", include_str!("../../migrations/0008_proof.sql")),
    (9, "0009_report.sql", include_str!("../../migrations/0009_report.sql")),
];

/// Key of the advisory lock under which migrations run: "backfill" in ASCII.
const LOCK_KEY: i64 = 0x6261_636b_6669_6c6c;

/// What the database holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// No schema of ours.
    Nothing,
    /// This version.
    Version(i32),
}

/// Reads the installed version; needs no right to write.
///
/// # Errors
/// Whatever the server says.
pub async fn installed(client: &Client) -> Result<Installed> {
    let there: bool = client.query_one("select to_regclass('backfilld.schema_version') is not null", &[]).await?.get(0);
    if !there {
        return Ok(Installed::Nothing);
    }
    let version: Option<i32> = client.query_one("select max(version) from backfilld.schema_version", &[]).await?.get(0);
    Ok(version.map_or(Installed::Nothing, Installed::Version))
}

/// Brings our tables to this binary's version. Safe to run by many daemons at once: only one migrates at a time.
///
/// The lock is tried, never waited for: a session that waits in `pg_advisory_lock` holds a snapshot, and a CREATE INDEX
/// CONCURRENTLY of the leader would wait for it while it waits for the leader (hazard 33).
///
/// # Errors
/// Refused if the tables belong to a newer binary or a released migration was altered; a hint names missing rights.
pub async fn migrate(client: &mut Client) -> Result<()> {
    let newest = MIGRATIONS.last().map_or(0, |m| m.0);
    for _ in 0..600 {
        match installed(client).await? {
            Installed::Version(v) if v == newest => return check_digests(client).await,
            Installed::Version(v) if v > newest => {
                return Err(Error::refused(format!("schema backfilld is at version {v}, this binary knows {newest}"))
                    .with_hint("run the newer backfilld that upgraded it"));
            }
            _ => {}
        }
        let tx = client.transaction().await?;
        let locked: bool = tx.query_one("select pg_try_advisory_xact_lock($1)", &[&LOCK_KEY]).await?.get(0);
        if locked {
            apply(&tx, newest).await?;
            tx.commit().await?;
        } else {
            tx.rollback().await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Err(Error::refused("another session has been migrating schema backfilld for a minute")
        .with_hint("look for it in pg_locks: locktype = 'advisory'"))
}

async fn apply(tx: &tokio_postgres::Transaction<'_>, newest: i32) -> Result<()> {
    let missing: bool = tx.query_one("select to_regnamespace('backfilld') is null", &[]).await?.get(0);
    if missing {
        tx.batch_execute("create schema backfilld").await.map_err(|e| {
            Error::from(e).context("cannot create schema backfilld").with_hint(
                "grant create on database ... to this login, or create the schema once: create schema backfilld \
                 authorization <login>",
            )
        })?;
    }
    tx.batch_execute(
        "create table if not exists backfilld.schema_version (
           version int primary key, name text not null, sha256 text not null,
           applied_at timestamptz not null default clock_timestamp())",
    )
    .await?;
    let done: Option<i32> = tx.query_one("select max(version) from backfilld.schema_version", &[]).await?.get(0);
    let done = done.unwrap_or(0);
    if done > newest {
        return Ok(());
    }
    for (version, name, sql) in MIGRATIONS.iter().filter(|m| m.0 > done) {
        tx.batch_execute(sql).await.map_err(|e| Error::from(e).context(format!("migration {name}")))?;
        tx.execute(
            "insert into backfilld.schema_version (version, name, sha256) values ($1, $2, $3)",
            &[version, name, &digest(sql)],
        )
        .await?;
    }
    Ok(())
}

async fn check_digests(client: &Client) -> Result<()> {
    for row in client.query("select version, name, sha256 from backfilld.schema_version", &[]).await? {
        let (version, name, sha): (i32, String, String) = (row.get(0), row.get(1), row.get(2));
        if MIGRATIONS.iter().any(|m| m.0 == version && digest(m.2) != sha) {
            return Err(Error::refused(format!("migration {name} in the database is not the one of this binary"))
                .with_hint("the database was prepared by another build of backfilld; use a released one"));
        }
    }
    Ok(())
}

fn digest(sql: &str) -> String {
    Sha256::digest(sql.as_bytes()).iter().map(|b| format!("{b:02x}")).collect()
}

/// Fails with a clear message where our tables are missing, for commands that only read or control.
///
/// # Errors
/// Refused, if nothing of ours is in this database.
pub async fn require(client: &Client) -> Result<()> {
    match installed(client).await? {
        Installed::Version(_) => Ok(()),
        Installed::Nothing => Err(Error::refused("there is no backfilld job in this database")
            .with_hint("start one with: backfilld run <job directory>; or check which database the settings name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_and_the_directory_agree() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
        let mut files: Vec<String> = std::fs::read_dir(dir)
            .expect("migrations/")
            .map(|f| f.expect("entry").file_name().into_string().expect("utf-8"))
            .filter(|f| f.ends_with(".sql"))
            .collect();
        files.sort();
        let listed: Vec<&str> = MIGRATIONS.iter().map(|m| m.1).collect();
        assert_eq!(files, listed);
        assert!(MIGRATIONS.windows(2).all(|w| w[0].0 + 1 == w[1].0));
    }
}
