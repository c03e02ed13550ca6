//! `backfilld verify`: the proof of the data, by itself. Without `--repair` it only reads, so it also works on a standby.

use std::io::Write as _;

use super::Global;
use crate::backfill::aside;
use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::ledger;
use crate::plan::Facts;
use crate::settings::Settings;
use crate::verify::proof::SETTINGS;
use crate::verify::repair;
use crate::verify::{Proof, QUARANTINED};

/// Options.
#[derive(clap::Args)]
pub struct VerifyArgs {
    /// The job, by name or directory
    job: String,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Derive wrong rows anew from their source, in small batches, then verify again. Refused while a daemon works on the job
    #[arg(long)]
    repair: bool,
    /// Show what the daemon found when it compared who may see and do what, before and after the flip
    #[arg(long, conflicts_with = "repair")]
    access: bool,
}

pub async fn run(global: &Global, args: VerifyArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "verify").await?;
    ledger::migrate::require(&session.client).await?;
    let row = ledger::job::get(&session.client, &super::job_name(&args.job)?).await?;
    if args.access {
        return access(&session.client, &row, args.json).await;
    }
    let spec = super::started_spec(&row)?;
    let facts = Facts::read(&session.client, &spec, settings.database.dedicated_login).await?;
    if let Some(i) = facts.existing.iter().position(Option::is_none) {
        return Err(Error::refused(format!("column {} does not exist yet", spec.columns[i].name))
            .with_hint("the job has not expanded; backfilld status says where it is"));
    }
    session.client.batch_execute(SETTINGS).await?;
    let accepted = ledger::checkpoint::accepted(&session.client, &row.name).await?;
    let proof = Proof::new(&spec, &facts);
    let proof = if accepted > 0 { proof.accepting() } else { proof };
    if args.repair {
        repair(&settings, &spec, &proof, &facts).await?;
    }
    let mut verdict = proof.run(&session.client, async |_| Ok(())).await?;
    verdict.count(QUARANTINED, ledger::checkpoint::quarantined(&session.client, &row.name).await?);
    if args.json {
        super::print_json(&verdict)?;
    } else {
        let width = verdict.counts.keys().map(String::len).max().unwrap_or(0).clamp(20, 56);
        let mut out = format!("{:<width$} {:>12}\n", "rows checked", verdict.rows_checked);
        let bytes: i64 = session
            .client
            .query_one("select pg_relation_size($1::oid)", &[&facts.target.oid])
            .await
            .map_err(Error::from)?
            .get(0);
        let seconds = (verdict.duration_ms.max(1) as f64) / 1000.0;
        let rate = format!("{:.0}", verdict.rows_checked as f64 / seconds);
        out.push_str(&format!("{:<width$} {rate:>12}  {:.0} MB/s\n", "rows per second", bytes as f64 / seconds / 1e6));
        for (kind, n) in &verdict.counts {
            out.push_str(&format!("{kind:<width$} {n:>12}  {}\n", if *n == 0 { "PASS" } else { "FAIL" }));
            for key in verdict.samples.get(kind).into_iter().flatten().take(5) {
                out.push_str(&format!("  key {}\n", key.join(", ")));
            }
        }
        super::print(out.trim_end())?;
    }
    if verdict.passed {
        return Ok(());
    }
    Err(Error::failed(format!("the verification found {}", verdict.summary())).with_hint(format!(
        "correct the rows named above at their source, the sync triggers bring the column along; drift and unfilled rows: \
         backfilld verify {0} --repair; quarantined rows: backfilld quarantine list {0}",
        row.name
    )))
}

/// On a session of its own: it runs as batches do, and its settings are not those of a proof.
async fn repair(settings: &Settings, spec: &JobSpec, proof: &Proof, facts: &Facts) -> Result<()> {
    let mut session = super::connect(settings, "repair").await?;
    session.client.batch_execute(aside::session_settings(spec)).await?;
    let done = repair::run(&mut session.client, proof, &facts.shape).await?;
    let refused: Vec<String> = done.refused.iter().map(|(state, n)| format!("{state} {n}")).collect();
    let refused = if refused.is_empty() { String::new() } else { format!(", refused: {}", refused.join(", ")) };
    let _ = writeln!(std::io::stderr(), "repaired {} rows, left {}{refused}", done.repaired, done.left);
    Ok(())
}

/// The newest comparison of access, with every difference and its cause.
async fn access(client: &tokio_postgres::Client, row: &ledger::job::JobRow, json: bool) -> Result<()> {
    let runs = ledger::access::latest(client, &row.name, None).await?;
    let Some(run) = runs else {
        let hint = if super::started_spec(row)?.access.is_some() {
            "the daemon compares after the verification of the data; backfilld status says where the job is"
        } else {
            "the job has no [access]; docs/job-reference.md explains it"
        };
        return Err(Error::refused(format!("access was not compared for job {}", row.name)).with_hint(hint));
    };
    if json {
        let outcomes = ledger::access::outcomes(client, run.id, false, i64::MAX).await?;
        super::print_json(&serde_json::json!({ "run": run, "outcomes": outcomes }))?;
    } else {
        let outcomes = ledger::access::outcomes(client, run.id, true, 1000).await?;
        super::print(&super::access::text(&run, &outcomes))?;
    }
    if run.passed == Some(true) {
        return Ok(());
    }
    let n = run.differences;
    Err(match run.passed {
        None => Error::refused("the comparison of access is not finished")
            .with_hint("backfilld status says what it waits for"),
        _ => Error::failed(format!("access would change in {n} ways"))
            .with_hint("correct the data or the policies; what is meant goes into [[access.accept]] with a reason"),
    })
}
