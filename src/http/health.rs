//! Alive and ready: what the two probes of an orchestrator ask.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Mutex;

/// The heartbeat is stamped this often.
const BEAT: Duration = Duration::from_millis(500);
/// Ten missed beats: far more than a scheduling hiccup, less than what a liveness probe usually waits.
const STALE: Duration = Duration::from_secs(5);
/// An answer is good for this long, so that requests cost the database at most one query per second.
const FRESH: Duration = Duration::from_secs(1);
/// Below the time-out of usual probes, so that the reason gets through.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether the daemon can do its work, and why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Status 200 or 503.
    pub ready: bool,
    /// One line for people; no secrets, as anybody who reaches the port can read it.
    pub reason: String,
}

impl Readiness {
    /// Everything is fine.
    pub fn yes() -> Self {
        Self { ready: true, reason: "ok".into() }
    }

    /// Not now.
    pub fn no(reason: impl Into<String>) -> Self {
        Self { ready: false, reason: reason.into() }
    }
}

/// A heartbeat that a task of the event loop stamps.
#[derive(Clone)]
pub struct Pulse {
    start: Instant,
    /// Milliseconds from `start` to the last beat.
    last_ms: Arc<AtomicU64>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self::new()
    }
}

impl Pulse {
    /// A pulse that beats now.
    pub fn new() -> Self {
        Self { start: Instant::now(), last_ms: Arc::new(AtomicU64::new(0)) }
    }

    /// A pulse whose event loop hangs.
    #[cfg(test)]
    pub(crate) fn stopped_a_minute_ago() -> Self {
        let start = Instant::now().checked_sub(Duration::from_secs(60)).expect("a machine that is up for a minute");
        Self { start, last_ms: Arc::new(AtomicU64::new(0)) }
    }

    /// Beats until dropped.
    pub async fn keep(&self) {
        loop {
            self.beat();
            tokio::time::sleep(BEAT).await;
        }
    }

    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// The age of the last beat if that is too long ago.
    pub fn stale(&self) -> Option<Duration> {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        let age = self.start.elapsed().saturating_sub(last);
        (age > STALE).then_some(age)
    }
}

type Check = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Readiness> + Send>> + Send + Sync>;

/// The readiness check with its last answer.
pub(super) struct Ready {
    check: Check,
    last: Mutex<Option<(Instant, Readiness)>>,
}

impl Ready {
    pub(super) fn new<F, Fut>(check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Readiness> + Send + 'static,
    {
        Self { check: Box::new(move || Box::pin(check())), last: Mutex::new(None) }
    }

    /// The last answer if it is fresh, else a new one; callers that come meanwhile wait for it.
    pub(super) async fn get(&self) -> Readiness {
        let mut last = self.last.lock().await;
        if let Some((at, readiness)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            tracing::trace!(age_ms = at.elapsed().as_millis(), "readiness answered from memory");
            return readiness.clone();
        }
        let readiness = tokio::time::timeout(CHECK_TIMEOUT, (self.check)()).await.unwrap_or_else(|_| {
            Readiness::no(format!("the database did not answer within {} s", CHECK_TIMEOUT.as_secs()))
        });
        *last = Some((Instant::now(), readiness.clone()));
        readiness
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulse_that_stopped_is_stale() {
        let pulse = Pulse::stopped_a_minute_ago();
        assert!(pulse.stale().is_some_and(|age| age >= Duration::from_secs(60)));
        pulse.beat();
        assert_eq!(pulse.stale(), None);
    }

    #[tokio::test]
    async fn many_requests_are_one_check() {
        let calls = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&calls);
        let ready = Ready::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            async { Readiness::no("standby") }
        });
        for _ in 0..100 {
            assert_eq!(ready.get().await, Readiness::no("standby"));
        }
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }
}
