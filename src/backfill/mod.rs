//! Backfill: walks the table in batches until a sweep has reached its end.
//!
//! Each lane's loop decides when; [`batch::run`] does one bounded unit. Done is a statement about data, which the verifier
//! makes: a sweep that reached its end only means that it is the verifier's turn (I5).

pub mod aside;
pub mod batch;
mod growth;
pub mod heap;
pub mod heap_cursor;
mod heap_statements;
pub mod horizon;
mod lane_loop;
pub mod plan_check;
mod pruning;
pub mod session;
pub mod settle;
pub mod sizer;
pub mod sweep;
mod team;
pub mod wal;
pub mod walk;

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::lane_loop::{LaneEnd, Loop};
use self::session::connect;
use self::team::Team;
use crate::context::{Context, Outcome};
use crate::error::{Error, Result, Retry};
use crate::ledger::checkpoint::{self, Checkpoint};
use crate::ledger::{event, lease};
use crate::metrics;
use crate::pg::connect::Session;
use crate::phase::Status;
use crate::plan::batch_sql;
use crate::progress;

/// How often the estimated end is looked at; an estimate that moves with every batch is read by nobody.
const OUTLOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs the phase.
///
/// # Errors
/// Lease lost, interrupted, connection lost; failed if rows cannot be updated and it is not for a retry to mend.
pub async fn run(ctx: &Context) -> Result<Outcome> {
    let mut retries = 0;
    loop {
        match sweep_on(ctx).await {
            Ok(Some(outcome)) => return Ok(outcome),
            Ok(None) => retries = 0,
            // Somebody's lock, met outside of a batch: it will go.
            Err(e) if e.retry() == Retry::Smaller => {
                retries += 1;
                metrics::retry(ctx.job(), e.sqlstate());
                warn!(
                    job = ctx.job(),
                    sqlstate = e.sqlstate(),
                    retries,
                    "going on at the checkpoint in a moment: {}",
                    e.line()
                );
                ctx.progress.update(|p| p.note = format!("retrying after {}", e.sqlstate().unwrap_or_default()));
                ctx.pause(lane_loop::backoff(retries)).await?;
                if ctx.status().await? != Status::Running {
                    return Ok(Outcome::StatusChanged);
                }
            }
            Err(e) => return Err(e),
        }
    }
}

/// Goes on with the sweep, or begins it. `None`: the table was rewritten, so it begins anew.
async fn sweep_on(ctx: &Context) -> Result<Option<Outcome>> {
    let mut session = connect(ctx).await?;
    let checkpoint = start(ctx, &mut session).await?;
    let mut lanes = walk::lanes(ctx, session, checkpoint).await?;
    let team = Team::new(ctx, &lanes);
    let members = &team;
    ctx.progress.update(|p| p.lanes.clear());
    let runs = lanes.iter_mut().enumerate().map(|(i, lane)| async move {
        let limits = lane.walk.limits(ctx, &lane.checkpoint);
        let end = Loop::new(ctx, limits, i, members).run(ctx, lane).await;
        if !matches!(end, Ok(LaneEnd::Complete)) {
            // The others end behind their batch.
            members.stop.cancel();
        }
        end
    });
    let over = CancellationToken::new();
    let all = async {
        let ends = futures_util::future::join_all(runs).await;
        over.cancel();
        ends
    };
    let ends = tokio::select! {
        (ends, ()) = async { tokio::join!(all, growth::keep(ctx, members, &over)) } => ends,
        never = show_outlook(ctx, members) => match never {},
    };
    outlook(ctx, members);
    let ends = ends.into_iter().collect::<Result<Vec<_>>>()?;
    if ends.contains(&LaneEnd::NotRunning) {
        return Ok(Some(Outcome::StatusChanged));
    }
    Ok((!ends.contains(&LaneEnd::Rewritten)).then_some(Outcome::Complete))
}

/// Shows how far the sweep is and how long it will take, again and again, whether batches run or wait.
async fn show_outlook(ctx: &Context, team: &Team) -> std::convert::Infallible {
    loop {
        outlook(ctx, team);
        tokio::time::sleep(OUTLOOK_EVERY).await;
    }
}

fn outlook(ctx: &Context, team: &Team) {
    let (ratio, eta) = team.outlook();
    metrics::progress(ctx.job(), ratio, eta.map(|e| progress::now_ms() as f64 / 1000.0 + e.seconds));
    ctx.progress.update(|p| {
        p.ratio = ratio;
        p.eta = eta;
    });
}

/// The checkpoint to go on from, or a new one. The upper bound is read after Expand has committed: rows inserted since
/// are the triggers' affair, so the sweep cannot be outrun by inserts (hazard 19).
async fn start(ctx: &Context, session: &mut Session) -> Result<Checkpoint> {
    let found = checkpoint::find(&session.client, ctx.job(), 0).await?;
    if let Some(found) = &found
        && (found.cursor.is_some() || found.upper.is_some() || found.finished)
    {
        info!(
            job = ctx.job(),
            rows_scanned = found.rows_scanned,
            rows_updated = found.rows_updated,
            "resuming from the checkpoint"
        );
        return Ok(found.clone());
    }
    let upper = session.client.query_opt(&batch_sql::last_key(&ctx.facts.shape), &[]).await?;
    let upper = upper.map(|row| (0..row.len()).map(|i| row.get(i)).collect());
    let previous = found.unwrap_or(Checkpoint {
        strategy: "keyset".into(),
        cursor: None,
        upper: None,
        sweep: 1,
        finished: false,
        batch_rows: ctx.live.now().batching.initial_rows as i32,
        rows_scanned: 0,
        rows_updated: 0,
        batches: 0,
        rows_estimate: estimate_rows(ctx, session).await?,
    });
    let fresh = Checkpoint { upper, ..previous };
    let tx = session.client.transaction().await?;
    lease::fence(&tx, &ctx.lease).await?;
    checkpoint::put(&tx, ctx.job(), 0, &fresh).await?;
    tx.commit().await?;
    Ok(fresh)
}

/// Rows of the table: the catalog's estimate, or, on a table that was never analyzed, the density of its first pages.
async fn estimate_rows(ctx: &Context, session: &Session) -> Result<i64> {
    if ctx.facts.target.rows_estimate > 0.0 {
        return Ok(ctx.facts.target.rows_estimate as i64);
    }
    let target = ctx.facts.shape.target.sql();
    let row = session
        .client
        .query_one(
            &format!(
                "select (select count(*) from {target} as t where t.ctid < '(16,0)'::tid)
                        * greatest(1, pg_relation_size(to_regclass($1)) / current_setting('block_size')::int8 / 16)"
            ),
            &[&target],
        )
        .await?;
    Ok(row.get(0))
}

/// Begins another sweep, for rows that the verifier found unfilled although a value is there.
///
/// # Errors
/// Database errors.
pub async fn begin_sweep(ctx: &Context) -> Result<i32> {
    let mut client = ctx.client().await?;
    let tx = client.transaction().await?;
    lease::fence(&*tx, &ctx.lease).await?;
    checkpoint::fold(&*tx, ctx.job()).await?;
    let mut next = checkpoint::find(&*tx, ctx.job(), 0).await?.ok_or_else(|| Error::internal("no checkpoint"))?;
    next = Checkpoint { cursor: None, upper: None, finished: false, sweep: next.sweep + 1, ..next };
    checkpoint::put(&*tx, ctx.job(), 0, &next).await?;
    checkpoint::clear_quarantine(&*tx, ctx.job()).await?;
    event::record(&*tx, ctx.job(), "sweep", serde_json::json!({ "sweep": next.sweep })).await?;
    tx.commit().await?;
    Ok(next.sweep)
}
