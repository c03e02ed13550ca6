//! `backfilld report`: what a job did and what came of it, as one file.

use std::path::{Path, PathBuf};

use tokio_postgres::Client;

use super::Global;
use crate::error::{Error, Result};
use crate::ledger;
use crate::report::{self, Report};

/// Options.
#[derive(clap::Args)]
pub struct ReportArgs {
    /// The job, by name or directory
    job: String,
    /// html: one file without anything from elsewhere; md; json
    #[arg(long, value_enum, default_value_t = Format::Html)]
    format: Format,
    /// Write to a file instead of stdout
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// How it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One HTML file.
    Html,
    /// Markdown.
    Md,
    /// JSON.
    Json,
}

pub async fn run(global: &Global, args: ReportArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "report").await?;
    let text = write(&session.client, &super::job_name(&args.job)?, args.format).await?;
    match &args.output {
        None => super::print(text.trim_end()),
        Some(path) => save(path, &text),
    }
}

/// The report of a job as text.
pub(super) async fn write(client: &Client, job: &str, format: Format) -> Result<String> {
    ledger::migrate::require(client).await?;
    let row = ledger::job::get(client, job).await?;
    let spec = super::started_spec(&row)?;
    let report = Report::read(client, &row, &spec).await?;
    Ok(match format {
        Format::Html => report::html(&report),
        Format::Md => report::markdown(&report),
        Format::Json => serde_json::to_string_pretty(&report.json())
            .map_err(|e| Error::internal("cannot write JSON").with_source(e))?,
    })
}

/// Writes a file whole or not at all.
pub(super) fn save(path: &Path, text: &str) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".part");
    let temporary = PathBuf::from(temporary);
    std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path)).map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        Error::input(format!("cannot write {}", path.display()))
            .with_source(e)
            .with_hint("name a file in a directory that exists and may be written to")
    })
}
