//! Measures the signals. What cannot be read is a reading that says wait (I10).

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio_postgres::{Client, Row};

use super::signal::Reading;
use crate::error::{Error, Result};
use crate::job::throttle::{Query, Throttle};

const MB: f64 = 1024.0 * 1024.0;
/// Longest time for one of the operator's queries: several of them have to fit into a measurement.
pub const QUERY_TIMEOUT: Duration = Duration::from_secs(2);

/// What a session for measurements is set to: nothing of the operator's can write, or take long.
pub fn session_settings() -> String {
    format!(
        "set default_transaction_read_only = on; set statement_timeout = {}; set lock_timeout = '100ms'",
        QUERY_TIMEOUT.as_millis()
    )
}

/// All readings, from one pass.
///
/// # Errors
/// If the connection is lost. A signal that fails by itself is a reading.
pub async fn measure(client: &Client, t: &Throttle) -> Result<Vec<Reading>> {
    let mut out = vec![window(t)];
    let began = Instant::now();
    let wanted = |name: &str| !t.ignore.iter().any(|i| i == name);
    let add = |name: &str, found: Result<Vec<Reading>>, out: &mut Vec<Reading>| match found {
        Ok(readings) => {
            out.extend(readings);
            Ok(())
        }
        Err(e) if client.is_closed() => Err(e),
        Err(e) => {
            out.push(Reading::no(name, format!("it cannot be read: {}", e.line())));
            Ok(())
        }
    };
    if wanted("replica_lag") {
        add("replica_lag", replicas(client, t).await, &mut out)?;
    }
    if wanted("slot_retained") || wanted("slot_safe") {
        let found = slots(client, t).await.map(|r| r.into_iter().filter(|r| wanted(&r.signal)).collect());
        add("slot_retained", found, &mut out)?;
    }
    if wanted("lock_waiters") || wanted("xid_age") || t.active_sessions.is_some() {
        let found = sessions(client, t).await.map(|r| r.into_iter().filter(|r| wanted(&r.signal)).collect());
        add("lock_waiters", found, &mut out)?;
    }
    // Only what the server itself answers quickly: the operator's queries take what they take.
    let took = began.elapsed();
    for query in &t.queries {
        add(&format!("query_{}", query.name), operator(client, query).await.map(|r| vec![r]), &mut out)?;
    }
    if wanted("probe_latency") {
        out.push(Reading::at_most("probe_latency", took.as_secs_f64(), t.probe_latency.as_secs_f64(), "s"));
    }
    Ok(out)
}

fn window(t: &Throttle) -> Reading {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    if t.windows.is_empty() || t.windows.iter().any(|w| w.is_open(now)) {
        return Reading::at_most("window", 0.0, 1.0, "");
    }
    let times: Vec<String> = t
        .windows
        .iter()
        .map(|w| format!("{} to {} {}", w.from, w.to, w.utc_offset.as_deref().unwrap_or("UTC")))
        .collect();
    Reading::no("window", format!("batches may run {}", times.join(", ")))
}

async fn replicas(client: &Client, t: &Throttle) -> Result<Vec<Reading>> {
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

async fn slots(client: &Client, t: &Throttle) -> Result<Vec<Reading>> {
    // A lost slot has nothing left to protect.
    let rows = client
        .query(
            "select slot_name::text, coalesce(wal_status, ''), safe_wal_size::float8,
                    (pg_current_wal_lsn() - restart_lsn)::float8
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
        out.push(Reading::at_least("slot_safe", left / MB, t.slot_safe_mb as f64, "MiB").of(format!("slot {name}")));
    }
    Ok(out)
}

async fn sessions(client: &Client, t: &Throttle) -> Result<Vec<Reading>> {
    let row: Row = client
        .query_one(
            "select (select count(distinct l.pid) from pg_locks l join pg_database d on d.datname = current_database()
                     where not l.granted and coalesce(l.database, d.oid) in (d.oid, 0))::float8,
                    (select age(datfrozenxid) from pg_database where datname = current_database())::float8,
                    (select count(*) filter (where state = 'active') from pg_stat_activity
                     where backend_type = 'client backend')::float8",
            &[],
        )
        .await?;
    let mut out = vec![
        Reading::at_most("lock_waiters", row.get(0), f64::from(t.lock_waiters), "sessions"),
        Reading::at_most("xid_age", row.get(1), f64::from(t.xid_age), "transactions"),
    ];
    if let Some(most) = t.active_sessions {
        out.push(Reading::at_most("active_sessions", row.get(2), f64::from(most), "sessions"));
    }
    Ok(out)
}

/// Runs one of the operator's queries.
///
/// # Errors
/// What the server says; input if it gives something else than one number or boolean.
pub async fn operator(client: &Client, query: &Query) -> Result<Reading> {
    let signal = format!("query_{}", query.name);
    let bad = |what: String| Error::input(format!("throttle query {}: {what}", query.name));
    let sql = format!("select q.v::text, pg_typeof(q.v)::text from (\n{}\n) as q(v) limit 2", query.sql);
    let rows =
        client.query(&sql, &[]).await.map_err(|e| Error::from(e).context(format!("throttle query {}", query.name)))?;
    let [row] = rows.as_slice() else {
        return Err(bad(format!("expected one row, found {}", if rows.is_empty() { "none" } else { "several" })));
    };
    let (value, kind): (Option<String>, String) = (row.get(0), row.get(1));
    let value = value.ok_or_else(|| bad("expected a value, found NULL".into()))?;
    match (kind.as_str(), query.max) {
        ("boolean", None) if value == "true" => Ok(Reading::at_most(&signal, 0.0, 1.0, "")),
        ("boolean", None) => Ok(Reading::no(&signal, "the query says no")),
        ("boolean", Some(_)) => Err(bad("it gives a boolean, which has no max".into())),
        ("smallint" | "integer" | "bigint" | "real" | "double precision" | "numeric", Some(max)) => {
            let number: f64 = value.parse().map_err(|_| bad("expected a finite number".into()))?;
            match number.is_finite() {
                true => Ok(Reading::at_most(&signal, number, max, "")),
                false => Err(bad("expected a finite number".into())),
            }
        }
        ("smallint" | "integer" | "bigint" | "real" | "double precision" | "numeric", None) => {
            Err(bad("it gives a number: say with max where batches have to wait".into()))
        }
        (other, _) => Err(bad(format!("expected a number or a boolean, found {other}"))),
    }
}

/// The worst of several, and whose it is.
#[derive(Default)]
struct Worst {
    value: f64,
    whose: String,
}

impl Worst {
    fn see(&mut self, value: f64, whose: &str) {
        if value > self.value {
            self.value = value;
            self.whose = whose.to_owned();
        }
    }

    fn reading(self, signal: &str, threshold: f64, unit: &'static str) -> Reading {
        Reading::at_most(signal, self.value, threshold, unit).of(self.whose)
    }
}
