//! The daemon: takes the lease, runs one job's phases, restarts what broke, shuts down.
//!
//! Every pass of the loop reads the job's row and does what it says, so that a resume is the normal path and any command
//! of an operator, given from any machine, is seen at the next step.

mod heartbeat;
mod phases;
mod recall;
mod sampler;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, info, info_span, warn};
use uuid::Uuid;

use crate::context::Context;
use crate::error::{Error, Kind, Result, Retry};
use crate::hooks::{self, Hooks, Webhook};
use crate::job::JobSpec;
use crate::ledger::job as jobs;
use crate::ledger::lease::{self, Acquired, Lease};
use crate::ledger::migrate;
use crate::live::{self, Live, Tunables};
use crate::metrics;
use crate::pg::connect::{Connector, Session};
use crate::pg::pool::Pool;
use crate::phase::{Phase, Status};
use crate::plan::Facts;
use crate::preflight::{self, PreflightOptions};
use crate::progress::{self, LeaseState, Progress};
use crate::settings::Settings;

/// What to run, and for whom.
#[derive(Clone)]
pub struct Daemon {
    /// The daemon's own settings.
    pub settings: Arc<Settings>,
    /// The job.
    pub spec: Arc<JobSpec>,
    /// Leave when the job is finished, failed or held, rather than wait for an operator.
    pub once: bool,
    /// Fires when the process is to leave.
    pub shutdown: CancellationToken,
    /// Where watchers look.
    pub progress: Progress,
    /// Makes connections.
    pub connector: Connector,
    /// Connections for short statements.
    pub pool: Pool,
    /// Who is told what happens.
    webhook: Option<Webhook>,
}

impl Daemon {
    /// Makes a daemon; connects nowhere yet.
    ///
    /// # Errors
    /// Input errors of the connection settings.
    pub fn new(settings: Settings, spec: JobSpec, once: bool) -> Result<Self> {
        let webhook = hooks::check(&settings.hooks)?;
        let connector = Connector::new(&settings.database)?;
        let pool = Pool::new(&connector, &settings.database, "pool")?;
        let progress = Progress::default();
        progress.update(|p| {
            p.job = spec.name.clone();
            p.instance = settings.instance.clone();
        });
        Ok(Self {
            settings: Arc::new(settings),
            spec: Arc::new(spec),
            once,
            shutdown: CancellationToken::new(),
            progress,
            connector,
            pool,
            webhook,
        })
    }

    /// Runs until the job is finished (with `once`) or a shutdown is asked for. Gives the job's last status.
    ///
    /// # Errors
    /// What keeps a job from starting; with `once` also what made it fail. A lost connection or lease is no error: it
    /// starts over.
    pub async fn run(&self) -> Result<Status> {
        let mut wait = Duration::from_millis(100);
        let mut started = false;
        loop {
            let began = Instant::now();
            match self.run_once(&mut started).await {
                Ok(status) => return Ok(status),
                Err(e) if self.shutdown.is_cancelled() || e.kind() == Kind::Interrupted => return Err(interrupted()),
                Err(e) if e.kind() == Kind::LeaseLost => warn!(job = self.spec.name, "{e}; waiting for it as standby"),
                // A first connection that fails is a wrong setting as a rule, so it ends the process with its reason.
                Err(e) if started && (e.kind() == Kind::Connect || e.retry() != Retry::Never) => {
                    warn!(job = self.spec.name, sqlstate = e.sqlstate(), "starting over at the checkpoint: {e}");
                    metrics::retry(&self.spec.name, e.sqlstate());
                }
                Err(e) => return Err(e),
            }
            if began.elapsed() > Duration::from_secs(30) {
                wait = Duration::from_millis(100);
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.shutdown.cancelled() => return Err(interrupted()),
            }
            wait = (wait * 2).min(Duration::from_secs(5));
        }
    }

    async fn run_once(&self, started: &mut bool) -> Result<Status> {
        // Nothing is in flight before the lease is ours, so a shutdown need not wait for a host that does not answer.
        let (session, lease, since) = tokio::select! {
            begun = self.begin(started) => match begun? {
                Some(begun) => begun,
                None => return Ok(Status::Done),
            },
            () = self.shutdown.cancelled() => return Err(interrupted()),
        };
        self.lead(session, lease, since).await
    }

    /// Enters the job, if it is new and can run here, and waits for its lease. Gives the session that took it, and when it
    /// was asked for; `None` if the job is done already.
    async fn begin(&self, started: &mut bool) -> Result<Option<(Session, Lease, Instant)>> {
        let mut session = self.connector.connect_ddl("start").await?;
        let client = &session.client;
        refuse_read_only(client, *started).await?;
        if !*started {
            self.connector.try_both().await?;
        }
        let facts = Facts::read(client, &self.spec, self.settings.database.dedicated_login).await;
        let known = match migrate::installed(client).await? {
            migrate::Installed::Version(_) => jobs::find(client, self.job()).await?,
            migrate::Installed::Nothing => None,
        };
        // The way back is open also where the catalog is no longer as the job says.
        if known.as_ref().is_none_or(|j| j.status != Status::RollingBack) {
            facts?;
        }
        if known.is_none() && *started {
            return Err(self.forgotten());
        }
        if known.as_ref().is_none_or(|j| j.phase == Phase::Preflight && j.status == Status::Running) {
            self.preflight(client).await?;
        }
        migrate::migrate(&mut session.client).await?;
        let job = jobs::register(&session.client, &self.spec).await?;
        metrics::job_started(self.job());
        metrics::job_info(self.job(), &self.settings.instance);
        *started = true;
        self.progress.update(|p| p.entered = true);
        if job.status == Status::RolledBack {
            return Err(Error::refused(format!("job {} was rolled back", self.job()))
                .with_hint(format!("to run it again, forget it first: backfilld uninstall {}", self.job())));
        }
        if job.status == Status::Done && self.once {
            info!(job = self.job(), "the job is done already");
            return Ok(None);
        }
        let (lease, since) = self.lease(&session).await.map_err(|e| self.or_forgotten(e))?;
        Ok(Some((session, lease, since)))
    }

    fn job(&self) -> &str {
        &self.spec.name
    }

    /// The error of a daemon whose job was uninstalled: to enter it again would start it from its beginning.
    fn forgotten(&self) -> Error {
        Error::refused(format!("job {} was uninstalled while this daemon ran", self.job()))
            .with_hint("nothing is left to do; start it again only if the job shall begin anew")
    }

    /// Tables of ours that are missing, and a lease that may not refer to a job, mean that the job is gone.
    fn or_forgotten(&self, e: Error) -> Error {
        let ours = match e.sqlstate() {
            Some("42P01" | "3F000") => e.to_string().contains("\"backfilld"),
            state => state == Some("23503"),
        };
        if ours { self.forgotten() } else { e }
    }

    async fn preflight(&self, client: &tokio_postgres::Client) -> Result<()> {
        self.progress.update(|p| p.phase = "preflight".into());
        let other = self.connector.connect("preflight").await?;
        let options = PreflightOptions {
            dedicated_login: self.settings.database.dedicated_login,
            // The verifier reads every row before anything enforcing; a start need not.
            deep: false,
            ddl_lock_timeout: self.settings.ddl.lock_timeout,
            other: Some(&other.client),
            ..Default::default()
        };
        let report = preflight::run(client, &self.spec, &options).await?;
        if report.passed() {
            return Ok(());
        }
        Err(Error::new(Kind::Check, format!("preflight failed: {}", report.failures().join("; ")))
            .with_hint("backfilld check shows each finding and what to do about it"))
    }

    /// Waits for the lease as standby. The wait holds no transaction and no lock. Who gives it back rings; who was killed
    /// cannot, nor does a failover pass a notification on, so it asks again by itself, too.
    async fn lease(&self, session: &Session) -> Result<(Lease, Instant)> {
        let client = &session.client;
        let ttl = self.settings.lease.ttl;
        let holder = Uuid::new_v4();
        // Before the lease is ours: from its first moment on there is a backend that shows that somebody works under it.
        let name = format!("{}heartbeat", Lease::application_prefix(&holder));
        client.execute("select set_config('application_name', $1, false)", &[&name]).await?;
        // Before it asks for the first time, so that nothing is missed.
        client.batch_execute(&format!("listen {}", lease::CHANNEL)).await?;
        let mut told = false;
        loop {
            let asked = Instant::now();
            match lease::acquire(client, self.job(), &self.settings.instance, holder, ttl).await {
                Ok(Acquired::Yes(lease)) => {
                    info!(job = self.job(), epoch = lease.epoch, instance = self.settings.instance, "lease acquired");
                    metrics::lease(self.job(), true, lease.epoch);
                    let holder = self.settings.instance.clone();
                    self.progress.update(|p| p.lease = LeaseState { is_ours: true, holder, epoch: lease.epoch });
                    return Ok((lease, asked));
                }
                Ok(Acquired::HeldBy { instance, expires_in }) => {
                    if !told {
                        info!(
                            job = self.job(),
                            holder = instance,
                            expires_in_ms = expires_in.as_millis() as u64,
                            "standby: another instance holds the lease"
                        );
                        told = true;
                    }
                    metrics::lease(self.job(), false, 0);
                    self.progress.update(|p| {
                        p.rest();
                        p.phase = "standby".into();
                        p.note = format!("{instance} holds the lease");
                        p.lease = LeaseState { is_ours: false, holder: instance, epoch: 0 };
                    });
                }
                // A takeover waits for the batch in flight, and gives up at lock_timeout.
                Err(e) if e.retry() == Retry::Smaller => {}
                Err(e) => return Err(e),
            }
            tokio::select! {
                () = session.notified() => {}
                () = tokio::time::sleep((ttl / 10).clamp(Duration::from_millis(100), Duration::from_secs(1))) => {}
                () = self.shutdown.cancelled() => return Err(interrupted()),
            }
        }
    }

    async fn rolls_back(&self, session: &Session) -> bool {
        let job = jobs::find(&session.client, self.job()).await;
        job.is_ok_and(|job| job.is_some_and(|j| j.status == Status::RollingBack))
    }

    async fn lead(&self, session: Session, lease: Lease, since: Instant) -> Result<Status> {
        // Read anew: a standby may have waited for days.
        let facts = Facts::read(&session.client, &self.spec, self.settings.database.dedicated_login).await;
        let facts = match facts {
            Ok(facts) => facts,
            Err(e) if e.retry() == Retry::Never && self.rolls_back(&session).await => {
                warn!(
                    job = self.job(),
                    "rolling back without the catalog, which is no longer as the job says: {}",
                    e.line()
                );
                Facts::unknown(&self.spec)
            }
            Err(e) => {
                let _ = lease::release(&session.client, &lease).await;
                return Err(e);
            }
        };
        if let Err(e) = recall::recall(&session.client, self.job(), &self.progress).await {
            warn!(job = self.job(), sqlstate = e.sqlstate(), "what went before cannot be shown: {e}");
        }
        let ctx = Context {
            settings: Arc::clone(&self.settings),
            spec: Arc::clone(&self.spec),
            live: Live::new(Tunables::from(&*self.spec)),
            facts: Arc::new(facts),
            connector: self.connector.clone(),
            pool: self.pool.clone(),
            lease,
            mandate: Status::Running,
            shutdown: self.shutdown.clone(),
            lost: CancellationToken::new(),
            progress: self.progress.clone(),
        };
        let heartbeat = tokio::spawn(heartbeat::run(ctx.clone(), session, since));
        let sampler = sampler::Sampler::start(ctx.clone());
        let tuning = tokio::spawn(live::watch(ctx.clone()));
        let hooks = Hooks::start(&ctx, self.webhook.clone()).await;
        let result = match (&hooks, live::refresh(&ctx).await) {
            (Ok(_), Ok(())) => {
                let span = info_span!(target: progress::SPANS, "job", job = self.job(), epoch = ctx.lease.epoch);
                phases::Phases { ctx: &ctx, once: self.once }.run().instrument(span).await
            }
            (Err(e), _) => Err(Error::new(e.kind(), e.line())),
            (_, Err(e)) => Err(e),
        };
        tuning.abort();
        sampler.stop().await;
        if let Err(e) = &result
            && e.kind() == Kind::LeaseLost
        {
            metrics::lease_lost(self.job());
        }
        self.progress.update(|p| p.lease.is_ours = false);
        heartbeat.abort();
        // Awaited so that its connection is closed before the lease is given back.
        let _ = heartbeat.await;
        if !ctx.lost.is_cancelled()
            && let Ok(client) = ctx.client().await
            && let Err(e) = lease::release(&**client, &ctx.lease).await
        {
            warn!(job = self.job(), "the lease could not be given back, it expires by itself: {e}");
        }
        metrics::lease(self.job(), false, ctx.lease.epoch);
        if let Ok(hooks) = hooks {
            hooks.finish().await;
        }
        result.map_err(|e| self.or_forgotten(e))
    }
}

/// At first a read-only server is a wrong setting; later it is a failover under way, which will end.
async fn refuse_read_only(client: &tokio_postgres::Client, started: bool) -> Result<()> {
    let row =
        client.query_one("select pg_is_in_recovery(), current_setting('transaction_read_only')::bool", &[]).await?;
    if !row.get::<_, bool>(0) && !row.get::<_, bool>(1) {
        return Ok(());
    }
    let kind = if started { Kind::Connect } else { Kind::Refused };
    Err(Error::new(kind, "this server is read-only (a standby, or default_transaction_read_only is on)")
        .with_hint("connect to the primary: target_session_attrs=read-write with all hosts in database.url"))
}

fn interrupted() -> Error {
    Error::new(Kind::Interrupted, "shutdown was asked for")
}
