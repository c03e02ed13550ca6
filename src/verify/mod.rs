//! The proof that the data is right: no NULLs, no drift, no orphans, no disagreement of paths; chunk by chunk, each chunk
//! with a snapshot of its own, so that no long one holds back vacuum or an index build (hazard 24).
//!
//! A row that moves while the scan runs has been written, and the sync triggers derive every version that is written; so
//! a row that the scan misses because it moved behind it is right by construction (I1).

pub mod standing;
pub mod state;
pub mod sync;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::info;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::ledger::verdict::{self, ServerIdentity, Verdict};
use crate::ledger::{checkpoint, event, lease};
use crate::metrics;
use crate::plan::verify_sql::{self, Finding};
use crate::plan::{Facts, Shape};
use crate::progress::{self, Eta};

pub use self::standing::verdict_holds;
use self::state::State;

/// Everything the proof runs, rendered once.
#[derive(Debug, Clone)]
pub struct Proof {
    from: String,
    findings: Vec<Finding>,
    shape: Shape,
    unusable: Option<(String, String)>,
    chunk_pages: u64,
    sample: u32,
}

/// Kind of the finding that counts source rows without a legal value.
pub const UNUSABLE_SOURCES: &str = "unusable_sources";
/// Kind of the finding that counts rows with another value than their source.
pub const DRIFT: &str = "drift";
/// Kind of the finding that counts sync triggers that are missing, disabled or changed.
pub const SYNC: &str = "sync_triggers";
/// Kind of the finding that counts quarantined rows.
pub const QUARANTINED: &str = "quarantined";

impl Proof {
    /// Renders the proof of a job.
    pub fn new(spec: &JobSpec, facts: &Facts) -> Self {
        let agree: Vec<_> =
            spec.agree.iter().zip(&facts.agree).map(|(a, shape)| verify_sql::agree_shape(a, shape)).collect();
        let unusable = (!spec.side_effects.source_may_lack_value)
            .then(|| verify_sql::unusable_sources(&facts.shape, &spec.foreign_keys))
            .flatten()
            .map(|(table, tail)| (table.sql(), tail));
        Self {
            from: verify_sql::from(&facts.shape, &spec.foreign_keys, &agree),
            findings: verify_sql::findings(&facts.shape, &spec.foreign_keys, &agree),
            shape: facts.shape.clone(),
            unusable,
            chunk_pages: u64::from(spec.verification.chunk_pages),
            sample: spec.verification.sample,
        }
    }

    /// Runs it. `between` is called between chunks with rows checked so far; it may stop the proof. Reads only, so it also
    /// works on a standby.
    ///
    /// # Errors
    /// Database errors, and what `between` returns.
    pub async fn run(&self, client: &Client, mut between: impl AsyncFnMut(i64) -> Result<()>) -> Result<Verdict> {
        let began = Instant::now();
        let mut v = Verdict {
            passed: false,
            rows_checked: 0,
            counts: self.findings.iter().map(|f| (f.kind.clone(), 0)).collect(),
            samples: BTreeMap::new(),
            duration_ms: 0,
        };
        let pages: i64 = client
            .query_one(
                "select pg_relation_size(to_regclass($1)) / current_setting('block_size')::int8",
                &[&self.shape.target.sql()],
            )
            .await?
            .get(0);
        let mut low = 0u64;
        loop {
            between(v.rows_checked).await?;
            let high = low + self.chunk_pages;
            // The last chunk has no upper end: it takes what was appended meanwhile as well.
            let last = high >= pages.unsigned_abs();
            let range = verify_sql::page_range(low, (!last).then_some(high));
            self.chunk(client, &range, &mut v).await?;
            if last {
                break;
            }
            low = high;
        }
        if let Some((table, tail)) = &self.unusable {
            let n: i64 = client
                .query_one(&format!("select count(*) {tail}"), &[])
                .await
                .map_err(|e| Error::from(e).context(format!("looking for rows of {table} without a legal value")))?
                .get(0);
            v.counts.insert(UNUSABLE_SOURCES.into(), n);
        }
        let broken = sync::broken(client, &self.shape).await?;
        v.counts.insert(SYNC.into(), broken.len() as i64);
        if !broken.is_empty() {
            v.samples.insert(SYNC.into(), broken.into_iter().map(|b| vec![b]).collect());
        }
        v.passed = v.findings() == 0;
        v.duration_ms = began.elapsed().as_millis() as i64;
        Ok(v)
    }

    async fn chunk(&self, client: &Client, range: &str, v: &mut Verdict) -> Result<()> {
        let row = client.query_one(&verify_sql::count(&self.from, &self.findings, range), &[]).await?;
        v.rows_checked += row.get::<_, i64>(0);
        for (i, finding) in self.findings.iter().enumerate() {
            let n: i64 = row.get(i + 1);
            *v.counts.entry(finding.kind.clone()).or_default() += n;
            let listed = v.samples.get(&finding.kind).map_or(0, Vec::len) as u32;
            if n > 0 && listed < self.sample {
                let sql = verify_sql::sample(&self.shape, &self.from, finding, range, self.sample - listed);
                let keys = client.query(&sql, &[]).await?;
                let keys = keys.iter().map(|r| (0..r.len()).map(|i| r.get(i)).collect());
                v.samples.entry(finding.kind.clone()).or_default().extend(keys);
            }
        }
        Ok(())
    }
}

/// Runs the proof under the lease and stores the verdict.
///
/// # Errors
/// Database errors, lease lost, interrupted. A verdict that did not pass is not an error here.
pub async fn run(ctx: &Context) -> Result<Verdict> {
    let session = ctx.connect("verify").await?;
    // A chunk is bounded by its pages, not by time: on a cold, busy disk it may take its time.
    session.client.batch_execute("set statement_timeout = '10min'; set max_parallel_workers_per_gather = 0").await?;
    let server = ServerIdentity::read(&session.client).await?;
    let state = State::read(&session.client, &ctx.spec, &ctx.facts).await?;
    let proof = Proof::new(&ctx.spec, &ctx.facts);
    let began = Instant::now();
    let mut verdict = proof
        .run(&session.client, async |rows| {
            checked(ctx, rows, began.elapsed());
            ctx.check()
        })
        .await?;
    let quarantined = checkpoint::quarantined(&session.client, ctx.job()).await?;
    verdict.counts.insert(QUARANTINED.into(), quarantined);
    verdict.passed = verdict.findings() == 0;
    let mut client = ctx.client().await?;
    let tx = client.transaction().await?;
    lease::fence(&*tx, &ctx.lease).await?;
    verdict::store(&*tx, ctx.job(), &ctx.spec.hash(), &server, &json(&state)?, &verdict).await?;
    let detail =
        serde_json::json!({ "passed": verdict.passed, "rows": verdict.rows_checked, "counts": verdict.counts });
    event::record(&*tx, ctx.job(), "verdict", detail).await?;
    tx.commit().await?;
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
    metrics::verify_checked(ctx.job(), verdict.rows_checked.unsigned_abs());
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

/// Shows how far the proof is. Every row costs about the same, so what went before tells how long the rest will take.
fn checked(ctx: &Context, rows: i64, took: Duration) {
    ctx.progress.update(|p| {
        p.note = format!("verifying, {rows} rows checked");
        p.rows_verified = rows;
        if p.rows_estimate > 0 && rows > 0 {
            p.ratio = (rows as f64 / p.rows_estimate as f64).min(1.0);
            let seconds = took.as_secs_f64() * (1.0 - p.ratio) / p.ratio;
            p.eta = Some(Eta { seconds, least_seconds: seconds, most_seconds: seconds });
            metrics::progress(ctx.job(), p.ratio, Some(progress::now_ms() as f64 / 1000.0 + seconds));
        }
    });
}

/// A state for the ledger.
///
/// # Errors
/// None that can be expected.
pub fn json(value: &impl serde::Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::internal("state as JSON").with_source(e))
}
