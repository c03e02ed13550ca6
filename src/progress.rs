//! How far a job is, in memory, for the terminal, the status page and the report. A leaf: whoever does something says so
//! here, and whoever looks costs the database nothing.
//!
//! Times are Unix time in milliseconds (`_ms` of a moment) or durations in the unit that the name ends with.

mod recent;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::watch;

pub use recent::{Event, events, remember, seed};

/// Target of log events that say again and again how far something is; they are no news for [`events`].
pub const REPORTS: &str = "backfilld::progress";
/// Target of spans that only traces have: log lines name the job and the phase by themselves.
pub const SPANS: &str = "backfilld::spans";
/// Batches of which the percentiles are made: at 100 ms each, the last half minute.
const RECENT_BATCHES: usize = 300;
/// Batches remembered between two looks at them; more say nothing new about a percentile.
const MAX_TALLY: usize = 50_000;

/// A moment of a job's run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Snapshot {
    /// Name of the job.
    pub job: String,
    /// Name of this daemon.
    pub instance: String,
    /// When this process began, Unix time in milliseconds.
    pub started_ms: u64,
    /// The job stands in the ledger: this daemon works on it, or waits for its lease.
    pub entered: bool,

    /// In one word: the phase, or the status where that is not `running`, or `standby`.
    pub phase: String,
    /// The phase in which the job stands, whatever its status; empty while unknown.
    pub stored_phase: String,
    /// The job's status as stored; empty while unknown.
    pub status: String,
    /// Since when it is in this phase, Unix time in milliseconds; 0 while unknown.
    pub since_ms: u64,
    /// Why it stands, as stored.
    pub reason: String,
    /// What an operator can do about it.
    pub hint: String,
    /// What is happening or waited for, in a few words.
    pub note: String,
    /// The phases so far, each with its times; a phase can come more than once.
    pub timeline: Vec<PhaseSpan>,

    /// Rows looked at so far, over all sweeps.
    pub rows_scanned: i64,
    /// Rows filled so far.
    pub rows_updated: i64,
    /// Rows of the table, estimated.
    pub rows_estimate: i64,
    /// Which sweep over the table this is, from 1; 0 before the first.
    pub sweep: i32,
    /// Rows that the present verification has compared.
    pub rows_verified: i64,
    /// Done part of the present phase, 0 to 1.
    pub ratio: f64,
    /// Time to the end of the present phase, if it can be told.
    pub eta: Option<Eta>,
    /// Rows looked at per second, over the last seconds.
    pub rows_per_second: f64,
    /// Lanes of the walk, each with its rows.
    pub lanes: Vec<LaneRows>,

    /// Batches committed.
    pub batches: i64,
    /// Size of the next batch: rows by key, pages in heap order.
    pub batch_rows: i64,
    /// Median duration of recent batches in milliseconds.
    pub batch_p50_ms: Option<f64>,
    /// 99th percentile of it.
    pub batch_p99_ms: Option<f64>,

    /// What batches wait for at this moment, the strictest first; empty: they run.
    pub waiting: Vec<Signal>,
    /// Every throttle signal as measured last, those that hold batches back first; empty while none are measured.
    pub signals: Vec<Signal>,
    /// How long batches have waited in this process, in seconds by signal.
    pub throttled_seconds: BTreeMap<String, f64>,

    /// What was proven, or found: one for each kind of proof, the latest.
    pub proofs: Vec<Proof>,
    /// Rows in quarantine.
    pub quarantined: i64,
    /// Who works on the job.
    pub lease: LeaseState,
}

impl Snapshot {
    /// A signal's last value.
    pub fn observed(&self, signal: &str) -> Option<f64> {
        self.signals.iter().find(|s| s.signal == signal && !s.refuses).map(|s| s.observed)
    }

    /// Goes into a phase, and notes that in the timeline.
    pub fn enter(&mut self, phase: &str, since_ms: u64) {
        if let Some(last) = self.timeline.last_mut().filter(|s| s.until_ms.is_none()) {
            if last.phase == phase {
                self.since_ms = last.since_ms;
                return;
            }
            last.until_ms = Some(since_ms);
        }
        self.timeline.push(PhaseSpan { phase: phase.to_owned(), since_ms, until_ms: None });
        self.since_ms = since_ms;
        self.ratio = 0.0;
        self.eta = None;
    }

    /// Nothing is measured between two phases and while a job stands: what was measured before is no longer true.
    pub fn rest(&mut self) {
        self.signals.clear();
        self.waiting.clear();
        self.rows_per_second = 0.0;
        self.eta = None;
    }

    /// Puts a proof in place of the last one of its kind.
    pub fn prove(&mut self, proof: Proof) {
        self.proofs.retain(|p| p.kind != proof.kind);
        self.proofs.push(proof);
    }
}

/// A phase, from when to when.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PhaseSpan {
    /// Its name.
    pub phase: String,
    /// Begin, Unix time in milliseconds.
    pub since_ms: u64,
    /// End, Unix time in milliseconds; none: not over.
    pub until_ms: Option<u64>,
}

/// How long something will still take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Eta {
    /// Best guess in seconds.
    pub seconds: f64,
    /// Rather not less than this, in seconds.
    pub least_seconds: f64,
    /// Rather not more than this, in seconds.
    pub most_seconds: f64,
}

/// How far one lane of the walk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct LaneRows {
    /// Rows looked at.
    pub rows_scanned: i64,
    /// Rows filled.
    pub rows_updated: i64,
}

/// A throttle signal as measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Signal {
    /// Stable name.
    pub signal: String,
    /// Value, in `unit`.
    pub observed: f64,
    /// Its limit, in `unit`.
    pub threshold: f64,
    /// Unit of both; empty for a plain number.
    pub unit: String,
    /// The limit is a floor, not a ceiling.
    pub is_floor: bool,
    /// It could not be read, or says no by itself; the value means nothing then.
    pub refuses: bool,
    /// It holds batches back.
    pub is_waiting: bool,
    /// For people: signal, value, limit, and whose value it is.
    pub text: String,
}

/// What a proof found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// What was proven: `data` compares rows with their source.
    pub kind: String,
    /// Nothing wrong was found.
    pub passed: bool,
    /// When it ended, Unix time in milliseconds.
    pub at_ms: u64,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// How many things were compared.
    pub checked: u64,
    /// Findings by kind; a kind with zero was looked for.
    pub findings: BTreeMap<String, u64>,
}

/// The lease as this daemon sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LeaseState {
    /// This daemon holds it.
    pub is_ours: bool,
    /// Name of the instance that holds it; empty while unknown.
    pub holder: String,
    /// Its epoch, which grows with each takeover; 0 while unknown.
    pub epoch: i64,
}

/// Sender and receiver in one; clones share the value.
#[derive(Clone, Debug)]
pub struct Progress {
    sender: Arc<watch::Sender<Snapshot>>,
    tally: Arc<Mutex<Tally>>,
}

/// What adds up while nobody looks.
#[derive(Debug, Default)]
struct Tally {
    /// Durations of recent batches.
    recent: VecDeque<Duration>,
    /// Durations of the batches since somebody last took them.
    untaken: Vec<Duration>,
    /// How long batches have waited, by signal.
    waited: BTreeMap<String, Duration>,
}

impl Default for Progress {
    fn default() -> Self {
        let first = Snapshot { started_ms: now_ms(), ..Snapshot::default() };
        Self { sender: Arc::new(watch::Sender::new(first)), tally: Arc::default() }
    }
}

impl Progress {
    /// Changes the value and wakes watchers.
    pub fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        self.sender.send_modify(change);
    }

    /// A receiver.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.sender.subscribe()
    }

    /// The value now.
    pub fn now(&self) -> Snapshot {
        self.sender.borrow().clone()
    }

    /// Notes that a batch was committed that took `took`. Watchers wake with what else is said about it.
    pub fn batch(&self, took: Duration) {
        let percentiles = {
            let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            if tally.untaken.len() < MAX_TALLY {
                tally.untaken.push(took);
            }
            if tally.recent.len() == RECENT_BATCHES {
                tally.recent.pop_front();
            }
            tally.recent.push_back(took);
            let mut sorted: Vec<Duration> = tally.recent.iter().copied().collect();
            sorted.sort_unstable();
            [0.5, 0.99].map(|q| percentile_ms(&sorted, q))
        };
        self.sender.send_if_modified(|p| {
            [p.batch_p50_ms, p.batch_p99_ms] = percentiles;
            false
        });
    }

    /// What batches wait for from now on, the strictest first, and the same in words.
    pub fn wait_for(&self, signals: Vec<Signal>, note: String) {
        self.sender.send_if_modified(|p| {
            if p.waiting == signals {
                return false;
            }
            p.note = note;
            p.waiting = signals;
            true
        });
    }

    /// Notes that batches waited for `signal`.
    pub fn waited(&self, signal: &str, time: Duration) {
        let seconds = {
            let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            let sum = tally.waited.entry(signal.to_owned()).or_default();
            *sum += time;
            sum.as_secs_f64()
        };
        self.update(|p| {
            p.throttled_seconds.insert(signal.to_owned(), seconds);
        });
    }

    /// Durations of the batches since this was last asked; and how long batches have waited so far, by signal.
    pub fn tally(&self) -> (Vec<Duration>, BTreeMap<String, Duration>) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut tally.untaken), tally.waited.clone())
    }
}

/// The nearest rank, in milliseconds.
fn percentile_ms(sorted: &[Duration], q: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * q).ceil().max(1.0) as usize;
    sorted.get(rank - 1).map(|d| d.as_secs_f64() * 1000.0)
}

/// Unix time in milliseconds.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// Rate over a sliding window.
#[derive(Debug)]
pub struct Rate {
    window: Duration,
    samples: VecDeque<(Instant, i64)>,
}

impl Rate {
    /// A rate over the last `window`.
    pub fn new(window: Duration) -> Self {
        Self { window, samples: VecDeque::new() }
    }

    /// Notes that the total is `total` at `at`; gives units per second over the window.
    pub fn observe(&mut self, at: Instant, total: i64) -> f64 {
        self.samples.push_back((at, total));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|s| at.duration_since(s.0) > self.window) {
            self.samples.pop_front();
        }
        match self.samples.front() {
            Some((from, before)) if at > *from => (total - before) as f64 / at.duration_since(*from).as_secs_f64(),
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_speak_of_the_recent_batches_and_each_batch_is_taken_once() {
        let progress = Progress::default();
        for ms in 1..=400 {
            progress.batch(Duration::from_millis(ms));
        }
        let now = progress.now();
        assert_eq!((now.batch_p50_ms, now.batch_p99_ms), (Some(250.0), Some(397.0)), "of 101 to 400");
        assert_eq!(progress.tally().0.len(), 400);
        assert!(progress.tally().0.is_empty());
        progress.waited("replica_lag", Duration::from_millis(700));
        progress.waited("replica_lag", Duration::from_millis(800));
        assert_eq!(progress.now().throttled_seconds["replica_lag"], 1.5);
    }

    #[test]
    fn the_timeline_has_each_phase_from_its_begin_to_the_next() {
        let mut now = Snapshot::default();
        now.enter("backfill", 10);
        now.ratio = 0.5;
        now.enter("backfill", 15);
        assert_eq!((now.ratio, now.since_ms), (0.5, 10), "it was there already");
        now.enter("verify", 20);
        now.enter("backfill", 30);
        let spans: Vec<_> = now.timeline.iter().map(|s| (s.phase.as_str(), s.since_ms, s.until_ms)).collect();
        assert_eq!(spans, [("backfill", 10, Some(20)), ("verify", 20, Some(30)), ("backfill", 30, None)]);
        assert_eq!((now.ratio, now.since_ms), (0.0, 30));
    }

    #[test]
    fn what_cannot_be_read_has_no_value_and_nothing_has_one_at_rest() {
        let signal = |signal: &str, is_waiting, refuses| Signal {
            signal: signal.into(),
            observed: 3.0,
            is_waiting,
            refuses,
            ..Signal::default()
        };
        let signals = vec![signal("a", false, false), signal("b", true, true)];
        let mut now = Snapshot { signals, ..Snapshot::default() };
        assert_eq!((now.observed("a"), now.observed("b")), (Some(3.0), None));
        now.rest();
        assert_eq!(now.observed("a"), None, "old values are no values");
    }
}
