//! What went before, for whoever watches: read once when the lease is ours, so that looking costs the database nothing.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::error::Result;
use crate::ledger::{checkpoint, event, verdict};
use crate::progress::{self, Event, PhaseSpan, Progress, Proof};

/// Events of earlier processes that are shown.
const EVENTS: i64 = 30;

/// Fills in phases, counts, proof and events of earlier processes.
///
/// # Errors
/// Database errors.
pub(super) async fn recall(client: &Client, job: &str, progress: &Progress) -> Result<()> {
    let mut before = 0;
    let mut timeline = Vec::new();
    for (phase, begun_ms, ended_ms) in event::phases(client, job).await? {
        let since_ms = if before == 0 { begun_ms.unsigned_abs() } else { before };
        before = ended_ms.unsigned_abs();
        timeline.push(PhaseSpan { phase, since_ms, until_ms: Some(before) });
    }
    let done = checkpoint::total(client, job).await?;
    let quarantined = checkpoint::quarantined(client, job).await?;
    let proof = verdict::latest(client, job).await?.map(|(at_ms, v)| proof("data", at_ms.unsigned_abs(), &v));
    progress.update(|p| {
        if p.timeline.is_empty() {
            p.timeline = timeline;
        }
        if let Some(done) = done {
            p.rows_scanned = done.rows_scanned;
            p.rows_updated = done.rows_updated;
            p.rows_estimate = done.rows_estimate;
            p.batches = done.batches;
            p.sweep = done.sweep;
        }
        p.quarantined = quarantined;
        proof.into_iter().for_each(|proof| p.prove(proof));
    });
    let events = event::latest(client, job, EVENTS).await?;
    progress::seed(events.into_iter().rev().map(|e| Event::recalled(e.at_ms, e.kind, e.detail)).collect());
    Ok(())
}

fn proof(kind: &str, at_ms: u64, v: &verdict::Verdict) -> Proof {
    Proof {
        kind: kind.into(),
        passed: v.passed,
        at_ms,
        duration_ms: v.duration_ms.unsigned_abs(),
        checked: v.rows_checked.unsigned_abs(),
        findings: v.counts.iter().map(|(k, n)| (k.clone(), n.unsigned_abs())).collect::<BTreeMap<_, _>>(),
    }
}
