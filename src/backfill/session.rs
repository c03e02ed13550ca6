//! Sessions for batches, and what they are set to.

use std::time::Duration;

use super::wal;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::spec::TriggerMode;
use crate::pg::connect::Session;

/// What a batch session is set to besides [`SESSION_SETTINGS`](crate::pg::connect::SESSION_SETTINGS) and its timeouts. A
/// lost commit loses rows and checkpoint together, so it need not wait for the disk. Plans are made anew for each batch by
/// key, and once in heap order ([`HEAP_SETTINGS`]). They go by the key's index, or by TID, and look up each source row by its key:
/// with statistics from before the backfill, a scan of the whole table could look cheaper.
pub const BATCH_SETTINGS: &str = "set synchronous_commit = off; set plan_cache_mode = force_custom_plan; \
     set enable_seqscan = off; set enable_tidscan = on; set enable_hashjoin = off; \
     set enable_mergejoin = off; set max_parallel_workers_per_gather = 0; \
     set idle_in_transaction_session_timeout = '10s'";
/// The plan of a batch does not depend on which pages it reads, so it is made once. With pgbench a batch of one page,
/// with all its statements, took 0.58 ms where plans were made each time, and 0.40 ms where they were kept.
pub(super) const HEAP_SETTINGS: &str = "set plan_cache_mode = force_generic_plan";

/// A session for batches: bounded waits, no application triggers if the job says so, fresh plans.
pub(super) async fn connect(ctx: &Context) -> Result<Session> {
    let session = ctx.connect("batch").await?;
    let deadlock_ms: i64 = session
        .client
        .query_one("select setting::int8 from pg_settings where name = 'deadlock_timeout'", &[])
        .await?
        .get(0);
    // Well below deadlock_timeout, so that in a deadlock it is us who give up before the server chooses a victim, who
    // would often be the application (hazard 3).
    let lock_ms = (deadlock_ms / 4).clamp(20, 250);
    session.client.batch_execute(&format!("set lock_timeout = {lock_ms}; {BATCH_SETTINGS}")).await?;
    let batching = ctx.live.now().batching.clone();
    set_statement_timeout(&session, batching.target_duration, 0).await?;
    wal::compress(&session.client, ctx.job(), batching.wal_compression).await?;
    if ctx.spec.side_effects.triggers == Some(TriggerMode::Skip) {
        session.client.batch_execute("set session_replication_role = replica").await.map_err(|e| {
            Error::from(e).context("the application's triggers cannot be skipped").with_hint(
                "grant set on parameter session_replication_role to this login (PostgreSQL 15 and later), or set \
                 side_effects.triggers = \"fire\" in the job",
            )
        })?;
    }
    Ok(session)
}

/// About twice the target, doubled for each timeout at the smallest batch, never above 30 s: `lock_timeout` is per lock,
/// and only this bounds the sum (hazard 69).
pub(super) async fn set_statement_timeout(session: &Session, target: Duration, doublings: u32) -> Result<()> {
    let base = (target * 2).max(Duration::from_millis(200));
    let timeout = (base * 2u32.pow(doublings.min(8))).min(Duration::from_secs(30));
    session.client.batch_execute(&format!("set statement_timeout = {}", timeout.as_millis())).await?;
    Ok(())
}
