//! The only executor of statements that take strong locks (I9).
//!
//! A statement that waits for ACCESS EXCLUSIVE makes everything behind it wait as well, so it waits briefly, gives up,
//! and tries again later; before it tries, it looks whether somebody would keep it waiting anyway.

use std::time::{Duration, Instant};

use rand::RngExt;
use tokio_postgres::{Client, Transaction};
use tracing::{info, warn};

use crate::context::Context;
use crate::error::{Error, Result, Retry};
use crate::fault;
use crate::ledger::{event, lease};
use crate::metrics;
use crate::pg::connect::{SESSION_SETTINGS, Session};

/// How long a statement under a strong lock may take, beside the wait for a lock, and how long the transaction may be idle, in
/// milliseconds: all of ours change catalogs only.
const STRONG_MS: u32 = 2_000;
/// The same for one that stops nobody.
const WEAK_IDLE_MS: u32 = 60_000;
const TOO_LONG: &str =
    "it needs a moment in which the table is not in use, and took more; backfilld plan shows the statements";

/// Someone who holds a lock on the table: `pid 123 (login app, application "api", active for 12 s)`. Never the query
/// text, which can hold values. An autovacuum is left out: it gives way (see [`lock`]), unless it prevents wraparound.
const BLOCKERS: &str = "
    select distinct on (a.xact_start, l.pid)
           case when l.pid is null then 'a prepared transaction (pg_prepared_xacts)'
                when a.backend_type <> 'client backend' then format('pid %s (%s)', a.pid, a.backend_type)
                else format('pid %s (login %s, application %L, %s, transaction open for %s s)', a.pid, a.usename,
                            a.application_name, a.state, round(extract(epoch from clock_timestamp() - a.xact_start)))
           end
    from pg_locks l left join pg_stat_activity a on a.pid = l.pid
    where l.locktype = 'relation' and l.database = (select oid from pg_database where datname = current_database())
      and l.relation = any (select to_regclass(r)::oid from unnest($1::text[]) r)
      and l.granted and l.pid is distinct from pg_backend_pid()
      and (l.pid is null or a.xact_start < clock_timestamp() - interval '1 second')
      and (a.backend_type is distinct from 'autovacuum worker' or a.query like '%to prevent wraparound%')
      and l.mode = any ($2)
    order by a.xact_start, l.pid limit 5";

/// Lock modes that conflict with ACCESS EXCLUSIVE: all.
const ALL_MODES: &[&str] = &[
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
];

/// Lock modes that conflict with SHARE ROW EXCLUSIVE: those of writers and of other DDL.
const WRITER_MODES: &[&str] = &[
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
];

/// Lock modes that conflict with SHARE UPDATE EXCLUSIVE: those of other DDL and of VACUUM.
const MAINTENANCE_MODES: &[&str] =
    &["ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"];

/// How strong the strongest lock of a transaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strength {
    /// SHARE UPDATE EXCLUSIVE: only other DDL and VACUUM wait. May take long once it has its lock.
    Maintenance,
    /// SHARE ROW EXCLUSIVE: writers wait.
    Writes,
    /// ACCESS EXCLUSIVE: readers wait, too.
    Everything,
}

impl Strength {
    /// As `lock table` wants it.
    pub fn sql(self) -> &'static str {
        match self {
            Self::Everything => "access exclusive",
            Self::Writes => "share row exclusive",
            Self::Maintenance => "share update exclusive",
        }
    }

    /// As `pg_locks` calls it; also the `mode` label of the metrics.
    pub fn mode(self) -> &'static str {
        match self {
            Self::Everything => "AccessExclusiveLock",
            Self::Writes => "ShareRowExclusiveLock",
            Self::Maintenance => "ShareUpdateExclusiveLock",
        }
    }
}

/// What is to be done, for the log and the executor.
#[derive(Debug, Clone, Default)]
pub struct Change<'a> {
    /// In a few words.
    pub what: &'a str,
    /// Tables to lock first, quoted, in this order.
    pub locks: Vec<(String, Strength)>,
    /// Tables, quoted, that the statements themselves lock as well; we may lack the right to do it beforehand.
    pub also_locked: Vec<String>,
    /// Statements that run before the locks are taken, in the same transaction, to keep the locks short.
    pub prelude: Vec<String>,
}

impl Change<'_> {
    fn strength(&self) -> Strength {
        self.locks.iter().map(|l| l.1).max().unwrap_or(Strength::Maintenance)
    }

    fn tables(&self) -> Vec<&str> {
        self.locks.iter().map(|l| &l.0).chain(&self.also_locked).map(String::as_str).collect()
    }
}

/// Runs `body` in a fenced transaction with a short `lock_timeout`, again and again until it gets its locks. `body` may
/// run several times; it must not have effects outside its transaction.
///
/// # Errors
/// What `body` returns, unless it is a lock that could not be had; `ddl.patience` used up; or it is time to stop.
pub async fn transaction<T>(
    ctx: &Context,
    session: &mut Session,
    change: &Change<'_>,
    body: impl AsyncFn(&Transaction<'_>) -> Result<T>,
) -> Result<T> {
    let began = Instant::now();
    let mut wait = Duration::from_millis(50);
    loop {
        ctx.check()?;
        let in_the_way = blockers(&session.client, change).await?;
        // Looking first must not become waiting for ever: on a table that always has a long transaction, try anyway.
        if in_the_way.is_empty() || began.elapsed() > ctx.settings.ddl.retry_max_wait * 3 {
            let attempted = Instant::now();
            match attempt(ctx, session, change, &body).await {
                Ok(done) => return Ok(done),
                Err(e) if e.retry() == Retry::Smaller && !took_too_long(&e, change) && ctx.check().is_ok() => {
                    metrics::ddl_attempt(ctx.job(), "lock_timeout", attempted.elapsed());
                    let now = blockers(&session.client, change).await.unwrap_or_default();
                    log_wait(ctx, change, &e.to_string(), if now.is_empty() { &in_the_way } else { &now });
                }
                Err(e) => {
                    metrics::ddl_attempt(ctx.job(), "error", attempted.elapsed());
                    let too_long = took_too_long(&e, change);
                    let e = e.context(change.what);
                    return Err(if too_long { e.with_hint(TOO_LONG) } else { e });
                }
            }
        } else {
            log_wait(ctx, change, "looked before locking", &in_the_way);
        }
        if began.elapsed() > ctx.settings.ddl.patience {
            return Err(out_of_patience(ctx, &session.client, change).await);
        }
        let jitter = rand::rng().random_range(0.5..1.5);
        ctx.pause(wait.mul_f64(jitter)).await?;
        wait = (wait * 2).min(ctx.settings.ddl.retry_max_wait);
    }
}

/// A statement under a strong lock was cancelled: it waits for locks no longer than `lock_timeout`, so it was at work, or somebody
/// cancelled it. Everybody else stood still meanwhile, and would again.
fn took_too_long(e: &Error, change: &Change<'_>) -> bool {
    e.sqlstate() == Some("57014") && change.strength() > Strength::Maintenance
}

async fn out_of_patience(ctx: &Context, client: &Client, change: &Change<'_>) -> Error {
    let who = blockers(client, change).await.unwrap_or_default().join("; ");
    Error::refused(format!(
        "{}: no lock on {} within {}; in the way now: {}",
        change.what,
        change.tables().join(", "),
        humantime::format_duration(ctx.settings.ddl.patience),
        if who.is_empty() { "nobody older than a second" } else { &who }
    ))
    .with_hint("end what holds the lock, then: backfilld resume")
}

async fn attempt<T>(
    ctx: &Context,
    session: &mut Session,
    change: &Change<'_>,
    body: &impl AsyncFn(&Transaction<'_>) -> Result<T>,
) -> Result<T> {
    let began = Instant::now();
    let strength = change.strength();
    // A long validation is cancelled when it is time to stop; everything else is short. Nobody is to wait for a daemon whose host is gone.
    let (statement_timeout, idle_timeout) = match strength {
        Strength::Maintenance => (0, WEAK_IDLE_MS),
        _ => (30_000, STRONG_MS),
    };
    let canceller = session.canceller();
    let tx = session.client.transaction().await?;
    tx.batch_execute(&format!(
        "set local lock_timeout = {}; set local statement_timeout = {statement_timeout}; \
         set local idle_in_transaction_session_timeout = {idle_timeout}; set local synchronous_commit = on",
        ctx.settings.ddl.lock_timeout.as_millis()
    ))
    .await?;
    // An operator who said `pause` or `rollback` while we waited for a lock has to be heard.
    ctx.may_go_on(&lease::fence(&tx, &ctx.lease).await?)?;
    let (done, locked_from) = {
        let work = lock_and_change(&tx, change, ctx.settings.ddl.lock_timeout, body);
        tokio::pin!(work);
        tokio::select! {
            done = &mut work => done?,
            why = ctx.told_to_stop() => {
                canceller.cancel().await?;
                // The statement ends with 57014, or was faster; waiting for it keeps the connection in step.
                let _ = work.as_mut().await;
                return Err(why);
            }
        }
    };
    fault::point("before-ddl-commit");
    tx.commit().await?;
    fault::point("after-ddl-commit");
    let held = locked_from.elapsed();
    metrics::ddl_attempt(ctx.job(), "ok", locked_from.duration_since(began));
    metrics::ddl_lock_hold(ctx.job(), strength.mode(), held);
    info!(job = ctx.job(), lock = strength.mode(), hold_us = held.as_micros() as u64, "{}", change.what);
    let detail =
        serde_json::json!({ "what": change.what, "lock": strength.mode(), "hold_us": held.as_micros() as u64 });
    event::record(&session.client, ctx.job(), "ddl", detail).await?;
    Ok(done)
}

/// Gives what `body` gives, and when the strongest lock was there.
async fn lock_and_change<T>(
    tx: &Transaction<'_>,
    change: &Change<'_>,
    lock_timeout: Duration,
    body: &impl AsyncFn(&Transaction<'_>) -> Result<T>,
) -> Result<(T, Instant)> {
    for sql in &change.prelude {
        tx.batch_execute(sql).await?;
    }
    let locked_from = lock(tx, change, lock_timeout).await?;
    body(tx).await.map(|done| (done, locked_from))
}

/// Takes the locks; gives when the strongest one was there.
///
/// SHARE UPDATE EXCLUSIVE comes first, on every table. No reader and no writer waits behind it, so it may be waited for
/// longer than `deadlock_timeout`, which is when the server ends an autovacuum that is in the way; the short
/// `lock_timeout` of the strong locks would never get past one. Once it is held, no other autovacuum begins.
async fn lock(tx: &Transaction<'_>, change: &Change<'_>, lock_timeout: Duration) -> Result<Instant> {
    let mut gentle = String::from(
        "select set_config('backfilld.lock_timeout', current_setting('lock_timeout'), true),
                set_config('lock_timeout', (2 * setting::int8)::text, true)
         from pg_settings where name = 'deadlock_timeout';",
    );
    for (table, _) in &change.locks {
        gentle.push_str(&format!("lock table {table} in {} mode;", Strength::Maintenance.sql()));
    }
    gentle.push_str("select set_config('lock_timeout', current_setting('backfilld.lock_timeout'), true);");
    if change.strength() > Strength::Maintenance {
        gentle.push_str(&format!("set local statement_timeout = {}", STRONG_MS + lock_timeout.as_millis() as u32));
    }
    tx.batch_execute(&gentle).await?;
    let mut locked_from = Instant::now();
    // The strongest last: whoever else is waited for, readers do not wait meanwhile.
    let mut strong: Vec<_> = change.locks.iter().filter(|l| l.1 > Strength::Maintenance).collect();
    strong.sort_by_key(|l| l.1);
    for (table, strength) in strong {
        tx.batch_execute(&format!("lock table {table} in {} mode", strength.sql())).await?;
        if *strength == change.strength() {
            locked_from = Instant::now();
        }
    }
    Ok(locked_from)
}

/// Runs one statement that cannot be in a transaction (CREATE or DROP INDEX CONCURRENTLY). It takes no lock that readers
/// or writers wait for, so it may wait itself; it is cancelled when it is time to stop.
///
/// # Errors
/// What the server says; lease lost before or after, interrupted.
pub async fn concurrently(ctx: &Context, session: &Session, what: &str, sql: &str) -> Result<()> {
    ctx.check()?;
    let client = &session.client;
    ctx.may_go_on(&lease::fence(client, &ctx.lease).await?)?;
    // Both timeouts end a build that waits for old transactions, and leave an INVALID index (hazard 32).
    client.batch_execute("set lock_timeout = 0; set statement_timeout = 0").await?;
    let began = Instant::now();
    let work = client.batch_execute(sql);
    tokio::pin!(work);
    let result = tokio::select! {
        done = &mut work => done.map_err(Error::from),
        why = ctx.told_to_stop() => {
            session.cancel().await?;
            let _ = work.await;
            return Err(why);
        }
    };
    fault::point("after-concurrently");
    result.map_err(|e| e.context(what))?;
    client.batch_execute(SESSION_SETTINGS).await?;
    lease::fence(client, &ctx.lease).await?;
    let duration_ms = began.elapsed().as_millis() as u64;
    info!(job = ctx.job(), duration_ms, "{what}");
    event::record(client, ctx.job(), "ddl", serde_json::json!({ "what": what, "duration_ms": duration_ms })).await
}

async fn blockers(client: &Client, change: &Change<'_>) -> Result<Vec<String>> {
    let modes = match change.strength() {
        Strength::Everything => ALL_MODES,
        Strength::Writes => WRITER_MODES,
        Strength::Maintenance => MAINTENANCE_MODES,
    };
    let rows = client.query(BLOCKERS, &[&change.tables(), &modes]).await?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
}

fn log_wait(ctx: &Context, change: &Change<'_>, cause: &str, who: &[String]) {
    let who = if who.is_empty() { "nobody that is still there".to_owned() } else { who.join("; ") };
    warn!(job = ctx.job(), tables = change.tables().join(", "), in_the_way = %who, "waiting to {}: {cause}", change.what);
    ctx.progress.update(|p| p.note = format!("waiting to {}: {who}", change.what));
}
