//! Watch: for a configured time after the flip, looks again and again whether everything is still as it was proven and as
//! the flip left it. What it finds ends nothing: it is shown until it is mended.

mod catalog;
mod data;

use std::time::Duration;

use serde_json::json;
use tracing::{info, warn};

use crate::context::{Context, Outcome};
use crate::error::{Kind, Result, Retry};
use crate::job::spec::Watch;
use crate::ledger::watch::{self as stored, Findings, Watched};
use crate::ledger::{event, job as jobs, lease, verification};
use crate::metrics;
use crate::phase::Status;

/// Kind of the finding that something could not be looked at: what cannot be read counts as bad (I10).
pub const BLIND: &str = "blind";
/// Kind of the finding that policies or functions are not what the flip made.
pub const POLICY_DRIFT: &str = "policy_drift";
/// Every kind, for metrics; `data` stands for all kinds of wrong rows.
pub const KINDS: [&str; 7] = [BLIND, POLICY_DRIFT, "sync_triggers", "catalog", "indexes", "constraints", "data"];

/// Runs the phase: until the time since the flip is over and nothing is wrong. Without `[watch]` it is over at once.
///
/// # Errors
/// Lease lost, interrupted, connection lost; refused if the job's status is no longer `running`.
pub async fn run(ctx: &Context) -> Result<Outcome> {
    let Some(watch) = ctx.spec.watch.clone() else { return Ok(Outcome::Complete) };
    loop {
        ctx.check()?;
        let left = tokio::select! {
            left = look(ctx, &watch) => left?,
            why = ctx.told_to_stop() => return Err(why),
        };
        let Some(left) = left else { return Ok(Outcome::Complete) };
        tokio::select! {
            () = tokio::time::sleep(left) => {}
            why = ctx.told_to_stop() => return Err(why),
        }
    }
}

/// One look at everything. Gives the time to the next one; `None`: there is no need for one.
async fn look(ctx: &Context, watch: &Watch) -> Result<Option<Duration>> {
    let session = ctx.connect("watch").await?;
    session.client.batch_execute(crate::verify::proof::SETTINGS).await?;
    let before = stored::begin(&session.client, ctx.job()).await?;
    let mut now = Watched { passes: before.passes + 1, findings: Findings::new(), ..before.clone() };
    tolerate(catalog::look(ctx, &session.client, &mut now.findings).await, &mut now.findings)?;
    // While triggers were off, rows may have been written anywhere.
    let untrusted = [&before, &now].iter().any(|w| w.findings.contains_key(crate::verify::SYNC));
    let seen = data::look(ctx, &session, watch, untrusted, &mut now).await;
    let keys = tolerate(seen, &mut now.findings)?.unwrap_or_default();
    let lasts = i64::try_from(watch.lasts.as_secs()).unwrap_or(i64::MAX);
    let over = before.seconds >= lasts && now.findings.is_empty() && !untrusted;
    store(ctx, &before, &now, &keys, watch).await?;
    let left = Duration::from_secs(lasts.saturating_sub(before.seconds).max(1).unsigned_abs());
    Ok((!over).then(|| watch.every.min(if now.findings.is_empty() { left } else { watch.every })))
}

/// What could not be looked at is a finding, unless it means that this run is over.
fn tolerate<T>(result: Result<T>, findings: &mut Findings) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e)
            if matches!(e.kind(), Kind::Interrupted | Kind::LeaseLost | Kind::Connect)
                || e.retry() == Retry::Reconnect =>
        {
            Err(e)
        }
        Err(e) => {
            findings.entry(BLIND.into()).or_default().push(e.line_without_values());
            Ok(None)
        }
    }
}

async fn store(ctx: &Context, before: &Watched, now: &Watched, keys: &data::Keys, watch: &Watch) -> Result<()> {
    let reason = reason(&now.findings);
    let hint = if reason.is_empty() {
        String::new()
    } else {
        format!("backfilld status {} has more; it clears when mended", ctx.job())
    };
    let mut client = ctx.client().await?;
    let tx = client.transaction().await?;
    lease::fence(&*tx, &ctx.lease).await?;
    stored::store(&*tx, ctx.job(), now).await?;
    verification::store_findings(&*tx, ctx.job(), "watch", keys).await?;
    jobs::set_status(&*tx, ctx.job(), &[Status::Running], Status::Running, &reason, &hint).await?;
    if now.findings != before.findings || now.passes == 1 {
        event::record(&*tx, ctx.job(), "watch", json!({ "passes": now.passes, "findings": now.findings })).await?;
    }
    tx.commit().await?;
    let ends = now_unix() + watch.lasts.as_secs_f64() - before.seconds as f64;
    let number = |kind: &str| now.findings.get(kind).map_or(0, Vec::len) as u64;
    let data = now.findings.iter().filter(|(k, _)| !KINDS.contains(&k.as_str())).map(|(_, f)| f.len() as u64).sum();
    let counts = KINDS.map(|kind| (kind, if kind == "data" { data } else { number(kind) }));
    metrics::watched(ctx.job(), now_unix(), ends, &counts, number(POLICY_DRIFT));
    ctx.progress.update(|p| {
        p.note = if reason.is_empty() { "nothing has changed".into() } else { reason.clone() };
        p.reason.clone_from(&reason);
    });
    if now.findings != before.findings {
        match reason.is_empty() {
            true => info!(job = ctx.job(), "watch: everything is as it should be again"),
            false => warn!(job = ctx.job(), "watch: {reason}"),
        }
    }
    Ok(())
}

/// What is wrong, in one line.
fn reason(findings: &Findings) -> String {
    let list: Vec<String> = findings.iter().map(|(kind, what)| format!("{kind}: {}", what.join("; "))).collect();
    list.join(" | ")
}

fn now_unix() -> f64 {
    crate::progress::now_ms() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn what_cannot_be_read_is_a_finding_and_a_lost_connection_ends_the_run() {
        let mut findings = Findings::new();
        let denied = Error::new(Kind::Database, "permission denied").with_sqlstate("42501");
        assert!(matches!(tolerate::<()>(Err(denied), &mut findings), Ok(None)));
        assert_eq!(reason(&findings), "blind: permission denied (SQLSTATE 42501)");
        let lost = Error::new(Kind::Connect, "gone");
        assert!(tolerate::<()>(Err(lost), &mut findings).is_err());
    }
}
