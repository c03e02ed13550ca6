//! `tune`, `throttle`, `grants`: what an operator changes in a running job, from any machine, through the database.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio_postgres::Transaction;

use super::Global;
use super::control::{Said, change};
use crate::error::{Error, Result};
use crate::job::tune::{self, KEYS, Key, THROTTLED, Tunables};
use crate::ledger::job::JobRow;
use crate::ledger::{self, job as jobs, tuning};

/// For longer there is `pause`, which does not end by itself.
const LONGEST_THROTTLE: Duration = Duration::from_secs(7 * 86_400);

/// Options of `tune`.
#[derive(clap::Args)]
pub struct TuneArgs {
    /// The job, by name or directory
    job: String,
    /// What to change, such as duty=0.25; the section may be left out
    #[arg(value_name = "KEY=VALUE", value_parser = pair)]
    values: Vec<(Key, String)>,
    /// When the change is over, by the database's clock: a time such as 2h, or a moment such as 2026-11-25T18:00Z
    #[arg(long, value_name = "TIME", requires = "values")]
    until: Option<String>,
    /// Go back to the job file's value; `all` for every key
    #[arg(long, value_name = "KEY")]
    reset: Vec<String>,
    /// Show every key with its bounds and values, as does leaving out what to change
    #[arg(long, conflicts_with_all = ["values", "reset"])]
    list: bool,
    /// The list as JSON
    #[arg(long, conflicts_with_all = ["values", "reset"])]
    json: bool,
}

/// Options of `throttle`.
#[derive(clap::Args)]
pub struct ThrottleArgs {
    /// The job, by name or directory
    job: String,
    /// For how long, by the database's clock, such as 10m; at most 7 days
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration, required_unless_present = "off")]
    time: Option<Duration>,
    /// Why, for those who look at its status
    #[arg(long, default_value = "stopped for a while by an operator")]
    reason: String,
    /// Let batches go on before the time is over
    #[arg(long, conflicts_with = "time")]
    off: bool,
}

/// Options of `grants`.
#[derive(clap::Args)]
pub struct GrantsArgs {
    /// The role that shall watch and control jobs
    role: String,
}

fn pair(text: &str) -> Result<(Key, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((tune::key(name.trim())?, value.trim().to_owned()))
}

pub async fn tune(global: &Global, args: TuneArgs) -> Result<()> {
    if args.values.is_empty() && args.reset.is_empty() {
        return list(global, &args).await;
    }
    let mut resets = Vec::new();
    for name in &args.reset {
        match name.as_str() {
            "all" => resets.extend(KEYS.iter().copied()),
            name => resets.push(tune::key(name).map_err(Error::input)?),
        }
    }
    change(global, &args.job, "tune", async |tx, row| {
        may_be_tuned(row)?;
        let before = stored(tx, row).await?;
        for key in &resets {
            tuning::reset(tx, &row.name, key.name).await?;
        }
        let until = match &args.until {
            None => None,
            Some(text) => Some(match humantime::parse_duration(text) {
                Ok(time) if time.is_zero() => return Err(Error::input("--until: expected more than no time")),
                Ok(time) => tuning::end_of(tx, time).await?,
                Err(_) => tuning::end(tx, text).await?,
            }),
        };
        let base = stored(tx, row).await?;
        let values: Vec<(Key, &str)> = args.values.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let after = base.with_all(&values).map_err(|e| {
            Error::input(e).with_hint(format!("backfilld tune {} shows each key with its bounds", row.name))
        })?;
        for (key, value) in &values {
            tuning::put(tx, &row.name, key.name, value, until.as_deref()).await?;
        }
        let changes = before.differences(&after);
        let end = until.as_deref().map_or(String::new(), |u| format!(" until {u}"));
        let text = match changes.is_empty() {
            true => format!("job {}: nothing is different{end}", row.name),
            false => format!("job {}:{end}\n  {}", row.name, changes.join("\n  ")),
        };
        let note = if after.batching.lanes > before.batching.lanes {
            "\n  more lanes than the sweep has begin with the next sweep"
        } else {
            ""
        };
        Ok(Said { text: text + note, detail: json!({ "changes": changes, "until": until }) })
    })
    .await
}

pub async fn throttle(global: &Global, args: ThrottleArgs) -> Result<()> {
    let reason = args.reason.trim();
    if reason.is_empty() || reason.chars().count() > 200 || reason.chars().any(char::is_control) {
        return Err(Error::input("--reason: expected 1 to 200 characters on one line"));
    }
    if args.time.is_some_and(|t| t < Duration::from_secs(1) || t > LONGEST_THROTTLE) {
        return Err(Error::input("--for: expected 1s to 7days").with_hint("backfilld pause stops a job until resume"));
    }
    change(global, &args.job, "throttle", async |tx, row| {
        may_be_tuned(row)?;
        let Some(time) = args.time else {
            let was = tuning::reset(tx, &row.name, THROTTLED).await?;
            let text = if was { "batches go on" } else { "batches were not stopped" };
            return Ok(Said { text: format!("job {}: {text}", row.name), detail: json!({ "off": true }) });
        };
        let until = tuning::end_of(tx, time).await?;
        tuning::put(tx, &row.name, THROTTLED, reason, Some(&until)).await?;
        Ok(Said {
            text: format!(
                "job {} makes no batch until {until}; let it go on with: backfilld throttle {} --off",
                row.name, row.name
            ),
            detail: json!({ "until": until, "reason": reason }),
        })
    })
    .await
}

fn may_be_tuned(row: &JobRow) -> Result<()> {
    match row.status.is_final() {
        true => Err(Error::refused(format!("job {} is {}; there is nothing left to tune", row.name, row.status))),
        false => Ok(()),
    }
}

async fn stored(tx: &Transaction<'_>, row: &JobRow) -> Result<Tunables> {
    let spec = super::started_spec(row)?;
    Ok(Tunables::tuned(&spec, &tuning::load(tx, &row.name).await?.values).0)
}

/// A key, as `--json` prints it.
#[derive(Serialize)]
struct Shown {
    key: &'static str,
    bounds: &'static str,
    now: String,
    job: String,
    default: String,
    tuned: Option<tuning::Setting>,
}

async fn list(global: &Global, args: &TuneArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "control").await?;
    ledger::migrate::require(&session.client).await?;
    let row = jobs::get(&session.client, &super::job_name(&args.job)?).await?;
    let spec = super::started_spec(&row)?;
    let stored = tuning::list(&session.client, &row.name).await?;
    let pairs: Vec<(String, String)> = stored.iter().map(|s| (s.key.clone(), s.value.clone())).collect();
    let (now, problems) = Tunables::tuned(&spec, &pairs);
    let job = Tunables::from(&spec);
    let default = Tunables { batching: Default::default(), throttle: Default::default(), throttled: None };
    let all: Vec<Shown> = KEYS
        .iter()
        .map(|key| Shown {
            key: key.name,
            bounds: key.bounds,
            now: now.show(*key),
            job: job.show(*key),
            default: default.show(*key),
            tuned: stored.iter().find(|s| s.key == key.name).cloned(),
        })
        .collect();
    if args.json {
        return super::print_json(&all);
    }
    let mut out = format!("{:<27} {:<10} {:<10} {}", "key", "now", "default", "expected");
    for k in &all {
        let text = |v: &str| if v.is_empty() { "-".to_owned() } else { v.to_owned() };
        out.push_str(&format!("\n{:<27} {:<10} {:<10} {}", k.key, text(&k.now), text(&k.default), k.bounds));
        if let Some(t) = &k.tuned {
            let until = t.until.as_deref().map_or(String::new(), |u| format!(", until {u}"));
            out.push_str(&format!(
                "\n  tuned by {} at {}{until}; the job file says {}",
                t.set_by,
                t.set_at,
                text(&k.job)
            ));
        }
    }
    if let Some(t) = stored.iter().find(|s| s.key == THROTTLED) {
        let until = t.until.as_deref().unwrap_or("it is reset");
        out.push_str(&format!("\nno batches until {until}, says {}: {}", t.set_by, t.value));
    }
    for problem in problems {
        out.push_str(&format!("\nleft out: {problem}"));
    }
    super::print(&out)
}

/// Prints the statements that make a role an operator; connects nowhere.
pub fn grants(args: &GrantsArgs) -> Result<()> {
    if args.role.is_empty() || args.role.len() > 63 || args.role.chars().any(char::is_control) {
        return Err(Error::input("the role's name: expected 1 to 63 bytes"));
    }
    super::print(&operator_grants(&args.role))
}

/// Rights for `status`, `pause`, `resume`, `cutover`, `tune` and `throttle`, and nothing else.
///
/// Rights on columns: the trigger `guard` on `backfilld.job` holds whoever has no more to what the commands do.
fn operator_grants(role: &str) -> String {
    let role = format!("\"{}\"", role.replace('"', "\"\""));
    format!(
        "-- as the login of the daemon, which owns the tables
grant usage on schema backfilld to {role};
grant select on all tables in schema backfilld to {role};
alter default privileges in schema backfilld grant select on tables to {role};
grant update (status, reason, hint, phase, phase_since, released, updated_at, tuning_version) on backfilld.job to {role};
grant insert (job, key, value, until), update (value, until), delete on backfilld.tuning to {role};
grant insert (job, kind, detail) on backfilld.event to {role};
-- resume gives rows in quarantine another try, in another sweep
grant update (sweep, cursor, upper, finished, filenode) on backfilld.checkpoint to {role};
grant delete on backfilld.quarantine, backfilld.verification to {role};"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_grants_and_the_keys() {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/control.md")).expect("docs/control.md");
        assert!(
            text.contains(&operator_grants("oncall").replace("\"oncall\"", "oncall")),
            "{}",
            operator_grants("oncall")
        );
        for key in KEYS {
            assert!(text.contains(&format!("| `{}` | {} |", key.name, key.bounds)), "{key:?}");
        }
    }

    #[test]
    fn a_roles_name_cannot_end_the_statement() {
        assert!(operator_grants("a\"; drop").contains("to \"a\"\"; drop\";"));
    }
}
