//! `backfilld check`: preflight, read-only.

use std::path::PathBuf;

use super::Global;
use crate::error::{Error, Kind, Result};
use crate::job;
use crate::plan::Facts;
use crate::preflight::{self, PreflightOptions};

/// Options.
#[derive(clap::Args)]
pub struct CheckArgs {
    /// The job's directory
    job: PathBuf,
    /// Read every row, rather than a sample of large tables
    #[arg(long)]
    deep: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Print the GRANT statements that would give this login what it lacks, and nothing else
    #[arg(long, conflicts_with = "json")]
    grants: bool,
    /// Print the validation queries as a psql script, and nothing else
    #[arg(long, conflicts_with_all = ["json", "grants"])]
    sql: bool,
}

pub async fn run(global: &Global, args: CheckArgs) -> Result<()> {
    let spec = job::load(&args.job)?;
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "check").await?;
    if args.sql {
        let facts = Facts::read(&session.client, &spec, false).await?;
        return super::print(preflight::validation_queries(&spec, &facts.shape).trim_end());
    }
    let other = super::connect(&settings, "check").await?;
    let options = PreflightOptions {
        dedicated_login: settings.database.dedicated_login,
        deep: args.deep,
        ddl_lock_timeout: settings.ddl.lock_timeout,
        other: Some(&other.client),
        ..Default::default()
    };
    let report = preflight::run(&session.client, &spec, &options).await?;
    if args.grants {
        let statements: Vec<String> = report.grants.iter().map(|grant| format!("{grant};")).collect();
        return super::print(&statements.join("\n"));
    }
    if args.json {
        super::print_json(&report.json())?;
    } else {
        super::print(report.table(super::width()).trim_end())?;
    }
    if report.passed() {
        return Ok(());
    }
    Err(Error::new(Kind::Check, "check found something that stops a run").with_hint("each FAIL above says what to do"))
}
