//! `backfilld status --watch`: how jobs stand, live, from any machine, read from the ledger.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio_postgres::Client;

use super::status;
use super::view::{self, Look};
use crate::error::{Error, Kind, Result, Retry};
use crate::eta::Estimator;
use crate::ledger::{self, checkpoint, event, job as jobs};
use crate::pg::connect::Session;
use crate::phase::{Phase, Status};
use crate::progress::{self, Event, Rate, Signal, Snapshot};
use crate::settings::Settings;
use crate::terminal::{self, Whole};

/// How often the ledger is read.
const EVERY: Duration = Duration::from_secs(1);
/// How often a line is written where there is nothing to draw on and nothing new.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// A server that has not answered for so long is as good as gone.
const PATIENCE: Duration = Duration::from_secs(10);
/// The speed is that of this time.
const RATE_OVER: Duration = Duration::from_secs(10);

/// Shows it until a signal comes.
pub async fn run(settings: &Settings, only: Option<&str>) -> Result<()> {
    let cannot = |e| Error::internal("cannot listen for signals").with_source(e);
    let mut int = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut term = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut hup = signal(SignalKind::hangup()).map_err(cannot)?;
    let mut resized = signal(SignalKind::window_change()).map_err(cannot)?;
    // What is wrong from the start is an error, as with every command.
    let session = super::connect(settings, "status").await?;
    let mut watcher = Watcher::new(settings, only, session);
    watcher.read().await?;
    let mut out = Out::new()?;
    tokio::select! {
        result = watcher.show(&mut out, &mut resized) => result,
        _ = int.recv() => Ok(()),
        _ = term.recv() => Ok(()),
        _ = hup.recv() => Ok(()),
    }
}

/// Where it is shown.
enum Out {
    Screen(Whole),
    /// The time of the last line, and what was new then.
    Lines(BTreeMap<String, (Instant, String)>),
}

impl Out {
    fn new() -> Result<Self> {
        if !terminal::stdout_draws() {
            return Ok(Self::Lines(BTreeMap::new()));
        }
        Whole::take().map(Self::Screen).map_err(|e| Error::internal("cannot draw on the terminal").with_source(e))
    }

    fn show(&mut self, jobs: &BTreeMap<String, Followed>, lost: Option<&str>) -> io::Result<()> {
        match self {
            Self::Screen(screen) => {
                let look = Look::now();
                let each: Vec<String> =
                    jobs.values().map(|j| view::lines(&j.now, j.last.as_ref(), lost, &look).join("\n")).collect();
                let text = if each.is_empty() { "no job in this database".to_owned() } else { each.join("\n\n") };
                screen.show(&text.lines().map(str::to_owned).collect::<Vec<_>>())
            }
            Self::Lines(said) => {
                for (name, job) in jobs {
                    let news = view::news(&job.now) + lost.unwrap_or_default();
                    let is_due = said.get(name).is_none_or(|(at, old)| *old != news || at.elapsed() >= LINE_EVERY);
                    if is_due {
                        said.insert(name.clone(), (Instant::now(), news));
                        let lost = lost.map_or(String::new(), |why| format!("; {}", view::lost(why)));
                        writeln!(io::stdout(), "{} {}{lost}", view::clock(progress::now_ms()), view::line(&job.now))?;
                    }
                }
                io::stdout().flush()
            }
        }
    }
}

struct Watcher<'a> {
    settings: &'a Settings,
    only: Option<&'a str>,
    /// None: it was lost.
    session: Option<Session>,
    jobs: BTreeMap<String, Followed>,
}

impl<'a> Watcher<'a> {
    fn new(settings: &'a Settings, only: Option<&'a str>, session: Session) -> Self {
        Self { settings, only, session: Some(session), jobs: BTreeMap::new() }
    }

    async fn show(&mut self, out: &mut Out, resized: &mut Signals) -> Result<()> {
        let mut lost: Option<String> = None;
        loop {
            match out.show(&self.jobs, lost.as_deref()) {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                shown => shown.map_err(|e| Error::internal("cannot write to stdout").with_source(e))?,
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                _ = resized.recv() => continue,
            }
            lost = match self.read().await {
                Ok(()) => None,
                // Once it was there, a server that refuses us may just be starting, or giving way to another.
                Err(e) if e.kind() == Kind::Connect || e.retry() == Retry::Reconnect => {
                    self.session = None;
                    Some(e.line())
                }
                Err(e) => return Err(e),
            };
        }
    }

    /// Reads where every job is, over a new connection if the last one was lost.
    async fn read(&mut self) -> Result<()> {
        let reading = async {
            let session = match &mut self.session {
                Some(session) => session,
                none => none.insert(super::connect(self.settings, "status").await?),
            };
            ledger::migrate::require(&session.client).await?;
            let names = status::names(&session.client, self.only).await?;
            self.jobs.retain(|name, _| names.contains(name));
            for name in names {
                self.jobs.entry(name.clone()).or_default().read(&session.client, &name).await?;
            }
            Ok(())
        };
        match tokio::time::timeout(PATIENCE, reading).await {
            Ok(result) => result,
            Err(_) => {
                let text = format!("the server has not answered for {} s", PATIENCE.as_secs());
                Err(Error::new(Kind::Connect, text))
            }
        }
    }
}

/// A job that is looked at again and again, so that its speed can be told.
#[derive(Default)]
struct Followed {
    now: Snapshot,
    last: Option<Event>,
    /// Begun, with the phase, sweep and status for which they count.
    pace: Option<(Instant, Rate, Estimator)>,
}

impl Followed {
    async fn read(&mut self, client: &Client, name: &str) -> Result<()> {
        let job = jobs::get(client, name).await?;
        let total = checkpoint::total(client, name).await?;
        let (ratio, eta) = status::outlook(client, &job, total.as_ref()).await?;
        let before = std::mem::take(&mut self.now);
        let is_running = job.status == Status::Running;
        let mut now = Snapshot {
            job: job.name.clone(),
            phase: if is_running { job.phase.to_string() } else { job.status.to_string() },
            stored_phase: job.phase.to_string(),
            status: job.status.to_string(),
            since_ms: job.phase_since_ms.unsigned_abs(),
            reason: job.reason.clone(),
            hint: job.hint.clone(),
            quarantined: checkpoint::quarantined(client, name).await?,
            ratio: ratio.unwrap_or(0.0),
            ..Snapshot::default()
        };
        if let Some(total) = total {
            now.rows_scanned = total.rows_scanned;
            now.rows_updated = total.rows_updated;
            now.rows_estimate = total.rows_estimate;
            now.batches = total.batches;
            now.sweep = total.sweep;
        }
        if job.phase == Phase::Verify {
            now.rows_verified = compared(client, name).await?;
            now.ratio = (now.rows_verified as f64 / (now.rows_estimate.max(1)) as f64).min(1.0);
        }
        if let Some(text) = job.reason.strip_prefix("waiting: ").filter(|_| is_running) {
            let signal = text.split(' ').next().unwrap_or_default().to_owned();
            now.waiting = vec![Signal { signal, text: text.to_owned(), is_waiting: true, ..Signal::default() }];
        }
        worker(client, &job, &mut now).await?;
        now.signals.extend(lag(client, &job).await?);
        self.measure(&before, &mut now);
        now.eta = now.eta.or(eta.map(|e| progress::Eta { seconds: e, least_seconds: e, most_seconds: e }));
        now.eta = now.eta.filter(|_| is_running);
        let last = event::latest(client, name, 1).await?.into_iter().next();
        self.last = last.map(|e| Event::recalled(e.at_ms, e.kind, e.detail));
        self.now = now;
        Ok(())
    }

    /// Speed and time left, from what was seen here since the phase, the sweep or the status changed.
    fn measure(&mut self, before: &Snapshot, now: &mut Snapshot) {
        let same = before.phase == now.phase && before.sweep == now.sweep;
        let (began, rate, estimator) = match &mut self.pace {
            Some(pace) if same => pace,
            pace => pace.insert((Instant::now(), Rate::new(RATE_OVER), Estimator::default())),
        };
        let at = Instant::now();
        let moved = if now.stored_phase == "verify" { now.rows_verified } else { now.rows_scanned };
        now.rows_per_second = rate.observe(at, moved).max(0.0);
        estimator.observe(at.duration_since(*began), now.ratio);
        now.eta = estimator.eta();
    }
}

/// Rows that a verification under way has compared.
async fn compared(client: &Client, job: &str) -> Result<i64> {
    let sql = "select (walk ->> 'rows_checked')::int8 from backfilld.verification where job = $1";
    Ok(client.query_opt(sql, &[&job]).await?.and_then(|r| r.get(0)).unwrap_or(0))
}

/// Who works on it. A job on which nobody works does not go on, whatever its status says.
async fn worker(client: &Client, job: &jobs::JobRow, now: &mut Snapshot) -> Result<()> {
    let sql = "select instance, epoch, expires_at > clock_timestamp() from backfilld.lease where job = $1";
    let lease = client.query_opt(sql, &[&job.name]).await?.filter(|r| r.get(2));
    match lease {
        Some(r) => {
            now.lease.holder = r.get(0);
            now.lease.epoch = r.get(1);
        }
        None if job.status == Status::Running => {
            now.waiting.clear();
            now.note = "waiting for a daemon; start one with: backfilld run <job directory>".into();
        }
        None => {}
    }
    Ok(())
}

/// The lag of the slowest replica; none: there is no replica, or this login may not see it.
async fn lag(client: &Client, job: &jobs::JobRow) -> Result<Option<Signal>> {
    let sql =
        "select max(extract(epoch from replay_lag))::float8, bool_and(state is not null) from pg_stat_replication";
    let row = client.query_one(sql, &[]).await?;
    let spec = super::started_spec(job)?;
    Ok(row.get::<_, Option<bool>>(1).filter(|readable| *readable).map(|_| Signal {
        signal: "replica_lag".into(),
        // It is null while nothing is left to replay.
        observed: row.get::<_, Option<f64>>(0).unwrap_or(0.0),
        threshold: spec.throttle.replica_lag.as_secs_f64(),
        ..Signal::default()
    }))
}
