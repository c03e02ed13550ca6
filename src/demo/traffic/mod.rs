//! Live application traffic over plain connections, as an application without any knowledge of backfills sends it.
//!
//! Requests are whole transactions. Everything that fails for the application counts as an application error, except
//! what is documented in [`TrafficReport`]. Acknowledged writes go to a ledger, see [`TrafficReport::check_oracle`].

mod ledger;
mod request;
mod stats;
mod worker;
mod world;

use std::collections::HashSet;
use std::str::FromStr as _;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;
use futures_util::{StreamExt as _, stream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

pub use ledger::Oracle;
pub use stats::{ErrorSample, Latency, Phase, TrafficReport};

use crate::error::{Error, Result};
use ledger::Ledger;
use stats::Stats;
use worker::{Job, Worker};
use world::World;

/// Users leave much less often than they write: one deletion in this many of a worker's turns.
const LEAVE_EVERY: u32 = 20;

/// A request is bounded by the login's `statement_timeout` of 8 s; a worker that takes longer than a few of those hangs.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// How much of which traffic.
#[derive(Debug, Clone)]
pub struct TrafficOptions {
    /// Login of the API server ([`crate::demo::sample::AUTHENTICATOR`]).
    pub app_url: String,
    /// Login of the sign-in service ([`crate::demo::sample::AUTH_ADMIN`]).
    pub auth_url: String,
    /// Connections that send requests, at least 1. From 4 on, two of them only write into one hot conversation; one
    /// more connection deletes users and one listens to broadcasts.
    pub workers: u32,
    /// All workers together. `None`: as fast as it goes.
    pub requests_per_second: Option<u32>,
    /// Ends by itself after this many. `None`: until stopped.
    pub max_requests: Option<u64>,
    /// What is asked in which order, for each worker.
    pub seed: u64,
}

/// What workers share.
struct Shared {
    world: World,
    stats: Mutex<Stats>,
    ledger: Mutex<Ledger>,
    phase: AtomicU8,
    sent: AtomicU64,
    /// Every worker's ticks are counted from here.
    epoch: Instant,
    max_requests: u64,
}

impl Shared {
    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Before,
            1 => Phase::During,
            _ => Phase::After,
        }
    }
}

/// Running traffic. Dropping it stops the workers without a report.
pub struct Traffic {
    shared: Arc<Shared>,
    workers: JoinSet<()>,
    listener: Listener,
    cancel: CancellationToken,
    _stop_on_drop: DropGuard,
}

impl Traffic {
    /// Connects and begins, in [`Phase::Before`]. Ends when `cancel` fires, too.
    ///
    /// # Errors
    /// No connection, or a database without the sample's data.
    pub async fn start(options: &TrafficOptions, cancel: &CancellationToken) -> Result<Self> {
        let context = |e: tokio_postgres::Error| Error::from(e).context("application traffic");
        let app = parse(&options.app_url)?;
        let auth = parse(&options.auth_url)?;
        let auth_client = connect(&auth).await.map_err(context)?;
        let app_client = connect(&app).await.map_err(context)?;
        let world = World::load(&auth_client, &app_client).await.map_err(context)?;
        if world.conversations.is_empty() || world.users.len() < 2 {
            return Err(Error::refused("application traffic: the database has no conversations to write to"));
        }
        let listener = Listener::start(&app).await.map_err(context)?;
        let shared = Arc::new(Shared {
            world,
            stats: Mutex::new(Stats::new()),
            ledger: Mutex::new(Ledger::default()),
            phase: AtomicU8::new(0),
            sent: AtomicU64::new(0),
            epoch: Instant::now(),
            max_requests: options.max_requests.unwrap_or(u64::MAX),
        });
        let cancel = cancel.child_token();
        let count = options.workers.max(1);
        let pace = options.requests_per_second.map(|rate| Duration::from_secs(count.into()) / rate.max(1));
        let mut ready = Vec::new();
        for n in 0..count {
            let job = if count >= 4 && n < 2 { Job::Hot } else { Job::Mixed { slice: n, of: count } };
            ready.push(Worker::connect(shared.clone(), app.clone(), job, options.seed + u64::from(n), pace));
        }
        let slow = pace.map(|pace| pace * LEAVE_EVERY);
        ready.push(Worker::connect(shared.clone(), auth, Job::Leave, options.seed, slow));
        // All are connected before the first one sends.
        let mut workers = JoinSet::new();
        for worker in try_join_all(ready).await.map_err(context)? {
            workers.spawn(worker.run(cancel.clone()));
        }
        let _stop_on_drop = cancel.clone().drop_guard();
        Ok(Self { shared, workers, listener, cancel, _stop_on_drop })
    }

    /// Requests that end from now on belong to `phase`.
    pub fn set_phase(&self, phase: Phase) {
        self.shared.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Requests begun so far.
    pub fn requests(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed).min(self.shared.max_requests)
    }

    /// Lets every worker end its request, and reports.
    ///
    /// # Errors
    /// A worker that hangs or panicked.
    pub async fn stop(self) -> Result<TrafficReport> {
        self.cancel.cancel();
        self.finish().await
    }

    /// Waits until `max_requests` have been sent, and reports.
    ///
    /// # Errors
    /// A worker that panicked, or hangs after a stop.
    pub async fn finish(self) -> Result<TrafficReport> {
        let Self { shared, mut workers, listener, cancel, _stop_on_drop } = self;
        let stopped = async {
            cancel.cancelled().await;
            tokio::time::sleep(STOP_TIMEOUT).await;
        };
        let joined = async {
            while let Some(result) = workers.join_next().await {
                result.map_err(|e| Error::internal("a traffic worker panicked").with_source(e))?;
            }
            Ok::<(), Error>(())
        };
        tokio::select! {
            result = joined => result?,
            () = stopped => return Err(Error::internal("a traffic worker did not end its request within a minute")),
        }
        let stats = std::mem::replace(&mut *lock(&shared.stats), Stats::new());
        let mut ledger = std::mem::take(&mut *lock(&shared.ledger));
        ledger.broadcasts = listener.stop().await?;
        Ok(stats.report(ledger))
    }
}

/// Collects the messages whose update was broadcast.
struct Listener {
    client: Client,
    updated: Arc<Mutex<HashSet<Uuid>>>,
    task: JoinHandle<()>,
}

impl Listener {
    async fn start(config: &Config) -> Result<Self, tokio_postgres::Error> {
        let (client, mut connection) = config.connect(NoTls).await?;
        let updated = Arc::new(Mutex::new(HashSet::new()));
        let sink = updated.clone();
        let task = tokio::spawn(async move {
            let mut messages = stream::poll_fn(move |context| connection.poll_message(context));
            while let Some(Ok(message)) = messages.next().await {
                let AsyncMessage::Notification(notification) = message else { continue };
                let id = notification.payload().strip_prefix("UPDATE ").and_then(|id| id.parse::<Uuid>().ok());
                lock(&sink).extend(id);
            }
        });
        client.batch_execute("listen realtime").await?;
        Ok(Self { client, updated, task })
    }

    async fn stop(self) -> Result<HashSet<Uuid>> {
        // Pending notifications are delivered before the answer; a listener that died would have proved nothing.
        self.client.batch_execute("select 1").await.map_err(|e| {
            Error::from(e).context("the listener for broadcasts lost its connection, so broadcasts are not known")
        })?;
        drop(self.client);
        let _ = self.task.await;
        Ok(std::mem::take(&mut *lock(&self.updated)))
    }
}

fn parse(url: &str) -> Result<Config> {
    // The URL holds a password, so the error does not repeat it.
    let mut config = Config::from_str(url).map_err(|_| Error::input("the traffic's database URL is not valid"))?;
    config.application_name("demo-application").connect_timeout(Duration::from_secs(10));
    Ok(config)
}

async fn connect(config: &Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    // Ends with the client; its error reaches the client's caller, too.
    tokio::spawn(connection);
    Ok(client)
}

/// A worker that panicked is reported by `finish`; its half-done counters are still the best we have.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
