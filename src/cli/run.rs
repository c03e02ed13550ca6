//! `backfilld run`: the daemon.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::Global;
use super::service_manager::ServiceManager;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::http::{self, HttpState, Pulse, Readiness};
use crate::phase::Status;
use crate::progress::Progress;
use crate::{eta, job, metrics};

/// Options.
#[derive(clap::Args)]
pub struct RunArgs {
    /// The job's directory
    job: PathBuf,
    /// Leave when the job is done, failed or held, with an exit code that says so
    #[arg(long)]
    once: bool,
}

pub async fn run(global: &Global, args: RunArgs) -> Result<()> {
    let spec = job::load(&args.job)?;
    let on_terminal = std::io::stderr().is_terminal();
    let settings = global.settings(on_terminal)?;
    let daemon = Daemon::new(settings, spec, args.once)?;
    let job = daemon.spec.name.clone();
    signals(job.clone(), daemon.shutdown.clone())?;
    let http_stop = CancellationToken::new();
    let pulse = Pulse::new();
    let server = serve_http(&daemon, &pulse, http_stop.clone()).await?;
    if let Some(manager) = ServiceManager::of_this_process() {
        tokio::spawn(manager.tell(pulse.clone(), daemon.progress.clone(), daemon.shutdown.clone()));
    }
    tokio::spawn(async move { pulse.keep().await });
    let bar = on_terminal.then(|| tokio::spawn(show(daemon.progress.clone())));
    let result = daemon.run().await;
    if let Some(bar) = bar {
        bar.abort();
    }
    http_stop.cancel();
    if let Some(server) = server {
        let _ = server.await;
    }
    match result {
        Ok(Status::Done) => {
            info!(job, "done");
            Ok(())
        }
        Ok(status) => Err(Error::failed(format!("the job is {status}"))),
        // A clean stop on request is what a service manager calls success.
        Err(e) if e.kind() == Kind::Interrupted => {
            info!(job, "stopped on request; the job goes on at its checkpoint with the next run");
            Ok(())
        }
        Err(e) => Err(e),
    }
}

/// Metrics and health, if the settings want them.
pub async fn serve_http(daemon: &Daemon, pulse: &Pulse, stop: CancellationToken) -> Result<Option<JoinHandle<()>>> {
    let handle =
        metrics::install().map_err(|e| Error::internal("cannot install the metrics recorder").with_source(e))?;
    let Some(address) = daemon.settings.http.address()? else { return Ok(None) };
    let pool = daemon.pool.clone();
    let state = HttpState::new(handle, daemon.progress.clone(), move || {
        let pool = pool.clone();
        async move { readiness(&pool).await }
    });
    let token = daemon.settings.http.read_token()?;
    let state = state.with_pulse(pulse.clone()).with_token(token.as_ref());
    Ok(Some(http::serve(address, state, stop).await?.1))
}

async fn readiness(pool: &crate::pg::pool::Pool) -> Readiness {
    let status = pool.status();
    metrics::pool(status.idle, status.in_use, status.waiting);
    let answer = async { pool.get().await?.execute("select", &[]).await.map_err(Error::from) };
    match tokio::time::timeout(Duration::from_secs(2), answer).await {
        Ok(Ok(_)) => Readiness::yes(),
        Ok(Err(e)) => Readiness::no(e.to_string()),
        Err(_) => Readiness::no("the database did not answer within 2 s"),
    }
}

/// SIGTERM and SIGINT finish the batch in flight; a second one ends the process at once, which the checkpoint survives.
fn signals(job: String, shutdown: CancellationToken) -> Result<()> {
    let cannot = |e| Error::internal("cannot listen for signals").with_source(e);
    let mut term = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut int = signal(SignalKind::interrupt()).map_err(cannot)?;
    tokio::spawn(async move {
        for times in 0.. {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            if times > 0 {
                std::process::exit(i32::from(Kind::Interrupted.exit_code()));
            }
            info!(job, "stopping after the batch in flight");
            shutdown.cancel();
        }
    });
    Ok(())
}

/// A bar has no use for more.
const BAR_STEPS: u64 = 10_000;

/// A calm line on the terminal, and one line above it per phase.
pub async fn show(progress: Progress) {
    let mut watch = progress.watch();
    let bar = ProgressBar::new(BAR_STEPS);
    let style = "{prefix:>10} {wide_bar} {percent:>3}% {msg}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    let mut phase = String::new();
    while watch.changed().await.is_ok() {
        let now = watch.borrow_and_update().clone();
        if now.phase != phase {
            phase = now.phase.clone();
            bar.println(format!("{phase} {}", now.note).trim_end());
        }
        bar.set_prefix(now.phase.clone());
        bar.set_position((now.ratio.clamp(0.0, 1.0) * BAR_STEPS as f64) as u64);
        let eta = now.eta.map_or(String::new(), |e| format!(", {} left", eta::words(e.seconds)));
        let note = if now.note.is_empty() { format!("{:.0} rows/s{eta}", now.rows_per_second) } else { now.note };
        bar.set_message(note);
    }
}
