//! The task that measures: publishes a verdict, says why batches wait, and holds the job beyond a critical limit.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tracing::{error, info, warn};

use super::Verdict;
use super::probe::{self, Probe};
use super::pulse::Pulse;
use super::signal::{self, Judge, Reading};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::ledger::{event, job as jobs, lease};
use crate::metrics;
use crate::pg::connect::Session;
use crate::phase::Status;

/// Measures over and over.
pub(super) async fn run(ctx: Context, verdicts: watch::Sender<Verdict>, pulse: Arc<Pulse>) {
    let mut session: Option<Session> = None;
    let mut probe = Probe::default();
    let mut judge = Judge::default();
    let mut said: Option<String> = None;
    let mut changes = ctx.live.changes();
    pulse.begun().await;
    loop {
        let every = changes.borrow_and_update().throttle.every;
        let mut readings = match pass(&ctx, &mut probe, &mut session).await {
            Ok(readings) => readings,
            Err(e) => {
                session = None;
                metrics::probe_errors(ctx.job(), 1);
                vec![Reading::no("probe", format!("the signals cannot be measured: {}", e.line()))]
            }
        };
        readings.push(operator(&ctx));
        let now = ctx.live.now();
        if now.throttle.wants("commit_latency") {
            readings.push(pulse.reading(&now.throttle));
        }
        let waits = judge.judge(&readings);
        pulse.stop(!waits.is_empty());
        // First of all the batches have to stop.
        if verdicts.send(Verdict { at: Instant::now(), waits: waits.clone() }).is_err() {
            return;
        }
        for r in &readings {
            let waiting = waits.iter().any(|w| w.signal == r.signal);
            metrics::signal(ctx.job(), &r.signal, r.observed, r.threshold, waiting);
            if !r.refuses {
                metrics::database(ctx.job(), &r.signal, r.observed);
            } else if r.detail.starts_with(signal::UNREADABLE) {
                metrics::probe_errors(ctx.job(), 1);
            }
        }
        ctx.progress.update(|p| {
            let others = readings.iter().filter(|r| !waits.contains(r)).map(|r| r.shown(false));
            p.signals = waits.iter().map(|r| r.shown(true)).chain(others).collect();
        });
        if let Some((reading, limit)) = signal::critical(&readings, &now.throttle.critical) {
            hold(&ctx, reading, limit).await;
        }
        // Not at each change of a value.
        let why: Vec<String> = waits.iter().map(|r| if r.refuses { r.text() } else { r.signal.clone() }).collect();
        let why = why.join("; ");
        if said.as_ref() != Some(&why) {
            let first = said.replace(why).is_none();
            tell(&ctx, &waits, first).await;
        }
        // Other limits are looked at at once.
        let _ = tokio::time::timeout(every, changes.changed()).await;
    }
}

/// Whether an operator stopped the batches for a while.
fn operator(ctx: &Context) -> Reading {
    match &ctx.live.now().throttled {
        Some(reason) => Reading::no("operator", reason.clone()),
        None => Reading::at_most("operator", 0.0, 1.0, ""),
    }
}

async fn pass(ctx: &Context, probe: &mut Probe, session: &mut Option<Session>) -> Result<Vec<Reading>> {
    if session.is_none() {
        let new = ctx.connect("throttle").await?;
        new.client.batch_execute(&probe::session_settings()).await?;
        *session = Some(new);
    }
    let session = session.as_ref().ok_or_else(|| Error::internal("no session"))?;
    let now = ctx.live.now();
    // The server's own timeouts do not help when it has stopped to answer.
    let target = ctx.facts.shape.target.sql();
    tokio::time::timeout(probe::patience(&now.throttle), probe.measure(&session.client, &now.throttle, &target))
        .await
        .map_err(|_| Error::internal("the server does not answer"))?
}

/// Says once per change why batches wait, in the log and in the ledger, where `status` finds it from any machine.
/// `first`: nothing was said before; then a reason that an earlier run left behind is taken back in silence.
async fn tell(ctx: &Context, waits: &[Reading], first: bool) {
    let text = if waits.is_empty() { String::new() } else { format!("{}{}", jobs::WAITING, signal::text(waits)) };
    match waits.first() {
        Some(r) => {
            warn!(
                job = ctx.job(),
                signal = r.signal,
                observed = r.observed,
                threshold = r.threshold,
                "batches wait: {}",
                signal::text(waits)
            );
        }
        None if first => {}
        None => info!(job = ctx.job(), "batches go on"),
    }
    let stored = async {
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        if waits.is_empty() {
            jobs::no_longer_waits(&*tx, ctx.job()).await?;
        } else {
            jobs::set_status(&*tx, ctx.job(), &[Status::Running], Status::Running, &text, "").await?;
        }
        if !waits.is_empty() || !first {
            let detail = serde_json::json!({ "wait": !waits.is_empty(), "reason": text });
            event::record(&*tx, ctx.job(), "throttle", detail).await?;
        }
        Ok::<_, Error>(tx.commit().await?)
    };
    if let Err(e) = stored.await {
        warn!(job = ctx.job(), "the reason could not be stored: {e}");
    }
}

/// Pauses the job, durably: a restart does not walk past it, an operator's `resume` does. If it cannot be stored, the
/// batches wait all the same, and the next measurement tries again.
async fn hold(ctx: &Context, reading: &Reading, limit: f64) {
    let reason = format!("critical: {}, and beyond {limit} the job is paused", reading.text());
    let hint = format!("look what happened; then: backfilld resume {}", ctx.job());
    let stored = async {
        let mut client = ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &ctx.lease).await?;
        let held = jobs::set_status(&*tx, ctx.job(), &[Status::Running], Status::Paused, &reason, &hint).await?;
        if held {
            let detail = serde_json::json!({
                "signal": reading.signal, "observed": reading.observed, "limit": limit, "reason": reason,
            });
            event::record(&*tx, ctx.job(), "critical", detail).await?;
        }
        tx.commit().await?;
        Ok::<_, Error>(held)
    };
    match stored.await {
        Ok(true) => error!(
            job = ctx.job(),
            signal = reading.signal,
            observed = reading.observed,
            limit,
            hint,
            "the job is paused: {reason}"
        ),
        Ok(false) => {}
        Err(e) => warn!(job = ctx.job(), "the job could not be paused: {e}"),
    }
}
