//! `backfilld rollback`: asks for the rollback in the ledger, then does it, or watches the daemon that holds the lease do it.

use std::time::Duration;

use serde_json::json;

use super::Global;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::ledger::{self, event, job as jobs};
use crate::pg::pool::Pool;
use crate::phase::Status;
use crate::rollback;

/// Options.
#[derive(clap::Args)]
pub struct RollbackArgs {
    /// The job, by name or directory
    job: String,
    /// Also drop the columns that the job added, with their data
    #[arg(long)]
    drop_column: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

pub async fn run(global: &Global, args: RollbackArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let mut session = super::connect(&settings, "control").await?;
    ledger::migrate::require(&session.client).await?;
    let name = super::job_name(&args.job)?;
    let row = jobs::get(&session.client, &name).await?;
    let spec = super::started_spec(&row)?;
    if row.status == Status::RolledBack && !args.drop_column {
        return super::print(&format!("job {name} is rolled back already"));
    }
    let lose = if args.drop_column { ", and drop its columns with their data" } else { "" };
    super::confirm(&format!("roll job {name} back from phase {}{lose}?", row.phase), args.yes)?;
    let tx = session.client.transaction().await?;
    tx.execute("update backfilld.job set drop_column = $2 where name = $1", &[&name, &args.drop_column]).await?;
    jobs::set_status(&tx, &name, &[], Status::RollingBack, "rollback asked for by an operator", "").await?;
    event::record(&tx, &name, "rollback", json!({ "phase": row.phase.as_str(), "drop_column": args.drop_column }))
        .await?;
    tx.commit().await?;
    session.close().await;

    let daemon = Daemon::new(settings, spec, true)?;
    let stop = daemon.shutdown.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stop.cancel();
        }
    });
    let pool = daemon.pool.clone();
    let ours = tokio::select! {
        ours = daemon.run() => ours,
        theirs = finished(&pool, &name) => theirs,
    };
    let row = jobs::get(&**pool.get().await?, &name).await?;
    match (row.status, ours) {
        // Also where another daemon was faster, and ours found nothing left to do.
        (Status::RolledBack, _) => super::print(&format!("job {name} is rolled back: {}", row.reason)),
        (_, Err(e)) => Err(e),
        (status, Ok(_)) => Err(Error::failed(format!("job {name} is {status} after the rollback"))),
    }
}

/// Resolves when another daemon has finished the rollback, some time after it did: ours may have been it.
async fn finished(pool: &Pool, name: &str) -> Result<Status> {
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let row = jobs::get(&**pool.get().await?, name).await?;
        if row.reason.starts_with(rollback::FAILED) {
            return Err(Error::failed(row.reason).with_hint(row.hint));
        }
        if row.status != Status::RollingBack {
            tokio::time::sleep(Duration::from_secs(1)).await;
            return Ok(row.status);
        }
    }
}
