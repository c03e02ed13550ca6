//! How far a job is, in memory, for the terminal, the status page and metrics. A leaf.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;

/// A moment of a job's run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Snapshot {
    /// The job stands in the ledger: this daemon works on it, or waits for its lease.
    pub entered: bool,
    /// Phase or status, in one word.
    pub phase: String,
    /// What is happening or waited for, in a few words.
    pub note: String,
    /// Rows looked at so far, over all sweeps.
    pub rows_scanned: i64,
    /// Rows filled so far.
    pub rows_updated: i64,
    /// Rows of the table, estimated.
    pub rows_estimate: i64,
    /// Batches committed.
    pub batches: i64,
    /// Size of the next batch in rows.
    pub batch_rows: i64,
    /// Rows looked at per second, over the last seconds.
    pub rows_per_second: f64,
}

/// Sender and receiver in one; clones share the value.
#[derive(Clone, Debug)]
pub struct Progress {
    sender: Arc<watch::Sender<Snapshot>>,
}

impl Default for Progress {
    fn default() -> Self {
        Self { sender: Arc::new(watch::Sender::new(Snapshot::default())) }
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
}

/// Rate over a sliding window.
#[derive(Debug)]
pub struct Rate {
    window: Duration,
    samples: std::collections::VecDeque<(Instant, i64)>,
}

impl Rate {
    /// A rate over the last `window`.
    pub fn new(window: Duration) -> Self {
        Self { window, samples: std::collections::VecDeque::new() }
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
