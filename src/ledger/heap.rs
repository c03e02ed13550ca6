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
    /// Pages to walk.
    pub bound: u64,
}

/// Reads it; `None` where no walk in heap order has begun.
///
/// # Errors
/// Whatever the server says.
pub async fn find(client: &impl GenericClient, job: &str, lane: i32) -> Result<Option<HeapPlace>> {
    let row = client
        .query_opt(
            "select filenode, heap_window, heap_block, heap_round, heap_rounds, heap_bound
             from backfilld.checkpoint where job = $1 and lane = $2 and filenode is not null",
            &[&job, &lane],
        )
        .await?;
    Ok(row.map(|r| HeapPlace {
        filenode: r.get(0),
        window: r.get::<_, i64>(1).unsigned_abs(),
        block: r.get::<_, i64>(2).unsigned_abs(),
        round: r.get::<_, i32>(3).unsigned_abs(),
        rounds: r.get::<_, i32>(4).unsigned_abs(),
        bound: r.get::<_, i64>(5).unsigned_abs(),
    }))
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
               heap_rounds = $7, heap_bound = $8 where job = $1 and lane = $2",
            &[
                &job,
                &lane,
                &place.filenode,
                &(c.window as i64),
                &(c.block as i64),
                &(c.round as i32),
                &(c.rounds as i32),
                &(c.bound as i64),
            ],
        )
        .await?;
    Ok(())
}

/// Moves the checkpoint by one batch, provided that the table is still in the file that the pages count in; the batch's
/// own lock keeps it there until the commit. Parameters: job, lane, file node, table's oid, window, block, round, rounds,
/// rows walked so far, rows updated by this batch, size of the next batch in pages, finished. Gives this transaction's
/// HOT updates and all its updates of the table; no row: the table was rewritten.
pub const ADVANCE: &str =
    "update backfilld.checkpoint set heap_window = $5, heap_block = $6, heap_round = $7, heap_rounds = $8,
     rows_scanned = greatest(rows_scanned, $9), rows_updated = rows_updated + $10, batch_rows = $11, finished = $12,
     batches = batches + 1, updated_at = clock_timestamp()
     where job = $1 and lane = $2 and filenode = $3 and pg_relation_filenode($4::oid) = $3
     returning pg_stat_get_xact_tuples_hot_updated($4::oid), pg_stat_get_xact_tuples_updated($4::oid)";
