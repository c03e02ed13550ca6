//! `backfilld quarantine`: rows that could not be updated.

use serde_json::json;

use super::Global;
use crate::backfill::aside::{self, Outcome};
use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::ledger::checkpoint::{self, Aside};
use crate::ledger::{self, event, job as jobs};
use crate::pg::connect::Session;
use crate::plan::Facts;

/// What to do.
#[derive(clap::Subcommand)]
pub enum QuarantineCommand {
    /// List the rows, with SQLSTATE and reason; never their values
    List(ListArgs),
    /// Try just these rows again, after what refuses their update was mended
    Retry(RetryArgs),
    /// Let rows stay without a value. Not possible where the column shall be NOT NULL
    Accept(AcceptArgs),
}

/// Options of `list`.
#[derive(clap::Args)]
pub struct ListArgs {
    /// The job, by name or directory
    job: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Options of `retry`.
#[derive(clap::Args)]
pub struct RetryArgs {
    /// The job, by name or directory
    job: String,
    /// Only this row; may be given again. A key of several columns as JSON: '["a","b"]'. Default: all that are not accepted
    #[arg(long, value_name = "KEY")]
    key: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Options of `accept`.
#[derive(clap::Args)]
pub struct AcceptArgs {
    /// The job, by name or directory
    job: String,
    /// This row; may be given again. A key of several columns as JSON: '["a","b"]'
    #[arg(long, value_name = "KEY", required_unless_present = "all")]
    key: Vec<String>,
    /// All rows
    #[arg(long, conflicts_with = "key")]
    all: bool,
    /// Why, for those who come later
    #[arg(long)]
    why: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(global: &Global, command: QuarantineCommand) -> Result<()> {
    match command {
        QuarantineCommand::List(args) => list(global, args).await,
        QuarantineCommand::Retry(args) => retry(global, args).await,
        QuarantineCommand::Accept(args) => accept(global, args).await,
    }
}

async fn list(global: &Global, args: ListArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "status").await?;
    ledger::migrate::require(&session.client).await?;
    let name = jobs::get(&session.client, &super::job_name(&args.job)?).await?.name;
    let rows = checkpoint::aside(&session.client, &name).await?;
    if args.json {
        return super::print_json(&rows);
    }
    if rows.is_empty() {
        return super::print("no rows in quarantine");
    }
    let line = |r: &Aside| {
        let accepted = match (&r.accepted_by, &r.accepted_why) {
            (Some(by), Some(why)) => {
                format!("\n  accepted by {by} at {}: {why}", r.accepted_at.as_deref().unwrap_or(""))
            }
            _ => String::new(),
        };
        format!("key {}\n  {} {}, found at {}{accepted}", r.key.join(","), r.sqlstate, r.message, r.found_at)
    };
    super::print(&rows.iter().map(line).collect::<Vec<_>>().join("\n"))
}

async fn retry(global: &Global, args: RetryArgs) -> Result<()> {
    let (mut session, spec, facts) = open(global, &args.job).await?;
    let shape = &facts.shape;
    let chosen = choose(&session, &spec, &facts, &args.key, |r| r.accepted_at.is_none()).await?;
    session.client.batch_execute(aside::session_settings(&spec)).await?;
    let mut out = Vec::new();
    for key in &chosen {
        out.push(aside::retry(&mut session.client, shape, key).await?);
    }
    let released = out.iter().filter(|o| o.released).count();
    let detail = json!({ "rows": out.len(), "released": released });
    event::record(&session.client, &spec.name, "quarantine retry", detail).await?;
    show(&out, args.json)?;
    if released == out.len() {
        return Ok(());
    }
    Err(Error::failed(format!("{} of {} rows still cannot be updated", out.len() - released, out.len()))
        .with_hint("correct the rows, or what refuses their update; then again"))
}

async fn accept(global: &Global, args: AcceptArgs) -> Result<()> {
    if args.why.trim().is_empty() {
        return Err(Error::input("--why: say why the rows may stay without a value"));
    }
    let (mut session, spec, facts) = open(global, &args.job).await?;
    let chosen = choose(&session, &spec, &facts, &args.key, |r| r.accepted_at.is_none()).await?;
    let tx = session.client.transaction().await?;
    let mut out = Vec::new();
    for key in &chosen {
        out.push(aside::accept(&tx, &facts.shape, key, args.why.trim()).await?);
    }
    let detail =
        json!({ "rows": out.len(), "keys": chosen.iter().take(20).collect::<Vec<_>>(), "why": args.why.trim() });
    event::record(&tx, &spec.name, "quarantine accept", detail).await?;
    tx.commit().await?;
    show(&out, args.json)
}

async fn open(global: &Global, job: &str) -> Result<(Session, JobSpec, Facts)> {
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "control").await?;
    ledger::migrate::require(&session.client).await?;
    let row = jobs::get(&session.client, &super::job_name(job)?).await?;
    let spec = super::started_spec(&row)?;
    let facts = Facts::read(&session.client, &spec, settings.database.dedicated_login).await?;
    Ok((session, spec, facts))
}

/// The keys that the operator named, or all for which `wanted` holds.
async fn choose(
    session: &Session,
    spec: &JobSpec,
    facts: &Facts,
    given: &[String],
    wanted: impl Fn(&Aside) -> bool,
) -> Result<Vec<Vec<String>>> {
    let rows = checkpoint::aside(&session.client, &spec.name).await?;
    if given.is_empty() {
        return Ok(rows.into_iter().filter(wanted).map(|r| r.key).collect());
    }
    given
        .iter()
        .map(|text| {
            let key = parse_key(text, facts.shape.key.len())?;
            if rows.iter().any(|r| r.key == key) {
                return Ok(key);
            }
            Err(Error::input(format!("--key {text}: no such row in quarantine"))
                .with_hint(format!("backfilld quarantine list {}", spec.name)))
        })
        .collect()
}

/// One column: the text as it is. Several: a JSON list of texts.
fn parse_key(text: &str, columns: usize) -> Result<Vec<String>> {
    if columns == 1 {
        return Ok(vec![text.to_owned()]);
    }
    let key: Option<Vec<String>> = serde_json::from_str(text).ok();
    key.filter(|k| k.len() == columns).ok_or_else(|| {
        Error::input(format!("--key {text}: expected a JSON list of {columns} texts, such as '[\"a\",\"b\"]'"))
    })
}

fn show(out: &[Outcome], json: bool) -> Result<()> {
    if json {
        return super::print_json(&out);
    }
    if out.is_empty() {
        return super::print("no rows to look at");
    }
    super::print(&out.iter().map(|o| format!("key {}: {}", o.key.join(","), o.what)).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_several_columns_are_json() {
        assert_eq!(parse_key("a,b", 1).expect("one column"), ["a,b"]);
        assert_eq!(parse_key("[\"a\",\"b,c\"]", 2).expect("two columns"), ["a", "b,c"]);
        assert!(parse_key("a,b", 2).is_err());
        assert!(parse_key("[\"a\"]", 2).is_err());
    }
}
