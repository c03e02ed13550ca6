//! The proof that nobody's access changes: old policies and functions against new ones, before the flip and after it.
//!
//! Before the flip a stand-in role has the new policies; after it, a stand-in has the old ones. So both sides are enforced by
//! the server on the same data, whatever the application writes meanwhile. Everything is tried in short transactions that
//! are rolled back, one user at a time; a user whose result is stored is not tried again after a restart.

mod compare;
pub mod explain;
pub mod probe_role;
pub mod rules;
mod running;
mod session;
mod sets;
mod users;

use tokio_postgres::Client;
use tracing::{info, warn};

use self::explain::failure;
use self::running::Running;
use crate::context::Context;
use crate::cutover::flip;
use crate::error::{Error, Result, Retry};
use crate::ledger::access::{self as ledger, Outcome};
use crate::ledger::{event, lease};
use crate::metrics;

/// Differences that are logged, and named in the reason of the failure.
const LOGGED: i64 = 20;

/// Which of the two comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Before the flip: the new policies are tried on a stand-in.
    Before,
    /// After it: the old policies are.
    After,
}

impl Stage {
    /// As the ledger has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
        }
    }
}

/// Whether the newest comparison is a passing one from before the flip, on everything that is there now. True without
/// `[access]`, and when that has come.
///
/// # Errors
/// Database errors.
pub async fn holds(ctx: &Context, client: &Client) -> Result<bool> {
    // Somebody stopped the job between the flip and what confirms it, which comes next.
    if ctx.spec.access.is_none() || flip::is_flipped(ctx, client).await? {
        return Ok(true);
    }
    ledger::holds(client, ctx.job(), Stage::Before.as_str(), &rules::basis(ctx, client).await?).await
}

/// Whether the comparison after the flip has passed.
///
/// # Errors
/// Database errors.
pub async fn is_confirmed(ctx: &Context, client: &Client) -> Result<bool> {
    if ctx.spec.access.is_none() {
        return Ok(true);
    }
    ledger::holds(client, ctx.job(), Stage::After.as_str(), &rules::basis(ctx, client).await?).await
}

/// Drops what a killed comparison left, before anything looks at the policies; also when the job compares nothing any more.
///
/// # Errors
/// DDL errors.
pub async fn clean(ctx: &Context) -> Result<()> {
    if !probe_role::any_left(ctx).await? {
        return Ok(());
    }
    let mut ddl = ctx.connect_ddl("access-ddl").await?;
    probe_role::drop_all(ctx, &mut ddl).await
}

/// Compares. Without `[access]` there is nothing to compare.
///
/// # Errors
/// Failed, if something differs that the job does not accept: it says what, and why. Refused or input errors for what
/// cannot be compared; lease lost, interrupted.
pub async fn compare(ctx: &Context, stage: Stage) -> Result<()> {
    let Some(access) = &ctx.spec.access else { return Ok(()) };
    if stage == Stage::Before && flip::is_flipped(ctx, &**ctx.client().await?).await? {
        return Ok(());
    }
    let mut ddl = ctx.connect_ddl("access-ddl").await?;
    // What a killed run left would be part of the state.
    probe_role::drop_all(ctx, &mut ddl).await?;
    let session = ctx.connect("access").await?;
    if stage == Stage::Before {
        // An earlier result holds no longer: what policies read in other tables may have changed.
        flip::assert_unchanged(ctx, &session.client).await?;
    }
    let timeout_ms = access.statement_timeout.as_millis();
    let settings = format!("set statement_timeout = {timeout_ms}; set max_parallel_workers_per_gather = 0");
    session.client.batch_execute(&settings).await?;
    let run = begin(ctx, &session.client, stage).await?;
    let compared = Running { ctx, access, session: &session, stage, run }.work(&mut ddl).await;
    if let Err(e) = &compared
        && ctx.check().is_ok()
        && e.retry() != Retry::Reconnect
        && let Err(left) = probe_role::drop_all(ctx, &mut ddl).await
    {
        warn!(job = ctx.job(), "roles on which policies were tried stay until the job goes on: {left}");
    }
    let (complete, notes) = compared?;
    probe_role::drop_all(ctx, &mut ddl).await?;
    conclude(ctx, stage, run, complete, &notes).await
}

async fn begin(ctx: &Context, client: &Client, stage: Stage) -> Result<i64> {
    let basis = rules::basis(ctx, client).await?;
    let mut own = ctx.client().await?;
    let tx = own.transaction().await?;
    lease::fence(&*tx, &ctx.lease).await?;
    let run = ledger::begin(&*tx, ctx.job(), stage.as_str(), &basis).await?;
    tx.commit().await?;
    Ok(run)
}

async fn conclude(ctx: &Context, stage: Stage, run: i64, complete: bool, notes: &[String]) -> Result<()> {
    let mut client = ctx.client().await?;
    let tx = client.transaction().await?;
    lease::fence(&*tx, &ctx.lease).await?;
    let unmet = explain::unmet(ctx, &*tx, stage, run).await?;
    let notes = &[notes, &unmet].concat();
    let passed = ledger::finish(&*tx, run, complete && unmet.is_empty(), notes).await?;
    let found = ledger::latest(&*tx, ctx.job(), None).await?.ok_or_else(|| Error::internal("the run is gone"))?;
    let all = ledger::outcomes(&*tx, run, true, LOGGED).await?;
    let detail = serde_json::json!({
        "stage": stage.as_str(), "passed": passed, "users": found.users, "set_users": found.set_users,
        "attempts": found.attempts, "differences": found.differences, "accepted": found.accepted,
    });
    event::record(&*tx, ctx.job(), "access", detail).await?;
    tx.commit().await?;
    metrics::verify_findings(ctx.job(), [("access", found.differences.unsigned_abs())]);
    info!(
        job = ctx.job(),
        stage = stage.as_str(),
        passed,
        users = found.users,
        set_users = found.set_users,
        attempts = found.attempts,
        differences = found.differences,
        accepted = found.accepted,
        duration_ms = found.duration_ms,
        "access compared"
    );
    for note in notes {
        info!(job = ctx.job(), "access: {note}");
    }
    let different: Vec<&Outcome> = all.iter().filter(|o| o.verdict == "different").collect();
    for outcome in &different {
        warn!(job = ctx.job(), stage = stage.as_str(), cause = outcome.cause, "access differs: {}", outcome.line());
    }
    if passed { Ok(()) } else { Err(failure(ctx, found.differences, &different, notes)) }
}
