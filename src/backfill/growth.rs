//! A growth budget: while a table is walked in heap order, vacuum frees the places that rows have left for the rows that move next.
//!
//! One row in seven moves however carefully rounds are cut, since each row grows by the new value. Without a vacuum all of them go
//! behind the table's end.

use std::time::Duration;

use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::team::Team;
use crate::context::Context;
use crate::error::Result;
use crate::ledger::event;
use crate::pg::connect::Session;

/// How often the size of the table is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Least part of the table that is walked between two vacuums. Each reads all that was walked so far, as the pages keep dead line
/// pointers, so twenty of them read the table ten times.
const STEP: f64 = 0.05;
/// What one vacuum may do: forty times as much as autovacuum by default would take away from the application by being late; a tenth
/// of a fast disk. The places are of use only while the walk is under way.
const SETTINGS: &str = "set vacuum_cost_delay = '2ms'; set vacuum_cost_limit = 2000; set statement_timeout = 0";

/// Vacuums when the table grows faster than `batching.growth_percent` allows, until `over`. What goes wrong here is told, and costs
/// nothing but space.
pub(super) async fn keep(ctx: &Context, team: &Team, over: &CancellationToken) {
    if let Err(e) = until_over(ctx, team, over).await
        && !over.is_cancelled()
    {
        warn!(job = ctx.job(), sqlstate = e.sqlstate(), "the growth of the table is no longer kept in bounds: {e}");
    }
}

async fn until_over(ctx: &Context, team: &Team, over: &CancellationToken) -> Result<()> {
    let Some(pages) = team.pages else { return Ok(()) };
    let mut last = team.outlook().0;
    loop {
        tokio::select! {
            () = over.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
        }
        let ratio = team.outlook().0;
        let Some(percent) = ctx.live.now().batching.growth_percent.filter(|_| ratio - last >= STEP) else { continue };
        let grown = size(ctx).await?.saturating_sub(pages);
        if !is_due(percent, pages, grown, ratio) {
            continue;
        }
        tokio::select! {
            () = over.cancelled() => return Ok(()),
            clear = team.throttle.clear(ctx, false) => clear?,
        }
        last = ratio;
        vacuum(ctx, pages, grown, over).await?;
    }
}

/// Whether a table of `pages` pages has grown by more than this part of the walk may cost.
fn is_due(percent: u32, pages: u64, grown: u64, ratio: f64) -> bool {
    grown as f64 * 100.0 > f64::from(percent) * ratio * pages as f64
}

async fn size(ctx: &Context) -> Result<u64> {
    let client = ctx.client().await?;
    let row = client
        .query_one(
            "select coalesce(pg_relation_size($1::oid), 0) / current_setting('block_size')::int8",
            &[&ctx.facts.target.oid],
        )
        .await?;
    Ok(row.get::<_, i64>(0).unsigned_abs())
}

/// Without the indexes, which would be read whole, and without the end of the table, whose removal takes a strong lock. Where somebody
/// else holds a lock, such as autovacuum, it does nothing.
async fn vacuum(ctx: &Context, pages: u64, grown: u64, over: &CancellationToken) -> Result<()> {
    let session = ctx.connect_ddl("vacuum").await?;
    session.client.batch_execute(SETTINGS).await?;
    let began = std::time::Instant::now();
    let sql = format!(
        "vacuum (index_cleanup off, truncate off, process_toast off, skip_locked) {}",
        ctx.facts.shape.target.sql()
    );
    let ended = run(&session, &sql, over).await?;
    let duration_ms = began.elapsed().as_millis() as u64;
    info!(job = ctx.job(), pages, grown_pages = grown, duration_ms, ended, "vacuumed, to keep the growth in bounds");
    let detail = json!({ "pages": pages, "grown_pages": grown, "duration_ms": duration_ms, "ended": ended });
    event::record(&**ctx.client().await?, ctx.job(), "vacuum", detail).await
}

/// Gives whether it reached its end. The session is not left before the server has stopped, or DDL that follows would wait for it.
async fn run(session: &Session, sql: &str, over: &CancellationToken) -> Result<bool> {
    let statement = session.client.batch_execute(sql);
    tokio::pin!(statement);
    tokio::select! {
        done = &mut statement => done.map(|()| true).map_err(Into::into),
        () = over.cancelled() => {
            session.canceller().cancel().await?;
            Ok(statement.await.is_ok())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_due;

    #[test]
    fn growth_is_held_against_the_part_that_was_walked() {
        assert!(!is_due(10, 1000, 10, 0.1));
        assert!(is_due(10, 1000, 11, 0.1));
        assert!(!is_due(10, 1000, 50, 0.5));
        assert!(is_due(10, 1000, 101, 1.0));
        assert!(!is_due(10, 0, 0, 1.0), "an empty table");
    }
}
