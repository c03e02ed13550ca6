//! Whom our batches keep waiting: a batch that does so for too long is cancelled.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_postgres::Client;

use crate::error::Result;
use crate::pg::connect::{Canceller, Session};

/// How often locks that somebody waits for are looked at. With the shortest patience an application waits for both.
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

    /// Cancels batches for which somebody has waited longer than `patience`. Gives how many.
    ///
    /// # Errors
    /// Database errors.
    pub async fn give_way(&self, client: &Client, patience: Duration) -> Result<usize> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let pids: Vec<i32> = sessions.iter().map(|s| s.0).collect();
        // pg_blocking_pids() holds up the lock manager for a moment, so it is only asked about those who wait.
        let rows = client
            .query(
                "with waiting as materialized (
                   select l.pid, min(l.waitstart) as since from pg_locks l
                   where not l.granted and l.pid <> all ($1) group by l.pid)
                 select distinct b.pid from waiting w, unnest(pg_blocking_pids(w.pid)) as b(pid)
                 where b.pid = any ($1) and clock_timestamp() - w.since > make_interval(secs => $2)",
                &[&pids, &patience.as_secs_f64()],
            )
            .await?;
        for row in &rows {
            let pid: i32 = row.get(0);
            if let Some((_, canceller)) = sessions.iter().find(|s| s.0 == pid) {
                self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
                canceller.cancel().await?;
            }
        }
        Ok(rows.len())
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
