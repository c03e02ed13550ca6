//! The part of a checkpoint that walks in heap order need.

use tokio_postgres::GenericClient;

use crate::error::Result;

/// Where a walk in heap order stands, and in which file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeapPlace {
    /// `pg_relation_filenode` of the table.
    pub filenode: u32,
    /// First page of the window.
    pub window: u64,
    /// First page of the next batch.
    pub block: u64,
    /// The current round, from 0.
    pub round: u32,
    /// Rounds of this window.
    pub rounds: u32,
    /// First page of the lane's range.
    pub start: u64,
    /// Behind its last page.
    pub bound: u64,
}

/// Reads the places of all lanes, in order; empty where no walk in heap order has begun.
///
/// # Errors
/// Whatever the server says.
pub async fn find(client: &impl GenericClient, job: &str) -> Result<Vec<(i32, HeapPlace)>> {
    let rows = client
        .query(
            "select filenode, heap_window, heap_block, heap_round, heap_rounds, heap_bound, heap_start, lane
             from backfilld.checkpoint where job = $1 and filenode is not null order by lane",
            &[&job],
        )
        .await?;
    let place = |r: &tokio_postgres::Row| HeapPlace {
        filenode: r.get(0),
        window: r.get::<_, i64>(1).unsigned_abs(),
        block: r.get::<_, i64>(2).unsigned_abs(),
        round: r.get::<_, i32>(3).unsigned_abs(),
        rounds: r.get::<_, i32>(4).unsigned_abs(),
        bound: r.get::<_, i64>(5).unsigned_abs(),
        start: r.get::<_, i64>(6).unsigned_abs(),
    };
    Ok(rows.iter().map(|r| (r.get(7), place(r))).collect())
}

/// Writes it whole: at the start of a sweep. The lane's row exists.
///
/// # Errors
/// Whatever the server says.
pub async fn put(client: &impl GenericClient, job: &str, lane: i32, place: &HeapPlace) -> Result<()> {
    let c = place;
    client
        .execute(
            "update backfilld.checkpoint set filenode = $3, heap_window = $4, heap_block = $5, heap_round = $6,
               heap_rounds = $7, heap_bound = $8, heap_start = $9 where job = $1 and lane = $2",
            &[
                &job,
                &lane,
                &place.filenode,
                &(c.window as i64),
                &(c.block as i64),
                &(c.round as i32),
                &(c.rounds as i32),
                &(c.bound as i64),
                &(c.start as i64),
            ],
        )
        .await?;
    Ok(())
}

/// Moves the checkpoint by one batch, provided that the table is still in the file that the pages count in; the batch's
/// own lock keeps it there until the commit. Parameters: job, lane, file node, table's oid, window, block, round, rounds,
/// rows walked so far, rows updated by this batch, size of the next batch in pages, finished. Where it is
/// not, only the counts move. Gives whether it is, HOT and all updates of the table as the backend counts them, and the
/// transaction id (`text`).
pub const ADVANCE: &str = "update backfilld.checkpoint as c set
       heap_window = case when f.same then $5 else c.heap_window end,
       heap_block = case when f.same then $6 else c.heap_block end,
       heap_round = case when f.same then $7 else c.heap_round end,
       heap_rounds = case when f.same then $8 else c.heap_rounds end,
       rows_scanned = case when f.same then greatest(c.rows_scanned, $9) else c.rows_scanned end,
       rows_updated = c.rows_updated + $10, batch_rows = $11, finished = f.same and $12,
       batches = c.batches + 1, updated_at = clock_timestamp()
     from (select pg_relation_filenode($4::oid) = $3::oid as same) as f
     where c.job = $1 and c.lane = $2
     returning f.same, pg_stat_get_xact_tuples_hot_updated($4::oid), pg_stat_get_xact_tuples_updated($4::oid),
       pg_current_xact_id()::text";
