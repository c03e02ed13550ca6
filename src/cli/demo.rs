//! `backfilld demo`: the reference migration on a throwaway server, under live traffic.

use std::path::{Path, PathBuf};

use secrecy::SecretString;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::Global;
use super::report::Format;
use super::run::{Live, serve_http};
use crate::daemon::Daemon;
use crate::demo::cluster::{Cluster, server_version};
use crate::demo::summary::{DriveReport, PhaseDuration};
use crate::demo::{self, DemoWorld, Options};
use crate::error::{Error, Result};
use crate::http::Pulse;
use crate::job::JobSpec;
use crate::job::load::parse;
use crate::ledger::checkpoint;
use crate::plan::Facts;
use crate::settings::Settings;
use crate::terminal;
use crate::verify::Proof;

/// Options.
#[derive(clap::Args)]
pub struct DemoArgs {
    /// Messages to generate
    #[arg(long, default_value_t = Options::default().rows)]
    rows: u64,
    /// The summary as JSON
    #[arg(long)]
    json: bool,
    /// Leave server and daemon running afterwards, until interrupted
    #[arg(long)]
    keep: bool,
    /// Directory of the server's programs (initdb, postgres)
    #[arg(long, env = "BACKFILLD_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// Port of the server on 127.0.0.1; a free one by default
    #[arg(long)]
    port: Option<u16>,
    /// Requests of the application per second
    #[arg(long, default_value_t = Options::default().requests_per_second)]
    requests: u32,
    /// Where to write the report of the job; by default backfilld-demo-report.html in the directory for temporary files
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// The shipped job, as it stands in deploy/jobs: the demo runs what an operator would run.
fn shipped_job() -> Result<JobSpec> {
    parse(
        include_str!("../../deploy/jobs/messages_auth_user_id/job.toml"),
        "deploy/jobs/messages_auth_user_id/job.toml",
        |_| Ok(include_str!("../../deploy/jobs/messages_auth_user_id/add_message.sql").to_owned()),
    )
}

pub async fn run(global: &Global, args: DemoArgs) -> Result<()> {
    let base = global.settings(true)?;
    let spec = shipped_job()?;
    let options = Options {
        rows: args.rows,
        pg_bin: args.pg_bin,
        port: args.port,
        keep: args.keep,
        requests_per_second: args.requests,
        ..Options::default()
    };
    let path = args.report.unwrap_or_else(|| std::env::temp_dir().join("backfilld-demo-report.html"));
    let (summary, cluster) = demo::run(&options, async |world| drive(&base, &spec, world, &path).await).await?;
    let text = if args.json { summary.to_json()? } else { summary.to_string() };
    super::print(text.trim_end())?;
    if args.keep {
        let daemon = Daemon::new(settings(&base, &cluster)?, spec, false)?;
        let stop = CancellationToken::new();
        let server = status_page(&daemon, &Pulse::new(), &stop).await;
        let serving = demo::serve_until_ctrl_c(cluster);
        tokio::pin!(serving);
        tokio::select! {
            served = &mut serving => served?,
            // It ends when somebody forgets its job; the server stays, and HTTP's port is free for the next daemon.
            ended = daemon.run() => {
                stop.cancel();
                let why = ended.err().map(|e| format!(": {e}")).unwrap_or_default();
                terminal::print(&format!("demo: the daemon has ended{why}; the server is still running"));
                serving.await?;
            }
        }
        stop.cancel();
        if let Some(server) = server {
            let _ = server.await;
        }
    }
    summary.verdict()
}

/// The operator's settings with the demo's database in place of theirs.
fn settings(base: &Settings, cluster: &Cluster) -> Result<Settings> {
    let mut settings = base.clone();
    settings.database = crate::settings::DatabaseSettings {
        url: Some(SecretString::from(cluster.url(demo::sample::DAEMON, demo::DATABASE))),
        dedicated_login: demo::sample::login_is_dedicated(&server_version(cluster.bin())?),
        ..Default::default()
    };
    Ok(settings)
}

/// The demo is the same without: another daemon may have the port.
async fn status_page(daemon: &Daemon, pulse: &Pulse, stop: &CancellationToken) -> Option<JoinHandle<()>> {
    serve_http(daemon, pulse, stop.clone()).await.unwrap_or_else(|e| {
        terminal::print(&format!("demo: no status page: {}", e.line()));
        None
    })
}

async fn drive(base: &Settings, spec: &JobSpec, world: &DemoWorld, path: &Path) -> Result<DriveReport> {
    let settings = settings(base, world.cluster())?;
    let daemon = Daemon::new(settings.clone(), spec.clone(), true)?;
    let (pulse, stop) = (Pulse::new(), CancellationToken::new());
    let server = status_page(&daemon, &pulse, &stop).await;
    if server.is_some() {
        terminal::print(&format!("demo: watch it at http://{}/", base.http.listen));
    }
    let view = Live::start(daemon.progress.clone());
    let result = daemon.run().await;
    stop.cancel();
    if let Some(server) = server {
        let _ = server.await;
    }
    if let Some(view) = view {
        view.end().await;
    }
    result?;
    let session = super::connect(&settings, "demo").await?;
    let mut done = report(&session.client, spec).await?;
    super::report::save(path, &super::report::write(&session.client, &spec.name, Format::Html).await?)?;
    done.report = Some(path.to_owned());
    Ok(done)
}

/// What the ledger says about the run, and the proof once more, now that everything is in place.
async fn report(client: &Client, spec: &JobSpec) -> Result<DriveReport> {
    let phases: Vec<PhaseDuration> = client
        .query(
            "select detail ->> 'phase', (detail ->> 'duration_ms')::float8 / 1000 from backfilld.event
             where job = $1 and kind = 'phase' order by id",
            &[&spec.name],
        )
        .await?
        .iter()
        .map(|r| PhaseDuration { name: r.get(0), seconds: r.get(1) })
        .collect();
    let longest: f64 = client
        .query_one(
            "select coalesce(max((detail ->> 'hold_us')::float8), 0) / 1000 from backfilld.event
             where job = $1 and kind = 'ddl' and detail ->> 'lock' = 'AccessExclusiveLock'",
            &[&spec.name],
        )
        .await?
        .get(0);
    let done = checkpoint::total(client, &spec.name).await?.ok_or_else(|| Error::internal("no checkpoint"))?;
    let facts = Facts::read(client, spec, true).await?;
    let verdict = Proof::new(spec, &facts).run(client, async |_| Ok(())).await?;
    let seconds: f64 = phases.iter().filter(|p| p.name == "backfill").map(|p| p.seconds).sum();
    let count = |kind: &str| verdict.counts.get(kind).copied().unwrap_or(0).unsigned_abs();
    Ok(DriveReport {
        rows_updated: done.rows_updated.unsigned_abs(),
        rows_per_second: if seconds > 0.0 { done.rows_scanned as f64 / seconds } else { 0.0 },
        longest_access_exclusive_ms: longest,
        nulls: count("nulls") + count("unfilled"),
        drift: count("drift"),
        report: None,
        phases,
    })
}
