//! Whom our batches keep waiting: a batch that does so for too long is cancelled.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_postgres::Client;

use crate::error::Result;
use crate::pg::connect::{Canceller, Session};

/// How often locks that somebody waits for are looked at. At worst, an application waits for both this and the patience.
pub const EVERY: Duration = Duration::from_millis(50);

/// The sessions of our batches, and which of them were cancelled.
#[derive(Default)]
pub struct Batches {
    sessions: Mutex<Vec<(i32, Canceller)>>,
    cancelled: Mutex<BTreeSet<i32>>,
}

impl Batches {
    /// Adds a session.
    pub fn add(&self, session: &Session) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).push((session.pid, session.canceller()));
    }

    /// Whether this session's batch was cancelled since this was last asked.
    pub fn gave_way(&self, pid: i32) -> bool {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid)
    }

    /// Cancels batches for which somebody has waited longer than `patience`. Gives how many, and how long until the next
    /// look: who waits already is not kept waiting until it is due anyway.
    ///
    /// # Errors
    /// Database errors.
    pub async fn give_way(&self, client: &Client, patience: Duration) -> Result<(usize, Duration)> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let pids: Vec<i32> = sessions.iter().map(|s| s.0).collect();
        // pg_blocking_pids() holds up the lock manager for a moment, so it is only asked about those who wait.
        let rows = client
            .query(
                "with waiting as materialized (
                   select l.pid, min(l.waitstart) as since from pg_locks l
                   where not l.granted and l.pid <> all ($1) group by l.pid)
                 select b.pid, coalesce(max(extract(epoch from clock_timestamp() - w.since)), 0)::float8
                 from waiting w, unnest(pg_blocking_pids(w.pid)) as b(pid)
                 where b.pid = any ($1) group by b.pid",
                &[&pids],
            )
            .await?;
        let (mut cancelled, mut next) = (0, EVERY);
        for row in &rows {
            let (pid, waited): (i32, f64) = (row.get(0), row.get(1));
            let left = patience.saturating_sub(Duration::from_secs_f64(waited.max(0.0)));
            if !left.is_zero() {
                next = next.min(left);
                continue;
            }
            cancelled += 1;
            if let Some((_, canceller)) = sessions.iter().find(|s| s.0 == pid) {
                self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
                canceller.cancel().await?;
            }
        }
        Ok((cancelled, next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::throttle::Throttle;

    /// The promise is 200 ms: the rest is for the look itself and for the cancelled batch to roll back.
    #[test]
    fn with_the_defaults_an_application_waits_for_a_batch_at_most_150_ms_before_it_is_cancelled() {
        assert!(Throttle::default().give_way_after + EVERY <= Duration::from_millis(150));
    }
}
