//! The thread that feels what batches cost others: a small write, committed as the application commits, now beside a batch
//! and now between two, and a look at who else works. From both the [`Pacer`] makes the pace.
//!
//! The batches' own commits do not wait for the disk, so they tell nothing. The write is an upsert of one row of ours, some
//! times per second; nothing reads it, so it needs no fence.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rand::RngExt as _;
use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};

use super::pacing::{self, Pacer, Seen, TICK};
use super::probe::QUERY_TIMEOUT;
use super::signal::Reading;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::throttle::{Pace, Throttle as Section};
use crate::metrics;
use crate::pg::connect::Session;

/// Least time between two writes: at most ten small commits per second, which is little beside what an application commits.
const SPACING: Duration = Duration::from_millis(100);
/// The same while nobody else works.
const SPACING_ALONE: Duration = Duration::from_millis(250);
/// How long the next write waits for a batch, or for its end. Where one batch takes long, the rest after it does too.
const WAIT_FOR_MOMENT: Duration = Duration::from_millis(600);
/// Shorter than this no timer sleeps.
const TIMER: Duration = Duration::from_millis(2);
/// Writes whose median is the signal `commit_latency`.
const LAST: usize = 9;
/// How often it is tried again when the connection is lost.
const RETRY: Duration = Duration::from_secs(1);

/// What the pulse, the monitor and the lanes share.
pub(super) struct Pulse {
    flights: watch::Sender<Flights>,
    /// Share of time that a lane works.
    pace: watch::Sender<f64>,
    /// The last commit times in seconds, when the last of them was, or why there is none.
    latest: Mutex<Latest>,
    pressed: AtomicBool,
    stopped: AtomicBool,
}

#[derive(Default)]
struct Latest {
    took: VecDeque<f64>,
    at: Option<Instant>,
    /// When the one was sent that has not come back.
    sent: Option<Instant>,
    failed: Option<String>,
}

/// A batch in flight; it has landed when this is dropped.
pub struct Flight<'a> {
    flights: &'a watch::Sender<Flights>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.flights.send_modify(|f| f.change(f.now.saturating_sub(1)));
    }
}

/// Batches in flight, and for how long there was one since this was last asked.
struct Flights {
    now: usize,
    busy: Duration,
    asked: Instant,
    changed: Instant,
    /// Since when there is one, without a moment in between.
    since: Option<Instant>,
}

impl Flights {
    fn new() -> Self {
        Self { now: 0, busy: Duration::ZERO, asked: Instant::now(), changed: Instant::now(), since: None }
    }

    fn change(&mut self, now: usize) {
        if self.now > 0 {
            self.busy += self.changed.elapsed();
        }
        (self.now, self.changed) = (now, Instant::now());
        self.since = if now > 0 { self.since.or(Some(self.changed)) } else { None };
    }

    /// Share of the time in which a batch was in flight, since this was last asked.
    fn share(&mut self) -> f64 {
        self.change(self.now);
        let share = self.busy.as_secs_f64() / self.asked.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        (self.busy, self.asked) = (Duration::ZERO, Instant::now());
        share.min(1.0)
    }
}

impl Pulse {
    pub(super) fn new(section: &Section) -> Self {
        let first = match section.pace {
            Pace::Auto => Pacer::default().pace().min(section.duty),
            Pace::Constant => section.duty,
        };
        Self {
            flights: watch::Sender::new(Flights::new()),
            pace: watch::Sender::new(first),
            latest: Mutex::default(),
            pressed: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        }
    }

    pub(super) fn flight(&self) -> Flight<'_> {
        self.flights.send_modify(|f| f.change(f.now + 1));
        Flight { flights: &self.flights }
    }

    /// For how long there has been a batch at every moment.
    pub(super) fn flying_for(&self) -> Duration {
        self.flights.borrow().since.map(|since| since.elapsed()).unwrap_or_default()
    }

    /// Share of time that a lane works.
    pub(super) fn pace(&self) -> watch::Receiver<f64> {
        self.pace.subscribe()
    }

    /// A batch was in somebody's way, or somebody in its.
    pub(super) fn press(&self) {
        self.pressed.store(true, Ordering::Relaxed);
    }

    /// Whether batches wait for a signal.
    pub(super) fn stop(&self, stopped: bool) {
        self.stopped.store(stopped, Ordering::Relaxed);
    }

    /// The signal `commit_latency`.
    pub(super) fn reading(&self, section: &Section) -> Reading {
        let signal = "commit_latency";
        let limit = section.commit_latency;
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        // Where no commit comes back the median knows nothing of it.
        if let Some(waits) = latest.sent.map(|at| at.elapsed()).filter(|waits| *waits > limit) {
            return Reading::at_most(signal, waits.as_secs_f64(), limit.as_secs_f64(), "s");
        }
        if let Some(why) = &latest.failed {
            return Reading::no(signal, format!("it cannot be measured: {why}"));
        }
        match latest.at {
            None => Reading::no(signal, "nothing was measured yet"),
            Some(at) if at.elapsed() > QUERY_TIMEOUT * 2 => {
                Reading::no(signal, format!("no commit for {} s", at.elapsed().as_secs()))
            }
            Some(_) => {
                let mut sorted: Vec<f64> = latest.took.iter().copied().collect();
                sorted.sort_by(f64::total_cmp);
                let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
                Reading::at_most(signal, median, limit.as_secs_f64(), "s")
            }
        }
    }

    /// Waits until the first commit was measured, or could not be, but not for long.
    pub(super) async fn begun(&self) {
        let _ = tokio::time::timeout(RETRY, async {
            while !self.has_begun() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// Whether a commit was measured, or could not be.
    fn has_begun(&self) -> bool {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.at.is_some() || latest.failed.is_some()
    }

    fn sends(&self) {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).sent = Some(Instant::now());
    }

    fn measured(&self, took: Duration) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.took.push_back(took.as_secs_f64());
        let excess = latest.took.len().saturating_sub(LAST);
        latest.took.drain(..excess);
        latest.at = Some(Instant::now());
        latest.sent = None;
        latest.failed = None;
    }

    fn failed(&self, why: String) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = Latest { failed: Some(why), ..Latest::default() };
    }
}

/// Feels over and over, until what this gives is dropped. On a thread of its own, as an application is one: where batches and the
/// writes beside them share a thread, what handling a batch takes of it looks like time that the server took. Where there is no
/// such thread, or it ends, nothing is measured, and batches wait.
pub(super) fn start(ctx: Context, pulse: Arc<Pulse>) -> DropGuard {
    let stop = CancellationToken::new();
    let (stopped, feeling) = (stop.clone(), Arc::clone(&pulse));
    let spawned = thread::Builder::new().name("pulse".into()).spawn(move || {
        match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(run(&ctx, &feeling, &stopped)),
            Err(e) => feeling.failed(e.to_string()),
        }
    });
    if let Err(e) = spawned {
        pulse.failed(e.to_string());
    }
    stop.drop_guard()
}

async fn run(ctx: &Context, pulse: &Pulse, stop: &CancellationToken) {
    let mut pacer = Pacer::default();
    while !stop.is_cancelled() {
        if let Err(e) = measure(ctx, pulse, &mut pacer, stop).await {
            warn!(job = ctx.job(), sqlstate = e.sqlstate(), "commits cannot be measured: {}", e.line());
            pulse.failed(e.line());
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn measure(ctx: &Context, pulse: &Pulse, pacer: &mut Pacer, stop: &CancellationToken) -> Result<()> {
    let session = ctx.connect("pulse").await?;
    let result = tokio::select! {
        result = beat(ctx, &session, pulse, pacer) => result,
        () = stop.cancelled() => Ok(()),
    };
    session.close().await;
    result
}

async fn beat(ctx: &Context, session: &Session, pulse: &Pulse, pacer: &mut Pacer) -> Result<()> {
    let settings = format!(
        "set statement_timeout = {}; set lock_timeout = '100ms'; reset synchronous_commit",
        QUERY_TIMEOUT.as_millis()
    );
    session.client.batch_execute(&settings).await?;
    let write = session
        .client
        .prepare(
            "insert into backfilld.pulse (job, at) values ($1, clock_timestamp())
             on conflict (job) do update set at = excluded.at",
        )
        .await?;
    let mut flights = pulse.flights.subscribe();
    let mut seen = Seen::default();
    let mut ticked = Instant::now();
    let mut beside = false;
    loop {
        let began = Instant::now();
        beside = !beside;
        // While nobody else works there is nothing to compare.
        if pulse.has_begun() && pacer.beside_others() {
            moment(&mut flights, beside, pacer.pace(), ctx).await;
        }
        let before = flights.borrow_and_update().now;
        let sent = Instant::now();
        pulse.sends();
        let answer = tokio::time::timeout(QUERY_TIMEOUT * 2, session.client.execute(&write, &[&ctx.job()])).await;
        answer.map_err(|_| Error::internal("the server does not answer"))??;
        let took = sent.elapsed();
        pulse.measured(took);
        let flew = before > 0 || flights.has_changed().unwrap_or(false);
        if flew {
            seen.beside.push(took.as_secs_f64())
        } else {
            seen.between.push(took.as_secs_f64())
        }
        if ticked.elapsed() >= TICK {
            ticked = Instant::now();
            seen.others = others(&session.client).await?;
            // Nobody has to look because of this.
            pulse.flights.send_if_modified(|f| {
                seen.busy = f.share();
                false
            });
            seen.pressed = pulse.pressed.swap(false, Ordering::Relaxed);
            seen.stopped = pulse.stopped.load(Ordering::Relaxed);
            publish(ctx, pulse, pacer, std::mem::take(&mut seen));
        }
        let spacing = if pacer.beside_others() { SPACING } else { SPACING_ALONE };
        tokio::time::sleep(spacing.saturating_sub(began.elapsed())).await;
    }
}

/// Waits for a moment beside a batch, or between two; not for long, there may be none.
async fn moment(flights: &mut watch::Receiver<Flights>, beside: bool, pace: f64, ctx: &Context) {
    let there = tokio::time::timeout(WAIT_FOR_MOMENT, flights.wait_for(|f| (f.now > 0) == beside)).await.is_ok();
    if beside && there {
        // Somewhere in it, as the application comes: a write that always comes at the beginning sees one part only.
        let batch = pacing::batch_target(pace, ctx.live.now().batching.target_duration);
        let into = batch.mul_f64(rand::rng().random_range(0.0..0.9));
        if into >= TIMER {
            tokio::time::sleep(into).await;
        }
    }
}

/// Whether somebody else worked on this server within the last tick. Who may not see others has to assume it.
async fn others(client: &Client) -> Result<bool> {
    let row = client
        .query_one(
            "select count(*) > 0 from pg_stat_activity
             where application_name not like 'backfilld/%'
               and (query = '<insufficient privilege>'
                    or backend_type = 'client backend'
                       and (state in ('active', 'fastpath function call')
                            or state_change > clock_timestamp() - make_interval(secs => $1)))",
            &[&TICK.as_secs_f64()],
        )
        .await?;
    Ok(row.get(0))
}

fn publish(ctx: &Context, pulse: &Pulse, pacer: &mut Pacer, seen: Seen) {
    let live = ctx.live.now();
    let before = pacer.pace();
    let pace = match live.throttle.pace {
        Pace::Auto => pacer.tick(seen, live.throttle.duty, live.throttle.latency_budget),
        Pace::Constant => live.throttle.duty,
    };
    if pace != before {
        debug!(job = ctx.job(), pace, others = pacer.beside_others(), "pace");
    }
    metrics::pace(ctx.job(), pace);
    pulse.pace.send_if_modified(|now| std::mem::replace(now, pace) != pace);
}
