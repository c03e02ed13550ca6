//! `[throttle]`: what makes batches wait.

use std::collections::BTreeSet;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What makes batches wait. Each signal is measured over and over; while one is beyond its limit, no batch begins, and the
/// reason is in the log, in `status` and in the metrics. A signal that cannot be read counts as beyond its limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Throttle {
    /// How often the signals are measured. 100 ms to 1 min.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub every: Duration,
    /// `application_name` of each replica that has to be there. One that is missing makes batches wait. Without this list
    /// every replica that is connected is looked at, and none is missed.
    pub replicas: Vec<String>,
    /// Most time that a replica may lag behind in replaying (`replay_lag` of pg_stat_replication).
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub replica_lag: Duration,
    /// Most WAL, in MiB, that a replica may still have to replay.
    pub replica_lag_mb: u64,
    /// Most WAL, in MiB, that a replication slot may retain.
    pub slot_retained_mb: u64,
    /// Least WAL, in MiB, that may still be written before a slot is lost (`safe_wal_size`, with `max_slot_wal_keep_size`).
    pub slot_safe_mb: u64,
    /// Most sessions of this database that may wait for locks.
    pub lock_waiters: u32,
    /// Most sessions that may be active, ours included. Default: not looked at, since it depends on the server.
    pub active_sessions: Option<u32>,
    /// Greatest age of the database's oldest transaction id, in transactions; where the server's own failsafe begins by
    /// default, writing more makes it worse.
    pub xid_age: u32,
    /// Longest time that the measurement itself may take: a server that answers slowly is busy.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub probe_latency: Duration,
    /// How long somebody may wait for a lock of a batch before that batch is cancelled and made smaller. 20 ms to 5 s.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub give_way_after: Duration,
    /// Share of time that each lane works: 0.25 pauses three times as long as a batch took. 0.01 to 1.
    pub duty: f64,
    /// Signals that are left out, where the login may not read them or they mean nothing here: `replica_lag`,
    /// `slot_retained`, `slot_safe`, `lock_waiters`, `xid_age`, `probe_latency`.
    pub ignore: Vec<String>,
    /// Measurements of the operator's own.
    pub queries: Vec<Query>,
    /// Times at which batches may run; default: always.
    pub windows: Vec<Window>,
}

/// A measurement of the operator's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Query {
    /// What the signal is called: 1 to 30 of `a-z 0-9 _`.
    pub name: String,
    /// A SELECT of one row and one column, read-only: a number, or a boolean that says whether batches may run.
    pub sql: String,
    /// For a number: the most that it may be.
    #[serde(default)]
    pub max: Option<f64>,
}

/// A time of the week.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Days on which it begins; default: each.
    #[serde(default)]
    pub days: Vec<Day>,
    /// When it opens, as `HH:MM`.
    pub from: String,
    /// When it closes, as `HH:MM`; before `from`: on the next day.
    pub to: String,
    /// The clock that is meant: a fixed distance from UTC, as `+02:00`. Default: UTC.
    #[serde(default)]
    pub utc_offset: Option<String>,
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "days of the week")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

/// Signals that can be left out.
pub const IGNORABLE: [&str; 6] =
    ["replica_lag", "slot_retained", "slot_safe", "lock_waiters", "xid_age", "probe_latency"];

impl Default for Throttle {
    fn default() -> Self {
        Self {
            every: Duration::from_secs(1),
            replicas: Vec::new(),
            // What an application that reads from replicas tolerates, as a rule; gh-ost and freno use 1 to 5 s for
            // replicas in the read path.
            replica_lag: Duration::from_secs(5),
            replica_lag_mb: 256,
            // A fraction of the disks that databases worth a backfill have.
            slot_retained_mb: 10_240,
            slot_safe_mb: 1024,
            // Some are always waiting for some microseconds; ten at once are a pile-up.
            lock_waiters: 10,
            active_sessions: None,
            // vacuum_failsafe_age
            xid_age: 1_600_000_000,
            probe_latency: Duration::from_secs(1),
            give_way_after: Duration::from_millis(100),
            duty: 1.0,
            ignore: Vec::new(),
            queries: Vec::new(),
            windows: Vec::new(),
        }
    }
}

impl Window {
    /// Minutes from midnight: open and close; and the offset from UTC. `None`: not written as wanted.
    pub fn minutes(&self) -> Option<(u32, u32, i32)> {
        let clock = |text: &str| -> Option<u32> {
            let (h, m) = text.split_once(':')?;
            let (h, m): (u32, u32) = (h.parse().ok()?, m.parse().ok()?);
            (h < 24 && m < 60 && text.len() == 5).then_some(h * 60 + m)
        };
        let offset = match self.utc_offset.as_deref() {
            None => 0,
            Some(text) => {
                let sign = match text.chars().next()? {
                    '+' => 1,
                    '-' => -1,
                    _ => return None,
                };
                let minutes = clock(&text[1..])? as i32;
                (minutes <= 14 * 60).then_some(sign * minutes)?
            }
        };
        Some((clock(&self.from)?, clock(&self.to)?, offset))
    }

    /// Whether it is open at `unix` (seconds).
    pub fn is_open(&self, unix: i64) -> bool {
        let Some((from, to, offset)) = self.minutes() else { return false };
        let local = unix + i64::from(offset) * 60;
        let minute = (local.rem_euclid(86_400) / 60) as u32;
        let on = |days_back: i64| {
            // The first of January 1970 was a Thursday.
            let day = (local.div_euclid(86_400) - days_back + 3).rem_euclid(7);
            let days = [Day::Mon, Day::Tue, Day::Wed, Day::Thu, Day::Fri, Day::Sat, Day::Sun];
            self.days.is_empty() || days.get(day as usize).is_some_and(|d| self.days.contains(d))
        };
        if from < to {
            (from..to).contains(&minute) && on(0)
        } else {
            (minute >= from && on(0)) || (minute < to && on(1))
        }
    }
}

/// What is wrong with it, one line each.
pub fn problems(t: &Throttle) -> Vec<String> {
    let mut out = Vec::new();
    let ms = Duration::from_millis;
    let mut between = |key: &str, value: Duration, low: Duration, high: Duration| {
        if value < low || value > high {
            let text = |d| humantime::format_duration(d).to_string();
            out.push(format!("throttle.{key}: expected {} to {}, found {}", text(low), text(high), text(value)));
        }
    };
    between("every", t.every, ms(100), ms(60_000));
    between("replica_lag", t.replica_lag, ms(1), ms(86_400_000));
    between("probe_latency", t.probe_latency, ms(10), ms(60_000));
    between("give_way_after", t.give_way_after, ms(20), ms(5000));
    if !(0.01..=1.0).contains(&t.duty) {
        out.push(format!("throttle.duty: expected 0.01 to 1, found {}", t.duty));
    }
    for (key, value) in [("replica_lag_mb", t.replica_lag_mb), ("slot_retained_mb", t.slot_retained_mb)] {
        if value == 0 {
            out.push(format!(
                "throttle.{key}: 0 would never let a batch run; to leave the signal out, name it in ignore"
            ));
        }
    }
    if t.active_sessions.is_some_and(|n| n < 2) {
        out.push("throttle.active_sessions: expected 2 or more, since the daemon is one itself".into());
    }
    for name in t.ignore.iter().filter(|n| !IGNORABLE.contains(&n.as_str())) {
        out.push(format!("throttle.ignore: unknown signal {name:?}; expected one of {}", IGNORABLE.join(", ")));
    }
    let mut names = BTreeSet::new();
    for (i, q) in t.queries.iter().enumerate() {
        let fine = (1..=30).contains(&q.name.len())
            && q.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !fine || !names.insert(&q.name) {
            out.push(format!("throttle.queries[{i}].name: expected 1 to 30 of a-z 0-9 _, unique; found {:?}", q.name));
        }
        if q.max.is_some_and(|m| !m.is_finite()) {
            out.push(format!("throttle.queries[{i}].max: expected a number"));
        }
        if q.sql.trim_end().ends_with(';') || q.sql.trim().is_empty() {
            out.push(format!("throttle.queries[{i}].sql: expected one SELECT without a semicolon"));
        }
    }
    for (i, w) in t.windows.iter().enumerate() {
        match w.minutes() {
            None => out.push(format!(
                "throttle.windows[{i}]: expected from and to as HH:MM, utc_offset as +HH:MM; found {:?}, {:?}, {:?}",
                w.from, w.to, w.utc_offset
            )),
            Some((from, to, _)) if from == to => {
                out.push(format!("throttle.windows[{i}]: it opens and closes at {}, so it never opens", w.from));
            }
            Some(_) => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(days: &[Day], from: &str, to: &str, offset: Option<&str>) -> Window {
        Window { days: days.to_vec(), from: from.into(), to: to.into(), utc_offset: offset.map(str::to_owned) }
    }

    #[test]
    fn windows_open_and_close_across_midnight_and_zones() {
        // 2026-11-24 was a Tuesday.
        let at = |hour: i64, minute: i64| 1_795_478_400 + hour * 3600 + minute * 60;
        let night = window(&[Day::Tue], "22:00", "04:00", None);
        assert!(!night.is_open(at(3, 0)), "that is Monday's night");
        assert!(!night.is_open(at(21, 59)) && night.is_open(at(22, 0)) && night.is_open(at(27, 59)));
        assert!(!night.is_open(at(28, 0)));
        let noon = window(&[], "12:00", "13:00", Some("+02:00"));
        assert!(noon.is_open(at(10, 30)) && !noon.is_open(at(12, 30)));
        assert!(window(&[Day::Mon], "23:00", "23:30", Some("-05:00")).is_open(at(4, 10)));
    }

    #[test]
    fn impossible_limits_are_named() {
        let bad = Throttle {
            every: Duration::ZERO,
            duty: 0.0,
            slot_retained_mb: 0,
            active_sessions: Some(1),
            ignore: vec!["lag".into()],
            queries: vec![Query { name: "No".into(), sql: "select 1;".into(), max: None }],
            windows: vec![window(&[], "10:00", "10:00", None), window(&[], "25:00", "1", Some("CET"))],
            ..Default::default()
        };
        let found = problems(&bad).join("\n");
        for part in [
            "throttle.every: expected 100ms to 1m",
            "throttle.duty",
            "slot_retained_mb",
            "active_sessions",
            "unknown signal \"lag\"",
            "queries[0].name",
            "queries[0].sql",
            "windows[0]: it opens and closes",
            "windows[1]",
        ] {
            assert!(found.contains(part), "{part}\n{found}");
        }
        assert_eq!(problems(&Throttle::default()), Vec::<String>::new());
    }
}
