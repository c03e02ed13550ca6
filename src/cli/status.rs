//! `backfilld status`: how far jobs are, from any machine, read from the ledger.

use std::time::Duration;

use serde::Serialize;
use tokio_postgres::Client;

use super::Global;
use crate::backfill::heap_cursor::HeapCursor;
use crate::backfill::walk::keyset_ratio;
use crate::error::Result;
use crate::eta;
use crate::ledger::checkpoint::Checkpoint;
use crate::ledger::{self, checkpoint, event, heap, job as jobs};
use crate::phase::{Phase, Status};
use crate::plan::Facts;
use crate::settings::Settings;
use crate::verify::{SYNC, standing};

/// Options.
#[derive(clap::Args)]
pub struct StatusArgs {
    /// The job, by name or directory; all jobs if left out
    job: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Live, until Ctrl-C, which ends it with 0; lines where stdout is no terminal
    #[arg(long, conflicts_with_all = ["json", "history"])]
    watch: bool,
    /// The last N events
    #[arg(long, value_name = "N", default_value_t = 0)]
    history: i64,
}

/// A job's status, as `--json` prints it.
#[derive(Debug, Serialize)]
struct JobStatus {
    job: String,
    phase: String,
    status: String,
    reason: String,
    hint: String,
    rows_scanned: i64,
    rows_updated: i64,
    rows_estimate: i64,
    batches: i64,
    sweep: i32,
    sweep_finished: bool,
    rows_per_second: Option<f64>,
    /// Done part of the sweep, 0 to 1; none outside of the backfill.
    progress_ratio: Option<f64>,
    /// Seconds to the end of the sweep, at the speed of the whole sweep, waits included; none while that means nothing.
    eta_seconds: Option<f64>,
    lease: Option<LeaseStatus>,
    verdict: Option<serde_json::Value>,
    /// Why the verdict does not hold any more; empty: it holds, did not pass, or there is none.
    verdict_expired: Vec<String>,
    /// The newest comparison of access.
    access: Option<ledger::access::Run>,
    /// Its first differences.
    access_differences: Vec<ledger::access::Outcome>,
    /// The watch after the flip; none before it, and for a job without one.
    watch: Option<ledger::watch::Shown>,
    quarantined: i64,
    /// Rows that an operator accepted without a value.
    accepted: i64,
    quarantine: Vec<serde_json::Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    history: Vec<event::Event>,
}

#[derive(Debug, Serialize)]
struct LeaseStatus {
    instance: String,
    epoch: i64,
    held: bool,
    expires_in_ms: i64,
}

pub async fn run(global: &Global, args: StatusArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let only = args.job.as_deref().map(super::job_name).transpose()?;
    if args.watch {
        return super::watch::run(&settings, only.as_deref()).await;
    }
    let session = super::connect(&settings, "status").await?;
    ledger::migrate::require(&session.client).await?;
    let mut all = Vec::new();
    for name in names(&session.client, only.as_deref()).await? {
        all.push(read(&session.client, &settings, &name, args.history).await?);
    }
    if args.json {
        return super::print_json(&all);
    }
    super::print(&all.iter().map(text).collect::<Vec<_>>().join("\n\n"))
}

/// The one job that is asked for, or all.
pub(super) async fn names(client: &Client, only: Option<&str>) -> Result<Vec<String>> {
    Ok(match only {
        Some(name) => vec![jobs::get(client, name).await?.name],
        None => jobs::all(client).await?.into_iter().map(|j| j.name).collect(),
    })
}

async fn read(client: &Client, settings: &Settings, name: &str, history: i64) -> Result<JobStatus> {
    let job = jobs::get(client, name).await?;
    let c = checkpoint::total(client, name).await?;
    let (progress_ratio, eta_seconds) = outlook(client, &job, c.as_ref()).await?;
    let rate = client
        .query_opt(
            "select sum(rows_scanned) / nullif(extract(epoch from max(updated_at) - min(started_at)), 0)::float8
             from backfilld.checkpoint where job = $1 having count(*) > 0",
            &[&name],
        )
        .await?
        .and_then(|r| r.get(0));
    let lease = client
        .query_opt(
            "select instance, epoch, expires_at > clock_timestamp(),
                    (extract(epoch from expires_at - clock_timestamp()) * 1000)::int8
             from backfilld.lease where job = $1",
            &[&name],
        )
        .await?
        .map(|r| LeaseStatus { instance: r.get(0), epoch: r.get(1), held: r.get(2), expires_in_ms: r.get(3) });
    let verdict: Option<serde_json::Value> = client
        .query_opt(
            "select jsonb_build_object('passed', passed, 'at', at, 'rows_checked', rows_checked, 'counts', counts,
                                       'samples', samples)
             from backfilld.verdict where job = $1 order by id desc limit 1",
            &[&name],
        )
        .await?
        .map(|r| r.get(0));
    let passed = verdict.as_ref().is_some_and(|v| v["passed"] == true);
    let verdict_expired = match job.status {
        Status::RollingBack | Status::RolledBack => Vec::new(),
        _ if !passed => Vec::new(),
        _ => expired(client, settings, &job).await,
    };
    let quarantine = client
        .query(
            "select jsonb_build_object('key', key, 'sqlstate', sqlstate, 'message', message)
             from backfilld.quarantine where job = $1 and accepted_at is null order by found_at limit 20",
            &[&name],
        )
        .await?;
    let access = ledger::access::latest(client, name, None).await?;
    let access_differences = match &access {
        Some(run) if run.passed == Some(false) => ledger::access::outcomes(client, run.id, true, 5).await?,
        _ => Vec::new(),
    };
    let lasts = super::started_spec(&job).ok().and_then(|spec| spec.watch).map(|w| w.lasts.as_secs_f64());
    let watch = ledger::watch::shown(client, name, lasts).await?;
    Ok(JobStatus {
        job: job.name,
        phase: job.phase.to_string(),
        status: job.status.to_string(),
        reason: job.reason,
        hint: job.hint,
        rows_scanned: c.as_ref().map_or(0, |c| c.rows_scanned),
        rows_updated: c.as_ref().map_or(0, |c| c.rows_updated),
        rows_estimate: c.as_ref().map_or(0, |c| c.rows_estimate),
        batches: c.as_ref().map_or(0, |c| c.batches),
        sweep: c.as_ref().map_or(0, |c| c.sweep),
        sweep_finished: c.as_ref().is_some_and(|c| c.finished),
        rows_per_second: rate,
        progress_ratio,
        eta_seconds,
        lease,
        verdict,
        verdict_expired,
        access,
        access_differences,
        watch,
        quarantined: checkpoint::quarantined(client, name).await?,
        accepted: checkpoint::accepted(client, name).await?,
        quarantine: quarantine.iter().map(|r| r.get(0)).collect(),
        history: if history > 0 { event::latest(client, name, history).await? } else { Vec::new() },
    })
}

/// How far a sweep is, and how long the rest takes, from its checkpoints. Only the daemon knows its recent speed; from
/// elsewhere it is that of the sweep so far.
pub(super) async fn outlook(
    client: &Client,
    job: &jobs::JobRow,
    total: Option<&Checkpoint>,
) -> Result<(Option<f64>, Option<f64>)> {
    let Some(total) = total.filter(|_| job.phase == Phase::Backfill) else { return Ok((None, None)) };
    let places = heap::find(client, &job.name).await?;
    let ratio = match total.strategy.as_str() {
        _ if total.finished => 1.0,
        "heap" if !places.is_empty() => {
            places.iter().map(|(_, place)| HeapCursor::from(*place).ratio()).sum::<f64>() / places.len() as f64
        }
        _ => keyset_ratio(total),
    };
    let seconds: Option<f64> = client
        .query_one(
            "select extract(epoch from clock_timestamp() - coalesce(
                 (select max(at) from backfilld.event where job = $1 and kind in ('sweep', 'heap_sweep')),
                 (select min(started_at) from backfilld.checkpoint where job = $1)))::float8",
            &[&job.name],
        )
        .await?
        .get(0);
    let took = Duration::from_secs_f64(seconds.unwrap_or(0.0).max(0.0));
    let eta = eta::overall(ratio, took).filter(|_| job.status == Status::Running);
    Ok((Some(ratio), eta.map(|e| e.seconds)))
}

/// Why a passing verdict does not hold; what cannot be read is one more reason.
async fn expired(client: &Client, settings: &Settings, job: &jobs::JobRow) -> Vec<String> {
    let reasons = async {
        let spec = super::started_spec(job)?;
        let facts = Facts::read(client, &spec, settings.database.dedicated_login).await?;
        standing::reasons(client, &spec, &facts).await
    };
    reasons.await.unwrap_or_else(|e| vec![e.line()])
}

fn text(s: &JobStatus) -> String {
    let mut out = format!("job {}\n  phase    {}\n  status   {}", s.job, s.phase, s.status);
    let mut line = |name: &str, text: String| out.push_str(&format!("\n  {name:<8} {text}"));
    if !s.reason.is_empty() {
        line("reason", s.reason.clone());
    }
    if !s.hint.is_empty() {
        line("next", s.hint.clone());
    }
    if s.batches > 0 {
        let of = if s.rows_estimate > 0 { format!(" of about {}", s.rows_estimate) } else { String::new() };
        line("rows", format!("{} filled, {} walked{of}, sweep {}", s.rows_updated, s.rows_scanned, s.sweep));
        if let Some(ratio) = s.progress_ratio {
            let left = s.eta_seconds.map_or(String::new(), |e| format!(", about {} left", eta::words(e)));
            line("done", format!("{:.1}% of the sweep{left}", ratio * 100.0));
        }
        // Over the whole time since the first batch, with every pause in it.
        let rate = s.rows_per_second.map_or(String::new(), |r| format!(", {r:.0} rows/s overall"));
        line("batches", format!("{}{rate}", s.batches));
    }
    match &s.lease {
        Some(l) if l.held => line("daemon", format!("{} (epoch {})", l.instance, l.epoch)),
        _ if matches!(s.status.as_str(), "done" | "rolled_back") => {}
        _ => line("daemon", "none; start one with: backfilld run <job directory>".into()),
    }
    if let Some(v) = &s.verdict {
        let passed = v["passed"].as_bool().unwrap_or(false);
        let result = match (passed, s.verdict_expired.is_empty()) {
            (false, _) => "did not pass",
            (true, true) => "passed",
            (true, false) => "passed, but does not hold any more",
        };
        line("verdict", format!("{result}, made at {}", v["at"].as_str().unwrap_or("")));
        for reason in &s.verdict_expired {
            line("", reason.clone());
        }
        for (kind, n) in v["counts"].as_object().into_iter().flatten() {
            if n.as_i64() != Some(0) {
                let keys: Vec<String> = v["samples"][kind]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .take(3)
                    .map(|k| {
                        k.as_array().into_iter().flatten().filter_map(|p| p.as_str()).collect::<Vec<_>>().join(",")
                    })
                    .collect();
                line(
                    "",
                    if kind == SYNC {
                        format!("{kind}: {}", keys.join("; "))
                    } else {
                        format!("{kind}: {n}, such as key {}", keys.join(" | "))
                    },
                );
            }
        }
    }
    if let Some(run) = &s.access {
        line("access", super::access::line(run));
        for o in s.access_differences.iter().filter(|o| o.verdict == "different") {
            line("", o.line());
        }
    }
    if let Some(w) = &s.watch {
        let until = w.until.as_ref().map_or(String::new(), |u| format!(" until {u} UTC"));
        let looked =
            w.checked_at.as_ref().map_or_else(|| "no look yet".into(), |at| format!("looked {at}, {} times", w.passes));
        let over = if w.over && !w.findings.is_empty() { "; it goes on until nothing is wrong" } else { "" };
        line("watch", format!("since {}{until}; {looked}{over}", w.since));
        if w.passes > 0 && w.findings.is_empty() {
            line("", "nothing has changed since the flip".into());
        }
        for (kind, found) in &w.findings {
            found.iter().for_each(|what| line("", format!("{kind}: {what}")));
        }
    }
    if s.quarantined > 0 {
        line("aside", format!("{} rows in quarantine; backfilld quarantine list {}", s.quarantined, s.job));
        for row in s.quarantine.iter().take(3) {
            let key: Vec<&str> = row["key"].as_array().into_iter().flatten().filter_map(|k| k.as_str()).collect();
            let text = |name: &str| row[name].as_str().unwrap_or_default();
            line("", format!("key {}: {} {}", key.join(","), text("sqlstate"), text("message")));
        }
    }
    if s.accepted > 0 {
        line("accepted", format!("{} rows without a value", s.accepted));
    }
    for e in &s.history {
        line("event", format!("{} {} by {}: {}", e.at, e.kind, e.actor, e.detail));
    }
    out
}
