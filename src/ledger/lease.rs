//! The lease: who may work on a job, by the server's clock, fenced by epoch and holder (I4).

use std::time::Duration;

use tokio_postgres::GenericClient;
use uuid::Uuid;

use crate::error::{Error, Kind, Result};

/// The channel on which whoever gives a lease back tells the standbys; the payload is the job.
pub const CHANNEL: &str = "backfilld_lease";

/// A lease that we hold, or held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The job.
    pub job: String,
    /// Counts takeovers; grows by one with each.
    pub epoch: i64,
    /// Random: a failover to an asynchronous replica can lose an epoch and issue it again.
    pub holder: Uuid,
}

impl Lease {
    /// First part of the `application_name` of every backend that works under this lease.
    pub fn application_prefix(holder: &Uuid) -> String {
        format!("backfilld/{}/", &holder.simple().to_string()[..12])
    }

    /// The purpose to connect with, so that a later holder can find and end our backends.
    pub fn purpose(&self, what: &str) -> String {
        format!("{}/{what}", &self.holder.simple().to_string()[..12])
    }
}

/// What came of asking for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// It is ours.
    Yes(Lease),
    /// Another instance has it for at least this long, unless it gives it back.
    HeldBy {
        /// Name of the holding instance.
        instance: String,
        /// Time to its expiry.
        expires_in: Duration,
    },
}

/// Takes the lease as `holder` if it is free, expired, or was ours before and nobody works under it any more. Backends
/// that still work under the old one are ended; their transactions cannot commit anyway, since the key that they locked
/// changes.
///
/// # Errors
/// Whatever the server says; a takeover waits for a batch in flight, within the session's `lock_timeout`.
pub async fn acquire(
    client: &impl GenericClient,
    job: &str,
    instance: &str,
    holder: Uuid,
    ttl: Duration,
) -> Result<Acquired> {
    let ttl_ms = ttl.as_millis() as i64;
    let inserted = client
        .query_opt(
            "insert into backfilld.lease (job, epoch, holder, instance, expires_at)
             values ($1, 1, $2, $3, clock_timestamp() + $4 * interval '1 millisecond')
             on conflict (job) do nothing returning epoch",
            &[&job, &holder, &instance, &(ttl_ms as f64)],
        )
        .await?;
    if let Some(row) = inserted {
        return Ok(Acquired::Yes(Lease { job: job.to_owned(), epoch: row.get(0), holder }));
    }
    let row = client
        .query_opt(
            "select epoch, holder, instance,
                    greatest(0, extract(epoch from expires_at - clock_timestamp()) * 1000)::int8
             from backfilld.lease where job = $1",
            &[&job],
        )
        .await?;
    let Some(row) = row else {
        return Ok(Acquired::HeldBy { instance: String::new(), expires_in: Duration::ZERO });
    };
    let (epoch, old_holder, old_instance): (i64, Uuid, String) = (row.get(0), row.get(1), row.get(2));
    let left = Duration::from_millis(row.get::<_, i64>(3).unsigned_abs());
    let prefix = Lease::application_prefix(&old_holder);
    let same_instance_came_back = old_instance == instance && backends(client, &prefix).await? == 0;
    if !left.is_zero() && !same_instance_came_back {
        return Ok(Acquired::HeldBy { instance: old_instance, expires_in: left });
    }
    end_backends(client, &prefix).await?;
    let taken = client
        .query_opt(
            "update backfilld.lease
             set epoch = epoch + 1, holder = $4, instance = $5, acquired_at = clock_timestamp(),
                 expires_at = clock_timestamp() + $6 * interval '1 millisecond'
             where job = $1 and epoch = $2 and holder = $3 and ($7 or expires_at <= clock_timestamp())
             returning epoch",
            &[&job, &epoch, &old_holder, &holder, &instance, &(ttl_ms as f64), &same_instance_came_back],
        )
        .await?;
    match taken {
        Some(row) => Ok(Acquired::Yes(Lease { job: job.to_owned(), epoch: row.get(0), holder })),
        None => Ok(Acquired::HeldBy { instance: old_instance, expires_in: Duration::ZERO }),
    }
}

async fn backends(client: &impl GenericClient, prefix: &str) -> Result<i64> {
    let row = client
        .query_one(
            "select count(*) from pg_stat_activity where starts_with(application_name, $1) and datname = current_database()",
            &[&prefix],
        )
        .await?;
    Ok(row.get(0))
}

async fn end_backends(client: &impl GenericClient, prefix: &str) -> Result<()> {
    // Only our own login's backends: anybody can set an application_name.
    client
        .execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where starts_with(application_name, $1) and usename = session_user and datname = current_database()
               and pid <> pg_backend_pid()",
            &[&prefix],
        )
        .await?;
    Ok(())
}

/// Prolongs the lease. Touches no key column, so it does not wait for batches.
///
/// # Errors
/// [`Kind::LeaseLost`] if somebody else has it.
pub async fn renew(client: &impl GenericClient, lease: &Lease, ttl: Duration) -> Result<()> {
    let n = client
        .execute(
            "update backfilld.lease set expires_at = clock_timestamp() + $4 * interval '1 millisecond'
             where job = $1 and epoch = $2 and holder = $3",
            &[&lease.job, &lease.epoch, &lease.holder, &(ttl.as_millis() as f64)],
        )
        .await?;
    if n == 1 { Ok(()) } else { Err(lost(&lease.job)) }
}

/// Gives the lease back, and tells those who listen on [`CHANNEL`]: a standby takes over at once.
///
/// # Errors
/// Whatever the server says. A lease that is no longer ours is not an error.
pub async fn release(client: &impl GenericClient, lease: &Lease) -> Result<()> {
    client
        .execute(
            "with given_back as (
               update backfilld.lease set expires_at = clock_timestamp()
               where job = $1 and epoch = $2 and holder = $3 returning job)
             select pg_notify($4, job) from given_back",
            &[&lease.job, &lease.epoch, &lease.holder, &CHANNEL],
        )
        .await?;
    Ok(())
}

/// The statement that makes a transaction fail to commit without the lease. Parameters: job, epoch, holder. Gives the job's
/// status and the version of its tuning.
/// `FOR KEY SHARE` lets heartbeats pass and makes a takeover wait.
pub const FENCE: &str =
    "select j.status, j.tuning_version from backfilld.lease l join backfilld.job j on j.name = l.job
     where l.job = $1 and l.epoch = $2 and l.holder = $3 for key share of l";

/// Runs [`FENCE`]. Gives the job's status, so that a batch learns of a pause without a query of its own.
///
/// # Errors
/// [`Kind::LeaseLost`] if the lease is not ours; the transaction must be rolled back.
pub async fn fence(client: &impl GenericClient, lease: &Lease) -> Result<String> {
    match client.query_opt(FENCE, &[&lease.job, &lease.epoch, &lease.holder]).await? {
        Some(row) => Ok(row.get(0)),
        None => Err(lost(&lease.job)),
    }
}

/// The error of a lost lease.
pub fn lost(job: &str) -> Error {
    Error::new(Kind::LeaseLost, format!("the lease of job {job} is held by another instance"))
}
