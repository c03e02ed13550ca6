//! Expand: the column and all sync triggers, in one transaction (I1), after the old definitions are in the snapshot.

pub mod snapshot;

use futures_util::future::try_join_all;
use tokio_postgres::Client;
use tracing::info;

use crate::context::{Context, Outcome};
use crate::ddl::{self, Change, Strength};
use crate::error::{Error, Result};
use crate::ledger::objects;
use crate::plan::shape::SYNC_SCHEMA;
use crate::plan::{steps, sync_sql};

/// How much of our triggers is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    /// None.
    Nothing,
    /// All, enabled always.
    All,
    /// Some: somebody took one away, or something else has its name.
    Some(Vec<String>),
}

/// Runs the phase.
///
/// # Errors
/// Refused if a part of the triggers is there already; DDL errors.
pub async fn run(ctx: &Context) -> Result<Outcome> {
    let mut session = ctx.connect_ddl("expand").await?;
    match installed(ctx, &session.client).await? {
        Installed::All => {
            info!(job = ctx.job(), "the sync triggers are in place");
            return Ok(Outcome::Complete);
        }
        Installed::Some(missing) => {
            return Err(Error::refused(format!("sync triggers are missing or disabled: {}", missing.join(", ")))
                .with_hint(
                    "somebody changed them; rows written since may be stale: roll the job back and start again",
                ));
        }
        Installed::Nothing => {}
    }
    snapshot::take(ctx, &session.client).await?;
    let lock_timeout = humantime::format_duration(ctx.settings.ddl.lock_timeout).to_string();
    let step = steps::expand(&ctx.spec, &ctx.facts, &lock_timeout);
    let shape = &ctx.facts.shape;
    let mut locks = vec![(shape.target.sql(), Strength::Everything)];
    locks.extend(shape.joins.iter().map(|j| (j.table.sql(), Strength::Writes)));
    // Schema and functions lock no table, so they are made before the locks are taken; what needs them goes out as one
    // message, so that they are held for one round trip.
    let (prelude, locked): (Vec<String>, Vec<String>) = step
        .sql
        .iter()
        .filter(|s| !s.starts_with("lock table"))
        .map(|s| if_missing(s))
        .partition(|s| is_about_functions(s));
    let locked = locked.join(";\n");
    let change = Change { what: &step.what, locks, prelude, ..Default::default() };
    let ours = created(ctx);
    ddl::transaction(ctx, &mut session, &change, async |tx| {
        let noted = try_join_all(ours.iter().map(|(kind, name)| objects::created(tx, ctx.job(), kind, name)));
        tokio::try_join!(async { tx.batch_execute(&locked).await.map_err(Error::from) }, noted)?;
        Ok(())
    })
    .await?;
    Ok(Outcome::Complete)
}

/// Looks which of our triggers are there and enabled always.
///
/// # Errors
/// Database errors.
pub async fn installed(ctx: &Context, client: &Client) -> Result<Installed> {
    let triggers = sync_sql::triggers(&ctx.facts.shape);
    let mut missing = Vec::new();
    for trigger in &triggers {
        let enabled: Option<String> = client
            .query_opt(
                "select tgenabled::text from pg_trigger where tgrelid = to_regclass($1) and tgname = $2 and not tgisinternal",
                &[&trigger.table, &trigger.name],
            )
            .await?
            .map(|r| r.get(0));
        if enabled.as_deref() != Some("A") {
            missing.push(format!("{} on {}", trigger.name, trigger.table));
        }
    }
    Ok(match missing.len() {
        0 => Installed::All,
        n if n == triggers.len() => Installed::Nothing,
        _ => Installed::Some(missing),
    })
}

/// Even with IF NOT EXISTS, `create schema` wants the right to create one.
fn if_missing(sql: &str) -> String {
    if !sql.starts_with("create schema") {
        return sql.to_owned();
    }
    format!("do $do$ begin if to_regnamespace('{SYNC_SCHEMA}') is null then {sql}; end if; end $do$")
}

fn is_about_functions(sql: &str) -> bool {
    ["do $do$", "create or replace function", "alter function", "revoke"].iter().any(|head| sql.starts_with(head))
}

/// Kind and name of everything that the step creates.
fn created(ctx: &Context) -> Vec<(&'static str, String)> {
    let shape = &ctx.facts.shape;
    let columns = shape.columns.iter().zip(&ctx.facts.existing).filter(|(_, existing)| existing.is_none());
    let mut out: Vec<_> = columns.map(|(column, _)| ("column", column.name.as_str().to_owned())).collect();
    out.extend(sync_sql::triggers(shape).iter().map(|t| ("trigger", format!("{} on {}", t.name, t.table))));
    out.extend(sync_sql::functions(shape).into_iter().map(|f| ("function", f.name)));
    out
}
