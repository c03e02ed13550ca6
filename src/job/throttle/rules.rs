//! What is wrong with a `[throttle]`.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{SIGNALS, Throttle};

/// What is wrong with it, one line each.
pub fn problems(t: &Throttle) -> Vec<String> {
    let mut out = Vec::new();
    limits(t, &mut out);
    names(t, &mut out);
    critical(t, &mut out);
    for (i, w) in t.windows.iter().enumerate() {
        out.extend(w.problem().map(|what| format!("throttle.windows[{i}]: {what}")));
    }
    out
}

fn limits(t: &Throttle, out: &mut Vec<String>) {
    let ms = Duration::from_millis;
    let day = ms(86_400_000);
    for (key, value, low, high) in [
        ("every", Some(t.every), ms(100), ms(60_000)),
        ("replica_lag", Some(t.replica_lag), ms(1), day),
        ("oldest_transaction", t.oldest_transaction, ms(1000), day * 30),
        ("commit_latency", Some(t.commit_latency), ms(1), ms(60_000)),
        ("probe_latency", Some(t.probe_latency), ms(10), ms(60_000)),
        ("give_way_after", Some(t.give_way_after), ms(20), ms(5000)),
    ] {
        if let Some(value) = value.filter(|v| *v < low || *v > high) {
            let text = |d| humantime::format_duration(d).to_string();
            out.push(format!("throttle.{key}: expected {} to {}, found {}", text(low), text(high), text(value)));
        }
    }
    for (key, value, low, high) in [("duty", t.duty, 0.01, 1.0), ("latency_budget", t.latency_budget, 1.05, 10.0)] {
        if !(low..=high).contains(&value) {
            out.push(format!("throttle.{key}: expected {low} to {high}, found {value}"));
        }
    }
    for (key, value) in [
        ("replica_lag_mb", Some(t.replica_lag_mb)),
        ("slot_retained_mb", Some(t.slot_retained_mb)),
        ("wal_mb_per_second", t.wal_mb_per_second),
        ("dead_rows_percent", t.dead_rows_percent.map(u64::from)),
        ("xid_age", Some(t.xid_age.into())),
        ("multixact_age", Some(t.multixact_age.into())),
    ] {
        if value == Some(0) {
            out.push(format!(
                "throttle.{key}: 0 would never let a batch run; to leave the signal out, name it in ignore"
            ));
        }
    }
    if t.active_sessions.is_some_and(|n| n < 2) {
        out.push("throttle.active_sessions: expected 2 or more, since the daemon is one itself".into());
    }
}

/// Names of signals: those that are left out, and the operator's own.
fn names(t: &Throttle, out: &mut Vec<String>) {
    for name in t.ignore.iter().filter(|n| !SIGNALS.iter().any(|s| s.name == n.as_str())) {
        out.push(format!("throttle.ignore: unknown signal {name:?}; expected one of {}", known().join(", ")));
    }
    let mut seen = BTreeSet::new();
    let mut name = |key: String, name: &str, out: &mut Vec<String>| {
        let fine = (1..=30).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !fine || !seen.insert(key.split('[').next().unwrap_or_default().to_owned() + name) {
            out.push(format!("throttle.{key}.name: expected 1 to 30 of a-z 0-9 _, unique; found {name:?}"));
        }
    };
    for (i, q) in t.queries.iter().enumerate() {
        name(format!("queries[{i}]"), &q.name, out);
        if q.max.is_some_and(|m| !m.is_finite()) {
            out.push(format!("throttle.queries[{i}].max: expected a number"));
        }
        if q.sql.trim_end().ends_with(';') || q.sql.trim().is_empty() {
            out.push(format!("throttle.queries[{i}].sql: expected one SELECT without a semicolon"));
        }
    }
    for (i, e) in t.http.iter().enumerate() {
        name(format!("http[{i}]"), &e.name, out);
        // The address itself may hold a token, so it is not repeated.
        let rest = e.url.strip_prefix("http://").unwrap_or_default();
        let host = rest.split(['/', '?']).next().unwrap_or_default();
        if host.is_empty() || host.contains('@') || e.url.chars().any(|c| c.is_whitespace() || c.is_control()) {
            out.push(format!(
                "throttle.http[{i}].url: expected http://host[:port]/path, without a user; for https put a proxy beside \
                 the daemon"
            ));
        }
    }
}

/// Each has to lie beyond the limit at which batches wait, or they would never wait.
fn critical(t: &Throttle, out: &mut Vec<String>) {
    for (name, &value) in &t.critical {
        let own = SIGNALS.iter().find(|s| s.name == name && !s.unit.is_empty());
        let query = name.strip_prefix("query_").and_then(|q| t.queries.iter().find(|known| known.name == q));
        let (unit, is_floor) = match (own, query) {
            (Some(own), _) => (own.unit, own.is_floor),
            (None, Some(query)) if query.max.is_some() => ("", false),
            (None, Some(_)) => {
                out.push(format!("throttle.critical.{name}: the query has no max, so it has no value either"));
                continue;
            }
            (None, None) => {
                let all: Vec<&str> = SIGNALS.iter().filter(|s| !s.unit.is_empty()).map(|s| s.name).collect();
                out.push(format!(
                    "throttle.critical: unknown signal {name:?}; expected query_<name> or one of {}",
                    all.join(", ")
                ));
                continue;
            }
        };
        if !value.is_finite() || value < 0.0 {
            out.push(format!("throttle.critical.{name}: expected a number of 0 or more, found {value}"));
        } else if !t.wants(name) {
            out.push(format!("throttle.critical.{name}: the signal is left out by throttle.ignore"));
        } else if let Some(limit) = t.limit(name) {
            let (beyond, side) = if is_floor { (value < limit, "below") } else { (value > limit, "above") };
            if !beyond {
                let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
                out.push(format!(
                    "throttle.critical.{name}: expected a limit {side} {limit}{unit}, where batches begin to wait; found {value}"
                ));
            }
        } else if !is_floor {
            out.push(format!(
                "throttle.critical.{name}: the signal is not looked at; set its limit in [throttle] as well"
            ));
        }
    }
}

fn known() -> Vec<&'static str> {
    SIGNALS.iter().map(|s| s.name).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Endpoint, Query};
    use super::*;
    use crate::job::window::Window;

    fn query(name: &str, sql: &str, max: Option<f64>) -> Query {
        Query { name: name.into(), sql: sql.into(), max }
    }

    fn endpoint(name: &str, url: &str) -> Endpoint {
        Endpoint { name: name.into(), url: url.into() }
    }

    fn closed() -> Window {
        Window { days: vec![], from: "10:00".into(), to: "10:00".into(), time_zone: None, utc_offset: None }
    }

    #[test]
    fn impossible_limits_are_named() {
        let bad = Throttle {
            every: Duration::ZERO,
            duty: 0.0,
            latency_budget: 1.0,
            slot_retained_mb: 0,
            wal_mb_per_second: Some(0),
            active_sessions: Some(1),
            oldest_transaction: Some(Duration::ZERO),
            ignore: vec!["lag".into()],
            queries: vec![query("No", "select 1;", None), query("a", "select 1", None), query("a", "select 1", None)],
            http: vec![endpoint("a", "https://x/"), endpoint("b", "http://u:secret@x/"), endpoint("b", "http://x")],
            windows: vec![closed()],
            ..Default::default()
        };
        let found = problems(&bad).join("\n");
        for part in [
            "throttle.every: expected 100ms to 1m",
            "throttle.duty",
            "throttle.latency_budget: expected 1.05 to 10",
            "slot_retained_mb",
            "wal_mb_per_second",
            "active_sessions",
            "oldest_transaction",
            "unknown signal \"lag\"",
            "queries[0].name",
            "queries[0].sql",
            "queries[2].name",
            "http[0].url",
            "http[1].url",
            "http[2].name",
            "windows[0]: it opens and closes",
        ] {
            assert!(found.contains(part), "{part}\n{found}");
        }
        assert!(!found.contains("secret") && !found.contains("http[0].name"), "{found}");
        assert_eq!(problems(&Throttle::default()), Vec::<String>::new());
    }

    #[test]
    fn a_critical_limit_lies_beyond_the_normal_one() {
        let job = |signal: &str, value: f64| Throttle {
            critical: [(signal.to_owned(), value)].into(),
            queries: vec![query("depth", "select 1", Some(5.0)), query("yes", "select true", None)],
            slot_safe_mb: Some(256),
            ignore: vec!["lock_waiters".into()],
            ..Default::default()
        };
        for (signal, value) in [("replica_lag", 60.0), ("slot_safe", 100.0), ("query_depth", 6.0)] {
            assert_eq!(problems(&job(signal, value)), Vec::<String>::new(), "{signal}");
        }
        for (signal, value, said) in [
            ("replica_lag", 3.0, "expected a limit above 5 s"),
            ("slot_safe", 300.0, "below 256 MiB"),
            ("query_depth", 5.0, "above 5,"),
            ("query_yes", 5.0, "has no max"),
            ("query_other", 5.0, "unknown signal"),
            ("window", 5.0, "unknown signal"),
            ("lag", 5.0, "unknown signal \"lag\""),
            ("replica_lag", f64::NAN, "expected a number"),
            ("lock_waiters", 50.0, "left out"),
            ("wal_rate", 50.0, "not looked at"),
        ] {
            let found = problems(&job(signal, value)).join("\n");
            assert!(found.contains(said), "{signal}: {found}");
        }
    }
}
