//! `backfilld run`: the daemon.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::Global;
use super::service_manager::ServiceManager;
use super::view::{self, Look};
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::http::{self, HttpState, Pulse, Readiness, TlsFiles};
use crate::phase::Status;
use crate::progress::{self, Progress};
use crate::settings::LogFormat;
use crate::terminal::Hangup;
use crate::{job, metrics, terminal};

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
    // The view says what lines would say, so that only warnings are left to say.
    let live = terminal::stderr_draws() && global.load(false)?.log.format != LogFormat::Json;
    let settings = global.settings_for(live, Some(&spec.name))?;
    let daemon = Daemon::new(settings, spec, args.once)?;
    let job = daemon.spec.name.clone();
    signals(job.clone(), daemon.shutdown.clone())?;
    let http_stop = CancellationToken::new();
    let pulse = Pulse::new();
    let server = match http_state(&daemon, &pulse)? {
        Some((address, state)) => Some(http::serve_when_free(address, state, http_stop.clone()).await?),
        None => None,
    };
    if let Some(manager) = ServiceManager::of_this_process() {
        tokio::spawn(manager.tell(pulse.clone(), daemon.progress.clone(), daemon.shutdown.clone()));
    }
    tokio::spawn(async move { pulse.keep().await });
    let view = if live { Live::start(daemon.progress.clone()) } else { None };
    let result = daemon.run().await;
    if let Some(view) = view {
        view.end().await;
        terminal::print(&view::line(&daemon.progress.now()));
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

/// Status page, metrics and health, if the settings want them; an error if the port is in use.
pub async fn serve_http(daemon: &Daemon, pulse: &Pulse, stop: CancellationToken) -> Result<Option<JoinHandle<()>>> {
    let Some((address, state)) = http_state(daemon, pulse)? else { return Ok(None) };
    Ok(Some(http::serve(address, state, stop).await?.1))
}

fn http_state(daemon: &Daemon, pulse: &Pulse) -> Result<Option<(SocketAddr, HttpState)>> {
    let handle =
        metrics::install().map_err(|e| Error::internal("cannot install the metrics recorder").with_source(e))?;
    let Some(address) = daemon.settings.http.address()? else { return Ok(None) };
    let pool = daemon.pool.clone();
    let state = HttpState::new(handle, daemon.progress.clone(), move || {
        let pool = pool.clone();
        async move { readiness(&pool).await }
    });
    let token = daemon.settings.http.read_token()?;
    let http = &daemon.settings.http;
    let tls = http.tls_cert.clone().zip(http.tls_key.clone()).map(|(cert, key)| TlsFiles { cert, key });
    let state = state.with_pulse(pulse.clone()).with_token(token.as_ref()).with_tls(tls);
    Ok(Some((address, state)))
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

/// SIGTERM, SIGINT and the end of the terminal finish the batch in flight. A second SIGTERM or SIGINT ends the process at
/// once, which the checkpoint survives; a second SIGHUP does not, as shell and terminal may both send one.
fn signals(job: String, shutdown: CancellationToken) -> Result<()> {
    let cannot = |e| Error::internal("cannot listen for signals").with_source(e);
    let mut term = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut int = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut hangup = Hangup::listen().map_err(cannot)?;
    tokio::spawn(async move {
        let mut told = false;
        loop {
            let hung_up =
                tokio::select! { _ = term.recv() => false, _ = int.recv() => false, () = hangup.recv() => true };
            if told && !hung_up {
                std::process::exit(i32::from(Kind::Interrupted.exit_code()));
            }
            if !told {
                info!(job, "stopping after the batch in flight");
                shutdown.cancel();
            }
            told = true;
        }
    });
    Ok(())
}

/// Often enough to look alive, rarely enough to be read.
const REDRAW: Duration = Duration::from_millis(500);

/// A view at the bottom of the terminal while work goes on. What is said meanwhile stands above it.
pub struct Live(JoinHandle<()>);

impl Live {
    /// Where stderr is a terminal that can be drawn on.
    pub fn start(progress: Progress) -> Option<Self> {
        terminal::stderr_draws().then(|| Self(tokio::spawn(show(progress))))
    }

    /// Takes it away.
    pub async fn end(self) {
        self.0.abort();
        // It may be drawing.
        let _ = self.0.await;
        terminal::draw(Vec::new());
    }
}

async fn show(progress: Progress) {
    let mut phase = String::new();
    loop {
        let now = progress.now();
        if now.phase != phase {
            phase.clone_from(&now.phase);
            let line = format!("{} {phase} {}", view::clock(progress::now_ms()), now.note);
            terminal::print(line.trim_end());
        }
        let mut lines = view::lines(&now, progress::events().last(), None, &Look::now());
        // A view that is higher than the terminal cannot be drawn in place.
        lines.truncate(terminal::size().0.saturating_sub(1));
        terminal::draw(lines);
        tokio::time::sleep(REDRAW).await;
    }
}
