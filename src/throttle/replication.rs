//! What replication says: replicas, slots, and how fast WAL is written.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::probe::MB;
use super::signal::{Reading, Worst};
use crate::error::Result;
use crate::job::throttle::Throttle;

/// Ceiling of the default for `slot_safe_mb`, in MiB: some seconds at the rate of a fast disk, which is more than it takes
/// to stop.
const SLOT_SAFE_MB: f64 = 1024.0;
/// Time over which the WAL rate is an average: long enough for a batch not to be a peak of its own.
const RATE_OVER: Duration = Duration::from_secs(5);
/// Before there is anything to compare with: how long to look.
const FIRST_LOOK: Duration = Duration::from_millis(200);

/// Lag of the replicas, in seconds and in bytes.
///
/// # Errors
/// What the server says.
pub async fn replicas(client: &Client, t: &Throttle) -> Result<Vec<Reading>> {
    let rows = client
        .query(
            "select application_name, state is not null, coalesce(state, ''),
                    (pg_current_wal_lsn() - replay_lsn)::float8, extract(epoch from replay_lag)::float8
             from pg_stat_replication",
            &[],
        )
        .await?;
    let mut out = Vec::new();
    for name in &t.replicas {
        if !rows.iter().any(|r| r.get::<_, String>(0) == *name && r.get::<_, String>(2) == "streaming") {
            out.push(Reading::no("replica_lag", format!("replica {name} is not streaming")));
        }
    }
    let (mut seconds, mut bytes) = (Worst::default(), Worst::default());
    for row in &rows {
        let name: String = row.get(0);
        if !t.replicas.is_empty() && !t.replicas.contains(&name) {
            continue;
        }
        if !row.get::<_, bool>(1) {
            let why = format!("the lag of replica {name} may not be read: grant pg_monitor to this login");
            out.push(Reading::no("replica_lag", why));
            continue;
        }
        // A logical receiver, or a base backup, replays nothing; slots tell how far the former is.
        let Some(lag) = row.get::<_, Option<f64>>(3) else { continue };
        bytes.see(lag / MB, &name);
        seconds.see(row.get::<_, Option<f64>>(4).unwrap_or(0.0), &name);
    }
    out.push(seconds.reading("replica_lag", t.replica_lag.as_secs_f64(), "s"));
    out.push(bytes.reading("replica_lag_bytes", t.replica_lag_mb as f64, "MiB"));
    Ok(out)
}

/// WAL that slots retain, and that may be written before one is lost.
///
/// # Errors
/// What the server says.
pub async fn slots(client: &Client, t: &Throttle) -> Result<Vec<Reading>> {
    // A lost slot has nothing left to protect.
    let rows = client
        .query(
            "select slot_name::text, coalesce(wal_status, ''), safe_wal_size::float8,
                    (pg_current_wal_lsn() - restart_lsn)::float8,
                    (select setting::float8 from pg_settings where name = 'max_slot_wal_keep_size')
             from pg_replication_slots where restart_lsn is not null and wal_status is distinct from 'lost'",
            &[],
        )
        .await?;
    let mut retained = Worst::default();
    let mut out = Vec::new();
    let mut safe: Option<(f64, String)> = None;
    for row in &rows {
        let name: String = row.get(0);
        retained.see(row.get::<_, f64>(3) / MB, &name);
        if row.get::<_, String>(1) == "unreserved" {
            out.push(Reading::no("slot_safe", format!("slot {name} is about to be lost")));
        }
        if let Some(left) = row.get::<_, Option<f64>>(2)
            && safe.as_ref().is_none_or(|s| left < s.0)
        {
            safe = Some((left, name));
        }
    }
    out.push(retained.reading("slot_retained", t.slot_retained_mb as f64, "MiB"));
    if let Some((left, name)) = safe {
        // The setting is in MiB.
        let keep: Option<f64> = rows.first().and_then(|r| r.get(4));
        let floor = t.slot_safe_mb.map_or_else(|| default_slot_safe(keep), |mb| mb as f64);
        out.push(Reading::at_least("slot_safe", left / MB, floor, "MiB").of(format!("slot {name}")));
    }
    Ok(out)
}

/// A slot that is read to the end has all of `max_slot_wal_keep_size` (in MiB) before it, and no more: a floor above that
/// would never let a batch run. Half of it leaves the reader as much to catch up with as was left to write.
fn default_slot_safe(keep: Option<f64>) -> f64 {
    keep.filter(|mb| *mb >= 0.0).map_or(SLOT_SAFE_MB, |mb| (mb / 2.0).min(SLOT_SAFE_MB))
}

/// How fast the server writes WAL, over the last seconds.
#[derive(Debug, Default)]
pub struct WalRate {
    seen: VecDeque<(Instant, f64)>,
}

impl WalRate {
    /// Looks again.
    ///
    /// # Errors
    /// What the server says.
    pub async fn read(&mut self, client: &Client, limit_mb: u64) -> Result<Reading> {
        let mut rate = self.see(Instant::now(), position(client).await?);
        if rate.is_none() {
            tokio::time::sleep(FIRST_LOOK).await;
            rate = self.see(Instant::now(), position(client).await?);
        }
        Ok(Reading::at_most("wal_rate", rate.unwrap_or(f64::INFINITY) / MB, limit_mb as f64, "MiB/s"))
    }

    /// Bytes per second. `None`: there is nothing to compare with. A position that goes back is another server's.
    fn see(&mut self, now: Instant, at: f64) -> Option<f64> {
        if self.seen.back().is_some_and(|(_, last)| *last > at) {
            self.seen.clear();
        }
        self.seen.push_back((now, at));
        // The one before the window is kept, so that there is always one to compare with.
        while self.seen.get(1).is_some_and(|(then, _)| now.duration_since(*then) >= RATE_OVER) {
            self.seen.pop_front();
        }
        let (then, before) = *self.seen.front()?;
        let time = now.duration_since(then).as_secs_f64();
        (time > 0.0).then(|| (at - before) / time)
    }
}

async fn position(client: &Client) -> Result<f64> {
    Ok(client.query_one("select (pg_current_wal_lsn() - '0/0')::float8", &[]).await?.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_for_slots_is_within_what_the_server_keeps() {
        // Supabase's default is 512 MB.
        assert_eq!(default_slot_safe(Some(512.0)), 256.0);
        assert_eq!(default_slot_safe(Some(102_400.0)), 1024.0);
        assert_eq!((default_slot_safe(Some(-1.0)), default_slot_safe(None)), (1024.0, 1024.0));
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let (mut rate, begin) = (WalRate::default(), Instant::now());
        let at = |s: u64| begin + Duration::from_secs(s);
        assert_eq!(rate.see(at(0), 1e9), None);
        assert_eq!(rate.see(at(1), 1e9 + 10.0), Some(10.0));
        for s in 2..=10 {
            rate.see(at(s), 1e9 + 10.0);
        }
        assert_eq!(rate.see(at(11), 1e9 + 10.0), Some(0.0));
        assert_eq!(rate.see(at(12), 5.0), None, "after a failover it begins anew");
    }
}
