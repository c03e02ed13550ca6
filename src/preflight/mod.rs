//! Preflight: everything that can be known before the first change. Reads only; works on a standby and for a login that
//! may do nothing but SELECT. One file per family of checks; docs/checks.md explains each check.

mod access;
mod bodies;
mod calls;
mod capacity;
mod check;
mod column;
mod comparison;
mod data;
mod dependents;
mod estimate;
mod expressions;
mod functions;
mod names;
mod owners;
mod policies;
mod policy_lint;
mod privileges;
mod probe;
mod propagation;
mod report;
mod report_queries;
mod scan;
mod server;
mod sessions;
mod signature;
mod state;
mod throttle;
mod triggers;
mod validation_sql;

use std::time::Duration;

use tokio_postgres::Client;

pub use check::{CATALOGUE, Check, Status};
pub use estimate::Estimate;
pub use report::{Report, Server};
pub use validation_sql::validation_queries;

use crate::error::Result;
use crate::job::JobSpec;
use crate::plan::Facts;
use probe::Probe;

/// A question that takes longer than this is asked in smaller pieces, or given up.
pub const DEFAULT_STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Older transactions hold back pruning and every CREATE INDEX CONCURRENTLY for long enough to be noticed.
pub const DEFAULT_LONG_TRANSACTION: Duration = Duration::from_secs(300);

/// How to look.
#[derive(Clone)]
pub struct PreflightOptions<'a> {
    /// The operator promises that nobody but us uses our login; then that is checked.
    pub dedicated_login: bool,
    /// Read every row. Otherwise large tables are sampled: findings are real, their absence is not proven. The verifier
    /// reads every row before the flip in any case.
    pub deep: bool,
    /// Limit for one statement.
    pub statement_timeout: Duration,
    /// How long our DDL will wait for a lock (`ddl.lock_timeout`).
    pub ddl_lock_timeout: Duration,
    /// Transactions older than this are worth a warning.
    pub long_transaction: Duration,
    /// A second session to the same target, if there is one: with two, a pooler in transaction mode is found with
    /// certainty; with one, only if it happens to switch servers while we look.
    pub other: Option<&'a Client>,
}

impl Default for PreflightOptions<'_> {
    fn default() -> Self {
        Self {
            dedicated_login: false,
            deep: true,
            statement_timeout: DEFAULT_STATEMENT_TIMEOUT,
            ddl_lock_timeout: crate::settings::DEFAULT_LOCK_TIMEOUT,
            long_transaction: DEFAULT_LONG_TRANSACTION,
            other: None,
        }
    }
}

/// Makes every check once. A check that cannot be made fails; it does not end the run.
///
/// # Errors
/// Only if the connection is lost or the server answers nothing at all.
pub async fn run(client: &Client, spec: &JobSpec, options: &PreflightOptions<'_>) -> Result<Report> {
    let mut p = Probe::new(client, spec, options).await?;
    let mut checks = server::checks(&p).await?;
    // Before anything that depends on how far the job is.
    let state = state::job_state(&mut p).await;
    checks.push(p.settle("job_state", state)?);

    let facts = Facts::read(client, spec, options.dedicated_login).await;
    let mut estimate = None;
    match facts {
        Ok(facts) => {
            checks.push(state::job_resolves(&facts));
            estimate = estimate::measure(&p, &facts).await.ok().flatten();
            job_checks(&p, &facts, &mut estimate, &mut checks).await?;
        }
        Err(error) if client.is_closed() => return Err(error),
        Err(error) => {
            checks.push(state::job_does_not_resolve(&error));
            // Without the right to read, the job does not resolve either; so these two are made by name.
            checks.push(p.settle("rls_visibility", access::rls_visibility(&p).await)?);
            checks.push(p.settle("privilege:rows", privileges::rows(&p).await)?);
        }
    }
    checks.extend(sessions::checks(&p).await?);
    checks.extend(capacity::checks(&p).await?);
    checks.push(p.settle("throttle", throttle::throttle(&p).await)?);
    Ok(finish(p, checks, estimate))
}

/// The checks that need the job's tables.
async fn job_checks(
    p: &Probe<'_>,
    facts: &Facts,
    estimate: &mut Option<Estimate>,
    checks: &mut Vec<Check>,
) -> Result<()> {
    let found = data::checks(p, facts, estimate).await?;
    checks.extend(found);
    checks.extend(column::checks(p, facts).await?);
    checks.extend(expressions::checks(p, facts).await?);
    checks.extend(policies::checks(p, facts).await?);
    checks.push(p.settle("report_queries", report_queries::report_queries(p).await)?);
    checks.push(p.settle("functions_before", functions::functions_before(p).await)?);
    checks.extend(bodies::checks(p, facts).await?);
    checks.extend(dependents::checks(p, facts).await?);
    checks.extend(access::checks(p, facts).await?);
    checks.push(p.settle("access", comparison::access(p, facts).await)?);
    checks.extend(privileges::checks(p, facts).await?);
    checks.extend(names::checks(p, facts).await?);
    checks.extend(triggers::checks(p, facts).await?);
    checks.extend(propagation::checks(p, facts).await?);
    checks.push(p.settle("table_growth", capacity::table_growth(p, facts).await)?);
    Ok(())
}

/// Brings the checks into the catalogue's order; what was not made is skipped, and says so.
fn finish(p: Probe<'_>, checks: Vec<Check>, estimate: Option<Estimate>) -> Report {
    let mut ordered = Vec::with_capacity(CATALOGUE.len());
    for (name, _) in CATALOGUE {
        let found = checks.iter().find(|c| c.name == *name).cloned();
        ordered.push(found.unwrap_or_else(|| Check::skip(name, "need the job's tables, see job")));
    }
    debug_assert_eq!(checks.iter().filter(|c| !CATALOGUE.iter().any(|k| k.0 == c.name)).count(), 0);
    let mut grants: Vec<String> = Vec::new();
    for grant in ordered.iter().flat_map(|c| &c.grants) {
        if !grants.contains(grant) {
            grants.push(grant.clone());
        }
    }
    Report { job: p.spec.name.clone(), server: p.server, checks: ordered, estimate, grants }
}
