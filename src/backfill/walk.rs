//! The two ways to walk a table, behind one face: the loop need not know which it drives.

use std::time::Duration;

use super::batch::{self, Batch, Failed, Statements};
use super::heap::HeapWalk;
use super::sweep;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::ledger::checkpoint::Checkpoint;
use crate::pg::connect::Session;
use crate::plan::steps;
use crate::throttle::Flight;

/// Pages of the first batch in heap order: enough to measure, few enough for a cold disk.
const INITIAL_PAGES: u32 = 32;

/// A walk under way.
pub enum Walk {
    /// By key.
    Keyset(Statements),
    /// In the order of the heap.
    Heap(Box<HeapWalk>),
}

/// One range of the table with all that it takes to fill it.
pub struct Lane {
    /// Its connection.
    pub session: Session,
    /// Its way through the range.
    pub walk: Walk,
    /// How far it is.
    pub checkpoint: Checkpoint,
}

/// The lanes of the sweep that `checkpoint`, the first lane's, belongs to. An unfinished sweep keeps its kind; a new one
/// takes the plan's.
///
/// # Errors
/// Database errors, lease lost.
pub async fn lanes(ctx: &Context, mut session: Session, mut checkpoint: Checkpoint) -> Result<Vec<Lane>> {
    if kind(ctx, &checkpoint) == steps::Walk::Keyset {
        checkpoint.strategy = "keyset".into();
        let walk = Walk::Keyset(Statements::prepare(&session.client, &ctx.facts.shape).await?);
        return Ok(vec![Lane { session, walk, checkpoint }]);
    }
    let places = sweep::lanes(ctx, &mut session, &checkpoint).await?;
    let mut first = Some(session);
    let mut out = Vec::new();
    for (lane, place, checkpoint) in places {
        let session = match first.take() {
            Some(session) => session,
            None => super::connect(ctx).await?,
        };
        let walk = HeapWalk::open(ctx, &session, lane, place, checkpoint.rows_estimate).await?;
        out.push(Lane { session, walk: Walk::Heap(Box::new(walk)), checkpoint });
    }
    Ok(out)
}

impl Walk {
    /// Smallest, largest and first batch, in the walk's unit.
    pub fn limits(&self, ctx: &Context, checkpoint: &Checkpoint) -> (u32, u32, u32) {
        let b = &ctx.live.now().batching;
        let stored = checkpoint.batch_rows.unsigned_abs();
        match self {
            Self::Keyset(_) => (b.min_rows, b.max_rows, stored),
            Self::Heap(walk) => {
                let most = walk.most_pages(checkpoint, b.max_rows);
                (1, most, if checkpoint.batches == 0 { INITIAL_PAGES } else { stored })
            }
        }
    }

    /// Behind the lane's last page; `None`: it is walked by key.
    pub fn bound(&self) -> Option<u64> {
        match self {
            Self::Keyset(_) => None,
            Self::Heap(walk) => Some(walk.bound()),
        }
    }

    /// Whether a batch can be made of pieces.
    pub fn in_pieces(&self) -> bool {
        matches!(self, Self::Heap(_))
    }

    /// Done part of the lane's range, 0 to 1. By key it is that of the estimated rows, and one only at the end.
    pub fn ratio(&self, checkpoint: &Checkpoint) -> f64 {
        match self {
            _ if checkpoint.finished => 1.0,
            Self::Keyset(_) => keyset_ratio(checkpoint),
            Self::Heap(walk) => walk.ratio(),
        }
    }

    /// The next batch of up to `size` units.
    ///
    /// # Errors
    /// What the server says, with the range that was tried.
    pub async fn batch(
        &mut self,
        ctx: &Context,
        session: &mut Session,
        checkpoint: &mut Checkpoint,
        size: u32,
        flight: &mut Flight<'_>,
        next: impl FnOnce(u32, Duration) -> u32,
    ) -> std::result::Result<Batch, Failed> {
        match self {
            Self::Keyset(statements) => batch::run(ctx, session, statements, checkpoint, size, flight, next).await,
            Self::Heap(walk) => walk.batch(ctx, session, checkpoint, size, flight, next).await,
        }
    }

    /// Behind a batch, with nothing in flight: see [`HeapWalk::look_for_holder`].
    ///
    /// # Errors
    /// As there.
    pub async fn look_for_holder(&mut self, ctx: &Context, session: &Session) -> Result<()> {
        match self {
            Self::Keyset(_) => Ok(()),
            Self::Heap(walk) => walk.look_for_holder(ctx, session).await,
        }
    }

    /// Puts aside what cannot be updated in the smallest batch, whose last key (keyset) is `key`. Gives how many rows.
    ///
    /// # Errors
    /// What the server says.
    pub async fn set_aside(
        &mut self,
        ctx: &Context,
        session: &mut Session,
        checkpoint: &mut Checkpoint,
        key: &[String],
        error: &Error,
    ) -> Result<u32> {
        match self {
            Self::Keyset(statements) => {
                batch::set_aside(ctx, session, statements, checkpoint, key, error).await?;
                Ok(1)
            }
            Self::Heap(walk) => walk.row_by_row(ctx, session, checkpoint).await,
        }
    }
}

/// Done part of a sweep by key. Rows are counted over all sweeps, and their estimate can be too low: what looks like the
/// end is the end only when the walk says so.
pub fn keyset_ratio(checkpoint: &Checkpoint) -> f64 {
    if checkpoint.finished {
        return 1.0;
    }
    let (walked, estimate) = (checkpoint.rows_scanned as f64, checkpoint.rows_estimate.max(1) as f64);
    ((walked - estimate * f64::from((checkpoint.sweep - 1).max(0))) / estimate).clamp(0.0, 0.99)
}

fn kind(ctx: &Context, checkpoint: &Checkpoint) -> steps::Walk {
    match checkpoint.strategy.as_str() {
        "keyset" if checkpoint.cursor.is_some() => steps::Walk::Keyset,
        _ => steps::walk(&ctx.spec, &ctx.facts).0,
    }
}
