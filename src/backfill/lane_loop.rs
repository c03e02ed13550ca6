//! A lane's loop: batch after batch, what became of each, when the next one may begin, and what to do about one that failed.

use std::time::Duration;

use rand::RngExt;
use tracing::field::Empty;
use tracing::{Instrument as _, debug, debug_span, info, warn};

use super::batch::{self, Batch, Failed};
use super::session::set_statement_timeout;
use super::sizer::Sizer;
use super::team::Team;
use super::walk::{Lane, Walk};
use crate::context::Context;
use crate::error::{Error, Kind, Result, Retry, is_about_a_row};
use crate::ledger::checkpoint::{self, Checkpoint};
use crate::live;
use crate::metrics;
use crate::pg::connect::Session;
use crate::progress::{self, LaneRows};

/// Rows in quarantine beyond which the fault is not a row's but the job's.
const MAX_QUARANTINE: i64 = 1000;
/// Statement timeouts in a row at the smallest batch before a human is asked: with doubling timeouts that is minutes.
const MAX_TIMEOUTS_AT_FLOOR: u32 = 8;
/// How often a lane that is one too many looks whether it may go on.
const TURN_POLL: Duration = Duration::from_millis(100);

/// Why a lane's loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LaneEnd {
    /// Its range is walked.
    Complete,
    /// The job's status is no longer `running`.
    NotRunning,
    /// The table was rewritten: all lanes begin anew.
    Rewritten,
    /// Another lane stopped.
    Stopped,
}

/// The state of the loop between two batches.
pub(super) struct Loop<'a> {
    lane: usize,
    team: &'a Team,
    sizer: Sizer,
    /// The target duration that the session's timeout was last made from; zero: none of ours.
    target: Duration,
    /// While a row that cannot be updated is being isolated: the size to use instead.
    isolating: Option<u32>,
    retries: u32,
    timeouts_at_floor: u32,
}

impl<'a> Loop<'a> {
    pub(super) fn new(ctx: &Context, (least, most, first): (u32, u32, u32), lane: usize, team: &'a Team) -> Self {
        Self {
            lane,
            team,
            // The stored size was found with a target of this sort, if not always at this pace.
            sizer: Sizer::new(team.throttle.batch_target(ctx, team.pages.is_some()), least, most, first),
            target: Duration::ZERO,
            isolating: None,
            retries: 0,
            timeouts_at_floor: 0,
        }
    }

    pub(super) async fn run(mut self, ctx: &Context, lane: &mut Lane) -> Result<LaneEnd> {
        let Lane { session, walk, checkpoint } = lane;
        if checkpoint.finished {
            return Ok(LaneEnd::Complete);
        }
        loop {
            ctx.check()?;
            if self.team.stop.is_cancelled() {
                return Ok(LaneEnd::Stopped);
            }
            self.retune(ctx, session, walk, checkpoint).await?;
            if !self.team.has_turn(ctx, self.lane) {
                // Another lane finds out what changed; this one only waits for its turn.
                ctx.pause(TURN_POLL).await?;
                continue;
            }
            self.team.throttle.clear(ctx, self.lane == 0).await?;
            let rows = self.isolating.unwrap_or(self.sizer.rows());
            let isolating = self.isolating.is_some();
            let sizer = &mut self.sizer;
            let mut flight = self.team.throttle.flight().await;
            let batch = walk.batch(ctx, session, checkpoint, rows, &mut flight, |units, took| {
                if !isolating {
                    sizer.committed(units, took);
                }
                sizer.rows()
            });
            let span = debug_span!(
                target: progress::SPANS, "batch", job = ctx.job(), lane = self.lane, rows,
                rows_scanned = Empty, rows_updated = Empty, sqlstate = Empty, otel.status_code = Empty,
            );
            let ended = batch.instrument(span.clone()).await;
            let worked = flight.worked_last();
            drop(flight);
            batch::note(span, &ended);
            match ended {
                Ok(Batch::Committed { scanned, updated, took, .. }) => {
                    walk.look_for_holder(ctx, session).await?;
                    let ratio = walk.ratio(checkpoint);
                    self.committed(ctx, session, checkpoint, ratio, [scanned, updated], took).await?;
                    self.team.throttle.rest(ctx, worked).await?;
                }
                Ok(Batch::End) => {
                    info!(
                        job = ctx.job(),
                        rows_scanned = checkpoint.rows_scanned,
                        rows_updated = checkpoint.rows_updated,
                        sweep = checkpoint.sweep,
                        "the sweep reached its end"
                    );
                    self.team.ended(self.lane);
                    return Ok(LaneEnd::Complete);
                }
                Ok(Batch::NotRunning) => return Ok(LaneEnd::NotRunning),
                Ok(Batch::Rewritten) => return Ok(LaneEnd::Rewritten),
                Err(failed) => {
                    // Who waited for a lock did not work.
                    let rests = failed.error.retry() == Retry::Never;
                    self.failed(ctx, session, walk, checkpoint, failed).await?;
                    if rests {
                        self.team.throttle.rest(ctx, worked).await?;
                    }
                }
            }
        }
    }

    /// Takes over what changed since the last batch.
    async fn retune(&mut self, ctx: &Context, session: &Session, walk: &Walk, checkpoint: &Checkpoint) -> Result<()> {
        if ctx.live.is_stale() {
            live::refresh(ctx).await?;
        }
        let target = ctx.live.now().batching.target_duration;
        let (least, most, _) = walk.limits(ctx, checkpoint);
        self.sizer.retune(self.team.throttle.batch_target(ctx, walk.in_pieces()), least, most);
        if target != self.target {
            self.target = target;
            set_statement_timeout(session, target, self.timeouts_at_floor).await?;
        }
        Ok(())
    }

    async fn committed(
        &mut self,
        ctx: &Context,
        session: &Session,
        checkpoint: &Checkpoint,
        ratio: f64,
        [scanned, updated]: [u32; 2],
        took: Duration,
    ) -> Result<()> {
        self.retries = 0;
        if self.timeouts_at_floor > 0 {
            self.timeouts_at_floor = 0;
            set_statement_timeout(session, self.target, 0).await?;
        }
        if let Some(size) = self.isolating {
            // Back to normal step by step: another bad row may be near.
            self.isolating = Some(size * 2).filter(|s| *s < self.sizer.rows());
        }
        metrics::batch(
            ctx.job(),
            took,
            u64::from(scanned),
            u64::from(updated),
            u64::from(scanned - updated.min(scanned)),
        );
        metrics::batch_size_target(ctx.job(), u64::from(self.sizer.rows()));
        let ([rows_scanned, rows_updated, batches], rate, report) = self.team.note(self.lane, ratio, checkpoint);
        let rows_estimate = self.team.rows_estimate;
        ctx.progress.batch(took);
        ctx.progress.update(|p| {
            if p.lanes.len() <= self.lane {
                p.lanes.resize(self.lane + 1, LaneRows::default());
            }
            p.lanes[self.lane] =
                LaneRows { rows_scanned: checkpoint.rows_scanned, rows_updated: checkpoint.rows_updated };
            p.sweep = checkpoint.sweep;
            p.rows_scanned = rows_scanned;
            p.rows_updated = rows_updated;
            p.rows_estimate = rows_estimate;
            p.batches = batches;
            p.batch_rows = i64::from(self.sizer.rows());
            p.rows_per_second = rate;
            p.note = String::new();
        });
        debug!(
            job = ctx.job(),
            rows_scanned = scanned,
            rows_updated = updated,
            duration_ms = took.as_millis() as u64,
            "batch"
        );
        if report {
            info!(
                target: progress::REPORTS,
                job = ctx.job(),
                rows_scanned,
                rows_updated,
                rows_estimate,
                rows_per_second = rate as i64,
                batch_size = self.sizer.rows(),
                pace = self.team.throttle.pace(),
                "backfilling"
            );
        }
        Ok(())
    }

    async fn failed(
        &mut self,
        ctx: &Context,
        session: &mut Session,
        walk: &mut Walk,
        checkpoint: &mut Checkpoint,
        failed: Failed,
    ) -> Result<()> {
        let Failed { error, range } = failed;
        let sqlstate = error.sqlstate().unwrap_or_default().to_owned();
        match error.retry() {
            Retry::Smaller => {
                self.retries += 1;
                metrics::retry(ctx.job(), error.sqlstate());
                if sqlstate != "57014" {
                    self.team.throttle.press();
                }
                let gave_way = sqlstate == "57014" && self.team.throttle.gave_way(session);
                if self.sizer.at_floor() && sqlstate == "57014" && !gave_way {
                    self.timeouts_at_floor += 1;
                    if self.timeouts_at_floor > MAX_TIMEOUTS_AT_FLOOR {
                        return Err(Error::failed(
                            "a batch of the smallest size runs into its timeout again and again",
                        )
                        .with_source(error)
                        .with_hint("look at the plan of the batch (backfilld plan); is there an index for the join?"));
                    }
                    set_statement_timeout(session, self.target, self.timeouts_at_floor).await?;
                }
                self.sizer.rolled_back();
                self.isolating = self.isolating.map(|n| (n / 2).max(1));
                let wait = backoff(self.retries);
                ctx.progress.update(|p| p.note = format!("retrying after {sqlstate}"));
                let log = format!("batch rolled back, trying again with {} rows", self.sizer.rows());
                if self.retries.is_multiple_of(10) {
                    warn!(job = ctx.job(), sqlstate, retries = self.retries, "{log}: {error}");
                } else {
                    debug!(job = ctx.job(), sqlstate, retries = self.retries, "{log}: {error}");
                }
                ctx.pause(wait).await
            }
            Retry::Never if is_about_a_row(&sqlstate) => match range {
                Some((key, 1)) => {
                    let flight = self.team.throttle.flight().await;
                    walk.set_aside(ctx, session, checkpoint, &key, &error).await?;
                    let worked = flight.worked_last();
                    drop(flight);
                    self.team.throttle.rest(ctx, worked).await?;
                    let total = checkpoint::quarantined(&session.client, ctx.job()).await?;
                    metrics::quarantined(ctx.job(), total as u64);
                    ctx.progress.update(|p| p.quarantined = total);
                    warn!(
                        job = ctx.job(),
                        sqlstate,
                        quarantined = total,
                        "a row cannot be updated and was put into quarantine"
                    );
                    if total > MAX_QUARANTINE {
                        // Without the server's message, which can hold a row's values.
                        return Err(Error::failed(format!(
                            "more than {MAX_QUARANTINE} rows cannot be updated, the last one with SQLSTATE {sqlstate}"
                        ))
                        .with_hint(format!("backfilld quarantine list {} has keys and codes", ctx.job())));
                    }
                    Ok(())
                }
                Some((_, n)) => {
                    metrics::retry(ctx.job(), error.sqlstate());
                    self.isolating = Some((n / 2).max(1));
                    Ok(())
                }
                None => Err(error),
            },
            Retry::Reconnect | Retry::Never => Err(match error.kind() {
                Kind::Database => error.context("a batch failed"),
                _ => error,
            }),
        }
    }
}

/// 50 ms, doubling to 5 s, jittered so that two daemons or a batch and an application do not stay in step.
pub(super) fn backoff(retries: u32) -> Duration {
    let base = Duration::from_millis(50) * 2u32.pow(retries.saturating_sub(1).min(7));
    base.min(Duration::from_secs(5)).mul_f64(rand::rng().random_range(0.5..1.5))
}
