//! Flip: functions and policies in one short transaction (I7), between two assertions about the exact set of policies.

use std::collections::BTreeSet;

use tokio_postgres::{Client, GenericClient, Transaction};

use crate::access;
use crate::context::{Context, Outcome};
use crate::ddl::{self, Change, Strength};
use crate::error::{Error, Kind, Result};
use crate::expand::snapshot::{self, FunctionState, PolicyState, Security};
use crate::job::spec::Policies;
use crate::ledger::{objects, verdict};
use crate::pg::connect::Session;
use crate::pg::ident::{QualifiedName, literal};
use crate::phase::Phase;
use crate::plan::steps;
use crate::{fault, rollback, verify};

/// Runs the phase. Without a passing verdict it goes back to the verification.
///
/// # Errors
/// Refused if a function could not be put back later, or if the policies are not what the job and the snapshot say; DDL errors.
pub async fn run(ctx: &Context) -> Result<Outcome> {
    let Some(step) = steps::flip(&ctx.spec, "") else { return Ok(Outcome::Complete) };
    let mut session = ctx.connect_ddl("flip").await?;
    if is_flipped(ctx, &session.client).await? {
        return confirm(ctx, &mut session).await;
    }
    if !verify::verdict_holds(ctx, &session.client).await? || !access::holds(ctx, &session.client).await? {
        return Ok(Outcome::BackTo(Phase::Verify));
    }
    rehearse_way_back(ctx, &mut session).await?;
    let target = ctx.spec.target.table.sql();
    let functions: Vec<String> = ctx.spec.functions.iter().flat_map(|f| f.statements.iter().cloned()).collect();
    let mut prelude = unchanged_functions(ctx, &session.client).await?;
    let policies: Vec<&str> =
        step.sql.iter().skip(functions.len()).filter(|s| !s.starts_with("lock table")).map(String::as_str).collect();
    // One message: the lock is held for one round trip, not for one per policy.
    let policies = policies.join(";\n");
    let then = kept_security(ctx, &session.client).await?;
    // Said before the lock is taken, if it is so; and the session has read the catalogs then, which takes longer than the
    // flip itself.
    assert_before(ctx, &session.client, then.as_ref()).await?;
    let locks = match ctx.spec.policies {
        Some(_) => vec![(target, Strength::Everything)],
        None => Vec::new(),
    };
    let proven = verify::standing::proven(&session.client, ctx.job()).await?;
    // None of this is the flip's own work, so it need not be read under the lock.
    let around = verify::state::around(&session.client, &ctx.spec, &ctx.facts.shape).await?;
    // Functions first: replacing them locks no table, and policies take ACCESS EXCLUSIVE until the commit.
    prelude.extend(functions);
    let change = Change { what: &step.what, locks, prelude, ..Default::default() };
    ddl::transaction(ctx, &mut session, &change, async |tx| {
        assert_before(ctx, tx, then.as_ref()).await?;
        tx.batch_execute(&policies).await?;
        let table = ctx.spec.target.table.to_string();
        // Sent together: one round trip less under the lock.
        let after = verify::state::State::read(tx, &ctx.spec, &ctx.facts);
        let (_, _, mut after) =
            tokio::try_join!(assert_after(ctx, tx), objects::created(tx, ctx.job(), "flip", &table), after)?;
        // It may have waited for the lock for long.
        let changed = verify::state::differences(&proven, &after.data);
        if !changed.is_empty() {
            return Err(Error::refused(format!("what was verified has changed since: {}", changed.join("; ")))
                .with_hint(format!("to verify again: backfilld resume {}", ctx.job())));
        }
        after.access.extend(around.clone());
        verdict::store_flipped(tx, ctx.job(), &verify::json(&after.access)?).await
    })
    .await?;
    confirm(ctx, &mut session).await
}

/// Compares access on the real thing. A difference takes the flip back at once.
async fn confirm(ctx: &Context, session: &mut Session) -> Result<Outcome> {
    if access::is_confirmed(ctx, &session.client).await? {
        access::clean(ctx).await?;
        return Ok(Outcome::Complete);
    }
    fault::point("before-confirm");
    match access::compare(ctx, access::Stage::After).await {
        Ok(()) => assert_flipped(ctx, &session.client).await.map(|()| Outcome::Complete),
        Err(e) if e.kind() == Kind::Failed => {
            rollback::unflip(ctx, session).await?;
            Err(e.context("after the flip; the old policies and functions are back"))
        }
        // Nothing differs as far as is known: the new policies stay, and `resume` compares again.
        Err(e) => Err(e),
    }
}

/// What was compared must be what the flip made: somebody who put the old function back changed nothing that differs.
async fn assert_flipped(ctx: &Context, client: &Client) -> Result<()> {
    let Some(mut flipped) = verify::standing::flipped(client, ctx.job()).await? else { return Ok(()) };
    flipped.retain(|item, _| !verify::state::is_around(item));
    let now = verify::state::State::read(client, &ctx.spec, &ctx.facts).await?;
    let changed = verify::state::differences(&flipped, &now.access);
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::refused(format!("policies or functions have changed since the flip: {}", changed.join("; "))).with_hint(
        "make them what the job says, or take the flip back with backfilld rollback; then: backfilld resume",
    ))
}

/// Tries whether the old functions can replace the new ones: not if, for example, a new one adds a default to a parameter.
/// Better to know it before the flip. Locks no table and is rolled back.
async fn rehearse_way_back(ctx: &Context, session: &mut Session) -> Result<()> {
    let tx = session.client.transaction().await?;
    for f in &ctx.spec.functions {
        let then = kept_function(ctx, &tx, &f.signature).await?.flatten();
        for sql in &f.statements {
            tx.batch_execute(sql).await.map_err(|e| Error::from(e).context(format!("function {}", f.signature)))?;
        }
        if let Some(then) = then {
            tx.batch_execute(&then.definition).await.map_err(|e| {
                Error::from(e)
                    .context(format!("function {}: a rollback could not put the old one back", f.signature))
                    .with_hint("keep the old function's parameter names and defaults, or give the new one another name")
            })?;
        }
    }
    Ok(tx.rollback().await?)
}

/// Whether the flip has committed.
///
/// # Errors
/// Database errors.
pub async fn is_flipped(ctx: &Context, client: &impl GenericClient) -> Result<bool> {
    objects::is_ours(client, ctx.job(), "flip", &ctx.spec.target.table.to_string()).await
}

/// The policies now must be those that the snapshot took, and those that the job names: somebody who changed one since has
/// to be asked.
///
/// # Errors
/// Refused, saying what is another.
pub async fn assert_unchanged(ctx: &Context, client: &impl GenericClient) -> Result<()> {
    let then = kept_security(ctx, client).await?;
    assert_before(ctx, client, then.as_ref()).await
}

async fn assert_before(ctx: &Context, tx: &impl GenericClient, then: Option<&Security>) -> Result<()> {
    let Some(policies) = &ctx.spec.policies else { return Ok(()) };
    let table = &ctx.spec.target.table;
    let now = snapshot::security(tx, table).await?;
    let then = then.ok_or_else(|| Error::internal("there is no snapshot of the policies"))?;
    if let Some(difference) = difference(then, &now) {
        return Err(Error::refused(format!("policies on {table} have changed since the job began: {difference}"))
            .with_hint("put them back, or roll the job back and start again with a job that names the new ones"));
    }
    named(policies, &now, table)
}

/// Refuses functions that somebody has changed since the snapshot: a rollback would bring the old ones back. Gives statements that look
/// again, in the transaction that replaces them.
async fn unchanged_functions(ctx: &Context, client: &Client) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for f in &ctx.spec.functions {
        let signature = &f.signature;
        let Some(then) = kept_function(ctx, client, signature).await? else { continue };
        if snapshot::function(client, signature).await? != then {
            return Err(Error::refused(format!("function {signature} has changed since the job began")).with_hint(
                "put it back as it was then, or roll the job back and start again with a job that is made from the new one",
            ));
        }
        let definition = then.map_or("null".to_owned(), |f| literal(&f.definition));
        out.push(format!(
            "do {0} begin if pg_get_functiondef(to_regprocedure({1})) is distinct from {definition} then \
             raise exception using errcode = '55000', message = 'function ' || {1} || ' has changed since the job began'; \
             end if; end {0}",
            "$backfilld_unchanged$",
            literal(signature)
        ));
    }
    Ok(out)
}

/// A function as the snapshot took it; `None`: it took none.
async fn kept_function(
    ctx: &Context,
    client: &impl GenericClient,
    signature: &str,
) -> Result<Option<Option<FunctionState>>> {
    objects::kept(client, ctx.job(), "function", signature)
        .await?
        .map(serde_json::from_value)
        .transpose()
        .map_err(|e| Error::internal(format!("snapshot of function {signature}")).with_source(e))
}

/// The policies as the snapshot took them.
async fn kept_security(ctx: &Context, client: &impl GenericClient) -> Result<Option<Security>> {
    objects::kept(client, ctx.job(), "policies", &ctx.spec.target.table.to_string())
        .await?
        .map(serde_json::from_value)
        .transpose()
        .map_err(|e| Error::internal("snapshot of the policies").with_source(e))
}

/// Every policy there must be named by the job as replaced or kept, and the other way round.
///
/// # Errors
/// Refused, naming what is left over and what is missing.
pub fn named(policies: &Policies, now: &Security, table: &QualifiedName) -> Result<()> {
    let there: BTreeSet<&str> = now.policies.iter().map(|p| p.name.as_str()).collect();
    let wanted: BTreeSet<&str> = policies.replace.iter().chain(&policies.keep).map(String::as_str).collect();
    if there == wanted {
        return Ok(());
    }
    let list = |a: &BTreeSet<&str>, b: &BTreeSet<&str>| {
        let names: Vec<String> = a.difference(b).map(|n| format!("{n:?}")).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    Err(Error::refused(format!(
        "policies on {table}: not named by the job: {}; named but missing: {}",
        list(&there, &wanted),
        list(&wanted, &there)
    ))
    .with_hint(
        "a permissive policy that stays would be ORed with the new ones: name it in policies.replace or policies.keep",
    ))
}

async fn assert_after(ctx: &Context, tx: &Transaction<'_>) -> Result<()> {
    let Some(policies) = &ctx.spec.policies else { return Ok(()) };
    let table = &ctx.spec.target.table;
    let now = snapshot::security(tx, table).await?;
    let there: BTreeSet<(String, String, bool, Vec<String>, bool, bool)> = now
        .policies
        .iter()
        .filter(|p| !policies.keep.contains(&p.name))
        .map(|p| {
            (p.name.clone(), p.command.clone(), p.permissive, p.roles.clone(), p.using.is_some(), p.check.is_some())
        })
        .collect();
    let wanted = policies
        .create
        .iter()
        .map(|p| {
            let mut roles: Vec<String> = p.roles.iter().map(|r| r.as_str().to_owned()).collect();
            roles.sort();
            let command = p.command.catalog_code().to_owned();
            (p.name.as_str().to_owned(), command, p.permissive, roles, p.using.is_some(), p.check.is_some())
        })
        .collect();
    if there == wanted && now.policies.len() == policies.create.len() + policies.keep.len() {
        return Ok(());
    }
    Err(Error::internal(format!("after the flip the policies on {table} are not those of the job")))
}

/// What differs between two states of row level security, in a few words; `None` if nothing does.
pub fn difference(then: &Security, now: &Security) -> Option<String> {
    if (then.enabled, then.forced) != (now.enabled, now.forced) {
        return Some(format!(
            "row level security was enabled: {}, forced: {}; it is enabled: {}, forced: {}",
            then.enabled, then.forced, now.enabled, now.forced
        ));
    }
    let find = |list: &[PolicyState], name: &str| list.iter().find(|p| p.name == name).cloned();
    for policy in &then.policies {
        match find(&now.policies, &policy.name) {
            None => return Some(format!("{:?} is gone", policy.name)),
            Some(other) if other != *policy => return Some(format!("{:?} is another", policy.name)),
            Some(_) => {}
        }
    }
    now.policies.iter().find(|p| find(&then.policies, &p.name).is_none()).map(|p| format!("{:?} is new", p.name))
}
