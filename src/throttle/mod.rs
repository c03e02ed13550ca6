//! What makes batches wait: signals are measured by a task with a connection of its own, and before each batch the loop
//! looks at the latest verdict. Blind means stop (I10): no verdict, an old one, or a signal that cannot be read is "wait".

pub mod blocking;
mod database;
pub mod endpoint;
mod flight;
mod monitor;
pub mod operator;
pub mod pacing;
pub mod probe;
mod pulse;
mod replication;
pub mod signal;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::DropGuard;
use tracing::{info, warn};

use self::blocking::{Batches, EVERY};
pub use self::flight::Flight;
use self::pulse::Pulse;
use self::signal::Reading;
use crate::context::Context;
use crate::error::{Error, Kind, Result};
use crate::job::throttle::Pace;
use crate::ledger::event;
use crate::live::Tunables;
use crate::metrics;
use crate::pg::connect::Session;
use crate::phase::Status;

/// How often a batch that waits looks whether it is time to leave.
const LOOK: Duration = Duration::from_millis(200);
/// How often it looks at the job's status meanwhile.
const LOOK_AT_STATUS: Duration = Duration::from_secs(1);

/// The latest measurement.
#[derive(Debug, Clone)]
struct Verdict {
    at: Instant,
    waits: Vec<Reading>,
}

/// The running throttle of a backfill. Its tasks, and the thread of its pulse, end when it is dropped.
pub struct Throttle {
    verdicts: watch::Receiver<Verdict>,
    batches: Arc<Batches>,
    pulse: Arc<Pulse>,
    tasks: [JoinHandle<()>; 2],
    _beats: DropGuard,
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Throttle {
    /// Starts to measure for batches on `sessions`.
    pub fn start<'a>(ctx: &Context, sessions: impl Iterator<Item = &'a Session>) -> Self {
        let batches = Arc::new(Batches::default());
        sessions.for_each(|s| batches.add(s));
        let first = Verdict { at: Instant::now(), waits: vec![Reading::no("probe", "nothing was measured yet")] };
        let (sender, verdicts) = watch::channel(first);
        let pulse = Arc::new(Pulse::new(&ctx.live.now().throttle));
        let tasks = [
            tokio::spawn(monitor::run(ctx.clone(), sender, Arc::clone(&pulse))),
            tokio::spawn(give_way(ctx.clone(), Arc::clone(&batches), Arc::clone(&pulse))),
        ];
        let beats = pulse::start(ctx.clone(), Arc::clone(&pulse));
        Self { verdicts, batches, pulse, tasks, _beats: beats }
    }

    /// Waits until a batch may begin. Also comes back when the job's status is no longer `running`: the batch sees it
    /// then, and does nothing. `counts`: whether this wait is added to the job's; of several lanes one does.
    ///
    /// # Errors
    /// Lease lost, interrupted.
    pub async fn clear(&self, ctx: &Context, counts: bool) -> Result<()> {
        let mut verdicts = self.verdicts.clone();
        let mut looked = Instant::now();
        loop {
            let verdict = verdicts.borrow_and_update().clone();
            let old = verdict.at.elapsed();
            // Two measurements may fail to come before the last one counts as old.
            let stale_after = ctx.live.now().throttle.every * 2 + probe::QUERY_TIMEOUT;
            let now = ctx.live.now();
            let waits = if let Some(reason) = &now.throttled {
                vec![Reading::no("operator", reason.clone())]
            } else if old > stale_after {
                vec![Reading::no("probe", format!("nothing could be measured for {} s", old.as_secs()))]
            } else {
                verdict.waits
            };
            let shown = waits.iter().map(|r| r.shown(true)).collect();
            let note = if waits.is_empty() { String::new() } else { format!("waiting: {}", signal::text(&waits)) };
            ctx.progress.wait_for(shown, note);
            let Some(strictest) = waits.first() else { return Ok(()) };
            let began = Instant::now();
            tokio::select! {
                // An error would come at once, again and again: then the time goes on instead.
                Ok(()) = verdicts.changed() => {}
                () = tokio::time::sleep(LOOK) => {}
                () = ctx.stopping() => {}
            }
            if counts {
                metrics::throttled_for(ctx.job(), &strictest.signal, began.elapsed());
                ctx.progress.waited(&strictest.signal, began.elapsed());
            }
            ctx.check()?;
            if looked.elapsed() > LOOK_AT_STATUS {
                looked = Instant::now();
                // A status that cannot be read is asked for again.
                if ctx.status().await.is_ok_and(|s| s != Status::Running) {
                    return Ok(());
                }
            }
        }
    }

    /// Whether a batch of this session was cancelled because it kept somebody waiting, since this was last asked.
    pub fn gave_way(&self, session: &Session) -> bool {
        self.batches.gave_way(session.pid)
    }

    /// To be held while a batch runs. Begins it, which may take a moment.
    pub async fn flight(&self) -> Flight<'_> {
        self.pulse.flight().await
    }

    /// A batch failed for want of a lock: somebody was in its way, and it may have been in theirs.
    pub fn press(&self) {
        self.pulse.press();
    }

    /// Share of time that a lane works now.
    pub fn pace(&self) -> f64 {
        *self.pulse.pace().borrow()
    }

    /// How long the next batch may work, of a target for full speed.
    pub fn batch_target(&self, ctx: &Context, in_pieces: bool) -> Duration {
        let live = ctx.live.now();
        match live.throttle.pace {
            Pace::Auto => pacing::batch_target(self.pace(), live.batching.target_duration, in_pieces),
            Pace::Constant => live.batching.target_duration,
        }
    }

    /// Rests after a batch that has worked for `took` since its last rest. A change of what decides about the rest takes effect while it lasts, and a job
    /// that is no longer running ends it.
    ///
    /// # Errors
    /// Lease lost, interrupted.
    pub async fn rest(&self, ctx: &Context, took: Duration) -> Result<()> {
        let began = Instant::now();
        let mut changes = ctx.live.changes();
        let mut looked = began;
        let mut paces = self.pulse.pace();
        loop {
            let pace = *paces.borrow_and_update();
            let left = pause(&changes.borrow_and_update(), pace, took).saturating_sub(began.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(left.min(LOOK_AT_STATUS)) => {}
                Ok(()) = changes.changed() => {}
                Ok(()) = paces.changed() => {}
                () = ctx.stopping() => {}
            }
            ctx.check()?;
            if looked.elapsed() >= LOOK_AT_STATUS {
                looked = Instant::now();
                if ctx.status().await.is_ok_and(|s| s != Status::Running) {
                    return Ok(());
                }
            }
        }
    }
}

/// The pause after a batch that has worked for `worked`.
fn pause(now: &Tunables, pace: f64, worked: Duration) -> Duration {
    now.batching.pause + rest(now, pace, worked)
}

/// The part of it that the pace asks for.
fn rest(now: &Tunables, pace: f64, worked: Duration) -> Duration {
    let duty = match now.throttle.pace {
        Pace::Auto => pace.min(now.throttle.duty),
        Pace::Constant => now.throttle.duty,
    };
    worked.mul_f64((1.0 - duty) / duty)
}

/// Looks over and over whom our batches keep waiting. What it cannot see has another bound: the batch's own duration.
async fn give_way(ctx: Context, batches: Arc<Batches>, pulse: Arc<Pulse>) {
    loop {
        if let Err(e) = watch_locks(&ctx, &batches, &pulse).await {
            warn!(job = ctx.job(), sqlstate = e.sqlstate(), "locks cannot be looked at: {e}");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn watch_locks(ctx: &Context, batches: &Batches, pulse: &Pulse) -> Result<()> {
    let session = ctx.connect("locks").await?;
    session.client.batch_execute(&probe::session_settings()).await?;
    loop {
        let patience = ctx.live.now().throttle.give_way_after;
        // Who waits for a batch has not waited for longer than it has run: short ones need no look.
        let early = patience.min(EVERY).saturating_sub(pulse.flights().borrow().flying_for());
        if !early.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(early) => continue,
                // Not when it is needed, which can be in hours.
                () = session.closed() => return Err(Error::new(Kind::Connect, "the connection has ended")),
            }
        }
        let (n, next) = batches.give_way(&session.client, patience).await?;
        if n > 0 {
            pulse.press();
            info!(job = ctx.job(), batches = n, "cancelled a batch that kept somebody waiting");
            let client = ctx.client().await?;
            event::record(&**client, ctx.job(), "gave_way", serde_json::json!({ "batches": n })).await?;
        }
        tokio::time::sleep(next).await;
    }
}
