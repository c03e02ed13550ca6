//! The report of a job: what was done and what came of it, read from the ledger. Numbers, names and keys, never other values.

mod charts;
pub mod explain;
mod html;
mod markdown;
mod tables;

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use tokio_postgres::Client;

use crate::error::Result;
use crate::job::JobSpec;
use crate::ledger::access;
use crate::ledger::checkpoint;
use crate::ledger::job::JobRow;
use crate::ledger::plans::{self, QueryPlan};
use crate::ledger::sample::{self, Sample};

pub use html::html;
pub use markdown::markdown;

/// Rows of a list that are shown; the rest is counted.
const SHOWN: i64 = 100;

/// Everything that is told of a job.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the job.
    pub job: String,
    /// What it is for, in the operator's words.
    pub description: String,
    /// Target and columns.
    pub target: String,
    /// Columns that are filled.
    pub columns: Vec<String>,
    /// When this was written, UTC.
    pub written_at: String,
    /// `PostgreSQL 15.18, database app`.
    pub server: String,
    /// Where the job is.
    pub phase: String,
    /// Whether it moves.
    pub status: String,
    /// Why it stands.
    pub reason: String,
    /// What to do about it.
    pub hint: String,
    /// When it was entered, UTC.
    pub started_at: String,
    /// Seconds from then to its last event.
    pub seconds: f64,
    /// Rows looked at, over all sweeps.
    pub rows_scanned: i64,
    /// Rows filled by batches; the sync triggers filled the others.
    pub rows_updated: i64,
    /// Batches committed.
    pub batches: i64,
    /// Seconds of the backfill phase.
    pub backfill_seconds: f64,
    /// What happened, oldest first.
    pub phases: Vec<PhaseRun>,
    /// Statements that took locks.
    pub ddl: Vec<Ddl>,
    /// Everything else that happened.
    pub events: Vec<Happened>,
    /// Seconds that batches waited, by signal.
    pub throttled_seconds: BTreeMap<String, f64>,
    /// The proofs of the data, newest first.
    pub verdicts: Vec<Proof>,
    /// The comparisons of access, before and after the flip.
    pub access: Vec<Access>,
    /// The application's queries.
    pub plans: Vec<QueryPlan>,
    /// What is left behind in the database.
    pub remains: Vec<Remains>,
    /// Rows that could not be updated.
    pub quarantined: i64,
    /// Some of them.
    pub quarantine: Vec<Quarantined>,
    /// The way back, as commands.
    pub undo: Vec<Undo>,
    /// The course, oldest first.
    pub samples: Vec<Sample>,
}

/// A phase that was completed.
#[derive(Debug, Clone, Serialize)]
pub struct PhaseRun {
    /// Its name.
    pub phase: String,
    /// When it ended, UTC.
    pub ended_at: String,
    /// How long its last run took.
    pub seconds: f64,
    /// The phase that followed.
    pub next: String,
}

/// A statement that took a lock.
#[derive(Debug, Clone, Serialize)]
pub struct Ddl {
    /// When, UTC.
    pub at: String,
    /// What.
    pub what: String,
    /// Lock, as `pg_locks` calls it; empty for index builds, which block neither readers nor writers.
    pub lock: String,
    /// How long the lock was held, or the build took, in milliseconds.
    pub ms: f64,
}

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Happened {
    /// When, UTC.
    pub at: String,
    /// What.
    pub kind: String,
    /// Names and numbers.
    pub detail: String,
    /// The login that wrote it.
    pub actor: String,
}

/// A verdict.
#[derive(Debug, Clone, Serialize)]
pub struct Proof {
    /// When, UTC.
    pub at: String,
    /// Nothing was found.
    pub passed: bool,
    /// Rows looked at.
    pub rows_checked: i64,
    /// Findings by kind.
    pub counts: BTreeMap<String, i64>,
    /// Keys of some of them.
    pub samples: BTreeMap<String, Vec<Vec<String>>>,
    /// How long it took.
    pub seconds: f64,
}

/// A comparison of access.
#[derive(Debug, Clone, Serialize)]
pub struct Access {
    /// Its numbers.
    pub run: access::Run,
    /// What differed, accepted or not; those that are not first.
    pub differences: Vec<access::Outcome>,
}

/// Something of ours in the database.
#[derive(Debug, Clone, Serialize)]
pub struct Remains {
    /// `trigger`, `column` and so on.
    pub kind: String,
    /// Their names.
    pub names: Vec<String>,
}

/// A row that could not be updated.
#[derive(Debug, Clone, Serialize)]
pub struct Quarantined {
    /// Its key.
    pub key: Vec<String>,
    /// Why.
    pub sqlstate: String,
}

/// A command of the way back.
#[derive(Debug, Clone, Serialize)]
pub struct Undo {
    /// As typed.
    pub command: String,
    /// What it does.
    pub what: String,
}

impl Report {
    /// Reads it. Works on a standby.
    ///
    /// # Errors
    /// Database errors.
    pub async fn read(client: &Client, job: &JobRow, spec: &JobSpec) -> Result<Self> {
        let head = client
            .query_one(
                "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'),
                        format('PostgreSQL %s, database %s', split_part(current_setting('server_version'), ' ', 1),
                               current_database()),
                        to_char(j.created_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'),
                        extract(epoch from coalesce((select max(at) from backfilld.event where job = j.name), j.created_at)
                                - j.created_at)::float8
                 from backfilld.job j where j.name = $1",
                &[&job.name],
            )
            .await?;
        let done = checkpoint::total(client, &job.name).await?;
        let events = events(client, &job.name).await?;
        let samples = sample::all(client, &job.name).await?;
        let throttled = samples.last().map(|s| s.throttled_ms.clone()).unwrap_or_default();
        let mut accesses = Vec::new();
        for stage in ["before", "after"] {
            if let Some(run) = access::latest(client, &job.name, Some(stage)).await? {
                let differences = access::outcomes(client, run.id, true, SHOWN).await?;
                accesses.push(Access { run, differences });
            }
        }
        let (phases, ddl, others) = sort_events(events);
        Ok(Self {
            job: job.name.clone(),
            description: spec.description.clone(),
            target: spec.target.table.to_string(),
            columns: spec.columns.iter().map(|c| c.name.as_str().to_owned()).collect(),
            written_at: head.get(0),
            server: head.get(1),
            phase: job.phase.to_string(),
            status: job.status.to_string(),
            reason: job.reason.clone(),
            hint: job.hint.clone(),
            started_at: head.get(2),
            seconds: head.get(3),
            rows_scanned: done.as_ref().map_or(0, |d| d.rows_scanned),
            rows_updated: done.as_ref().map_or(0, |d| d.rows_updated),
            batches: done.as_ref().map_or(0, |d| d.batches),
            backfill_seconds: phases.iter().filter(|p| p.phase == "backfill").map(|p| p.seconds).sum(),
            phases,
            ddl,
            events: others,
            throttled_seconds: throttled.into_iter().map(|(k, ms)| (k, ms as f64 / 1000.0)).collect(),
            verdicts: verdicts(client, &job.name).await?,
            access: accesses,
            plans: plans::all(client, &job.name).await?,
            remains: remains(client, &job.name).await?,
            quarantined: checkpoint::quarantined(client, &job.name).await?,
            quarantine: quarantine(client, &job.name).await?,
            undo: undo(job),
            samples,
        })
    }

    /// For machines; docs/report.md describes it.
    pub fn json(&self) -> Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        // Whose rows were read is nobody's business; how many they are is what counts.
        for plan in value["plans"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            plan.remove("owner_key");
        }
        value
    }

    /// Rows looked at per second of the backfill.
    pub fn rows_per_second(&self) -> Option<f64> {
        (self.backfill_seconds > 0.0).then(|| self.rows_scanned as f64 / self.backfill_seconds)
    }

    /// Longest time that ACCESS EXCLUSIVE was held, in milliseconds.
    pub fn longest_exclusive_ms(&self) -> Option<f64> {
        self.ddl.iter().filter(|d| d.lock == "AccessExclusiveLock").map(|d| d.ms).max_by(f64::total_cmp)
    }
}

async fn events(client: &Client, job: &str) -> Result<Vec<(String, String, Value, String)>> {
    let rows = client
        .query(
            "select to_char(at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'), kind, detail, actor
             from backfilld.event where job = $1 order by id",
            &[&job],
        )
        .await?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3))).collect())
}

fn sort_events(events: Vec<(String, String, Value, String)>) -> (Vec<PhaseRun>, Vec<Ddl>, Vec<Happened>) {
    let (mut phases, mut ddl, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for (at, kind, detail, actor) in events {
        let text = |key: &str| detail[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| detail[key].as_f64();
        match kind.as_str() {
            "phase" => phases.push(PhaseRun {
                phase: text("phase"),
                ended_at: at,
                seconds: number("duration_ms").unwrap_or_default() / 1000.0,
                next: text("next"),
            }),
            "ddl" => ddl.push(Ddl {
                at,
                what: text("what"),
                lock: text("lock"),
                ms: number("hold_us").map(|us| us / 1000.0).or(number("duration_ms")).unwrap_or_default(),
            }),
            // Shown by itself.
            "verdict" => {}
            _ => others.push(Happened { at, kind, detail: tables::detail(&detail), actor }),
        }
    }
    (phases, ddl, others)
}

async fn verdicts(client: &Client, job: &str) -> Result<Vec<Proof>> {
    let rows = client
        .query(
            "select to_char(at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'), passed, rows_checked, counts, samples,
                    duration_ms
             from backfilld.verdict where job = $1 order by id desc limit $2",
            &[&job, &SHOWN],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|r| Proof {
            at: r.get(0),
            passed: r.get(1),
            rows_checked: r.get(2),
            counts: serde_json::from_value(r.get(3)).unwrap_or_default(),
            samples: serde_json::from_value(r.get(4)).unwrap_or_default(),
            seconds: r.get::<_, i64>(5) as f64 / 1000.0,
        })
        .collect())
}

async fn remains(client: &Client, job: &str) -> Result<Vec<Remains>> {
    let rows = client
        .query(
            "select kind, array_agg(ident order by ident) from backfilld.object where job = $1 and kind <> 'flip'
             group by kind order by kind",
            &[&job],
        )
        .await?;
    Ok(rows.iter().map(|r| Remains { kind: r.get(0), names: r.get(1) }).collect())
}

async fn quarantine(client: &Client, job: &str) -> Result<Vec<Quarantined>> {
    let rows = client
        .query(
            "select key, sqlstate from backfilld.quarantine where job = $1 order by found_at limit $2",
            &[&job, &SHOWN],
        )
        .await?;
    Ok(rows.iter().map(|r| Quarantined { key: r.get(0), sqlstate: r.get(1) }).collect())
}

fn undo(job: &JobRow) -> Vec<Undo> {
    use crate::phase::Status;
    let undo = |command: String, what: &str| Undo { command, what: what.to_owned() };
    let name = &job.name;
    if job.status == Status::RolledBack {
        return vec![undo(format!("backfilld uninstall {name}"), "forgets the job; everything is as it was")];
    }
    vec![
        undo(
            format!("backfilld rollback {name}"),
            "puts policies, functions, constraints, indexes and triggers back as they were; the column stays, with its data",
        ),
        undo(format!("backfilld rollback {name} --drop-column"), "the same, and drops the column"),
        undo(
            format!("backfilld uninstall {name}"),
            "after a rollback, or when the job is done: forgets the job and this history; what it made stays",
        ),
    ]
}
