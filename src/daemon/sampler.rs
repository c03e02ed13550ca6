//! Takes samples of the job's course into the ledger while a lease is held. What cannot be written is left out: a report
//! with a gap is no reason to stop work.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::context::Context;
use crate::error::Result;
use crate::ledger::lease;
use crate::ledger::sample::{self, Own};

/// The last sample must not keep a process that is asked to leave.
const PATIENCE: Duration = Duration::from_secs(1);

/// A sampler at work.
pub(super) struct Sampler {
    task: JoinHandle<()>,
    stop: CancellationToken,
}

impl Sampler {
    pub(super) fn start(ctx: Context) -> Self {
        let stop = CancellationToken::new();
        Self { task: tokio::spawn(run(ctx, stop.clone())), stop }
    }

    /// Takes the last sample, and ends.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(PATIENCE, &mut self.task).await.is_err() {
            self.task.abort();
            let _ = self.task.await;
        }
    }
}

async fn run(ctx: Context, stop: CancellationToken) {
    let mut progress = ctx.progress.watch();
    let mut before: Option<BTreeMap<String, u64>> = None;
    // Under an earlier lease of this process: in the ledger already.
    let stored = ctx.progress.tally().1;
    let (mut born, mut written) = (Instant::now(), 0u32);
    loop {
        if ctx.lost.is_cancelled() {
            return;
        }
        let phase = progress.borrow().phase.clone();
        match take(&ctx, &phase, &stored, &mut before, &mut born, written).await {
            Ok(()) => written += 1,
            Err(e) => debug!(job = ctx.job(), sqlstate = e.sqlstate(), "no sample: {e}"),
        }
        if stop.is_cancelled() {
            return;
        }
        // A new phase has its first sample at once.
        tokio::select! {
            () = tokio::time::sleep(sample::spacing(born.elapsed())) => {}
            Ok(_) = progress.wait_for(|p| p.phase != phase) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn take(
    ctx: &Context,
    phase: &str,
    stored: &BTreeMap<String, Duration>,
    before: &mut Option<BTreeMap<String, u64>>,
    born: &mut Instant,
    written: u32,
) -> Result<()> {
    let mut client = ctx.client().await?;
    let earlier = match before {
        Some(earlier) => earlier,
        None => {
            let (age, earlier) = sample::latest(&**client, ctx.job()).await?;
            *born = Instant::now().checked_sub(age).unwrap_or(*born);
            before.insert(earlier)
        }
    };
    let tx = client.transaction().await?;
    // Sizes wait for whoever locks the table; a sample is not worth it.
    tx.batch_execute("set local lock_timeout = '200ms'; set local synchronous_commit = off").await?;
    lease::fence(&*tx, &ctx.lease).await?;
    let (batches, waited) = ctx.progress.tally();
    let mut throttled_ms = earlier.clone();
    for (signal, time) in &waited {
        let new = time.saturating_sub(stored.get(signal).copied().unwrap_or_default());
        *throttled_ms.entry(signal.clone()).or_default() += new.as_millis() as u64;
    }
    let table = ctx.spec.target.table.sql();
    let own = Own { phase, table: &table, throttled_ms, batch_ms: percentiles(batches) };
    sample::put(&*tx, ctx.job(), &own).await?;
    if written.is_multiple_of(50) {
        sample::thin(&*tx, ctx.job()).await?;
    }
    tx.commit().await?;
    Ok(())
}

fn percentiles(mut batches: Vec<Duration>) -> Option<(f64, f64)> {
    batches.sort_unstable();
    let at = |share: f64| {
        let i = (batches.len() as f64 * share).ceil() as usize;
        batches.get(i.saturating_sub(1)).map(|d| d.as_secs_f64() * 1000.0)
    };
    Some((at(0.5)?, at(0.99)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_there() {
        assert_eq!(percentiles(Vec::new()), None);
        let ms = |n| Duration::from_millis(n);
        assert_eq!(percentiles(vec![ms(7)]), Some((7.0, 7.0)));
        assert_eq!(percentiles((1..=100).map(ms).collect()), Some((50.0, 99.0)));
    }
}
