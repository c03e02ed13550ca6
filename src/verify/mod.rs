//! The proof that the data is right: no NULLs, no drift, no orphans, no disagreement of paths, and sync triggers that keep it so.
//!
//! A row that moves while the scan runs has been written, and the sync triggers derive every version that is written; so
//! a row that the scan misses because it moved behind it is right by construction (I1). For the same reason a proof that was
//! interrupted goes on where it was, as long as triggers, columns and keys are what they were.

pub mod proof;
pub mod repair;
pub mod standing;
pub mod state;
pub mod sync;

use std::time::{Duration, Instant};

use tracing::{info, warn};

pub use self::proof::{DRIFT, Part, Proof, UNFILLED, UNUSABLE_SOURCES, Walk};
pub use self::standing::verdict_holds;
use self::state::State;
use crate::context::Context;
use crate::error::{Error, Result, Retry};
use crate::fault;
use crate::ledger::verdict::{self, ServerIdentity, Verdict};
use crate::ledger::verification::{self, Basis};
use crate::ledger::{checkpoint, event, lease};
use crate::live::{Live, Tunables};
use crate::metrics;
use crate::pg::connect::Session;
use crate::progress::{self, Eta};
use crate::throttle::Throttle;

/// Kind of the finding that counts sync triggers that are missing, disabled or changed.
pub const SYNC: &str = "sync_triggers";
/// Kind of the finding that counts quarantined rows.
pub const QUARANTINED: &str = "quarantined";

/// Chunks in a row that are cancelled, at the smallest size, before a human is asked.
const MAX_CANCELLED: u32 = 20;
/// Pause after a chunk that was cancelled: whoever waited for it has the table first.
const AFTER_CANCEL: Duration = Duration::from_millis(200);

/// Runs the proof under the lease and stores the verdict. A proof that an earlier run began goes on at its chunk.
///
/// # Errors
/// Database errors, lease lost, interrupted. A verdict that did not pass is not an error here.
pub async fn run(ctx: &Context) -> Result<Verdict> {
    let session = ctx.connect("verify").await?;
    session.client.batch_execute(proof::SETTINGS).await?;
    let server = ServerIdentity::read(&session.client).await?;
    let state = json(&State::read(&session.client, &ctx.spec, &ctx.facts).await?)?;
    let basis = Basis { job_hash: ctx.spec.hash(), server, state };
    let proof = for_job(ctx, &session).await?;
    let mut walk = resume(ctx, &session, &basis).await?.unwrap_or_else(|| proof.begin());
    let began_at = walk.rows_checked;
    walk_on(ctx, &session, &proof, &basis, &mut walk).await?;
    let looked_at = walk.rows_checked - began_at;
    let mut verdict = proof.verdict(walk);
    verdict.add(SYNC, sync::broken(&session.client, &ctx.facts.shape).await?);
    let quarantined = checkpoint::quarantined(&session.client, ctx.job()).await?;
    verdict.count(QUARANTINED, quarantined);
    store(ctx, &basis, &verdict).await?;
    show(ctx, &verdict, quarantined);
    metrics::verify_checked(ctx.job(), looked_at.max(0).unsigned_abs());
    metrics::verify_findings(ctx.job(), verdict.counts.iter().map(|(kind, n)| (kind.as_str(), n.unsigned_abs())));
    info!(
        job = ctx.job(),
        passed = verdict.passed,
        rows_checked = verdict.rows_checked,
        duration_ms = verdict.duration_ms,
        found = verdict.summary(),
        "verified"
    );
    Ok(verdict)
}

/// The proof of the context's job, with the rows left out that an operator accepted.
///
/// # Errors
/// Database errors.
pub async fn for_job(ctx: &Context, session: &Session) -> Result<Proof> {
    let proof = Proof::new(&ctx.spec, &ctx.facts);
    let accepted = checkpoint::accepted(&session.client, ctx.job()).await?;
    Ok(if accepted > 0 { proof.accepting() } else { proof })
}

/// The walk of an earlier run, if it was made on the same.
async fn resume(ctx: &Context, session: &Session, basis: &Basis) -> Result<Option<Walk>> {
    let Some(stored) = verification::find(&session.client, ctx.job(), basis).await? else { return Ok(None) };
    // One of another version is no loss: the proof begins anew.
    let Ok(walk) = serde_json::from_value::<Walk>(stored) else { return Ok(None) };
    info!(job = ctx.job(), rows_checked = walk.rows_checked, "the verification goes on at {}", walk.place());
    let detail = serde_json::json!({ "at": walk.place(), "rows_checked": walk.rows_checked });
    event::record(&session.client, ctx.job(), "verification goes on", detail).await?;
    Ok(Some(walk))
}

/// Chunk by chunk to the end, waiting for what makes reads wait.
async fn walk_on(ctx: &Context, session: &Session, proof: &Proof, basis: &Basis, walk: &mut Walk) -> Result<()> {
    let reading = reading(ctx);
    let throttle = Throttle::start(&reading, std::iter::once(session));
    let (began, began_at) = (Instant::now(), walk.rows_checked);
    let mut cancelled = 0;
    while walk.part != Part::Done {
        ctx.check()?;
        reading.live.set(for_reads(ctx));
        throttle.clear(&reading, true).await?;
        checked(ctx, began_at, walk.rows_checked, began.elapsed());
        match proof.step(&session.client, walk).await {
            Ok(()) => {
                cancelled = 0;
                save(ctx, basis, walk).await?;
                fault::point("after-chunk");
            }
            Err(e) if e.retry() == Retry::Smaller => {
                cancelled += u32::from(!walk.smaller());
                if cancelled > MAX_CANCELLED {
                    return Err(e.context("chunks of the verification are cancelled again and again"));
                }
                warn!(
                    job = ctx.job(),
                    sqlstate = e.sqlstate(),
                    "a chunk was cancelled, going on with a smaller one: {e}"
                );
                metrics::retry(ctx.job(), e.sqlstate());
                ctx.pause(AFTER_CANCEL).await?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Shows how far the proof is. Every row costs about the same, so what went before tells how long the rest will take.
fn checked(ctx: &Context, began_at: i64, rows: i64, took: Duration) {
    ctx.progress.update(|p| {
        p.note = format!("verifying, {rows} rows checked");
        p.rows_verified = rows;
        if p.rows_estimate > 0 && rows > began_at {
            p.ratio = (rows as f64 / p.rows_estimate as f64).min(1.0);
            let seconds = took.as_secs_f64() * (p.rows_estimate - rows).max(0) as f64 / (rows - began_at) as f64;
            p.eta = Some(Eta { seconds, least_seconds: seconds, most_seconds: seconds });
            metrics::progress(ctx.job(), p.ratio, Some(progress::now_ms() as f64 / 1000.0 + seconds));
        }
    });
}

fn show(ctx: &Context, verdict: &Verdict, quarantined: i64) {
    ctx.progress.update(|p| {
        p.ratio = 1.0;
        p.rows_verified = verdict.rows_checked;
        p.quarantined = quarantined;
        p.prove(progress::Proof {
            kind: "data".into(),
            passed: verdict.passed,
            at_ms: progress::now_ms(),
            duration_ms: verdict.duration_ms.unsigned_abs(),
            checked: verdict.rows_checked.unsigned_abs(),
            findings: verdict.counts.iter().map(|(kind, n)| (kind.clone(), n.unsigned_abs())).collect(),
        });
    });
}

/// The context with the throttle of reads.
pub fn reading(ctx: &Context) -> Context {
    Context { live: Live::new(for_reads(ctx)), ..ctx.clone() }
}

fn for_reads(ctx: &Context) -> Tunables {
    let now = ctx.live.now();
    Tunables { throttle: now.throttle.for_reads(), ..(*now).clone() }
}

async fn save(ctx: &Context, basis: &Basis, walk: &Walk) -> Result<()> {
    let mut client = ctx.client().await?;
    let tx = client.transaction().await?;
    // Lost with a crash, the chunk is looked at again.
    tx.batch_execute("set local synchronous_commit = off").await?;
    lease::fence(&*tx, &ctx.lease).await?;
    verification::save(&*tx, ctx.job(), basis, &json(walk)?).await?;
    Ok(tx.commit().await?)
}

async fn store(ctx: &Context, basis: &Basis, verdict: &Verdict) -> Result<()> {
    let mut client = ctx.client().await?;
    let tx = client.transaction().await?;
    lease::fence(&*tx, &ctx.lease).await?;
    verdict::store(&*tx, ctx.job(), &basis.job_hash, &basis.server, &basis.state, verdict).await?;
    verification::store_findings(&*tx, ctx.job(), "verify", &verdict.samples).await?;
    verification::forget(&*tx, ctx.job()).await?;
    let detail =
        serde_json::json!({ "passed": verdict.passed, "rows": verdict.rows_checked, "counts": verdict.counts });
    event::record(&*tx, ctx.job(), "verdict", detail).await?;
    Ok(tx.commit().await?)
}

/// A state for the ledger.
///
/// # Errors
/// None that can be expected.
pub fn json(value: &impl serde::Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::internal("state as JSON").with_source(e))
}
