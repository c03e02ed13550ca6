//! Every metric: name, labels, help, and the functions that record it. A leaf: it knows no other module.
//!
//! Names begin with `backfilld_`, units are base units, labels have few values: a job's name, a phase, a signal, an
//! SQLSTATE. docs/metrics.md is made from [`METRICS`]. One long file, since it is one list, and who looks for a metric finds it here.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Build information, always 1.
pub const BUILD_INFO: &str = "backfilld_build_info";
/// Which job this daemon has.
pub const JOB_INFO: &str = "backfilld_job_info";
/// Status of the job.
pub const JOB_STATUS: &str = "backfilld_job_status";
/// Phase of the job.
pub const JOB_PHASE: &str = "backfilld_job_phase";
/// Rows looked at.
pub const ROWS_SCANNED: &str = "backfilld_rows_scanned_total";
/// Rows filled.
pub const ROWS_UPDATED: &str = "backfilld_rows_updated_total";
/// Rows left alone.
pub const ROWS_SKIPPED: &str = "backfilld_rows_skipped_total";
/// Rows in quarantine.
pub const ROWS_QUARANTINED: &str = "backfilld_rows_quarantined";
/// Rows updated without index work.
pub const ROWS_HOT: &str = "backfilld_rows_hot_total";
/// Batches committed.
pub const BATCHES: &str = "backfilld_batches_total";
/// Duration of a batch.
pub const BATCH_DURATION: &str = "backfilld_batch_duration_seconds";
/// Rows of a batch.
pub const BATCH_ROWS: &str = "backfilld_batch_rows";
/// Rows the next batch will ask for.
pub const BATCH_SIZE_TARGET: &str = "backfilld_batch_size_target_rows";
/// Share of time that each lane works.
pub const PACE: &str = "backfilld_pace_ratio";
/// Progress of the phase.
pub const PROGRESS: &str = "backfilld_progress_ratio";
/// Estimated end.
pub const ETA: &str = "backfilld_eta_timestamp_seconds";
/// Attempts that failed and were made again.
pub const RETRIES: &str = "backfilld_retries_total";
/// Failures.
pub const ERRORS: &str = "backfilld_errors_total";
/// Whether a signal holds the job back.
pub const THROTTLED: &str = "backfilld_throttled";
/// Time held back.
pub const THROTTLED_SECONDS: &str = "backfilld_throttled_seconds_total";
/// What a signal shows.
pub const SIGNAL_VALUE: &str = "backfilld_throttle_signal_value";
/// Where a signal stops us.
pub const SIGNAL_THRESHOLD: &str = "backfilld_throttle_signal_threshold";
/// Signals that could not be read.
pub const PROBE_ERRORS: &str = "backfilld_probe_errors_total";
/// Lag of the worst replica in time.
pub const REPLICA_LAG: &str = "backfilld_replica_lag_seconds";
/// Lag of the worst replica in WAL.
pub const REPLICA_LAG_BYTES: &str = "backfilld_replica_lag_bytes";
/// WAL that the worst slot keeps.
pub const SLOT_RETAINED: &str = "backfilld_slot_retained_bytes";
/// WAL until the first slot is lost.
pub const SLOT_SAFE: &str = "backfilld_slot_safe_bytes";
/// WAL of the server.
pub const WAL_RATE: &str = "backfilld_wal_bytes_per_second";
/// Dead rows of the target.
pub const DEAD_ROWS: &str = "backfilld_target_dead_rows_ratio";
/// Attempts at DDL.
pub const DDL_ATTEMPTS: &str = "backfilld_ddl_attempts_total";
/// How long DDL held its lock.
pub const DDL_LOCK_HOLD: &str = "backfilld_ddl_lock_hold_seconds";
/// How long DDL waited for its lock.
pub const DDL_LOCK_WAIT: &str = "backfilld_ddl_lock_wait_seconds";
/// Whether a failed build left an index.
pub const INVALID_INDEXES: &str = "backfilld_invalid_indexes";
/// Rows verified.
pub const VERIFY_CHECKED: &str = "backfilld_verify_checked_rows_total";
/// Rows found wrong.
pub const VERIFY_FINDINGS: &str = "backfilld_verify_findings";
/// What the watch after the flip finds.
pub const WATCH_FINDINGS: &str = "backfilld_watch_findings";
/// Looks of the watch.
pub const WATCH_LOOKS: &str = "backfilld_watch_looks_total";
/// Last look of the watch.
pub const WATCH_CHECKED: &str = "backfilld_watch_checked_timestamp_seconds";
/// End of the watch.
pub const WATCH_ENDS: &str = "backfilld_watch_ends_timestamp_seconds";
/// Policies and functions that are not what the flip made.
pub const POLICY_DRIFT: &str = "backfilld_policy_drift";
/// Whether this daemon holds the lease.
pub const LEASE_HELD: &str = "backfilld_lease_held";
/// Epoch of the lease.
pub const LEASE_EPOCH: &str = "backfilld_lease_epoch";
/// Leases lost.
pub const LEASE_LOST: &str = "backfilld_lease_lost_total";
/// Pooled connections.
pub const POOL_CONNECTIONS: &str = "backfilld_pool_connections";

/// Prometheus type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricType {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts per bucket.
    Histogram,
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Full name.
    pub name: &'static str,
    /// Prometheus type.
    pub kind: MetricType,
    /// Base unit.
    pub unit: Unit,
    /// Label names.
    pub labels: &'static [&'static str],
    /// Help text.
    pub help: &'static str,
}

const fn metric(
    name: &'static str,
    kind: MetricType,
    unit: Unit,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric { name, kind, unit, labels, help }
}

use MetricType::{Counter, Gauge, Histogram};

/// All metrics, in the order of docs/metrics.md.
#[rustfmt::skip]
pub const METRICS: [Metric; 44] = [
    metric(BUILD_INFO, Gauge, Unit::Count, &["version"], "always 1; the version is a label"),
    metric(JOB_INFO, Gauge, Unit::Count, &["job", "daemon"], "always 1; the daemon's name is a label"),
    metric(JOB_STATUS, Gauge, Unit::Count, &["job", "status"], "1 for the status the job has, 0 for the others"),
    metric(JOB_PHASE, Gauge, Unit::Count, &["job", "phase"], "1 for the phase the job is in, 0 for the others"),
    metric(ROWS_SCANNED, Counter, Unit::Count, &["job"], "rows that committed batches have looked at"),
    metric(ROWS_UPDATED, Counter, Unit::Count, &["job"], "rows that committed batches have filled"),
    metric(ROWS_SKIPPED, Counter, Unit::Count, &["job"], "rows that were filled already, by a trigger or an earlier run"),
    metric(ROWS_QUARANTINED, Gauge, Unit::Count, &["job"], "rows that cannot be updated and wait for the operator; they block the flip"),
    metric(ROWS_HOT, Counter, Unit::Count, &["job"], "rows that batches in heap order filled without a new entry in any index (HOT)"),
    metric(BATCHES, Counter, Unit::Count, &["job"], "batches committed"),
    metric(BATCH_DURATION, Histogram, Unit::Seconds, &["job"], "time of a committed batch from begin to commit"),
    metric(BATCH_ROWS, Histogram, Unit::Count, &["job"], "rows filled by a committed batch"),
    metric(BATCH_SIZE_TARGET, Gauge, Unit::Count, &["job"], "rows the next batch will ask for"),
    metric(PACE, Gauge, Unit::Count, &["job"], "share of time that each lane works, 0 to 1"),
    metric(PROGRESS, Gauge, Unit::Count, &["job"], "done part of the current phase, 0 to 1"),
    metric(ETA, Gauge, Unit::Seconds, &["job"], "estimated end of the current phase as Unix time; 0 while unknown"),
    metric(RETRIES, Counter, Unit::Count, &["job", "sqlstate"], "batches and statements that failed and were tried again"),
    metric(ERRORS, Counter, Unit::Count, &["job", "sqlstate"], "failures by SQLSTATE; none where the server did not speak"),
    metric(THROTTLED, Gauge, Unit::Count, &["job", "signal"], "1 while this signal holds the job back"),
    metric(THROTTLED_SECONDS, Counter, Unit::Seconds, &["job", "signal"], "time the job was held back by this signal"),
    metric(SIGNAL_VALUE, Gauge, Unit::Count, &["job", "signal"], "last value of a throttle signal, in the signal's unit"),
    metric(SIGNAL_THRESHOLD, Gauge, Unit::Count, &["job", "signal"], "value at which the signal holds the job back"),
    metric(PROBE_ERRORS, Counter, Unit::Count, &["job"], "throttle signals that could not be read; batches wait meanwhile"),
    metric(REPLICA_LAG, Gauge, Unit::Seconds, &["job"], "replay lag of the worst replica; absent while not measured"),
    metric(REPLICA_LAG_BYTES, Gauge, Unit::Bytes, &["job"], "WAL that the worst replica has not replayed; absent while not measured"),
    metric(SLOT_RETAINED, Gauge, Unit::Bytes, &["job"], "WAL that the worst replication slot keeps; absent while not measured"),
    metric(SLOT_SAFE, Gauge, Unit::Bytes, &["job"], "WAL that may be written until the first replication slot is lost; absent where no slot has a limit"),
    metric(WAL_RATE, Gauge, Unit::Bytes, &["job"], "WAL that the server writes per second; absent without throttle.wal_mb_per_second"),
    metric(DEAD_ROWS, Gauge, Unit::Count, &["job"], "dead part of the target's rows, 0 to 1; absent without throttle.dead_rows_percent"),
    metric(DDL_ATTEMPTS, Counter, Unit::Count, &["job", "outcome"], "attempts at statements that take strong locks: ok, lock_timeout or error"),
    metric(DDL_LOCK_HOLD, Histogram, Unit::Seconds, &["job", "mode"], "time such a statement held its lock, by lock mode"),
    metric(DDL_LOCK_WAIT, Histogram, Unit::Seconds, &["job"], "time such a statement waited for its lock, successful or not"),
    metric(INVALID_INDEXES, Gauge, Unit::Count, &["job"], "indexes of the job that a failed build left invalid"),
    metric(VERIFY_CHECKED, Counter, Unit::Count, &["job"], "rows compared with their source"),
    metric(VERIFY_FINDINGS, Gauge, Unit::Count, &["job", "kind"], "rows the last verification found wrong: nulls, drift or orphans; absent before the first"),
    metric(WATCH_FINDINGS, Gauge, Unit::Count, &["job", "kind"], "what the watch after the flip finds wrong now: sync_triggers, policy_drift, catalog, indexes, constraints, data or blind; absent before the flip"),
    metric(WATCH_LOOKS, Counter, Unit::Count, &["job"], "looks at everything by the watch after the flip"),
    metric(WATCH_CHECKED, Gauge, Unit::Seconds, &["job"], "last look of the watch as Unix time; absent before the flip"),
    metric(WATCH_ENDS, Gauge, Unit::Seconds, &["job"], "when the watch is over, if nothing is wrong then, as Unix time"),
    metric(POLICY_DRIFT, Gauge, Unit::Count, &["job"], "policies, functions and row level security flags that are not what the flip made; absent before the flip"),
    metric(LEASE_HELD, Gauge, Unit::Count, &["job"], "1 while this daemon holds the job's lease"),
    metric(LEASE_EPOCH, Gauge, Unit::Count, &["job"], "epoch of the lease this daemon holds or held last; grows with every takeover"),
    metric(LEASE_LOST, Counter, Unit::Count, &["job"], "times this daemon lost the lease to another one or to time"),
    metric(POOL_CONNECTIONS, Gauge, Unit::Count, &["state"], "pooled connections that are idle or in_use, and callers waiting for one"),
];

/// Values of the label `phase`.
pub const PHASES: [&str; 12] = [
    "preflight",
    "expand",
    "backfill",
    "verify",
    "constrain",
    "flip",
    "watch",
    "done",
    "paused",
    "failed",
    "rolling_back",
    "rolled_back",
];
/// Values of the label `status`.
pub const STATUSES: [&str; 7] = ["running", "paused", "held", "failed", "rolling_back", "rolled_back", "done"];
/// SQLSTATEs that are retried as a matter of course: deadlock, serialization, lock timeout, statement timeout.
const RETRIED: [&str; 4] = ["40P01", "40001", "55P03", "57014"];
/// Values of the label `outcome`.
pub const DDL_OUTCOMES: [&str; 3] = ["ok", "lock_timeout", "error"];
/// The label `sqlstate` where the server did not speak.
pub const NO_SQLSTATE: &str = "none";

/// Around the default target of 100 ms, up to the statement timeout.
const BATCH_SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0, 30.0];
/// From the floor of the sizer to beyond its ceiling.
const BATCH_ROW_COUNTS: [f64; 10] = [1.0, 10.0, 50.0, 100.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0, 50_000.0];
/// A flip holds for some milliseconds; 20 ms is what we promise, a second what users notice.
const LOCK_SECONDS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// Histograms need upkeep, or their samples pile up between scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the recorder for the process, describes all metrics, and keeps the recorder tidy from a tokio task, so it has
/// to be called in the runtime. Called again, it gives the same one.
///
/// # Errors
/// If a recorder that is not ours was installed before.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    static INSTALLED: Mutex<Option<PrometheusHandle>> = Mutex::new(None);
    let mut installed = INSTALLED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(handle) = installed.as_ref() {
        return Ok(handle.clone());
    }
    let handle = builder()?.install_recorder()?;
    *installed = Some(handle.clone());
    describe();
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });
    Ok(handle)
}

/// Without buckets the exporter would make summaries of the histograms.
fn builder() -> Result<PrometheusBuilder, BuildError> {
    let buckets: BTreeMap<&str, &[f64]> = [
        (BATCH_DURATION, &BATCH_SECONDS[..]),
        (BATCH_ROWS, &BATCH_ROW_COUNTS[..]),
        (DDL_LOCK_HOLD, &LOCK_SECONDS[..]),
        (DDL_LOCK_WAIT, &LOCK_SECONDS[..]),
    ]
    .into();
    buckets.into_iter().try_fold(PrometheusBuilder::new(), |builder, (name, values)| {
        builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), values)
    })
}

/// Registers the help texts.
pub fn describe() {
    for m in METRICS {
        match m.kind {
            Counter => describe_counter!(m.name, m.unit, m.help),
            Gauge => describe_gauge!(m.name, m.unit, m.help),
            Histogram => describe_histogram!(m.name, m.unit, m.help),
        }
    }
}

/// Creates the job's series at zero, so that rates and alerts have something to begin from.
pub fn job_started(job: &str) {
    for name in [ROWS_SCANNED, ROWS_UPDATED, ROWS_SKIPPED, ROWS_HOT, BATCHES, PROBE_ERRORS, VERIFY_CHECKED, LEASE_LOST]
    {
        counter!(name, "job" => job.to_owned()).absolute(0);
    }
    for sqlstate in RETRIED {
        counter!(RETRIES, "job" => job.to_owned(), "sqlstate" => sqlstate).absolute(0);
    }
    counter!(ERRORS, "job" => job.to_owned(), "sqlstate" => NO_SQLSTATE).absolute(0);
    for outcome in DDL_OUTCOMES {
        counter!(DDL_ATTEMPTS, "job" => job.to_owned(), "outcome" => outcome).absolute(0);
    }
    for name in [ROWS_QUARANTINED, BATCH_SIZE_TARGET, PROGRESS, ETA, INVALID_INDEXES, LEASE_HELD, LEASE_EPOCH] {
        gauge!(name, "job" => job.to_owned()).set(0.0);
    }
    for phase in PHASES {
        gauge!(JOB_PHASE, "job" => job.to_owned(), "phase" => phase).set(0.0);
    }
    for status in STATUSES {
        gauge!(JOB_STATUS, "job" => job.to_owned(), "status" => status).set(0.0);
    }
}

/// This daemon, of this name, has the job.
pub fn job_info(job: &str, daemon: &str) {
    gauge!(JOB_INFO, "job" => job.to_owned(), "daemon" => daemon.to_owned()).set(1.0);
}

/// The job has `status`, one of [`STATUSES`], and no other.
pub fn status(job: &str, status: &str) {
    for each in STATUSES {
        gauge!(JOB_STATUS, "job" => job.to_owned(), "status" => each).set(f64::from(u8::from(each == status)));
    }
}

/// `rows` more were filled without index work.
pub fn hot(job: &str, rows: u64) {
    counter!(ROWS_HOT, "job" => job.to_owned()).increment(rows);
}

/// `n` more signals could not be read.
pub fn probe_errors(job: &str, n: u64) {
    counter!(PROBE_ERRORS, "job" => job.to_owned()).increment(n);
}

/// A signal that is a metric of its own as well, in base units.
pub fn database(job: &str, signal: &str, value: f64) {
    const MB: f64 = 1024.0 * 1024.0;
    let (name, factor) = match signal {
        "replica_lag" => (REPLICA_LAG, 1.0),
        "replica_lag_bytes" => (REPLICA_LAG_BYTES, MB),
        "slot_retained" => (SLOT_RETAINED, MB),
        "slot_safe" => (SLOT_SAFE, MB),
        "wal_rate" => (WAL_RATE, MB),
        "dead_rows" => (DEAD_ROWS, 0.01),
        _ => return,
    };
    if value.is_finite() {
        gauge!(name, "job" => job.to_owned()).set(value * factor);
    }
}

/// A failed build left an invalid index, or none is there any more.
pub fn invalid_indexes(job: &str, n: u64) {
    gauge!(INVALID_INDEXES, "job" => job.to_owned()).set(float(n));
}

/// The job is in `phase`, one of [`PHASES`], and in no other.
pub fn phase(job: &str, phase: &str) {
    for each in PHASES {
        gauge!(JOB_PHASE, "job" => job.to_owned(), "phase" => each).set(f64::from(u8::from(each == phase)));
    }
}

/// A batch was committed.
pub fn batch(job: &str, duration: Duration, scanned: u64, updated: u64, skipped: u64) {
    counter!(BATCHES, "job" => job.to_owned()).increment(1);
    counter!(ROWS_SCANNED, "job" => job.to_owned()).increment(scanned);
    counter!(ROWS_UPDATED, "job" => job.to_owned()).increment(updated);
    counter!(ROWS_SKIPPED, "job" => job.to_owned()).increment(skipped);
    histogram!(BATCH_DURATION, "job" => job.to_owned()).record(duration.as_secs_f64());
    histogram!(BATCH_ROWS, "job" => job.to_owned()).record(float(updated));
}

/// The sizer decided on `rows` for the next batch.
pub fn batch_size_target(job: &str, rows: u64) {
    gauge!(BATCH_SIZE_TARGET, "job" => job.to_owned()).set(float(rows));
}

/// Share of time that each lane works.
pub fn pace(job: &str, pace: f64) {
    gauge!(PACE, "job" => job.to_owned()).set(pace);
}

/// Rows in quarantine now.
pub fn quarantined(job: &str, rows: u64) {
    gauge!(ROWS_QUARANTINED, "job" => job.to_owned()).set(float(rows));
}

/// `ratio` (0 to 1) of the current phase is done; `eta` is its estimated end as Unix time in seconds, if known.
pub fn progress(job: &str, ratio: f64, eta: Option<f64>) {
    gauge!(PROGRESS, "job" => job.to_owned()).set(ratio.clamp(0.0, 1.0));
    gauge!(ETA, "job" => job.to_owned()).set(eta.unwrap_or(0.0));
}

/// Something failed with `sqlstate` and is tried again.
pub fn retry(job: &str, sqlstate: Option<&str>) {
    counter!(RETRIES, "job" => job.to_owned(), "sqlstate" => sqlstate.unwrap_or(NO_SQLSTATE).to_owned()).increment(1);
}

/// Something failed with `sqlstate` and is not tried again.
pub fn error(job: &str, sqlstate: Option<&str>) {
    counter!(ERRORS, "job" => job.to_owned(), "sqlstate" => sqlstate.unwrap_or(NO_SQLSTATE).to_owned()).increment(1);
}

/// What a throttle signal shows, in the signal's own unit, and whether it holds the job back.
pub fn signal(job: &str, signal: &str, value: f64, threshold: f64, throttles: bool) {
    gauge!(SIGNAL_VALUE, "job" => job.to_owned(), "signal" => signal.to_owned()).set(value);
    gauge!(SIGNAL_THRESHOLD, "job" => job.to_owned(), "signal" => signal.to_owned()).set(threshold);
    gauge!(THROTTLED, "job" => job.to_owned(), "signal" => signal.to_owned()).set(f64::from(u8::from(throttles)));
    throttled_for(job, signal, Duration::ZERO);
}

/// Fractions of a second that did not make a whole one yet, by job and signal: counters hold integers.
static THROTTLED_REST: Mutex<BTreeMap<(String, String), Duration>> = Mutex::new(BTreeMap::new());

/// The job was held back by `signal` for `time`.
pub fn throttled_for(job: &str, signal: &str, time: Duration) {
    let mut rests = THROTTLED_REST.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let rest = rests.entry((job.to_owned(), signal.to_owned())).or_default();
    *rest += time;
    let whole = rest.as_secs();
    *rest -= Duration::from_secs(whole);
    counter!(THROTTLED_SECONDS, "job" => job.to_owned(), "signal" => signal.to_owned()).increment(whole);
}

/// No signal holds the job back: nothing is measured now.
pub fn not_throttled(job: &str) {
    let rests = THROTTLED_REST.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (_, signal) in rests.keys().filter(|(j, _)| j == job) {
        gauge!(THROTTLED, "job" => job.to_owned(), "signal" => signal.clone()).set(0.0);
    }
}

/// An attempt at DDL ended: `outcome` is one of [`DDL_OUTCOMES`]; `wait` is the time until the lock was there or given
/// up.
pub fn ddl_attempt(job: &str, outcome: &str, wait: Duration) {
    counter!(DDL_ATTEMPTS, "job" => job.to_owned(), "outcome" => outcome.to_owned()).increment(1);
    histogram!(DDL_LOCK_WAIT, "job" => job.to_owned()).record(wait.as_secs_f64());
}

/// DDL held a lock of `mode` (as in `pg_locks`, for example AccessExclusiveLock) for `time`.
pub fn ddl_lock_hold(job: &str, mode: &str, time: Duration) {
    histogram!(DDL_LOCK_HOLD, "job" => job.to_owned(), "mode" => mode.to_owned()).record(time.as_secs_f64());
}

/// `rows` more were compared with their source.
pub fn verify_checked(job: &str, rows: u64) {
    counter!(VERIFY_CHECKED, "job" => job.to_owned()).increment(rows);
}

/// What a complete verification found, by kind.
pub fn verify_findings<'a>(job: &str, findings: impl IntoIterator<Item = (&'a str, u64)>) {
    for (kind, rows) in findings {
        gauge!(VERIFY_FINDINGS, "job" => job.to_owned(), "kind" => kind.to_owned()).set(float(rows));
    }
}

/// The watch looked at everything: when, when it will be over (Unix time in seconds), and what is wrong, by kind.
pub fn watched(job: &str, at: f64, ends: f64, findings: &[(&'static str, u64)], policy_drift: u64) {
    counter!(WATCH_LOOKS, "job" => job.to_owned()).increment(1);
    gauge!(WATCH_CHECKED, "job" => job.to_owned()).set(at);
    gauge!(WATCH_ENDS, "job" => job.to_owned()).set(ends);
    gauge!(POLICY_DRIFT, "job" => job.to_owned()).set(float(policy_drift));
    for (kind, n) in findings {
        gauge!(WATCH_FINDINGS, "job" => job.to_owned(), "kind" => *kind).set(float(*n));
    }
}

/// Whether this daemon holds the lease, and under which epoch.
pub fn lease(job: &str, held: bool, epoch: i64) {
    gauge!(LEASE_HELD, "job" => job.to_owned()).set(f64::from(u8::from(held)));
    gauge!(LEASE_EPOCH, "job" => job.to_owned()).set(float(u64::try_from(epoch).unwrap_or_default()));
}

/// The lease was lost.
pub fn lease_lost(job: &str) {
    counter!(LEASE_LOST, "job" => job.to_owned()).increment(1);
    gauge!(LEASE_HELD, "job" => job.to_owned()).set(0.0);
}

/// Pooled connections now.
pub fn pool(idle: usize, in_use: usize, waiting: usize) {
    for (state, n) in [("idle", idle), ("in_use", in_use), ("waiting", waiting)] {
        gauge!(POOL_CONNECTIONS, "state" => state).set(float(n as u64));
    }
}

/// Prometheus knows only floats; rows beyond 2^53 would lose their last digits.
fn float(n: u64) -> f64 {
    n as f64
}

/// docs/metrics.md.
pub fn reference_markdown() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         Served at `/metrics` in the format of Prometheus. Units are base units; a job's series exist from its start, at\n\
         zero. Histograms have `_bucket`, `_sum` and `_count`. This table is made from `METRICS` in src/metrics.rs.\n\n\
         | Metric | Type | Labels | Meaning |\n|---|---|---|---|\n",
    );
    for m in METRICS {
        let kind = format!("{:?}", m.kind).to_lowercase();
        out.push_str(&format!("| `{}` | {kind} | {} | {} |\n", m.name, m.labels.join(", "), m.help));
    }
    out.push_str(&format!("\nPhases: {}.\n\nStatuses: {}.\n", PHASES.join(", "), STATUSES.join(", ")));
    out.push_str(
        "\nOn Linux also the usual metrics of a process: `process_cpu_seconds_total`, `process_resident_memory_bytes`,\n\
         `process_virtual_memory_bytes`, `process_open_fds`, `process_threads`, `process_start_time_seconds`.\n",
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() {
        describe();
        gauge!(BUILD_INFO, "version" => "0").set(1.0);
        job_started("j");
        job_info("j", "here");
        phase("j", "backfill");
        status("j", "running");
        hot("j", 800);
        probe_errors("j", 1);
        for signal in ["replica_lag", "replica_lag_bytes", "slot_retained", "slot_safe", "wal_rate", "dead_rows"] {
            database("j", signal, 3.0);
        }
        invalid_indexes("j", 1);
        batch("j", Duration::from_millis(90), 1000, 900, 100);
        batch_size_target("j", 1100);
        pace("j", 0.1);
        quarantined("j", 2);
        progress("j", 0.25, Some(1e9));
        retry("j", Some("40P01"));
        error("j", None);
        signal("j", "replica_lag", 3.0, 2.0, true);
        throttled_for("j", "replica_lag", Duration::from_millis(700));
        throttled_for("j", "replica_lag", Duration::from_millis(700));
        ddl_attempt("j", "ok", Duration::from_millis(3));
        ddl_lock_hold("j", "AccessExclusiveLock", Duration::from_millis(4));
        verify_checked("j", 10);
        watched("j", 1.0, 2.0, &[("data", 1)], 1);
        verify_findings("j", [("drift", 1)]);
        lease("j", true, 7);
        lease_lost("k");
        pool(1, 2, 0);
    }

    fn rendered(record: impl FnOnce()) -> String {
        let recorder = builder().unwrap().build_recorder();
        metrics::with_local_recorder(&recorder, record);
        recorder.handle().render()
    }

    #[test]
    fn every_name_is_in_the_table_once_described_and_recorded() {
        let source = include_str!("metrics.rs");
        let text = rendered(everything);
        let consts = source.lines().filter(|l| l.starts_with("pub const") && l.contains("= \"backfilld_"));
        let names: Vec<&str> = consts.map(|l| l.split('"').nth(1).unwrap()).collect();
        assert_eq!(names, METRICS.map(|m| m.name));
        for m in METRICS {
            let kind = format!("{:?}", m.kind).to_lowercase();
            assert!(text.contains(&format!("# TYPE {} {kind}\n", m.name)), "{} {kind}\n{text}", m.name);
            assert!(text.contains(&format!("# HELP {} {}", m.name, m.help)), "{}", m.name);
            let mut series = text.lines().filter(|l| l.starts_with(&format!("{}{{", m.name)));
            let bucket = format!("{}_bucket{{", m.name);
            let line = series.next().or_else(|| text.lines().find(|l| l.starts_with(&bucket))).unwrap();
            for label in m.labels {
                assert!(line.contains(&format!("{label}=\"")), "{line}");
            }
            let total = m.name.ends_with("_total");
            assert_eq!(total, m.kind == Counter, "{}", m.name);
        }
    }

    #[test]
    fn counters_start_at_zero_and_exactly_one_phase_is_current() {
        let text = rendered(|| job_started("j"));
        assert!(text.contains("backfilld_rows_updated_total{job=\"j\"} 0\n"), "{text}");
        assert!(text.contains("backfilld_retries_total{job=\"j\",sqlstate=\"40P01\"} 0\n"), "{text}");
        let text = rendered(everything);
        assert_eq!(text.lines().filter(|l| l.starts_with(JOB_PHASE) && l.ends_with(" 1")).count(), 1, "{text}");
        assert!(text.contains("backfilld_throttled_seconds_total{job=\"j\",signal=\"replica_lag\"} 1\n"), "{text}");
        assert!(text.lines().filter(|l| l.contains("job=\"j\"")).count() < 300);
    }

    #[test]
    fn the_documentation_is_up_to_date() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
        if std::env::var_os("BACKFILLD_TEST_BLESS").is_some() {
            std::fs::write(&path, reference_markdown()).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == reference_markdown(), "docs/metrics.md is stale; run the test with BACKFILLD_TEST_BLESS=1");
    }
}
