//! Whether the job resolves, and whether it has been started already.

use super::check::Check;
use super::probe::{Probe, text};
use crate::error::{Error, Result};
use crate::ledger::migrate::MIGRATIONS;
use crate::phase::Status as JobStatus;
use crate::plan::Facts;

/// `job`: the catalog has what the job names.
pub fn job_resolves(facts: &Facts) -> Check {
    let sources: Vec<String> = facts.sources.iter().map(|t| t.name.to_string()).collect();
    let from = if sources.is_empty() { "no source table".to_owned() } else { sources.join(", ") };
    Check::pass("job", format!("{} from {from}", facts.target.name))
}

/// `job`: it does not.
pub fn job_does_not_resolve(error: &Error) -> Check {
    let mut check = Check::could_not("job", error);
    check.summary = match error.sqlstate() {
        Some(state) => format!("{error} (SQLSTATE {state})"),
        None => error.to_string(),
    };
    match error.sqlstate() {
        // The catalog is open to all, so what was refused is reading the tables.
        Some("42501") => {
            check.hint = Some(
                "give this login the right to read (privilege:rows, rls_visibility) and check again: then the other checks \
                 can be made"
                    .into(),
            );
        }
        _ => check.hint = error.hint().map(str::to_owned).or(check.hint),
    }
    check
}

/// `job_state`: what our ledger knows of the job. Fills [`Probe::started`].
pub async fn job_state(p: &mut Probe<'_>) -> Result<Check> {
    let name = "job_state";
    // By the catalog: to_regclass raises where the schema may not be used.
    let row = p
        .one(
            "select exists (select from pg_namespace where nspname = 'backfilld'),
                    exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
                            where n.nspname = 'backfilld' and c.relname = 'schema_version'),
                    exists (select from pg_namespace n where n.nspname = 'backfilld'
                              and not has_schema_privilege(n.oid, 'USAGE'))",
            &[],
        )
        .await?;
    let (schema, installed, hidden): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
    if !schema {
        return Ok(Check::pass(name, "not started yet; nothing of backfilld is in this database"));
    }
    if hidden {
        return Ok(Check::fail(name, "schema backfilld exists, and this login may not look into it")
            .hint("use the login that ran backfilld here before, or give this one the right")
            .grants(ledger_grants(p).await?));
    }
    if !installed {
        return Ok(Check::fail(name, "schema backfilld exists and is not ours: it has no table schema_version")
            .hint("backfilld keeps its state in a schema of that name; rename the other one"));
    }
    let version: i32 = p.one("select coalesce(max(version), 0) from backfilld.schema_version", &[]).await?.get(0);
    let newest = MIGRATIONS.last().map_or(0, |m| m.0);
    if version > newest {
        return Ok(Check::fail(name, format!("schema backfilld is at version {version}, this binary knows {newest}"))
            .hint("use the newer backfilld that upgraded it"));
    }
    read_job(p).await
}

async fn read_job(p: &mut Probe<'_>) -> Result<Check> {
    let name = "job_state";
    let others = p
        .texts(
            "select name from backfilld.job where name <> $1 and spec #>> '{target,table}' = $2
               and status not in ('done', 'rolled_back') order by 1",
            &[text(&p.spec.name), text(&p.spec.target.table.sql())],
        )
        .await?;
    if !others.is_empty() {
        return Ok(Check::warn(name, format!("other jobs work on this table: {}", others.join(", ")))
            .count(i64::try_from(others.len()).unwrap_or(i64::MAX))
            .hint("let them finish first: their batches and triggers, and this job's, wait for each other's rows"));
    }
    let Some(job) = crate::ledger::job::find(p.client, &p.spec.name).await? else {
        return Ok(Check::pass(name, "not started yet in this database"));
    };
    let place = format!("job {} is in phase {}, status {}", job.name, job.phase, job.status);
    let changed = job.spec_hash != p.spec.hash();
    let differences =
        serde_json::to_value(p.spec).map(|new| crate::job::load::diff(&job.spec, &new)).unwrap_or_default();
    let status = job.status;
    let reason = job.reason.clone();
    p.started = Some(job);
    if changed && status != JobStatus::RolledBack {
        return Ok(Check::fail(
            name,
            format!("{place}, and was started with another content: {}", differences.join("; ")),
        )
        .hint("put the job file back, or roll the job back, or give the changed job another name"));
    }
    Ok(match status {
        JobStatus::Done => Check::warn(name, format!("{place}: it has been done already"))
            .hint("run finds nothing to do; give a new job a new name"),
        JobStatus::Failed => Check::warn(name, format!("{place}: {reason}")).hint("backfilld resume tries again"),
        JobStatus::RolledBack => {
            Check::warn(name, place).hint("backfilld uninstall forgets it; then it can be run again")
        }
        _ => Check::pass(name, format!("{place}; run goes on from there")),
    })
}

async fn ledger_grants(p: &Probe<'_>) -> Result<Vec<String>> {
    let owner: String = p
        .one(
            "select quote_ident(r.rolname) from pg_namespace n join pg_roles r on r.oid = n.nspowner
             where n.nspname = 'backfilld'",
            &[],
        )
        .await?
        .get(0);
    Ok(vec![format!("grant {owner} to {}", super::privileges::quote(&p.server.login))])
}
