//! The phases of one job under one lease. Every pass reads the job's row and does what it says.

use std::time::{Duration, Instant};

use serde_json::json;
use tracing::{Instrument as _, error, info, info_span, warn};

use crate::context::{Context, Outcome};
use crate::cutover::{constrain, flip};
use crate::error::{Error, Kind, Result, Retry, is_about_a_row};
use crate::job::spec::HoldPoint;
use crate::ledger::job::{self as jobs, JobRow};
use crate::ledger::plans::Stage;
use crate::ledger::verdict::Verdict;
use crate::ledger::{checkpoint, event, lease};
use crate::phase::{Phase, Status};
use crate::plan::Facts;
use crate::report::explain;
use crate::{access, backfill, expand, fault, metrics, rollback, verify, watch};

/// Sweeps over the table before rows that are still unfilled need a human. The second catches what slipped through the
/// first (a writer that skipped triggers); a third that still finds some is a pattern.
const MAX_SWEEPS: i32 = 3;
/// How often a daemon that has nothing to do looks whether that has changed.
const POLL: Duration = Duration::from_millis(500);
/// Pause before a rollback that failed is tried again: what was in its way may be gone.
const ROLLBACK_RETRY: Duration = Duration::from_secs(10);

/// The phases of one job under one lease.
pub(super) struct Phases<'a> {
    pub(super) ctx: &'a Context,
    pub(super) once: bool,
}

impl Phases<'_> {
    pub(super) async fn run(&self) -> Result<Status> {
        let ctx = self.ctx;
        loop {
            ctx.check()?;
            let job = jobs::find(&**ctx.client().await?, ctx.job()).await?.ok_or_else(|| lease::lost(ctx.job()))?;
            let shown = if job.status == Status::Running { job.phase.as_str() } else { job.status.as_str() };
            metrics::phase(ctx.job(), if job.status == Status::Held { "paused" } else { shown });
            ctx.progress.update(|p| {
                p.enter(job.phase.as_str(), job.phase_since_ms.unsigned_abs());
                p.rest();
                p.phase = shown.to_owned();
                p.stored_phase = job.phase.to_string();
                p.status = job.status.to_string();
                p.reason = job.reason.clone();
                p.hint = job.hint.clone();
                p.note = job.reason.clone();
            });
            metrics::not_throttled(ctx.job());
            metrics::status(ctx.job(), job.status.as_str());
            match job.status {
                Status::Running if job.phase == Phase::Done => self.finish().await?,
                Status::Running => self.step(&job).await?,
                Status::RollingBack => self.roll_back().await?,
                Status::Done | Status::RolledBack if self.once => return Ok(job.status),
                Status::Failed if self.once => {
                    return Err(Error::failed(format!("job {} failed: {}", ctx.job(), job.reason)).with_hint(
                        if job.hint.is_empty() { "backfilld resume tries again".to_owned() } else { job.hint },
                    ));
                }
                Status::Held if self.once => {
                    return Err(
                        Error::refused(format!("job {} is held: {}", ctx.job(), job.reason)).with_hint(job.hint)
                    );
                }
                Status::Done | Status::RolledBack | Status::Failed | Status::Held | Status::Paused => {
                    ctx.pause(POLL).await?;
                }
            }
        }
    }

    async fn finish(&self) -> Result<()> {
        let ctx = self.ctx;
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        if jobs::set_status(&*tx, ctx.job(), &[Status::Running], Status::Done, "", "").await? {
            event::record(&*tx, ctx.job(), "done", json!({})).await?;
            tx.commit().await?;
            info!(job = ctx.job(), "the job is done");
        }
        Ok(())
    }

    /// A rollback that fails stays one: it goes on with the next run, or here when what was in its way is gone.
    async fn roll_back(&self) -> Result<()> {
        let ctx = self.ctx;
        let Err(e) = rollback::run(&ctx.rolling_back()).await else { return Ok(()) };
        if leaves(&e) || ctx.status().await? != Status::RollingBack {
            return Err(e);
        }
        let reason = format!("{}{}", rollback::FAILED, e.line());
        error!(job = ctx.job(), sqlstate = e.sqlstate(), hint = e.hint(), "{reason}");
        metrics::error(ctx.job(), e.sqlstate());
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        let hint = e.hint().unwrap_or_default();
        jobs::set_status(&*tx, ctx.job(), &[Status::RollingBack], Status::RollingBack, &reason, hint).await?;
        event::record(&*tx, ctx.job(), "rollback failed", json!({ "reason": reason })).await?;
        tx.commit().await?;
        drop(client);
        if self.once { Err(e) } else { ctx.pause(ROLLBACK_RETRY).await }
    }

    async fn step(&self, job: &JobRow) -> Result<()> {
        let ctx = self.ctx;
        if let Some(point) = hold_point(job.phase)
            && ctx.spec.hold_before.contains(&point)
            && !job.released.iter().any(|r| r == job.phase.as_str())
        {
            return self.hold(job.phase).await;
        }
        let began = Instant::now();
        info!(job = ctx.job(), phase = %job.phase, "phase begins");
        // What is said meanwhile carries the phase, whoever says it.
        let span = info_span!("phase", job = ctx.job(), phase = %job.phase);
        match self.phase(job.phase).instrument(span).await {
            Ok(Outcome::Complete) => self.advance(job.phase, job.phase.next(), began.elapsed()).await,
            Ok(Outcome::BackTo(phase)) => self.advance(job.phase, phase, began.elapsed()).await,
            Ok(Outcome::StatusChanged) => Ok(()),
            Err(e) if leaves(&e) => Err(e),
            Err(e) => self.fail(job.phase, e).await,
        }
    }

    async fn phase(&self, phase: Phase) -> Result<Outcome> {
        let ctx = self.ctx;
        match phase {
            // The checks ran before the job was entered; what they found holds now.
            Phase::Preflight => Ok(Outcome::Complete),
            Phase::Expand => expand::run(ctx).await,
            Phase::Backfill => backfill::run(ctx).await,
            Phase::Verify => self.verify().await,
            Phase::Constrain => constrain::run(ctx).await,
            Phase::Flip => flip::run(ctx).await,
            Phase::Watch => {
                explain::capture(ctx, Stage::After).await?;
                watch::run(ctx).await
            }
            Phase::Done => Ok(Outcome::Complete),
        }
    }

    async fn verify(&self) -> Result<Outcome> {
        let ctx = self.ctx;
        access::clean(ctx).await?;
        // Which triggers there have to be depends on keys of the tables.
        let now = Facts::read(&**ctx.client().await?, &ctx.spec, ctx.settings.database.dedicated_login).await?;
        if now.shape != ctx.facts.shape {
            // An error as a lost connection is one: it starts over, with what is there now.
            return Err(Error::new(Kind::Connect, "tables of the job are others than when this run began"));
        }
        let mut verdict = self.proof().await?;
        if verdict.counts.get(verify::DRIFT).is_some_and(|n| *n > 0) && backfill::settle::run(ctx).await? > 0 {
            verdict = self.proof().await?;
        }
        if verdict.passed {
            access::compare(ctx, access::Stage::Before).await?;
            // The last phase in which neither policies nor indexes are new, unless the flip was stopped before it was confirmed.
            if !flip::is_flipped(ctx, &**ctx.client().await?).await? {
                explain::capture(ctx, Stage::Before).await?;
            }
            return Ok(Outcome::Complete);
        }
        let count = |kind: &str| verdict.counts.get(kind).copied().unwrap_or(0);
        // Rows in quarantine are unfilled as well, and another sweep would not change that.
        let unfilled = count(verify::UNFILLED) - count(verify::QUARANTINED);
        let sweep = checkpoint::find(&**ctx.client().await?, ctx.job(), 0).await?.map_or(1, |c| c.sweep);
        if unfilled > 0 && sweep < MAX_SWEEPS {
            warn!(job = ctx.job(), rows = unfilled, "rows are unfilled although they have a value; sweeping again");
            backfill::begin_sweep(ctx).await?;
            return Ok(Outcome::BackTo(Phase::Backfill));
        }
        Err(Error::failed(format!("the verification found {}", verdict.summary())).with_hint(format!(
            "backfilld status {0} lists keys; correct the data, then: backfilld resume {0}",
            ctx.job()
        )))
    }

    async fn proof(&self) -> Result<Verdict> {
        // It only reads, so it can be dropped half way; the server ends a statement whose client is gone.
        tokio::select! {
            verdict = verify::run(self.ctx) => verdict,
            why = self.ctx.told_to_stop() => Err(why),
        }
    }

    async fn hold(&self, phase: Phase) -> Result<()> {
        let ctx = self.ctx;
        let reason = format!("hold point before {phase}");
        let hint = format!("when you are ready: backfilld cutover {}", ctx.job());
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        if jobs::set_status(&*tx, ctx.job(), &[Status::Running], Status::Held, &reason, &hint).await? {
            event::record(&*tx, ctx.job(), "held", json!({ "before": phase.as_str() })).await?;
            tx.commit().await?;
            info!(job = ctx.job(), "{reason}; {hint}");
        }
        Ok(())
    }

    async fn advance(&self, from: Phase, to: Phase, took: Duration) -> Result<()> {
        let ctx = self.ctx;
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        jobs::set_phase(&*tx, ctx.job(), from, to).await?;
        let detail = json!({ "phase": from.as_str(), "next": to.as_str(), "duration_ms": took.as_millis() as u64 });
        event::record(&*tx, ctx.job(), "phase", detail).await?;
        fault::point("before-phase");
        tx.commit().await?;
        fault::point("after-phase");
        info!(job = ctx.job(), phase = %from, duration_ms = took.as_millis() as u64, "phase complete");
        Ok(())
    }

    /// Stores the failure: a restart stops here again, until an operator says `resume` (hazard 61).
    async fn fail(&self, phase: Phase, e: Error) -> Result<()> {
        let ctx = self.ctx;
        // Where the job's expressions are evaluated for the table's rows.
        let reads_rows = matches!(phase, Phase::Backfill | Phase::Verify | Phase::Watch);
        let about_a_row = reads_rows && e.sqlstate().is_some_and(is_about_a_row);
        let reason = format!("{phase}: {}", if about_a_row { e.line_without_values() } else { e.line() });
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        let evaluate =
            format!("an expression of the job cannot be evaluated for a row: backfilld quarantine list {}", ctx.job());
        let hint = if about_a_row { evaluate.as_str() } else { e.hint().unwrap_or_default() };
        if !jobs::set_status(&*tx, ctx.job(), &[Status::Running], Status::Failed, &reason, hint).await? {
            // An operator was faster, and perhaps the cause; what they asked for goes first.
            info!(job = ctx.job(), phase = %phase, "phase stopped: {reason}");
            return Ok(());
        }
        event::record(&*tx, ctx.job(), "failed", json!({ "phase": phase.as_str(), "reason": reason })).await?;
        tx.commit().await?;
        metrics::error(ctx.job(), e.sqlstate());
        error!(job = ctx.job(), phase = %phase, sqlstate = e.sqlstate(), hint, "phase failed: {reason}");
        Ok(())
    }
}

/// Whether an error ends this run rather than the phase.
fn leaves(e: &Error) -> bool {
    matches!(e.kind(), Kind::Interrupted | Kind::LeaseLost | Kind::Connect) || e.retry() == Retry::Reconnect
}

fn hold_point(phase: Phase) -> Option<HoldPoint> {
    match phase {
        Phase::Backfill => Some(HoldPoint::Backfill),
        Phase::Constrain => Some(HoldPoint::Constrain),
        Phase::Flip => Some(HoldPoint::Flip),
        _ => None,
    }
}
