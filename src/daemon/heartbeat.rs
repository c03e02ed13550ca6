//! The heartbeat: keeps the lease, or stops all work when it cannot be proven to be ours any more.

use std::time::Instant;

use tracing::{error, warn};

use crate::context::Context;
use crate::error::{Kind, Result};
use crate::ledger::lease;
use crate::metrics;
use crate::pg::connect::Session;

/// Renews the lease three times per time to live. When it cannot be proven to be ours any more, by a local clock that
/// starts before each renewal is sent, everything stops before somebody else can take it.
///
/// `session` is the one that took the lease, under its name; `proven`: when that was asked for.
pub(super) async fn run(ctx: Context, session: Session, mut proven: Instant) {
    let ttl = ctx.settings.lease.ttl;
    let every = ctx.settings.lease.heartbeat();
    // A tenth of the time is left for what is in flight; the fence in each transaction is what makes it safe.
    let deadline = ttl - ttl / 10;
    let mut session = Some(session);
    loop {
        let pool = ctx.pool.status();
        metrics::pool(pool.idle, pool.in_use, pool.waiting);
        let sent = Instant::now();
        let left = deadline.saturating_sub(proven.elapsed());
        match tokio::time::timeout(left, renew(&ctx, &mut session)).await {
            Ok(Ok(())) => proven = sent,
            Ok(Err(e)) if e.kind() == Kind::LeaseLost => break,
            Ok(Err(e)) => {
                warn!(job = ctx.job(), sqlstate = e.sqlstate(), "heartbeat failed: {e}");
                session = None;
            }
            Err(_) => {}
        }
        if proven.elapsed() >= deadline {
            break;
        }
        tokio::time::sleep(every.min(deadline.saturating_sub(proven.elapsed()))).await;
    }
    error!(job = ctx.job(), epoch = ctx.lease.epoch, "the lease is lost or cannot be proven; stopping all work");
    ctx.lost.cancel();
}

async fn renew(ctx: &Context, session: &mut Option<Session>) -> Result<()> {
    let session = match session {
        Some(session) => session,
        none => none.insert(ctx.connect_ddl("heartbeat").await?),
    };
    lease::renew(&session.client, &ctx.lease, ctx.settings.lease.ttl).await
}
