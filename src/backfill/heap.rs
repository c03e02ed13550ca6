//! Batches in heap order; see [`super::heap_cursor`] for the idea.

use std::time::{Duration, Instant};

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient, Statement};
use tracing::{info, warn};

use super::batch::{Batch, Failed};
use super::heap_cursor::{HeapCursor, MAX_SLICE_PAGES, Slice, initial_rounds, next_rounds};
use crate::context::Context;
use crate::error::{Error, Result, Retry};
use crate::ledger::checkpoint::{self, Checkpoint};
use crate::ledger::heap::{self, HeapPlace};
use crate::ledger::{event, lease};
use crate::pg::connect::Session;
use crate::phase::Status;
use crate::plan::heap_sql;

/// A walk in heap order, with its statements prepared.
pub struct HeapWalk {
    statements: Statements,
    filenode: u32,
    cursor: HeapCursor,
    oid: u32,
    /// HOT and all updates in the first round and in the others of the current window.
    hot: [(u64, u64); 2],
}

struct Statements {
    fence: Statement,
    fill: Statement,
    advance: Statement,
    unfilled: Statement,
    fill_row: Statement,
}

impl HeapWalk {
    /// Goes on where the checkpoint stands, or begins a sweep.
    ///
    /// # Errors
    /// Database errors, lease lost.
    pub async fn open(ctx: &Context, session: &mut Session, checkpoint: &mut Checkpoint) -> Result<Self> {
        let statements = Statements::prepare(ctx, &session.client).await?;
        let oid = ctx.facts.target.oid;
        let found = heap::find(&session.client, ctx.job(), 0).await?;
        let mut walk = Self { statements, filenode: 0, cursor: HeapCursor::new(0, 1), oid, hot: [(0, 0); 2] };
        match found {
            Some(place) if place.filenode == filenode(&session.client, oid).await? => walk.take(place),
            Some(_) => walk.begin(ctx, session, checkpoint, "the table was rewritten").await?,
            None => walk.begin(ctx, session, checkpoint, "new sweep").await?,
        }
        Ok(walk)
    }

    /// Begins at the first page, with the table's present size as bound: rows that come later are the triggers' affair.
    async fn begin(
        &mut self,
        ctx: &Context,
        session: &mut Session,
        checkpoint: &mut Checkpoint,
        why: &str,
    ) -> Result<()> {
        let tx = session.client.transaction().await?;
        lease::fence(&tx, &ctx.lease).await?;
        let row = tx
            .query_one(
                "select pg_relation_filenode($1::oid), pg_relation_size($1::oid) / current_setting('block_size')::int8,
                        greatest(reltuples, 0)::float8 / greatest(relpages, 1) from pg_class where oid = $1::oid",
                &[&self.oid],
            )
            .await?;
        let bound = row.get::<_, i64>(1).unsigned_abs();
        let rounds = initial_rounds(row.get(2));
        self.filenode = row.get(0);
        self.cursor = HeapCursor::new(bound, rounds);
        checkpoint.strategy = "heap".into();
        checkpoint.finished = false;
        checkpoint::put(&tx, ctx.job(), 0, checkpoint).await?;
        heap::put(&tx, ctx.job(), 0, &self.place()).await?;
        let detail = serde_json::json!({ "why": why, "pages": bound, "rounds": rounds });
        event::record(&tx, ctx.job(), "heap_sweep", detail).await?;
        tx.commit().await?;
        info!(job = ctx.job(), pages = bound, rounds, "walking in heap order: {why}");
        Ok(())
    }

    fn take(&mut self, p: HeapPlace) {
        self.filenode = p.filenode;
        self.cursor = HeapCursor { window: p.window, block: p.block, round: p.round, rounds: p.rounds, bound: p.bound };
    }

    fn place(&self) -> HeapPlace {
        let c = self.cursor;
        let (window, block, round, rounds, bound) = (c.window, c.block, c.round, c.rounds, c.bound);
        HeapPlace { filenode: self.filenode, window, block, round, rounds, bound }
    }

    /// Share of the sweep that is done, 0 to 1.
    pub fn ratio(&self) -> f64 {
        self.cursor.ratio()
    }

    /// Most pages of a batch, so that it locks at most `rows` rows.
    pub fn most_pages(&self, ctx: &Context, rows: u32) -> u32 {
        let pages = self.cursor.bound.max(1) as f64;
        let per_page = (f64::from(ctx.facts.target.rows_estimate.max(1.0)) / pages).max(1.0);
        (f64::from(rows) * f64::from(self.cursor.rounds) / per_page).clamp(1.0, f64::from(MAX_SLICE_PAGES)) as u32
    }

    /// Runs the next batch of up to `pages` pages; as [`super::batch::run`].
    ///
    /// # Errors
    /// As there.
    pub async fn batch(
        &mut self,
        ctx: &Context,
        session: &mut Session,
        checkpoint: &mut Checkpoint,
        pages: u32,
        next_pages: impl FnOnce(u32, Duration) -> u32,
    ) -> std::result::Result<Batch, Failed> {
        let Some(slice) = self.cursor.slice(pages) else {
            return self.finish(ctx, session, checkpoint).await;
        };
        let began = Instant::now();
        let attempt = self.attempt(ctx, &session.client, checkpoint, slice, began, next_pages).await;
        if !matches!(attempt, Ok(Attempt::Committed(_))) {
            // What a broken connection makes of this does not matter: its transaction is gone as well.
            let _ = session.client.batch_execute("rollback").await;
        }
        match attempt.map_err(|error| Failed { error, range: Some((Vec::new(), (slice.high - slice.low) as u32)) })? {
            Attempt::Committed(batch) => Ok(batch),
            Attempt::NotRunning => Ok(Batch::NotRunning),
            Attempt::Rewritten => {
                self.begin(ctx, session, checkpoint, "the table was rewritten").await?;
                Ok(Batch::Committed { units: 0, scanned: 0, updated: 0, took: began.elapsed() })
            }
        }
    }

    /// One transaction in two round trips: `begin`, fence and update go out together, checkpoint and `commit` as well.
    ///
    /// Nothing is lost by not waiting in between. Without the fence the transaction is rolled back. Where the table was
    /// rewritten the checkpoint does not move, and what was filled is right all the same.
    async fn attempt(
        &mut self,
        ctx: &Context,
        client: &Client,
        checkpoint: &mut Checkpoint,
        slice: Slice,
        began: Instant,
        next_pages: impl FnOnce(u32, Duration) -> u32,
    ) -> Result<Attempt> {
        let lease = &ctx.lease;
        let fence: [&(dyn ToSql + Sync); 3] = [&lease.job, &lease.epoch, &lease.holder];
        let bounds = Bounds::of(slice);
        let range = bounds.params();
        let (begun, status, updated) = tokio::join!(
            biased;
            client.batch_execute("begin"),
            client.query_opt(&self.statements.fence, &fence),
            client.execute(&self.statements.fill, &range),
        );
        begun?;
        let status: String = status?.ok_or_else(|| lease::lost(ctx.job()))?.get(0);
        if status != Status::Running.as_str() {
            return Ok(Attempt::NotRunning);
        }
        let updated = updated?;
        let next = self.cursor.after(slice, self.rounds_after());
        let walked = (next.ratio() * checkpoint.rows_estimate as f64) as i64;
        let units = (slice.high - slice.low) as u32;
        let size = next_pages(units, began.elapsed());
        crate::fault::point("before-commit");
        let (moved, committed) = tokio::join!(
            biased;
            self.advance(client, ctx, next, walked, updated as i64, size, false),
            client.batch_execute("commit"),
        );
        let moved = moved?;
        committed?;
        crate::fault::point("after-commit");
        let Some((hot, all)) = moved else { return Ok(Attempt::Rewritten) };
        let count = &mut self.hot[usize::from(slice.round > 0)];
        count.0 += hot;
        count.1 += all;
        if next.window != self.cursor.window {
            self.hot = [(0, 0); 2];
        }
        let scanned = (walked - checkpoint.rows_scanned).max(0);
        self.cursor = next;
        checkpoint.rows_scanned = checkpoint.rows_scanned.max(walked);
        checkpoint.rows_updated += updated as i64;
        checkpoint.batches += 1;
        checkpoint.batch_rows = size as i32;
        Ok(Attempt::Committed(Batch::Committed {
            units,
            scanned: scanned as u32,
            updated: updated as u32,
            took: began.elapsed(),
        }))
    }

    /// Rounds of the next window, from the HOT shares of this one.
    fn rounds_after(&self) -> u32 {
        let share = |(hot, all): (u64, u64)| (all > 0).then(|| hot as f64 / all as f64);
        let now = self.cursor.rounds;
        next_rounds(now, share(self.hot[0]), share(self.hot[1]))
    }

    /// Moves the checkpoint. Gives the transaction's HOT updates and all its updates of the table; `None`: the table was
    /// rewritten, the checkpoint stands where it was.
    #[expect(clippy::too_many_arguments, reason = "one value per column of the checkpoint")]
    async fn advance(
        &self,
        client: &impl GenericClient,
        ctx: &Context,
        to: HeapCursor,
        walked: i64,
        updated: i64,
        size: u32,
        finished: bool,
    ) -> Result<Option<(u64, u64)>> {
        let row = client
            .query_opt(
                &self.statements.advance,
                &[
                    &ctx.spec.name,
                    &0i32,
                    &self.filenode,
                    &self.oid,
                    &(to.window as i64),
                    &(to.block as i64),
                    &(to.round as i32),
                    &(to.rounds as i32),
                    &walked,
                    &updated,
                    &(size as i32),
                    &finished,
                ],
            )
            .await?;
        Ok(row.map(|r| (r.get::<_, i64>(0).unsigned_abs(), r.get::<_, i64>(1).unsigned_abs())))
    }

    async fn finish(
        &mut self,
        ctx: &Context,
        session: &mut Session,
        checkpoint: &mut Checkpoint,
    ) -> std::result::Result<Batch, Failed> {
        let tx = session.client.transaction().await?;
        lease::fence(&tx, &ctx.lease).await?;
        // Under a lock, as a batch: or a rewrite could come between the check and the commit.
        tx.batch_execute(&format!("lock table {} in row exclusive mode", ctx.facts.shape.target.sql())).await?;
        let size = checkpoint.batch_rows.unsigned_abs();
        if self.advance(&tx, ctx, self.cursor, checkpoint.rows_estimate, 0, size, true).await?.is_none() {
            tx.rollback().await?;
            self.begin(ctx, session, checkpoint, "the table was rewritten").await?;
            return Ok(Batch::Committed { units: 0, scanned: 0, updated: 0, took: Duration::ZERO });
        }
        tx.commit().await?;
        checkpoint.finished = true;
        checkpoint.rows_scanned = checkpoint.rows_scanned.max(checkpoint.rows_estimate);
        Ok(Batch::End)
    }

    /// A page with a row that cannot be updated: fills its rows one by one, each in a transaction of its own, and puts
    /// aside what fails. The batch that follows finds the rest filled.
    ///
    /// # Errors
    /// Everything that is not about a row. Gives the number of rows put aside.
    pub async fn row_by_row(
        &mut self,
        ctx: &Context,
        session: &mut Session,
        checkpoint: &mut Checkpoint,
    ) -> Result<u32> {
        let Some(slice) = self.cursor.slice(1) else { return Ok(0) };
        let bounds = Bounds::of(slice);
        let rows = session.client.query(&self.statements.unfilled, &bounds.params()).await?;
        let mut aside = 0;
        for row in rows {
            let tid: String = row.get(0);
            let tx = session.client.transaction().await?;
            lease::fence(&tx, &ctx.lease).await?;
            match tx.execute(&self.statements.fill_row, &[&tid]).await.map_err(Error::from) {
                Ok(updated) => {
                    tx.execute(
                        "update backfilld.checkpoint set rows_updated = rows_updated + $2 where job = $1 and lane = 0",
                        &[&ctx.spec.name, &(updated as i64)],
                    )
                    .await?;
                    tx.commit().await?;
                    checkpoint.rows_updated += updated as i64;
                }
                Err(e) if e.retry() == Retry::Never && super::is_about_a_row(e.sqlstate().unwrap_or_default()) => {
                    tx.rollback().await?;
                    let key: Vec<String> = (1..row.len()).map(|i| row.get(i)).collect();
                    let tx = session.client.transaction().await?;
                    lease::fence(&tx, &ctx.lease).await?;
                    super::batch::quarantine(ctx, &tx, &key, &e).await?;
                    tx.commit().await?;
                    aside += 1;
                }
                Err(e) => return Err(e),
            }
        }
        // Nothing of this slice is left to fill but what is aside: step over it.
        let next = self.cursor.after(slice, self.cursor.rounds);
        let tx = session.client.transaction().await?;
        lease::fence(&tx, &ctx.lease).await?;
        tx.batch_execute(&format!("lock table {} in row exclusive mode", ctx.facts.shape.target.sql())).await?;
        if self.advance(&tx, ctx, next, checkpoint.rows_scanned, 0, 1, false).await?.is_some() {
            tx.commit().await?;
            self.cursor = next;
        } else {
            tx.rollback().await?;
            warn!(job = ctx.job(), "the table was rewritten while a page was being isolated");
        }
        Ok(aside)
    }
}

impl Statements {
    async fn prepare(ctx: &Context, client: &Client) -> Result<Self> {
        let shape = &ctx.facts.shape;
        Ok(Self {
            fence: client.prepare(lease::FENCE).await?,
            fill: client.prepare(&heap_sql::fill(shape)).await?,
            advance: client.prepare(heap::ADVANCE).await?,
            unfilled: client.prepare(&heap_sql::unfilled(shape)).await?,
            fill_row: client.prepare(&heap_sql::fill_row(shape)).await?,
        })
    }
}

/// What became of one transaction.
enum Attempt {
    Committed(Batch),
    NotRunning,
    Rewritten,
}

/// A slice as statement parameters.
struct Bounds {
    low: String,
    high: String,
    mask: i32,
    round: i32,
}

impl Bounds {
    fn of(slice: Slice) -> Self {
        Self {
            low: format!("({},0)", slice.low),
            high: format!("({},0)", slice.high),
            mask: slice.rounds as i32 - 1,
            round: slice.round as i32,
        }
    }

    fn params(&self) -> [&(dyn ToSql + Sync); 4] {
        [&self.low, &self.high, &self.mask, &self.round]
    }
}

async fn filenode(client: &Client, oid: u32) -> Result<u32> {
    let row = client
        .query_opt("select pg_relation_filenode($1::oid) where pg_relation_filenode($1::oid) is not null", &[&oid])
        .await?;
    row.map(|r| r.get(0)).ok_or_else(|| Error::refused("the target table is gone"))
}
