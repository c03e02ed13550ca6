//! Batches in heap order; see [`super::heap_cursor`] for the idea.

use std::time::{Duration, Instant};

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient};
use tracing::{info, warn};

use super::batch::{Batch, Failed};
use super::heap_cursor::{HOT_NEVER, HOT_WORKS, HeapCursor, MAX_SLICE_PAGES, Slice, Steering};
use super::heap_statements::{Bounds, Statements};
use super::horizon::{self, Holder};
use super::plan_check::PlanCheck;
use super::session::HEAP_SETTINGS;
use crate::context::Context;
use crate::error::{Error, Result, Retry};
use crate::ledger::checkpoint::Checkpoint;
use crate::ledger::heap::HeapPlace;
use crate::ledger::{event, lease};
use crate::metrics;
use crate::pg::connect::Session;
use crate::phase::Status;
use crate::plan::rounds::initial_rounds;
use crate::plan::steps::Walk;
use crate::throttle::Flight;

/// Updates in later rounds from which their share of HOT ones means something.
const ENOUGH_UPDATES: u64 = 200;
/// Updates in later rounds from which it is certain that none of them is HOT: many batches, so not a passing snapshot.
const MANY_UPDATES: u64 = 2000;
/// How often a holder of an old snapshot is looked after while it is waited for.
const HORIZON_POLL: Duration = Duration::from_secs(1);

/// One lane of a walk in heap order, with its statements prepared.
pub struct HeapWalk {
    statements: Statements,
    lane: i32,
    filenode: u32,
    cursor: HeapCursor,
    oid: u32,
    steering: Steering,
    plan_check: PlanCheck,
    /// HOT and all updates in the first round and in the others of the current window.
    hot: [(u64, u64); 2],
    /// The server's counts of HOT and all updates as they were after the last batch.
    counted: (u64, u64),
    /// Transaction of the window's first batch.
    since: Option<String>,
    /// Who keeps dead versions from being pruned, and was not worth more waiting.
    held_by: Option<Holder>,
    /// Whether this window was looked at for that.
    asked: bool,
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
            steering: Steering::new(initial_rounds(rows_per_page)),
            plan_check: PlanCheck::default(),
            hot: [(0, 0); 2],
            counted: (0, 0),
            since: None,
            held_by: None,
            asked: false,
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
        if !matches!(attempt, Ok(Attempt::Committed(_))) {
            // What a broken connection makes of this does not matter: its transaction is gone as well.
            let _ = session.client.batch_execute("rollback").await;
        }
        match attempt.map_err(|error| Failed { error, range: Some((Vec::new(), (slice.high - slice.low) as u32)) })? {
            Attempt::Committed(batch) => {
                self.look_for_holder(ctx, &session.client).await?;
                Ok(batch)
            }
            Attempt::NotRunning => Ok(Batch::NotRunning),
            Attempt::Rewritten => Ok(Batch::Rewritten),
        }
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
    ) -> Result<Attempt> {
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
            return Ok(Attempt::NotRunning);
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
        let rounds = self.rounds_after(slice);
        let next = self.cursor.after(slice, rounds);
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
        let Some(Moved { hot, all, xid }) = moved else { return Ok(Attempt::Rewritten) };
        self.since.get_or_insert(xid);
        if let Some(hot) = hot_of_batch(self.counted, (hot, all), updated) {
            let count = &mut self.hot[usize::from(slice.round > 0)];
            metrics::hot(ctx.job(), hot);
            count.0 += hot;
            count.1 += updated;
        }
        self.counted = (hot, all);
        if next.window != self.cursor.window {
            self.hot = [(0, 0); 2];
            self.asked = false;
            self.since = self.since.take().filter(|_| self.held_by.is_some());
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
            took: flight.took(),
        }))
    }

    /// Rounds of the next window, from the HOT shares of this one.
    fn rounds_after(&mut self, slice: Slice) -> u32 {
        let ends_window = self.cursor.after(slice, 1).window != self.cursor.window;
        if !ends_window {
            return self.cursor.rounds;
        }
        let share = |(hot, all): (u64, u64)| (all > 0).then(|| hot as f64 / all as f64);
        let now = self.cursor.rounds;
        self.steering.next(now, share(self.hot[0]), share(self.hot[1]), self.held_by.is_some())
    }

    /// Where the rounds after the first find no room: looks who keeps dead versions from being pruned, says so, and waits a
    /// while. Who stays longer than that is not waited for again; it is looked after once per window.
    async fn look_for_holder(&mut self, ctx: &Context, client: &Client) -> Result<()> {
        let Some(since) = self.since.clone() else { return Ok(()) };
        let (hot, all) = self.hot[1];
        let fails = all >= ENOUGH_UPDATES && (hot as f64) < HOT_WORKS * all as f64;
        if self.asked || !(fails || self.held_by.is_some()) {
            return Ok(());
        }
        self.asked = true;
        let known = self.held_by.take();
        let Some(holder) = horizon::holder(client, &since).await? else {
            return self.nobody_holds(ctx, client).await;
        };
        if known.as_ref() == Some(&holder) {
            self.held_by = known;
            return Ok(());
        }
        let what = &holder.what;
        let patience = || ctx.live.now().batching.horizon_wait;
        warn!(
            job = ctx.job(),
            patience_s = patience().as_secs(),
            "dead row versions cannot be pruned because of {what}; waiting"
        );
        let began = Instant::now();
        while began.elapsed() < patience() {
            ctx.progress.update(|p| p.note = format!("waiting for {what}, which keeps dead rows from being pruned"));
            ctx.pause(HORIZON_POLL.min(patience())).await?;
            if horizon::holder(client, &since).await?.is_none_or(|h| h != holder) {
                info!(job = ctx.job(), waited_ms = began.elapsed().as_millis() as u64, "the old snapshot is gone");
                return Ok(());
            }
            if ctx.status().await? != Status::Running {
                return Ok(());
            }
        }
        warn!(
            job = ctx.job(),
            "going on in single rounds in spite of {what}: every row moves, with an entry in each index, and the table grows"
        );
        let detail = serde_json::json!({ "holder": what, "waited_ms": began.elapsed().as_millis() as u64 });
        event::record(client, ctx.job(), "horizon", detail).await?;
        self.held_by = Some(holder);
        Ok(())
    }

    /// Nobody keeps dead versions, and yet hardly any update is HOT: it is not for want of room.
    async fn nobody_holds(&mut self, ctx: &Context, client: &Client) -> Result<()> {
        let (hot, all) = self.hot[1];
        if hot as f64 >= HOT_NEVER * all as f64 {
            return Ok(());
        }
        if all < MANY_UPDATES {
            self.asked = false;
            return Ok(());
        }
        if !self.steering.cannot_be_hot() {
            return Ok(());
        }
        warn!(
            job = ctx.job(),
            "each row gets an entry in every index: {hot} of {all} updates are HOT although nothing holds back pruning; does a \
             trigger change an indexed column?"
        );
        event::record(client, ctx.job(), "not_hot", serde_json::json!({ "hot": hot, "updates": all })).await
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

/// HOT updates of a batch of `updated` rows, from the server's counts of HOT and all updates before and after it. They
/// go on from one transaction to the next until the server has reported them, about once a second, and then begin at zero;
/// `None`: neither explains them.
fn hot_of_batch(before: (u64, u64), after: (u64, u64), updated: u64) -> Option<u64> {
    if before.1 + updated == after.1 && before.0 <= after.0 {
        return Some(after.0 - before.0);
    }
    (after.1 == updated).then_some(after.0)
}

/// What the server says when the checkpoint has moved.
struct Moved {
    /// HOT updates of the table since this backend last reported its statistics.
    hot: u64,
    /// All updates since then.
    all: u64,
    /// The transaction.
    xid: String,
}

/// What became of one transaction.
enum Attempt {
    Committed(Batch),
    NotRunning,
    Rewritten,
}

#[cfg(test)]
mod tests {
    use super::hot_of_batch;

    #[test]
    fn counts_that_go_on_or_begin_anew_give_the_batchs_own() {
        assert_eq!(hot_of_batch((0, 0), (0, 20), 20), Some(0));
        assert_eq!(hot_of_batch((0, 20), (18, 40), 20), Some(18));
        assert_eq!(hot_of_batch((18, 40), (19, 20), 20), Some(19), "reported meanwhile");
        assert_eq!(hot_of_batch((18, 40), (30, 55), 20), None);
    }
}
