//! Whether the rounds after the first find the room that those before have left: how many of their updates are HOT, how many rounds
//! are worth it, and who keeps dead versions from being pruned.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::{info, warn};

use super::heap_cursor::{HOT_NEVER, HOT_WORKS, Steering};
use super::horizon::{self, Holder};
use crate::context::Context;
use crate::error::Result;
use crate::ledger::event;
use crate::phase::Status;

/// Updates in later rounds from which their share of HOT ones means something.
const ENOUGH_UPDATES: u64 = 200;
/// Updates in later rounds from which it is certain that none of them is HOT: many batches, so not a passing snapshot.
const MANY_UPDATES: u64 = 2000;
/// How often a holder of an old snapshot is looked after while it is waited for.
const HORIZON_POLL: Duration = Duration::from_secs(1);

/// What one lane has seen of it.
pub(super) struct Pruning {
    steering: Steering,
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

/// What the server says when the checkpoint has moved.
pub(super) struct Moved {
    /// HOT updates of the table since this backend last reported its statistics.
    pub hot: u64,
    /// All updates since then.
    pub all: u64,
    /// The transaction.
    pub xid: String,
}

/// The rounds of a window to come, and what they were found with.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub rounds: u32,
    steering: Steering,
}

impl Pruning {
    /// Begins with so many rounds.
    pub(super) fn new(rounds: u32) -> Self {
        Self {
            steering: Steering::new(rounds),
            hot: [(0, 0); 2],
            counted: (0, 0),
            since: None,
            held_by: None,
            asked: false,
        }
    }

    /// A batch of `round` has updated so many rows. Gives how many of the updates were HOT, if that is known.
    pub(super) fn updated(&mut self, updated: u64, round: u32, moved: Moved) -> Option<u64> {
        self.since.get_or_insert(moved.xid);
        let after = (moved.hot, moved.all);
        let hot = hot_of_batch(std::mem::replace(&mut self.counted, after), after, updated)?;
        let count = &mut self.hot[usize::from(round > 0)];
        count.0 += hot;
        count.1 += updated;
        Some(hot)
    }

    /// The window behind this one, from the HOT shares of this one, which has so many rounds.
    pub(super) fn next_window(&self, rounds: u32) -> Window {
        let share = |(hot, all): (u64, u64)| (all > 0).then(|| hot as f64 / all as f64);
        let mut steering = self.steering;
        let rounds = steering.next(rounds, share(self.hot[0]), share(self.hot[1]), self.held_by.is_some());
        Window { rounds, steering }
    }

    /// It has begun: the last batch of the one before is committed.
    pub(super) fn begin(&mut self, window: Window) {
        self.steering = window.steering;
        self.hot = [(0, 0); 2];
        self.asked = false;
        self.since = self.since.take().filter(|_| self.held_by.is_some());
    }

    /// Where the rounds after the first find no room: looks who keeps dead versions from being pruned, says so, and waits a
    /// while. Who stays longer than that is not waited for again; it is looked after once per window.
    ///
    /// # Errors
    /// Whatever the server says.
    pub(super) async fn look_for_holder(&mut self, ctx: &Context, client: &Client) -> Result<()> {
        let Some(since) = self.since.clone() else { return Ok(()) };
        let (hot, all) = self.hot[1];
        let fails = all >= ENOUGH_UPDATES && (hot as f64) < HOT_WORKS * all as f64;
        if self.asked || !(fails || self.held_by.is_some()) {
            return Ok(());
        }
        self.asked = true;
        let holder = horizon::holder(client, &since).await?;
        if holder.is_some() && holder == self.held_by {
            return Ok(());
        }
        self.held_by = None;
        let Some(holder) = holder else { return self.nobody_holds(ctx, client).await };
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
