//! What the lanes of a sweep share: who may begin a batch, and how far they are together.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::heap_cursor::lanes_at_work;
use super::walk::Lane;
use crate::context::Context;
use crate::eta::Estimator;
use crate::job::throttle::Pace;
use crate::ledger::checkpoint::Checkpoint;
use crate::progress::{Eta, Rate};
use crate::throttle::Throttle;

/// How often a long run says how far it is.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// What the lanes share.
pub(super) struct Team {
    /// Fires when one of them stops before its end.
    pub(super) stop: CancellationToken,
    pub(super) throttle: Throttle,
    pub(super) rows_estimate: i64,
    /// Pages of the table when the sweep began; `None`: it is not walked in heap order.
    pub(super) pages: Option<u64>,
    sum: Mutex<Sum>,
}

struct Sum {
    /// Lanes that have reached their end.
    ended: Vec<bool>,
    /// Rows scanned, rows updated, batches; by lane.
    done: Vec<[i64; 3]>,
    /// Done part of each lane's range, 0 to 1.
    ratios: Vec<f64>,
    rate: Rate,
    pace: Estimator,
    began: Instant,
    reported: Instant,
}

impl Team {
    pub(super) fn new(ctx: &Context, lanes: &[Lane]) -> Self {
        Self {
            stop: CancellationToken::new(),
            throttle: Throttle::start(ctx, lanes.iter().map(|l| &l.session)),
            rows_estimate: lanes.iter().map(|l| l.checkpoint.rows_estimate).sum(),
            pages: lanes.iter().filter_map(|l| l.walk.bound()).max(),
            sum: Mutex::new(Sum {
                ended: lanes.iter().map(|l| l.checkpoint.finished).collect(),
                done: lanes.iter().map(|l| done(&l.checkpoint)).collect(),
                ratios: lanes.iter().map(|l| l.walk.ratio(&l.checkpoint)).collect(),
                pace: Estimator::default(),
                began: Instant::now(),
                rate: Rate::new(Duration::from_secs(10)),
                reported: Instant::now(),
            }),
        }
    }

    /// Whether a lane may begin a batch: so many of those that are not at their end may as [`lanes_at_work`] says, the first ones
    /// first. So fewer lanes take effect at once, and more than the sweep has with the next sweep.
    pub(super) fn has_turn(&self, ctx: &Context, lane: usize) -> bool {
        let live = ctx.live.now();
        let adapts = live.throttle.pace == Pace::Auto;
        let most = lanes_at_work(live.batching.lanes, adapts, self.throttle.pace()) as usize;
        let sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        sum.ended.iter().take(lane).filter(|ended| !**ended).count() < most
    }

    pub(super) fn ended(&self, lane: usize) {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mine) = sum.ended.get_mut(lane) {
            *mine = true;
        }
        if let Some(mine) = sum.ratios.get_mut(lane) {
            *mine = 1.0;
        }
    }

    /// Notes how far a lane is. Gives the sums, rows per second, and whether it is time to say so.
    pub(super) fn note(&self, lane: usize, ratio: f64, checkpoint: &Checkpoint) -> ([i64; 3], f64, bool) {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mine) = sum.done.get_mut(lane) {
            *mine = done(checkpoint);
        }
        if let Some(mine) = sum.ratios.get_mut(lane) {
            *mine = ratio;
        }
        let all = sum.done.iter().fold([0; 3], |a, d| [a[0] + d[0], a[1] + d[1], a[2] + d[2]]);
        let rate = sum.rate.observe(Instant::now(), all[0]);
        let report = sum.reported.elapsed() > REPORT_EVERY;
        if report {
            sum.reported = Instant::now();
        }
        (all, rate, report)
    }

    /// Done part of the sweep, and how long the rest will take. Lanes have equal ranges.
    pub(super) fn outlook(&self) -> (f64, Option<Eta>) {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        let ratio = sum.ratios.iter().sum::<f64>() / sum.ratios.len().max(1) as f64;
        let at = sum.began.elapsed();
        sum.pace.observe(at, ratio);
        (ratio, sum.pace.eta())
    }
}

fn done(c: &Checkpoint) -> [i64; 3] {
    [c.rows_scanned, c.rows_updated, c.batches]
}
