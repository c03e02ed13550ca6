//! What every phase works with: the job, its plan, the lease, and the signals to stop.

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::Object;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::job::JobSpec;
use crate::ledger::lease::{self, Lease};
use crate::live::Live;
use crate::pg::connect::{Connector, Session};
use crate::pg::pool::Pool;
use crate::phase::{Phase, Status};
use crate::plan::Facts;
use crate::progress::Progress;
use crate::settings::Settings;

/// How often a statement that takes long is interrupted by a look at the job's status.
const LOOK_FOR_ORDERS: Duration = Duration::from_millis(500);

/// One job under one lease.
#[derive(Clone)]
pub struct Context {
    /// The daemon's own settings.
    pub settings: Arc<Settings>,
    /// The job.
    pub spec: Arc<JobSpec>,
    /// What may change while the job runs: batching and throttle. Read from here, not from `spec`.
    pub live: Live,
    /// The catalog as it was when this run began.
    pub facts: Arc<Facts>,
    /// Makes connections for batches and DDL.
    pub connector: Connector,
    /// Connections for short statements.
    pub pool: Pool,
    /// The lease under which everything commits.
    pub lease: Lease,
    /// The status under which this work may go on: running, or rolling back. An operator who gives the job another one
    /// stops the work.
    pub mandate: Status,
    /// Fires when the process is to leave.
    pub shutdown: CancellationToken,
    /// Fires when the lease is lost or can no longer be proven to be ours.
    pub lost: CancellationToken,
    /// Where watchers look.
    pub progress: Progress,
}

impl Context {
    /// Name of the job.
    pub fn job(&self) -> &str {
        &self.spec.name
    }

    /// Fails when it is time to stop.
    ///
    /// # Errors
    /// Lease lost, or interrupted.
    pub fn check(&self) -> Result<()> {
        if self.lost.is_cancelled() {
            return Err(lease::lost(self.job()));
        }
        if self.shutdown.is_cancelled() {
            return Err(Error::new(Kind::Interrupted, "shutdown was asked for"));
        }
        Ok(())
    }

    /// Waits, unless it is time to stop.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub async fn pause(&self, time: Duration) -> Result<()> {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = self.stopping() => {}
        }
        self.check()
    }

    /// The same for a rollback.
    #[must_use]
    pub fn rolling_back(&self) -> Self {
        Self { mandate: Status::RollingBack, ..self.clone() }
    }

    /// Fails unless `status`, as read under the lease, is the one under which this work may go on.
    ///
    /// # Errors
    /// Refused. The daemon then looks at the job anew.
    pub fn may_go_on(&self, status: &str) -> Result<()> {
        if status == self.mandate.as_str() {
            return Ok(());
        }
        Err(Error::refused(format!("job {} is {status} by now", self.job())))
    }

    /// Resolves with the reason when work that takes long has to stop: it is time to leave, the lease is lost, or an
    /// operator has given the job another status.
    pub async fn told_to_stop(&self) -> Error {
        loop {
            if let Err(e) = self.pause(LOOK_FOR_ORDERS).await {
                return e;
            }
            // A status that cannot be read now is asked for again; the lease ends blind work.
            if let Ok(status) = self.status().await
                && let Err(e) = self.may_go_on(status.as_str())
            {
                return e;
            }
        }
    }

    /// Resolves when it is time to stop.
    pub async fn stopping(&self) {
        tokio::select! {
            () = self.shutdown.cancelled() => {}
            () = self.lost.cancelled() => {}
        }
    }

    /// A connection of its own, named so that a later holder of the lease can find and end it.
    ///
    /// # Errors
    /// Connect errors.
    pub async fn connect(&self, what: &str) -> Result<Session> {
        self.connector.connect(&self.lease.purpose(what)).await
    }

    /// A direct connection for DDL and other long statements.
    ///
    /// # Errors
    /// Connect errors.
    pub async fn connect_ddl(&self, what: &str) -> Result<Session> {
        self.connector.connect_ddl(&self.lease.purpose(what)).await
    }

    /// A pooled connection.
    ///
    /// # Errors
    /// Connect errors.
    pub async fn client(&self) -> Result<Object> {
        self.pool.get().await
    }

    /// The job's status, read from the ledger.
    ///
    /// # Errors
    /// Database errors.
    pub async fn status(&self) -> Result<Status> {
        Ok(crate::ledger::job::get(&**self.client().await?, self.job()).await?.status)
    }
}

/// How a phase ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is complete.
    Complete,
    /// Something it found sends the job back to an earlier phase.
    BackTo(Phase),
    /// An operator changed the job's status; the daemon looks what to do.
    StatusChanged,
}
