//! `backfilld plan`: every statement, in order, with its lock and its reason. Touches nothing.

use std::path::PathBuf;

use super::Global;
use crate::error::Result;
use crate::job;
use crate::plan::steps::{self, Step};
use crate::plan::{Facts, contract};

/// Options.
#[derive(clap::Args)]
pub struct PlanArgs {
    /// The job's directory
    job: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(global: &Global, args: PlanArgs) -> Result<()> {
    let spec = job::load(&args.job)?;
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "plan").await?;
    let facts = Facts::read(&session.client, &spec, settings.database.dedicated_login).await?;
    let lock_timeout = humantime::format_duration(settings.ddl.lock_timeout).to_string();
    let all = steps::all(&spec, &facts, &lock_timeout);
    if args.json {
        return super::print_json(&all);
    }
    let mut out = format!("-- plan of job {}: {}\n", spec.name, spec.description);
    for step in &all {
        out.push_str(&text(step));
    }
    out.push_str(&contract::comment(&facts.shape));
    super::print(out.trim_end())
}

/// A step as SQL that can be pasted into psql; what is to be known of it are comments.
fn text(step: &Step) -> String {
    let mut out = format!(
        "\n-- {}: {}\n--   lock:   {}\n--   blocks: {}\n--   bound:  {}\n--   why:    {}\n",
        step.phase, step.what, step.lock, step.blocks, step.bound, step.why
    );
    let several = step.transaction && step.sql.len() > 1;
    if several {
        out.push_str("begin;\n");
    }
    for sql in &step.sql {
        out.push_str(sql);
        out.push_str(";\n");
    }
    if several {
        out.push_str("commit;\n");
    }
    out
}
