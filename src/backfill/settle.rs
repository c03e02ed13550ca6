//! Takes back values whose source became NULL while a batch in heap order wrote them.
//!
//! NULL is no proof that nobody wrote a row where NULL is a legal value: [`crate::plan::batch_sql::recheck`] has the
//! race. A walk by key looks again within the batch. In heap order a row that moved is not in the batch's pages any more, and a
//! second look at every round would cost a quarter of the whole; so it is done when a verification found a difference, which reads
//! every row anyway. Until then nobody reads the column: the flip comes after a verification without findings.

use tokio_postgres::Statement;
use tracing::info;

use crate::context::Context;
use crate::error::{Result, Retry};
use crate::ledger::{event, lease};
use crate::pg::connect::Session;
use crate::plan::heap_sql;

/// Pages of a transaction: some thousand rows, read with one look at their source each; few of them get locked.
const CHUNK_PAGES: i64 = 256;

/// Walks the table once. Gives the number of rows taken back; 0 as well where it cannot happen.
///
/// # Errors
/// Database errors, lease lost, interrupted; refused if the job's status is no longer `running`.
pub async fn run(ctx: &Context) -> Result<i64> {
    let Some([lock, clear]) = heap_sql::settle(&ctx.facts.shape) else { return Ok(0) };
    let mut session = super::connect(ctx).await?;
    let statements = [session.client.prepare(&lock).await?, session.client.prepare(&clear).await?];
    let pages: i64 = session
        .client
        .query_one("select pg_relation_size($1::oid) / current_setting('block_size')::int8", &[&ctx.facts.target.oid])
        .await?
        .get(0);
    session.client.batch_execute("set statement_timeout = '30s'").await?;
    let mut settled = 0;
    let mut low = 0;
    let mut retries = 0;
    while low < pages {
        ctx.check()?;
        match chunk(ctx, &mut session, &statements, low).await {
            Ok(rows) => {
                settled += rows;
                low += CHUNK_PAGES;
                retries = 0;
            }
            Err(e) if e.retry() == Retry::Smaller => {
                retries += 1;
                ctx.pause(super::lane_loop::backoff(retries)).await?;
            }
            Err(e) => return Err(e),
        }
    }
    info!(job = ctx.job(), rows = settled, "values whose source had become NULL meanwhile were taken back");
    Ok(settled)
}

async fn chunk(ctx: &Context, session: &mut Session, [lock, clear]: &[Statement; 2], low: i64) -> Result<i64> {
    let (low, high) = (format!("({low},0)"), format!("({},0)", low + CHUNK_PAGES));
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
