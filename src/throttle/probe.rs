//! Measures the signals. What cannot be read is a reading that says wait (I10).

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio_postgres::Client;

use super::replication::WalRate;
use super::signal::{Reading, UNREADABLE};
use super::{database, endpoint, operator, replication};
use crate::error::Result;
use crate::job::throttle::Throttle;

pub(super) const MB: f64 = 1024.0 * 1024.0;
/// Longest time for one of the operator's queries: several of them have to fit into a measurement.
pub const QUERY_TIMEOUT: Duration = Duration::from_secs(2);

/// What a session for measurements is set to: nothing of the operator's can write, or take long.
pub fn session_settings() -> String {
    format!(
        "set default_transaction_read_only = on; set statement_timeout = {}; set lock_timeout = '100ms'",
        QUERY_TIMEOUT.as_millis()
    )
}

/// Longest time for a measurement with all of the operator's own questions.
pub fn patience(t: &Throttle) -> Duration {
    QUERY_TIMEOUT * (2 + t.queries.len() as u32) + endpoint::TIMEOUT
}

/// Measures, and remembers what a rate needs.
#[derive(Debug, Default)]
pub struct Probe {
    wal: WalRate,
}

impl Probe {
    /// All readings, from one pass. `target` is the job's table, as in SQL.
    ///
    /// # Errors
    /// If the connection is lost. A signal that fails by itself is a reading.
    pub async fn measure(&mut self, client: &Client, t: &Throttle, target: &str) -> Result<Vec<Reading>> {
        let mut out = vec![window(t)];
        let add = |name: &str, found: Result<Vec<Reading>>, out: &mut Vec<Reading>| match found {
            Ok(readings) => {
                out.extend(readings.into_iter().filter(|r| t.wants(&r.signal)));
                Ok(())
            }
            Err(e) if client.is_closed() => Err(e),
            Err(e) => {
                out.push(Reading::no(name, format!("{UNREADABLE}: {}", e.line())));
                Ok(())
            }
        };
        let any = |names: &[&str]| names.iter().any(|n| t.wants(n));
        let began = Instant::now();
        if any(&["replica_lag", "replica_lag_bytes"]) {
            add("replica_lag", replication::replicas(client, t).await, &mut out)?;
        }
        if any(&["slot_retained", "slot_safe"]) {
            add("slot_retained", replication::slots(client, t).await, &mut out)?;
        }
        if any(&["lock_waiters", "xid_age", "multixact_age"]) || t.active_sessions.is_some() {
            add("lock_waiters", database::sessions(client, t).await, &mut out)?;
        }
        if any(&["oldest_transaction"]) {
            add("oldest_transaction", database::oldest_transaction(client, t).await.map(|r| vec![r]), &mut out)?;
        }
        if any(&["wraparound_vacuum"]) || t.dead_rows_percent.is_some() {
            add("wraparound_vacuum", database::target(client, t, target).await, &mut out)?;
        }
        // Only what the server itself answers quickly: the operator's queries take what they take.
        let took = began.elapsed();
        if let Some(limit) = t.wal_mb_per_second.filter(|_| t.wants("wal_rate")) {
            add("wal_rate", self.wal.read(client, limit).await.map(|r| vec![r]), &mut out)?;
        }
        if t.wants("probe_latency") {
            out.push(Reading::at_most("probe_latency", took.as_secs_f64(), t.probe_latency.as_secs_f64(), "s"));
        }
        for query in &t.queries {
            add(&format!("query_{}", query.name), operator::ask(client, query).await.map(|r| vec![r]), &mut out)?;
        }
        let answers = futures_util::future::join_all(t.http.iter().map(endpoint::ask)).await;
        for (e, answer) in t.http.iter().zip(answers) {
            add(&format!("http_{}", e.name), answer.map(|r| vec![r]), &mut out)?;
        }
        Ok(out)
    }
}

fn window(t: &Throttle) -> Reading {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    if t.windows.is_empty() || t.windows.iter().any(|w| w.is_open(now)) {
        return Reading::at_most("window", 0.0, 1.0, "");
    }
    let times: Vec<String> = t.windows.iter().map(|w| w.text()).collect();
    Reading::no("window", format!("batches may run {}", times.join(", ")))
}
