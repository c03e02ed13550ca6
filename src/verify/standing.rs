//! Whether the last verdict still holds (I6): for this job's content, on this server and timeline, and on the catalog as it was.

use tokio_postgres::GenericClient;
use tracing::warn;

use super::state::{self, State};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::ledger::verdict::{self, ServerIdentity};
use crate::plan::Facts;

/// Why no verdict holds, most telling first; empty: one does.
///
/// # Errors
/// Database errors.
pub async fn reasons(client: &impl GenericClient, spec: &JobSpec, facts: &Facts) -> Result<Vec<String>> {
    let Some(last) = verdict::last(client, &spec.name).await? else {
        return Ok(vec!["nothing was verified yet".into()]);
    };
    if !last.passed {
        return Ok(vec!["the last verification did not pass".into()]);
    }
    let mut out = Vec::new();
    if last.job_hash != spec.hash() {
        out.push("the job has another content".into());
    }
    let server = ServerIdentity::read(client).await?;
    if last.server.system_identifier != server.system_identifier {
        out.push("it was made on another server".into());
    } else if last.server.timeline != server.timeline {
        out.push(format!(
            "it was made on timeline {}, this is timeline {}: a failover or a restore",
            last.server.timeline, server.timeline
        ));
    }
    let Some(then) = last.state else {
        out.push("it was made by an older version".into());
        return Ok(out);
    };
    let then: State = parse(then)?;
    let now = State::read(client, spec, facts).await?;
    out.extend(state::differences(&then.data, &now.data));
    let mut access = flipped(client, &spec.name).await?.unwrap_or(then.access);
    access.retain(|item, _| !state::is_around(item));
    out.extend(state::differences(&access, &now.access));
    Ok(out)
}

/// The tables, columns and triggers on which the last verdict was made.
///
/// # Errors
/// Database errors.
pub async fn proven(client: &impl GenericClient, job: &str) -> Result<state::Items> {
    let then = verdict::last(client, job).await?.and_then(|last| last.state);
    then.map(parse::<State>).transpose().map(|state| state.unwrap_or_default().data)
}

/// Policies, functions and what leads around them as the flip left them; `None` before the flip.
///
/// # Errors
/// Database errors.
pub async fn flipped(client: &impl GenericClient, job: &str) -> Result<Option<state::Items>> {
    verdict::flipped(client, job).await?.map(parse).transpose()
}

fn parse<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> Result<T> {
    serde_json::from_value(json).map_err(|e| Error::internal("state of a verdict").with_source(e))
}

/// Whether a passing verdict holds. Says why not.
///
/// # Errors
/// Database errors.
pub async fn verdict_holds(ctx: &Context, client: &impl GenericClient) -> Result<bool> {
    let reasons = reasons(client, &ctx.spec, &ctx.facts).await?;
    if reasons.is_empty() {
        return Ok(true);
    }
    warn!(job = ctx.job(), "no passing verdict holds: {}; verifying again", reasons.join("; "));
    let detail = serde_json::json!({ "reasons": reasons });
    crate::ledger::event::record(client, ctx.job(), "verdict expired", detail).await?;
    Ok(false)
}
