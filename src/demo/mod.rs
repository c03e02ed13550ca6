//! The demo: a throwaway server, a small Supabase-like application with live traffic, and what it noticed.
//!
//! [`run`] knows nothing of the daemon: the caller drives it between "before" and "after".

pub mod cluster;
pub mod measure;
pub mod sample;
pub mod summary;
pub mod traffic;

use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::terminal::{self, Hangup};
use cluster::{Cluster, ClusterOptions, SUPERUSER};
use summary::{DriveReport, Summary};
use traffic::{Phase, Traffic, TrafficOptions};

/// The application's database.
pub const DATABASE: &str = "app";

/// As a small production server is set up: durable, with the log levels that logical decoding needs.
const SETTINGS: [&str; 6] = [
    "shared_buffers = 256MB",
    "max_wal_size = 2GB",
    "wal_level = logical",
    "max_connections = 100",
    "log_lock_waits = on",
    "cluster_name = 'backfilld demo'",
];

/// What to show. `Default` is what `make demo` shows.
#[derive(Debug, Clone)]
pub struct Options {
    /// Messages to generate.
    pub rows: u64,
    /// The same seed makes the same data.
    pub seed: u32,
    /// The server's programs; default: see [`cluster::find_binaries`].
    pub pg_bin: Option<PathBuf>,
    /// The server's port on 127.0.0.1; default: a free one.
    pub port: Option<u16>,
    /// Leave the server running when the demo fails.
    pub keep: bool,
    /// Connections of the application.
    pub workers: u32,
    /// Requests of the application, all connections together.
    pub requests_per_second: u32,
    /// How long the application runs alone, before and after.
    pub observe: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rows: 200_000,
            seed: 1,
            pg_bin: None,
            port: None,
            keep: false,
            workers: 8,
            // Two cores serve several times as much; the demo shows an application at work, not one at its limit.
            requests_per_second: 100,
            // 500 requests: five of them lie beyond the 99th percentile.
            observe: Duration::from_secs(5),
        }
    }
}

/// The running application that the daemon is let loose on.
pub struct DemoWorld {
    cluster: Cluster,
    traffic: Traffic,
}

impl DemoWorld {
    /// A superuser's login in the application's database.
    pub fn admin_url(&self) -> String {
        self.cluster.url(SUPERUSER, DATABASE)
    }

    /// The server.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The traffic.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }
}

/// Starts a server with data and traffic, lets `drive` do the migration, and finds out what became of it. Progress goes
/// to stderr. The server runs until the returned [`Cluster`] is dropped; see [`serve_until_ctrl_c`].
///
/// A problem with the result is not an error here: see [`Summary::verdict`].
///
/// # Errors
/// No server, an error of `drive`, or an interrupt (SIGINT, SIGTERM, SIGHUP). What was started is stopped, unless `keep`.
pub async fn run(
    options: &Options,
    drive: impl AsyncFnOnce(&DemoWorld) -> Result<DriveReport>,
) -> Result<(Summary, Cluster)> {
    tokio::select! {
        result = run_uninterrupted(options, drive) => result,
        interrupted = interrupt() => {
            interrupted?;
            Err(Error::new(Kind::Interrupted, "the demo was interrupted, and its server is stopped"))
        }
    }
}

async fn run_uninterrupted(
    options: &Options,
    drive: impl AsyncFnOnce(&DemoWorld) -> Result<DriveReport>,
) -> Result<(Summary, Cluster)> {
    let cluster = start_cluster(options).await?;
    let server_version = cluster::server_version(cluster.bin())?;
    say(&format!("PostgreSQL {server_version} on 127.0.0.1:{}; {} messages", cluster.port(), options.rows));
    let admin = prepare(&cluster, options.rows, options.seed).await?;
    let app = connect(&cluster.url(sample::AUTHENTICATOR, DATABASE)).await?;
    let owners = measure::owners(&admin).await?;
    let list_before = measure::list_times(&app, &owners).await?;

    say(&format!("application alone for {:?}", options.observe));
    let mut world = DemoWorld { traffic: start_traffic(&cluster, options).await?, cluster };
    tokio::time::sleep(options.observe).await;
    world.traffic.set_phase(Phase::During);
    let drive = match drive(&world).await {
        Ok(report) => report,
        Err(error) => {
            if options.keep {
                world.cluster.keep();
                say(&how_to_connect(&world.cluster));
            }
            return Err(error);
        }
    };
    world.traffic.set_phase(Phase::After);
    say(&format!("application alone again for {:?}", options.observe));
    tokio::time::sleep(options.observe).await;
    let DemoWorld { cluster, traffic } = world;
    let traffic = traffic.stop().await?;

    say("checking every row");
    let oracle = traffic.check_oracle(&admin).await?;
    let found = measure::nulls_and_drift(&admin).await?;
    let list_after = measure::list_times(&app, &owners).await?;
    let (nulls, drift) = found.unzip();
    let rows = options.rows;
    Ok((Summary { server_version, rows, drive, traffic, oracle, nulls, drift, list_before, list_after }, cluster))
}

/// For `--keep`: says how to connect, and stops the server on SIGINT, SIGTERM or SIGHUP.
///
/// # Errors
/// No signal handler, or a server that does not stop.
pub async fn serve_until_ctrl_c(cluster: Cluster) -> Result<()> {
    say(&how_to_connect(&cluster));
    say("Ctrl-C stops and deletes it");
    interrupt().await?;
    cluster.stop()
}

/// Creates the application's database with everything in it, and returns a superuser's connection to it.
///
/// # Errors
/// What the server says.
pub async fn prepare(cluster: &Cluster, rows: u64, seed: u32) -> Result<Client> {
    let postgres = connect(&cluster.url(SUPERUSER, "postgres")).await?;
    postgres.batch_execute(&format!("create database {DATABASE}")).await?;
    let admin = connect(&cluster.url(SUPERUSER, DATABASE)).await?;
    sample::create_roles(&admin, cluster.password()).await?;
    sample::grant_on_database(&admin).await?;
    sample::create_schema(&admin).await?;
    sample::generate(&admin, rows, seed).await?;
    sample::take_baseline(&admin).await?;
    Ok(admin)
}

async fn start_cluster(options: &Options) -> Result<Cluster> {
    let options = ClusterOptions {
        bin: options.pg_bin.clone(),
        dir: None,
        port: options.port,
        settings: SETTINGS.map(str::to_owned).to_vec(),
    };
    tokio::task::spawn_blocking(move || Cluster::start(&options))
        .await
        .map_err(|e| Error::internal("the server's start panicked").with_source(e))?
}

async fn start_traffic(cluster: &Cluster, options: &Options) -> Result<Traffic> {
    let options = TrafficOptions {
        app_url: cluster.url(sample::AUTHENTICATOR, DATABASE),
        auth_url: cluster.url(sample::AUTH_ADMIN, DATABASE),
        workers: options.workers,
        requests_per_second: Some(options.requests_per_second),
        max_requests: None,
        seed: options.seed.into(),
    };
    Traffic::start(&options, &CancellationToken::new()).await
}

async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Ends with SIGINT, SIGTERM or SIGHUP.
async fn interrupt() -> Result<()> {
    let handler = |kind| signal(kind).map_err(|e| Error::internal("cannot handle signals").with_source(e));
    let (mut int, mut term) = (handler(SignalKind::interrupt())?, handler(SignalKind::terminate())?);
    let mut hangup = Hangup::listen().map_err(|e| Error::internal("cannot handle signals").with_source(e))?;
    tokio::select! {
        _ = int.recv() => {}
        _ = term.recv() => {}
        () = hangup.recv() => {}
    }
    Ok(())
}

fn how_to_connect(cluster: &Cluster) -> String {
    let url = |role| cluster.url(role, DATABASE);
    // The version was read before; where it cannot be, the login is taken for a shared one, which is always right.
    let version = cluster::server_version(cluster.bin()).unwrap_or_default();
    let dedicated = if sample::login_is_dedicated(&version) { " BACKFILLD_DATABASE__DEDICATED_LOGIN=true" } else { "" };
    format!(
        "the server is running; its log is {}\n  as superuser:  psql '{}'\n  as the API:    psql '{}'\n  \
         as the daemon: export BACKFILLD_DATABASE__URL='{}'{dedicated}",
        cluster.dir().join("server.log").display(),
        url(SUPERUSER),
        url(sample::AUTHENTICATOR),
        url(sample::DAEMON),
    )
}

/// stdout is for the summary.
fn say(line: &str) {
    terminal::print(&format!("demo: {line}"));
}
