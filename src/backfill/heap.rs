//! Batches in heap order; see [`super::heap_cursor`] for the idea.

use std::time::Duration;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient};
use tracing::warn;

use super::batch::{Batch, Failed};
use super::heap_cursor::{HeapCursor, MAX_SLICE_PAGES, Slice};
use super::heap_statements::{Bounds, Statements};
use super::plan_check::PlanCheck;
use super::pruning::{Moved, Pruning};
use super::session::HEAP_SETTINGS;
use crate::context::Context;
use crate::error::{Error, Result, Retry};
use crate::ledger::checkpoint::Checkpoint;
use crate::ledger::heap::HeapPlace;
use crate::ledger::lease;
use crate::metrics;
use crate::pg::connect::Session;
use crate::phase::Status;
use crate::plan::rounds::initial_rounds;
use crate::plan::steps::Walk;
use crate::throttle::Flight;

/// One lane of a walk in heap order, with its statements prepared.
pub struct HeapWalk {
    statements: Statements,
    lane: i32,
    filenode: u32,
    cursor: HeapCursor,
    oid: u32,
    pruning: Pruning,
    plan_check: PlanCheck,
}

impl From<HeapPlace> for HeapCursor {
    fn from(p: HeapPlace) -> Self {
        Self { window: p.window, block: p.block, round: p.round, rounds: p.rounds, start: p.start, bound: p.bound }
    }
}

impl HeapWalk {
    /// A lane that goes on at `place`.
    ///
    /// # Errors
    /// What the server says about the job's expressions.
    pub async fn open(ctx: &Context, session: &Session, lane: i32, place: HeapPlace, rows: i64) -> Result<Self> {
        let p = place;
        let rows_per_page = rows as f64 / (p.bound - p.start).max(1) as f64;
        session.client.batch_execute(HEAP_SETTINGS).await?;
        Ok(Self {
            statements: Statements::prepare(ctx, &session.client).await?,
            lane,
            filenode: p.filenode,
            cursor: HeapCursor::from(p),
            oid: ctx.facts.target.oid,
            pruning: Pruning::new(initial_rounds(rows_per_page)),
            plan_check: PlanCheck::default(),
        })
    }

    /// Behind the lane's last page.
    pub fn bound(&self) -> u64 {
        self.cursor.bound
    }

    /// Share of the sweep that is done, 0 to 1.
    pub fn ratio(&self) -> f64 {
        self.cursor.ratio()
    }

    /// Most pages of a batch, so that it locks at most `rows` rows.
    pub fn most_pages(&self, checkpoint: &Checkpoint, rows: u32) -> u32 {
        let pages = (self.cursor.bound - self.cursor.start).max(1) as f64;
        let per_page = (checkpoint.rows_estimate as f64 / pages).max(1.0);
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
        flight: &mut Flight<'_>,
        next_pages: impl FnOnce(u32, Duration) -> u32,
    ) -> std::result::Result<Batch, Failed> {
        let Some(slice) = self.cursor.slice(pages) else {
            return self.finish(ctx, session, checkpoint).await;
        };
        let bounds = Bounds::of(slice);
        let target = &ctx.facts.shape.target;
        self.plan_check.look(&session.client, Walk::Heap, target, &bounds.execute(), &[]).await?;
        let attempt = self.attempt(ctx, &session.client, checkpoint, slice, flight, next_pages).await;
        if !matches!(attempt, Ok(Batch::Committed { .. })) {
            // What a broken connection makes of this does not matter: its transaction is gone as well.
            let _ = session.client.batch_execute("rollback").await;
        }
        attempt.map_err(|error| Failed { error, range: Some((Vec::new(), (slice.high - slice.low) as u32)) })
    }

    /// Behind a batch: looks whether dead versions can be pruned, and waits a while for who is in the way.
    ///
    /// # Errors
    /// Database errors, lease lost, interrupted.
    pub async fn look_for_holder(&mut self, ctx: &Context, session: &Session) -> Result<()> {
        self.pruning.look_for_holder(ctx, &session.client).await
    }

    /// One transaction in two round trips, and one for each piece behind the first: `begin`, fence and update go out together,
    /// checkpoint and `commit` as well.
    ///
    /// Nothing is lost by not waiting in between. Without the fence the transaction is rolled back. Where the table was
    /// rewritten the checkpoint does not move, and what was filled is right all the same.
    async fn attempt(
        &mut self,
        ctx: &Context,
        client: &Client,
        checkpoint: &mut Checkpoint,
        slice: Slice,
        flight: &mut Flight<'_>,
        next_pages: impl FnOnce(u32, Duration) -> u32,
    ) -> Result<Batch> {
        let lease = &ctx.lease;
        let fence: [&(dyn ToSql + Sync); 3] = [&lease.job, &lease.epoch, &lease.holder];
        let n = flight.pieces(ctx);
        let mut pieces = slice.pieces(n);
        let mut done = pieces.next().unwrap_or(slice);
        let bounds = Bounds::of(done);
        let range = bounds.params();
        let (begun, status, updated) = tokio::join!(
            biased;
            client.batch_execute("begin"),
            client.query_opt(&self.statements.fence, &fence),
            client.execute(&self.statements.fill, &range),
        );
        begun?;
        let fenced = status?.ok_or_else(|| lease::lost(ctx.job()))?;
        let status: String = fenced.get(0);
        ctx.live.saw(fenced.get(1));
        if status != Status::Running.as_str() {
            return Ok(Batch::NotRunning);
        }
        flight.trip();
        let mut updated = updated?;
        for piece in pieces {
            if !flight.rest(ctx).await {
                break;
            }
            crate::fault::point("between-pieces");
            updated += client.execute(&self.statements.fill, &Bounds::of(piece).params()).await?;
            flight.trip();
            done.high = piece.high;
        }
        if n > 1 {
            // The end of the transaction is as much work as a piece.
            flight.rest(ctx).await;
        }
        let slice = done;
        let ends_window = self.cursor.after(slice, 1).window != self.cursor.window;
        let next_window = ends_window.then(|| self.pruning.next_window(self.cursor.rounds));
        let next = self.cursor.after(slice, next_window.map_or(self.cursor.rounds, |w| w.rounds));
        let walked = (next.ratio() * checkpoint.rows_estimate as f64) as i64;
        let units = (slice.high - slice.low) as u32;
        let size = next_pages(units, flight.worked());
        crate::fault::point("before-commit");
        let (moved, committed) = tokio::join!(
            biased;
            self.advance(client, ctx, next, walked, updated as i64, size, false),
            client.batch_execute("commit"),
        );
        flight.trip();
        let moved = moved?;
        committed?;
        crate::fault::point("after-commit");
        let Some(moved) = moved else { return Ok(Batch::Rewritten) };
        if let Some(hot) = self.pruning.updated(updated, slice.round, moved) {
            metrics::hot(ctx.job(), hot);
        }
        if let Some(next) = next_window {
            self.pruning.begin(next);
        }
        let scanned = (walked - checkpoint.rows_scanned).max(0);
        self.cursor = next;
        checkpoint.rows_scanned = checkpoint.rows_scanned.max(walked);
        checkpoint.rows_updated += updated as i64;
        checkpoint.batches += 1;
        checkpoint.batch_rows = size as i32;
        Ok(Batch::Committed { units, scanned: scanned as u32, updated: updated as u32, took: flight.took() })
    }

    /// Moves the checkpoint. `None`: the table was rewritten, the checkpoint stands where it was.
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
    ) -> Result<Option<Moved>> {
        let row = client
            .query_opt(
                &self.statements.advance,
                &[
                    &ctx.spec.name,
                    &self.lane,
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
        let row = row.ok_or_else(|| lease::lost(ctx.job()))?;
        Ok(row.get::<_, bool>(0).then(|| Moved {
            hot: row.get::<_, i64>(1).unsigned_abs(),
            all: row.get::<_, i64>(2).unsigned_abs(),
            xid: row.get(3),
        }))
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
            return Ok(Batch::Rewritten);
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
                        "update backfilld.checkpoint set rows_updated = rows_updated + $2 where job = $1 and lane = $3",
                        &[&ctx.spec.name, &(updated as i64), &self.lane],
                    )
                    .await?;
                    tx.commit().await?;
                    checkpoint.rows_updated += updated as i64;
                }
                Err(e)
                    if e.retry() == Retry::Never && crate::error::is_about_a_row(e.sqlstate().unwrap_or_default()) =>
                {
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
