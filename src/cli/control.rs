//! `pause`, `resume`, `cutover`: what an operator says to a running job, from any machine, through the database.

use serde_json::json;

use super::Global;
use crate::error::{Error, Result};
use crate::ledger::{self, event, job as jobs};
use crate::phase::{Phase, Status};

/// A job.
#[derive(clap::Args)]
pub struct JobArg {
    /// The job, by name or directory
    job: String,
}

/// Options of `pause`.
#[derive(clap::Args)]
pub struct PauseArgs {
    /// The job, by name or directory
    job: String,
    /// Why, for those who look at its status
    #[arg(long, default_value = "paused by an operator")]
    reason: String,
}

pub async fn pause(global: &Global, args: PauseArgs) -> Result<()> {
    change(global, &args.job, "pause", async |tx, row| {
        let hint = format!("backfilld resume {}", row.name);
        match row.status {
            Status::Running => {
                jobs::set_status(tx, &row.name, &[Status::Running], Status::Paused, &args.reason, &hint).await?;
                let text = format!("job {} pauses after the batch in flight; go on with: {hint}", row.name);
                Ok(Said { text, detail: json!({ "reason": args.reason }) })
            }
            Status::Paused => Ok(format!("job {} is paused already", row.name).into()),
            other => Err(Error::refused(format!("job {} is {other}; only a running job can be paused", row.name))),
        }
    })
    .await
}

pub async fn resume(global: &Global, args: JobArg) -> Result<()> {
    change(global, &args.job, "resume", async |tx, row| match row.status {
        Status::Paused | Status::Failed => {
            if row.status == Status::Failed && matches!(row.phase, Phase::Backfill | Phase::Verify) {
                retry_quarantined(tx, row).await?;
            }
            go_on(tx, row).await
        }
        Status::Running => Ok(format!("job {} is running already", row.name)),
        Status::Held => Err(Error::refused(format!("job {} stands at a hold point", row.name))
            .with_hint(format!("backfilld cutover {}", row.name))),
        other => Err(Error::refused(format!("job {} is {other}", row.name))),
    })
    .await
}

/// The operator has corrected the data: rows in quarantine get another try, in another sweep.
async fn retry_quarantined(tx: &tokio_postgres::Transaction<'_>, row: &jobs::JobRow) -> Result<()> {
    let job = &row.name;
    if ledger::checkpoint::quarantined(tx, job).await? == 0 {
        tx.execute("update backfilld.checkpoint set sweep = 1 where job = $1", &[&job]).await?;
        return Ok(());
    }
    ledger::checkpoint::clear_quarantine(tx, job).await?;
    tx.execute(
        "update backfilld.checkpoint set sweep = 1, cursor = null, upper = null, finished = false, filenode = null
         where job = $1",
        &[&job],
    )
    .await?;
    jobs::set_phase(tx, job, row.phase, Phase::Backfill).await
}

/// Sets the job running. Nobody knows what happened to the data while it stood still, so before anything enforcing the
/// proof is made anew (I6).
async fn go_on(tx: &tokio_postgres::Transaction<'_>, row: &jobs::JobRow) -> Result<String> {
    ledger::verification::forget(tx, &row.name).await?;
    if row.phase.needs_verdict() {
        jobs::set_phase(tx, &row.name, row.phase, Phase::Verify).await?;
    }
    jobs::set_status(tx, &row.name, &[row.status], Status::Running, "", "").await?;
    let next = jobs::get(tx, &row.name).await?.phase;
    let then = if next == row.phase { String::new() } else { format!(" and then {}", row.phase) };
    Ok(format!("job {} goes on with {next}{then}, if a daemon runs (backfilld run)", row.name))
}

pub async fn cutover(global: &Global, args: JobArg) -> Result<()> {
    change(global, &args.job, "cutover", async |tx, row| match row.status {
        Status::Held => {
            tx.execute(
                "update backfilld.job set released = array_append(released, phase) where name = $1",
                &[&row.name],
            )
            .await?;
            go_on(tx, row).await
        }
        other => {
            Err(Error::refused(format!("job {} is {other} in {}; it stands at no hold point", row.name, row.phase))
                .with_hint("hold_before in the job says where it stops"))
        }
    })
    .await
}

/// What a command did: for the operator, and for the events.
pub(super) struct Said {
    pub(super) text: String,
    pub(super) detail: serde_json::Value,
}

impl From<String> for Said {
    fn from(text: String) -> Self {
        Self { text, detail: json!({}) }
    }
}

/// Who it is, where: of a login that many share the database only knows the name.
fn whose() -> String {
    let user = whoami::username().unwrap_or_else(|_| "?".into());
    let host = whoami::hostname().unwrap_or_else(|_| "?".into());
    format!("{user}@{host}")
}

/// Reads the job's row for update, changes it, notes it in the events, and says what was done.
pub(super) async fn change<S: Into<Said>>(
    global: &Global,
    given: &str,
    what: &str,
    body: impl AsyncFn(&tokio_postgres::Transaction<'_>, &jobs::JobRow) -> Result<S>,
) -> Result<()> {
    let settings = global.settings(true)?;
    let mut session = super::connect(&settings, "control").await?;
    ledger::migrate::require(&session.client).await?;
    let name = super::job_name(given)?;
    let tx = session.client.transaction().await?;
    tx.execute("select from backfilld.job where name = $1 for no key update", &[&name]).await?;
    let row = jobs::get(&tx, &name).await?;
    let Said { text, detail: more } = body(&tx, &row).await?.into();
    let mut detail = json!({ "was": row.status.as_str(), "phase": row.phase.as_str(), "from": whose() });
    if let (Some(all), Some(more)) = (detail.as_object_mut(), more.as_object()) {
        all.extend(more.clone());
    }
    event::record(&tx, &name, what, detail).await?;
    tx.commit().await?;
    super::print(&text)
}
