//! Where the lanes of a sweep in heap order begin, or go on.

use tokio_postgres::Client;
use tracing::info;

use super::heap_cursor::{HeapCursor, lane_range, lanes_for};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::ledger::checkpoint::{self, Checkpoint};
use crate::ledger::heap::{self, HeapPlace};
use crate::ledger::{event, lease};
use crate::pg::connect::Session;
use crate::plan::rounds::initial_rounds;

/// The lanes of a sweep, to go on where their checkpoints stand, or of a new sweep. `checkpoint` is the first lane's.
///
/// # Errors
/// Database errors, lease lost.
pub async fn lanes(
    ctx: &Context,
    session: &mut Session,
    checkpoint: &Checkpoint,
) -> Result<Vec<(i32, HeapPlace, Checkpoint)>> {
    let oid = ctx.facts.target.oid;
    let found = heap::find(&session.client, ctx.job()).await?;
    let current = filenode(&session.client, oid).await?;
    let why = match found.iter().all(|(_, place)| place.filenode == current) {
        true if found.first().is_none_or(|(lane, _)| *lane != 0) => "new sweep",
        true => {
            let mut lanes = Vec::new();
            for (lane, place) in found {
                lanes.extend(checkpoint::find(&session.client, ctx.job(), lane).await?.map(|c| (lane, place, c)));
            }
            return Ok(lanes);
        }
        false => "the table was rewritten",
    };
    begin(ctx, session, checkpoint, why).await
}

/// Begins at the first pages, with the table's present size as bound: rows that come later are the triggers' affair.
async fn begin(
    ctx: &Context,
    session: &mut Session,
    checkpoint: &Checkpoint,
    why: &str,
) -> Result<Vec<(i32, HeapPlace, Checkpoint)>> {
    let tx = session.client.transaction().await?;
    lease::fence(&tx, &ctx.lease).await?;
    let row = tx
        .query_one(
            "select pg_relation_filenode($1::oid), pg_relation_size($1::oid) / current_setting('block_size')::int8
             from pg_class where oid = $1::oid",
            &[&ctx.facts.target.oid],
        )
        .await?;
    let (filenode, pages) = (row.get(0), row.get::<_, i64>(1).unsigned_abs());
    checkpoint::fold(&tx, ctx.job()).await?;
    let first = checkpoint::find(&tx, ctx.job(), 0).await?.unwrap_or_else(|| checkpoint.clone());
    let rounds = initial_rounds(first.rows_estimate as f64 / pages.max(1) as f64);
    let count = lanes_for(pages, ctx.live.now().batching.lanes);
    let mut lanes = Vec::new();
    for lane in 0..count {
        let (start, bound) = lane_range(pages, count, lane);
        let c = HeapCursor::new(start, bound, rounds);
        let share = |n: i64| n * i64::from(lane + 1) / i64::from(count) - n * i64::from(lane) / i64::from(count);
        let checkpoint = Checkpoint {
            strategy: "heap".into(),
            cursor: None,
            finished: false,
            rows_scanned: 0,
            rows_estimate: share(first.rows_estimate),
            rows_updated: if lane == 0 { first.rows_updated } else { 0 },
            batches: if lane == 0 { first.batches } else { 0 },
            ..first.clone()
        };
        let place =
            HeapPlace { filenode, window: c.window, block: c.block, round: 0, rounds: c.rounds, start, bound: c.bound };
        checkpoint::put(&tx, ctx.job(), lane as i32, &checkpoint).await?;
        heap::put(&tx, ctx.job(), lane as i32, &place).await?;
        lanes.push((lane as i32, place, checkpoint));
    }
    let detail = serde_json::json!({ "why": why, "pages": pages, "rounds": rounds, "lanes": count });
    event::record(&tx, ctx.job(), "heap_sweep", detail).await?;
    tx.commit().await?;
    info!(job = ctx.job(), pages, rounds, lanes = count, "walking in heap order: {why}");
    Ok(lanes)
}

async fn filenode(client: &Client, oid: u32) -> Result<u32> {
    let row = client
        .query_opt("select pg_relation_filenode($1::oid) where pg_relation_filenode($1::oid) is not null", &[&oid])
        .await?;
    row.map(|r| r.get(0)).ok_or_else(|| Error::refused("the target table is gone"))
}
