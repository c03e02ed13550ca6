//! What an operator does about rows in quarantine: try them again, or accept that they have no value.

use serde::Serialize;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Transaction};

use crate::error::{Error, Result, Retry};
use crate::job::JobSpec;
use crate::job::spec::TriggerMode;
use crate::ledger::checkpoint;
use crate::plan::{Shape, batch_sql, repair_sql};

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Its key.
    pub key: Vec<String>,
    /// It is in quarantine no more.
    pub released: bool,
    /// What happened, for people; never values.
    pub what: String,
}

/// The session setting under which batches run, if the job's batches skip the application's triggers.
pub fn session_settings(spec: &JobSpec) -> &'static str {
    match spec.side_effects.triggers {
        Some(TriggerMode::Skip) => "set session_replication_role = replica; set lock_timeout = '1s'",
        _ => "set lock_timeout = '1s'",
    }
}

/// Fills one row again, in a transaction of its own. A row that is gone or has its value leaves the quarantine too.
///
/// # Errors
/// Everything that is not about the row.
pub async fn retry(client: &mut Client, shape: &Shape, key: &[String]) -> Result<Outcome> {
    let tx = client.transaction().await?;
    let done = |released, what: String| Outcome { key: key.to_vec(), released, what };
    match attempt(&tx, shape, key).await {
        Ok(what) => {
            checkpoint::release(&tx, &shape.job, key).await?;
            tx.commit().await?;
            Ok(done(true, what.into()))
        }
        Err(e) if e.retry() == Retry::Smaller => {
            Ok(done(false, format!("somebody holds a lock on it ({}); try again", e.sqlstate().unwrap_or_default())))
        }
        Err(e) if crate::error::is_about_a_row(e.sqlstate().unwrap_or_default()) => {
            tx.rollback().await?;
            let (sqlstate, message) = super::batch::reason(client, shape, &e).await?;
            checkpoint::quarantine(client, &shape.job, key, &sqlstate, &message).await?;
            Ok(done(false, format!("{sqlstate} {message}")))
        }
        Err(e) => Err(e),
    }
}

async fn attempt(tx: &Transaction<'_>, shape: &Shape, key: &[String]) -> Result<&'static str> {
    let parameters: Vec<&(dyn ToSql + Sync)> = key.iter().map(|k| k as &(dyn ToSql + Sync)).collect();
    let at = shape.key_at(1);
    let filled = tx.execute(&batch_sql::fill(shape, &at), &parameters).await?;
    if let Some(recheck) = batch_sql::recheck(shape, &at) {
        tx.execute(&recheck, &parameters).await?;
    }
    Ok(match (filled, tx.query_opt(&repair_sql::filled(shape), &parameters).await?) {
        (_, None) => "the row is gone",
        (0, _) => "nothing is left to fill",
        _ => "filled",
    })
}

/// Notes that the row may stay without a value.
///
/// # Errors
/// Refused where NOT NULL is wanted of a column that is NULL in it: NOT NULL would be impossible.
pub async fn accept(tx: &Transaction<'_>, shape: &Shape, key: &[String], why: &str) -> Result<Outcome> {
    let parameters: Vec<&(dyn ToSql + Sync)> = key.iter().map(|k| k as &(dyn ToSql + Sync)).collect();
    let done = |released, what: &str| Outcome { key: key.to_vec(), released, what: what.to_owned() };
    let Some(row) = tx.query_opt(&repair_sql::filled(shape), &parameters).await? else {
        checkpoint::release(tx, &shape.job, key).await?;
        return Ok(done(true, "the row is gone"));
    };
    let filled: Vec<bool> = row.get(0);
    if filled.iter().all(|f| *f) {
        checkpoint::release(tx, &shape.job, key).await?;
        return Ok(done(true, "the row has its value by now"));
    }
    let impossible = shape.columns.iter().zip(&filled).find(|(c, f)| c.not_null && !**f);
    if let Some((column, _)) = impossible {
        return Err(Error::refused(format!(
            "row {} cannot be accepted: column {} shall be NOT NULL and has no value in it",
            key.join(","),
            column.name
        ))
        .with_hint(
            "mend what refuses the update (`quarantine list` has the reason) and say `quarantine retry`; or delete the row",
        ));
    }
    checkpoint::accept(tx, &shape.job, key, why).await?;
    Ok(done(false, "accepted without a value"))
}
