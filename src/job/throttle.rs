//! `[throttle]`: what makes batches wait.

mod rules;

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::rules::problems;
use super::window::Window;

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
    /// Default: half of `max_slot_wal_keep_size`, at most 1024.
    pub slot_safe_mb: Option<u64>,
    /// Most WAL, in MiB per second, that the server may write, ours and others' together, over five seconds. Default: as
    /// much as it does.
    pub wal_mb_per_second: Option<u64>,
    /// Most sessions of this database that may wait for locks.
    pub lock_waiters: u32,
    /// Most sessions that may be active, ours included. Default: not looked at, since it depends on the server.
    pub active_sessions: Option<u32>,
    /// Greatest age of the oldest transaction of this database that keeps dead rows from being removed. Default: an hour, of
    /// those that this login can see; if it is set, a session that cannot be seen means wait.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "Option<String>")]
    pub oldest_transaction: Option<Duration>,
    /// Most dead rows of the target, in percent of its live ones. Default: not looked at, since a walk by key leaves one per
    /// row by its nature.
    pub dead_rows_percent: Option<u32>,
    /// Greatest age of the database's oldest transaction id, in transactions; where the server's own failsafe begins by
    /// default, writing more makes it worse.
    pub xid_age: u32,
    /// Greatest age of the database's oldest multixact; see `xid_age`.
    pub multixact_age: u32,
    /// Longest time that a small transaction may take, as the median of the last ones.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub commit_latency: Duration,
    /// Longest time that the measurement itself may take: a server that answers slowly is busy.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub probe_latency: Duration,
    /// How long somebody may wait for a lock of a batch before that batch is cancelled and made smaller. 20 ms to 5 s.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub give_way_after: Duration,
    /// How fast batches follow each other while no signal says wait.
    pub pace: Pace,
    /// Share of time that each lane works: 0.25 pauses three times as long as a batch took. With `pace = "auto"` the most
    /// that it may be. 0.01 to 1.
    pub duty: f64,
    /// With `pace = "auto"`: how much longer than without batches the slowest hundredth of an application's transactions may take
    /// with them, as a factor. 1.05 to 10.
    pub latency_budget: f64,
    /// Signals that are left out, where the login may not read them or they mean nothing here; a list of the names in
    /// docs/throttle.md.
    pub ignore: Vec<String>,
    /// Limits beyond which the job is paused, so that it goes on only when an operator says `resume`: the signal's name and
    /// the limit in the signal's unit.
    pub critical: BTreeMap<String, f64>,
    /// Measurements of the operator's own.
    pub queries: Vec<Query>,
    /// Addresses that say whether batches may run.
    pub http: Vec<Endpoint>,
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

/// How fast batches follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pace {
    /// As fast as the application's latency allows: gently while others work, at full speed while nobody does.
    Auto,
    /// `duty`, whatever goes on.
    Constant,
}

/// An address that says whether batches may run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// What the signal is called: 1 to 30 of `a-z 0-9 _`.
    pub name: String,
    /// Asked with GET over plain HTTP: any status but 2xx, and no answer within a second, mean wait.
    pub url: String,
}

/// A signal of our own.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Stable name.
    pub name: &'static str,
    /// What its values count; empty where it only says yes or no.
    pub unit: &'static str,
    /// Its limit is a floor.
    pub is_floor: bool,
}

const fn known(name: &'static str, unit: &'static str, is_floor: bool) -> Known {
    Known { name, unit, is_floor }
}

/// The signals that can be left out; all but the last can have a critical limit.
pub const SIGNALS: [Known; 14] = [
    known("replica_lag", "s", false),
    known("replica_lag_bytes", "MiB", false),
    known("slot_retained", "MiB", false),
    known("slot_safe", "MiB", true),
    known("wal_rate", "MiB/s", false),
    known("lock_waiters", "sessions", false),
    known("active_sessions", "sessions", false),
    known("oldest_transaction", "s", false),
    known("dead_rows", "%", false),
    known("xid_age", "transactions", false),
    known("multixact_age", "multixacts", false),
    known("commit_latency", "s", false),
    known("probe_latency", "s", false),
    known("wraparound_vacuum", "", false),
];

/// The limit for transactions that this login can see. Dead rows of an hour are a fraction of what a table of a size worth
/// a backfill holds; reports and dumps are done by then, as a rule.
pub const OLDEST_TRANSACTION: Duration = Duration::from_secs(3600);

impl Throttle {
    /// What makes reads wait: lock waiters, busy sessions, slow answers, the operator's own queries, windows. Replicas, slots, WAL,
    /// dead rows and transaction ids only suffer from writes.
    #[must_use]
    pub fn for_reads(&self) -> Self {
        let mut out = self.clone();
        out.replicas.clear();
        out.wal_mb_per_second = None;
        out.oldest_transaction = None;
        out.dead_rows_percent = None;
        const OF_WRITES: [&str; 10] = [
            "replica_lag",
            "replica_lag_bytes",
            "slot_retained",
            "slot_safe",
            "wal_rate",
            "oldest_transaction",
            "dead_rows",
            "xid_age",
            "multixact_age",
            "wraparound_vacuum",
        ];
        for signal in OF_WRITES {
            if !out.ignore.iter().any(|i| i == signal) {
                out.ignore.push(signal.into());
            }
        }
        out
    }
}

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
            slot_safe_mb: None,
            wal_mb_per_second: None,
            // Some are always waiting for some microseconds; ten at once are a pile-up.
            lock_waiters: 10,
            active_sessions: None,
            oldest_transaction: None,
            dead_rows_percent: None,
            // vacuum_failsafe_age, vacuum_multixact_failsafe_age
            xid_age: 1_600_000_000,
            multixact_age: 1_600_000_000,
            // Far beyond any disk that is not in trouble; pacing looks at much less.
            commit_latency: Duration::from_millis(500),
            probe_latency: Duration::from_secs(1),
            give_way_after: Duration::from_millis(100),
            pace: Pace::Auto,
            duty: 1.0,
            latency_budget: 1.25,
            ignore: Vec::new(),
            critical: BTreeMap::new(),
            queries: Vec::new(),
            http: Vec::new(),
            windows: Vec::new(),
        }
    }
}

impl Throttle {
    /// The limit of one of our own signals, as far as the job alone knows it, in the signal's unit.
    fn limit(&self, signal: &str) -> Option<f64> {
        match signal {
            "replica_lag" => Some(self.replica_lag.as_secs_f64()),
            "replica_lag_bytes" => Some(self.replica_lag_mb as f64),
            "slot_retained" => Some(self.slot_retained_mb as f64),
            "slot_safe" => self.slot_safe_mb.map(|mb| mb as f64),
            "wal_rate" => self.wal_mb_per_second.map(|mb| mb as f64),
            "lock_waiters" => Some(f64::from(self.lock_waiters)),
            "active_sessions" => self.active_sessions.map(f64::from),
            "oldest_transaction" => Some(self.oldest_transaction.unwrap_or(OLDEST_TRANSACTION).as_secs_f64()),
            "dead_rows" => self.dead_rows_percent.map(f64::from),
            "xid_age" => Some(f64::from(self.xid_age)),
            "multixact_age" => Some(f64::from(self.multixact_age)),
            "commit_latency" => Some(self.commit_latency.as_secs_f64()),
            "probe_latency" => Some(self.probe_latency.as_secs_f64()),
            other => {
                let query = other.strip_prefix("query_")?;
                self.queries.iter().find(|q| q.name == query)?.max
            }
        }
    }

    /// Whether a signal is wanted.
    pub fn wants(&self, signal: &str) -> bool {
        !self.ignore.iter().any(|i| i == signal)
    }
}
