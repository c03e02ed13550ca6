//! `backfilld uninstall`: forgets a finished job; with the last one goes our schema.

use super::Global;
use crate::error::{Error, Result};
use crate::ledger::{self, job as jobs};
use crate::phase::Status;

/// Options.
#[derive(clap::Args)]
pub struct UninstallArgs {
    /// The job, by name or directory
    job: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// What to ask before a job is forgotten; an error if it must not be.
fn question(row: &jobs::JobRow) -> Result<String> {
    let name = &row.name;
    match row.status {
        Status::RolledBack => Ok(format!("forget job {name}, with its snapshots and history?")),
        Status::Done => Ok(format!(
            "forget job {name}? Column, constraints, policies and sync triggers stay; it cannot be rolled back any more"
        )),
        other => Err(Error::refused(format!("job {name} is {other} in {}", row.phase))
            .with_hint(format!("first: backfilld rollback {name}"))),
    }
}

pub async fn run(global: &Global, args: UninstallArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let mut session = super::connect(&settings, "control").await?;
    ledger::migrate::require(&session.client).await?;
    let name = super::job_name(&args.job)?;
    super::confirm(&question(&jobs::get(&session.client, &name).await?)?, args.yes)?;
    let tx = session.client.transaction().await?;
    // Looked at again under its lock: somebody may have said `rollback` while we asked.
    tx.execute("select from backfilld.job where name = $1 for update", &[&name]).await?;
    question(&jobs::get(&tx, &name).await?)?;
    tx.execute("delete from backfilld.event where job = $1", &[&name]).await?;
    tx.execute("delete from backfilld.job where name = $1", &[&name]).await?;
    let others: i64 = tx.query_one("select count(*) from backfilld.job", &[]).await?.get(0);
    if others == 0 {
        // By name, not CASCADE: if somebody put something of theirs into our schema, this fails and nothing is lost.
        tx.batch_execute(
            "drop table backfilld.pulse, backfilld.query_plan, backfilld.sample, backfilld.access_result, backfilld.access_run, backfilld.event, backfilld.object,
               backfilld.snapshot, backfilld.flipped, backfilld.verdict, backfilld.quarantine, backfilld.verification,
               backfilld.finding, backfilld.watch,
               backfilld.checkpoint, backfilld.lease, backfilld.tuning, backfilld.job, backfilld.schema_version;
             drop function backfilld.sign_tuning(), backfilld.count_tuning(), backfilld.guard_job();
             drop schema backfilld",
        )
        .await?;
    }
    tx.commit().await?;
    super::print(&format!("job {name} is forgotten"))
}
