//! Takes back values whose source became NULL while a batch in heap order wrote them.
//!
//! NULL is no proof that nobody wrote a row where NULL is a legal value: [`crate::plan::batch_sql::recheck`] has the
//! race. A walk by key looks again within the batch. In heap order a row that moved is not in the batch's pages any more, and a
//! second look at every round would cost a quarter of the whole; so it is done when a verification found a difference, which reads
//! every row anyway. Until then nobody reads the column: the flip comes after a verification without findings.

use tokio_postgres::Statement;
use tracing::info;

use super::lane_loop::backoff;
use super::sizer::Sizer;
use crate::context::Context;
use crate::error::{Result, Retry};
use crate::ledger::{event, lease};
use crate::live;
use crate::pg::connect::Session;
use crate::plan::heap_sql;
use crate::throttle::Throttle;

/// Pages of a transaction at most, some thousand rows, read with one look at their source each; few of them get locked. And at first.
const CHUNK_PAGES: u32 = 256;
const FIRST_PAGES: u32 = 32;

/// Walks the table once. Gives the number of rows taken back; 0 as well where it cannot happen.
///
/// # Errors
/// Database errors, lease lost, interrupted; refused if the job's status is no longer `running`.
pub async fn run(ctx: &Context) -> Result<i64> {
    let Some([lock, clear]) = heap_sql::settle(&ctx.facts.shape) else { return Ok(0) };
    let mut retries = 0;
    let (mut session, statements) = loop {
        let session = super::connect(ctx).await?;
        match prepare(&session, [&lock, &clear]).await {
            Ok(statements) => break (session, statements),
            Err(e) if e.retry() == Retry::Smaller => wait(ctx, &mut retries).await?,
            Err(e) => return Err(e),
        }
    };
    let pages: i64 = session
        .client
        .query_one("select pg_relation_size($1::oid) / current_setting('block_size')::int8", &[&ctx.facts.target.oid])
        .await?
        .get(0);
    session.client.batch_execute("set statement_timeout = '30s'").await?;
    let throttle = Throttle::start(ctx, std::iter::once(&session));
    let mut sizer = Sizer::new(throttle.batch_target(ctx, false), 1, CHUNK_PAGES, FIRST_PAGES);
    let (mut settled, mut low) = (0, 0);
    while low < pages {
        ctx.check()?;
        if ctx.live.is_stale() {
            live::refresh(ctx).await?;
        }
        throttle.clear(ctx, true).await?;
        sizer.retune(throttle.batch_target(ctx, false), 1, CHUNK_PAGES);
        let high = (low + i64::from(sizer.rows())).min(pages);
        let flight = throttle.flight().await;
        let done = chunk(ctx, &mut session, &statements, low, high).await;
        let worked = flight.worked_last();
        drop(flight);
        match done {
            Ok(rows) => {
                settled += rows;
                sizer.committed((high - low) as u32, worked);
                (low, retries) = (high, 0);
                throttle.rest(ctx, worked).await?;
            }
            Err(e) if e.retry() == Retry::Smaller => {
                sizer.rolled_back();
                wait(ctx, &mut retries).await?;
            }
            Err(e) => return Err(e),
        }
    }
    info!(job = ctx.job(), rows = settled, "values whose source had become NULL meanwhile were taken back");
    Ok(settled)
}

async fn prepare(session: &Session, sql: [&str; 2]) -> Result<[Statement; 2]> {
    Ok([session.client.prepare(sql[0]).await?, session.client.prepare(sql[1]).await?])
}

async fn wait(ctx: &Context, retries: &mut u32) -> Result<()> {
    *retries += 1;
    ctx.pause(backoff(*retries)).await
}

async fn chunk(
    ctx: &Context,
    session: &mut Session,
    [lock, clear]: &[Statement; 2],
    low: i64,
    high: i64,
) -> Result<i64> {
    let (low, high) = (format!("({low},0)"), format!("({high},0)"));
    let tx = session.client.transaction().await?;
    ctx.may_go_on(&lease::fence(&tx, &ctx.lease).await?)?;
    let mut rows = 0;
    if tx.execute(lock, &[&low, &high]).await? > 0 {
        rows = tx.execute(clear, &[&low, &high]).await? as i64;
        event::record(&tx, ctx.job(), "settled", serde_json::json!({ "rows": rows })).await?;
    }
    tx.commit().await?;
    Ok(rows)
}
