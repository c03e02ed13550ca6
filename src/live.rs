//! What may change while a job runs, as it is now: the job file's batching and throttle, and what operators tuned.

use std::sync::Arc;

use tokio::sync::watch;

use crate::job::JobSpec;
use crate::job::spec::Batching;
use crate::job::throttle::Throttle;

/// Everything that may change under a running job. Read it where it is used, batch by batch; keep no copy of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Tunables {
    /// How batches are cut. `strategy` and `initial_rows` only matter before the first batch.
    pub batching: Batching,
    /// What makes batches wait.
    pub throttle: Throttle,
}

impl From<&JobSpec> for Tunables {
    fn from(spec: &JobSpec) -> Self {
        Self { batching: spec.batching.clone(), throttle: spec.throttle.clone() }
    }
}

/// The values in force; clones share them.
#[derive(Debug, Clone)]
pub struct Live {
    sender: Arc<watch::Sender<Arc<Tunables>>>,
}

impl Live {
    /// Begins with `first`.
    pub fn new(first: Tunables) -> Self {
        Self { sender: Arc::new(watch::Sender::new(Arc::new(first))) }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchers_wake_when_something_is_different_and_only_then() {
        let first = Tunables { batching: Batching::default(), throttle: Throttle::default() };
        let live = Live::new(first.clone());
        let watcher = live.changes();
        assert!(!live.set(first.clone()));
        assert!(!watcher.has_changed().expect("alive"));
        let mut second = first;
        second.throttle.duty = 0.5;
        assert!(live.set(second.clone()));
        assert!(watcher.has_changed().expect("alive"));
        assert_eq!(*live.now(), second);
    }
}
