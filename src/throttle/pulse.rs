//! The thread that feels what batches cost others: a small transaction of several statements, as an application's is, at any
//! moment, and now and then while batches keep still; and a look at who else works. From both the [`Pacer`] makes the pace.
//!
//! The batches' own commits do not wait for the disk, so they tell nothing. What is written is one row of ours; nothing else
//! reads it, so it needs no fence.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rand::RngExt as _;
use tokio::sync::watch;
use tokio_postgres::{Client, Statement};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, trace, warn};

use super::flight::{Flight, Flights, Still};
use super::pacing::{Pacer, Seen, TICK};
use super::probe::QUERY_TIMEOUT;
use super::signal::Reading;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::throttle::{Pace, Throttle as Section};
use crate::metrics;
use crate::pg::connect::Session;

/// From one transaction to the next, in milliseconds: ten per second, which is little beside what an application commits, and never in
/// step with the batches.
const SPACING_MS: std::ops::Range<u64> = 50..150;
/// The same while nobody else works.
const SPACING_ALONE: Duration = Duration::from_millis(250);
/// One of so many finds batches keeping still; until enough is known of how others fare without them, one of two.
const STILL_EVERY: u32 = 3;
/// How long it waits for the batches that are in flight. Where one takes longer, it is felt at any moment.
const WAIT_FOR_STILL: Duration = Duration::from_millis(100);
/// What a round trip takes without a network, which is work of the server's and of ours.
const LOCAL: Duration = Duration::from_micros(100);
/// Transactions whose median is the signal `commit_latency`.
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
    /// What a round trip takes at least, in microseconds.
    trip: AtomicU64,
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
            trip: AtomicU64::new(0),
            pressed: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        }
    }

    pub(super) async fn flight(&self) -> Flight<'_> {
        Flight::begin(self).await
    }

    pub(super) fn flights(&self) -> &watch::Sender<Flights> {
        &self.flights
    }

    /// How long the messages of a round trip are on their way, of which neither the server nor this process knows anything.
    pub(super) fn travel(&self) -> Duration {
        Duration::from_micros(self.trip.load(Ordering::Relaxed)).saturating_sub(LOCAL)
    }

    /// A round trip without work took so long. The shortest counts, and it may slowly become longer.
    pub(super) fn travelled(&self, took: Duration) {
        let took = took.as_micros() as u64;
        let before = self.trip.load(Ordering::Relaxed);
        self.trip.store(if before == 0 { took } else { took.min(before + before / 100 + 1) }, Ordering::Relaxed);
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
    let felt = Transaction::prepare(&session.client).await?;
    let mut flights = pulse.flights.subscribe();
    let mut seen = Seen::default();
    let mut ticked = Instant::now();
    for turn in 0u32.. {
        let began = Instant::now();
        // While nobody else works, or the pace does not go by it, there is nothing to compare.
        let compares = pulse.has_begun() && pacer.beside_others() && ctx.live.now().throttle.pace == Pace::Auto;
        let every = if pacer.knows_enough() { STILL_EVERY } else { 2 };
        let still = (compares && turn.is_multiple_of(every)).then(|| Still::keep(&pulse.flights));
        let without = still.is_some()
            && tokio::time::timeout(WAIT_FOR_STILL, flights.wait_for(|f| f.now == 0)).await.is_ok_and(|f| f.is_ok());
        let still = still.filter(|_| without);
        let begun_before = pulse.flights.borrow().begun;
        let sent = Instant::now();
        pulse.sends();
        let answer = tokio::time::timeout(QUERY_TIMEOUT * 2, felt.run(&session.client, ctx.job())).await;
        let begun = answer.map_err(|_| Error::internal("the server does not answer"))??;
        let took = sent.elapsed();
        pulse.travelled(begun);
        let begun_after = pulse.flights.borrow().begun;
        drop(still);
        pulse.measured(took);
        let disturbed = without && begun_after != begun_before;
        trace!(job = ctx.job(), without, disturbed, took_us = took.as_micros() as u64, "felt");
        match (without, disturbed) {
            // A batch that had waited for long went on beside it.
            (true, true) => {}
            (true, false) => seen.without.push(took.as_secs_f64()),
            (false, _) => seen.with.push(took.as_secs_f64()),
        }
        if ticked.elapsed() >= TICK {
            ticked = Instant::now();
            seen.others = others(&session.client).await?;
            // Nobody has to look because of this.
            pulse.flights.send_if_modified(|f| {
                if f.share() == 0.0 {
                    // There was nothing to feel.
                    seen.with.clear();
                }
                false
            });
            seen.pressed = pulse.pressed.swap(false, Ordering::Relaxed);
            seen.stopped = pulse.stopped.load(Ordering::Relaxed);
            publish(ctx, pulse, pacer, std::mem::take(&mut seen));
        }
        let spacing = if pacer.beside_others() {
            Duration::from_millis(rand::rng().random_range(SPACING_MS))
        } else {
            SPACING_ALONE
        };
        tokio::time::sleep(spacing.saturating_sub(began.elapsed())).await;
    }
    Ok(())
}

/// What an application's request does, each statement with its own round trip: what makes it slow is often that it has to get a core
/// for each of them.
struct Transaction {
    read: Statement,
    write: Statement,
}

impl Transaction {
    async fn prepare(client: &Client) -> Result<Self> {
        let write = "insert into backfilld.pulse (job, at) values ($1, clock_timestamp())
                     on conflict (job) do update set at = excluded.at";
        Ok(Self {
            read: client.prepare("select at::text from backfilld.pulse where job = $1").await?,
            write: client.prepare(write).await?,
        })
    }

    /// Gives how long the first round trip took, for which there is nothing to do.
    async fn run(&self, client: &Client, job: &str) -> Result<Duration> {
        let sent = Instant::now();
        client.batch_execute("begin").await?;
        let begun = sent.elapsed();
        client.query_opt(&self.read, &[&job]).await?;
        client.execute(&self.write, &[&job]).await?;
        client.batch_execute("commit").await?;
        Ok(begun)
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
