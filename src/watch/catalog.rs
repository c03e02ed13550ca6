//! What the catalog must still say: sync triggers, policies and functions as the flip left them, index and constraints.

use tokio_postgres::Client;

use super::POLICY_DRIFT;
use crate::access::rules;
use crate::context::Context;
use crate::error::Result;
use crate::ledger::verdict;
use crate::ledger::watch::Findings;
use crate::plan::sync_sql;
use crate::verify::state::{self, State};
use crate::verify::{SYNC, standing, sync};

pub async fn look(ctx: &Context, client: &Client, findings: &mut Findings) -> Result<()> {
    let mut add = |kind: &str, found: Vec<String>| {
        if !found.is_empty() {
            findings.entry(kind.into()).or_default().extend(found);
        }
    };
    add(SYNC, sync::broken(client, &ctx.facts.shape).await?);
    let now = State::read(client, &ctx.spec, &ctx.facts).await?;
    add("indexes", indexes(ctx, client).await?);
    add("constraints", constraints(ctx, client).await?);
    for line in since_flip(ctx, client, &now).await? {
        let kind = match line.split(' ').next() {
            Some("index") => "indexes",
            Some("constraint") => "constraints",
            _ => POLICY_DRIFT,
        };
        add(kind, vec![line]);
    }
    if let Some(access) = ctx.spec.access.as_ref().filter(|_| ctx.spec.policies.is_some()) {
        add(POLICY_DRIFT, rules::above_policies(ctx, client, access).await?);
    }
    let last = verdict::last(client, ctx.job()).await?.and_then(|v| v.state);
    if let Some(then) = last.and_then(|v| serde_json::from_value::<State>(v).ok()) {
        add("catalog", state::differences(&others(ctx, &then.data), &others(ctx, &now.data)));
    }
    Ok(())
}

/// What is no longer as the flip left it.
async fn since_flip(ctx: &Context, client: &Client, now: &State) -> Result<Vec<String>> {
    let Some(flipped) = standing::flipped(client, ctx.job()).await? else { return Ok(Vec::new()) };
    let mut now = now.access.clone();
    // Otherwise an older version flipped, which did not look at it.
    if flipped.keys().any(|item| state::is_around(item)) {
        now.extend(state::around(client, &ctx.spec, &ctx.facts.shape).await?);
    }
    let mut changed = state::differences(&flipped, &now);
    // The looks at the index and the constraints say it better when one is gone.
    changed.retain(|line| {
        !(line.ends_with(" is gone") && (line.starts_with("index ") || line.starts_with("constraint ")))
    });
    Ok(changed)
}

/// Without our triggers and their functions: [`sync::broken`] looks at them, and says when they are mended, which the version
/// in their digest never would.
fn others(ctx: &Context, items: &state::Items) -> state::Items {
    let shape = &ctx.facts.shape;
    let triggers = sync_sql::triggers(shape);
    let ours = |item: &str| {
        triggers.iter().any(|t| item == format!("trigger {} on {}", t.name, t.table))
            || item.starts_with(&format!("function {}.{}_", crate::plan::shape::SYNC_SCHEMA, shape.job))
    };
    items.iter().filter(|(item, _)| !ours(item)).map(|(a, b)| (a.clone(), b.clone())).collect()
}

async fn indexes(ctx: &Context, client: &Client) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for index in &ctx.spec.indexes {
        let row = client
            .query_opt(
                "select i.indisvalid and i.indisready and i.indislive from pg_index i join pg_class c on c.oid = i.indexrelid
                 where i.indrelid = to_regclass($1) and c.relname = $2",
                &[&ctx.facts.shape.target.sql(), &index.name.as_str()],
            )
            .await?;
        match row.map(|r| r.get::<_, bool>(0)) {
            None => out.push(format!("index {} is gone", index.name)),
            Some(false) => out.push(format!("index {} is not valid", index.name)),
            Some(true) => {}
        }
    }
    Ok(out)
}

async fn constraints(ctx: &Context, client: &Client) -> Result<Vec<String>> {
    let target = ctx.facts.shape.target.sql();
    let mut out = Vec::new();
    for key in &ctx.spec.foreign_keys {
        let row = client
            .query_opt(
                "select convalidated from pg_constraint where conrelid = to_regclass($1) and conname = $2 and contype = 'f'",
                &[&target, &key.name.as_str()],
            )
            .await?;
        match row.map(|r| r.get::<_, bool>(0)) {
            None => out.push(format!("foreign key {} is gone", key.name)),
            Some(false) => out.push(format!("foreign key {} is not validated", key.name)),
            Some(true) => {}
        }
    }
    for column in ctx.facts.shape.columns.iter().filter(|c| c.not_null) {
        let row = client
            .query_opt(
                "select attnotnull from pg_attribute where attrelid = to_regclass($1) and attname = $2",
                &[&target, &column.name.as_str()],
            )
            .await?;
        if row.is_none_or(|r| !r.get::<_, bool>(0)) {
            out.push(format!("column {} is not NOT NULL", column.name));
        }
    }
    Ok(out)
}
