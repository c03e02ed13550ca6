//! What may change while a job runs, as it is now: the job file's batching and throttle, and what operators tuned.
//!
//! Each batch reads the version of the tuning with its fence. Where it is new, the values are read again before the next
//! batch; where no batch runs, a task asks for the version once a second.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::context::Context;
use crate::error::Result;
pub use crate::job::tune::Tunables;
use crate::ledger::{event, lease, tuning};

/// How often the version is asked for where no batch reads it.
const POLL: Duration = Duration::from_secs(1);

/// The values in force; clones share them.
#[derive(Debug, Clone)]
pub struct Live {
    sender: Arc<watch::Sender<Arc<Tunables>>>,
    stored: Arc<Stored>,
}

/// What is known of the stored tuning.
#[derive(Debug, Default)]
struct Stored {
    /// The version that was last seen, by a fence or by asking; -1: none.
    seen: AtomicI64,
    /// The version of the values in force, and when the first of them is over.
    loaded: Mutex<(i64, Option<Instant>)>,
    /// When a version was last seen.
    heard: Mutex<Option<Instant>>,
    /// Held while values are read, so that older ones do not come over newer ones.
    reading: tokio::sync::Mutex<()>,
}

impl Live {
    /// Begins with `first`, and with what is stored still to be read.
    pub fn new(first: Tunables) -> Self {
        let stored = Stored { loaded: Mutex::new((-1, None)), ..Stored::default() };
        Self { sender: Arc::new(watch::Sender::new(Arc::new(first))), stored: Arc::new(stored) }
    }

    /// The values now.
    pub fn now(&self) -> Arc<Tunables> {
        Arc::clone(&self.sender.borrow())
    }

    /// Puts others in force. Gives whether anything is different.
    pub fn set(&self, next: Tunables) -> bool {
        self.sender.send_if_modified(|now| {
            let other = **now != next;
            if other {
                *now = Arc::new(next);
            }
            other
        })
    }

    /// A receiver that wakes when other values come into force.
    pub fn changes(&self) -> watch::Receiver<Arc<Tunables>> {
        self.sender.subscribe()
    }

    /// Notes the version that a fence has read.
    pub fn saw(&self, version: i64) {
        self.stored.seen.fetch_max(version, Ordering::Relaxed);
        *self.stored.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether the values in force are not those that are stored.
    pub fn is_stale(&self) -> bool {
        let (version, over) = *self.stored.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        version < self.stored.seen.load(Ordering::Relaxed) || over.is_some_and(|at| at <= Instant::now())
    }

    /// Time until a look at the stored values is due.
    fn due_in(&self) -> Duration {
        let over = self.stored.loaded.lock().unwrap_or_else(PoisonError::into_inner).1;
        over.map_or(POLL, |at| at.saturating_duration_since(Instant::now()).min(POLL))
    }

    fn heard_lately(&self) -> bool {
        let heard = *self.stored.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.is_some_and(|at| at.elapsed() < POLL)
    }
}

/// Puts the stored values in force, if those in force are others.
///
/// # Errors
/// Database errors, lease lost.
pub async fn refresh(ctx: &Context) -> Result<()> {
    let live = &ctx.live;
    let _one = live.stored.reading.lock().await;
    if !live.is_stale() {
        return Ok(());
    }
    let asked = Instant::now();
    let found = tuning::load(&**ctx.client().await?, ctx.job()).await?;
    let (next, problems) = Tunables::tuned(&ctx.spec, &found.values);
    for problem in problems {
        warn!(job = ctx.job(), "a tuned value is left out: {problem}");
    }
    let changes = live.now().differences(&next);
    live.set(next);
    live.stored.seen.fetch_max(found.version, Ordering::Relaxed);
    // From before it was asked: rather a moment early, and asked again, than late.
    let over = found.next_end.map(|left| asked + left);
    *live.stored.loaded.lock().unwrap_or_else(PoisonError::into_inner) = (found.version, over);
    if !changes.is_empty() {
        info!(job = ctx.job(), version = found.version, "tuned: {}", changes.join("; "));
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        event::record(&*tx, ctx.job(), "tuned", json!({ "changes": changes })).await?;
        tx.commit().await?;
    }
    Ok(())
}

/// Keeps the values in force those that are stored, where no batch does.
pub async fn watch(ctx: Context) {
    loop {
        tokio::time::sleep(ctx.live.due_in().max(Duration::from_millis(20))).await;
        let looked = async {
            if !ctx.live.heard_lately() {
                ctx.live.saw(tuning::version(&**ctx.client().await?, ctx.job()).await?);
            }
            refresh(&ctx).await
        };
        // The lease ends blind work.
        if let Err(e) = looked.await {
            warn!(job = ctx.job(), sqlstate = e.sqlstate(), "the tuning cannot be read: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::Batching;
    use crate::job::throttle::Throttle;

    #[test]
    fn watchers_wake_when_something_is_different_and_only_then() {
        let first = Tunables { batching: Batching::default(), throttle: Throttle::default(), throttled: None };
        let live = Live::new(first.clone());
        let watcher = live.changes();
        assert!(!live.set(first.clone()));
        assert!(!watcher.has_changed().expect("alive"));
        let mut second = first;
        second.throttle.duty = 0.5;
        assert!(live.set(second.clone()));
        assert!(watcher.has_changed().expect("alive"));
        assert_eq!(*live.now(), second);
        assert!(live.is_stale(), "nothing stored was read yet");
    }
}
