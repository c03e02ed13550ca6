//! The way back, from every phase: policies and functions, constraints, index, triggers, as they were (I11). Each step
//! looks what is there and removes what is ours, so it can be interrupted and run again. Nothing is dropped with CASCADE.

use tokio_postgres::Transaction;
use tracing::{info, warn};

use crate::access;
use crate::context::Context;
use crate::cutover::flip;
use crate::ddl::{self, Change, Strength};
use crate::error::{Error, Result};
use crate::expand::snapshot::{self, ColumnState, FunctionState, Security};
use crate::ledger::{event, job, lease, objects, verdict, watch};
use crate::pg::connect::Session;
use crate::pg::ident::literal;
use crate::phase::Status;
use crate::plan::steps::quote;
use crate::plan::sync_sql;

/// How the reason of a job begins whose rollback failed and will be tried again.
pub const FAILED: &str = "rollback: ";

/// Runs the rollback to its end.
///
/// # Errors
/// DDL errors, lease lost, interrupted; refused if something stands in the way that is not ours.
pub async fn run(ctx: &Context, drop_column: bool) -> Result<()> {
    let mut session = ctx.connect_ddl("rollback").await?;
    access::probe_role::drop_all(ctx, &mut session).await?;
    if flip::is_flipped(ctx, &session.client).await? {
        unflip(ctx, &mut session).await?;
    }
    unconstrain(ctx, &mut session).await?;
    unexpand(ctx, &mut session, drop_column).await?;
    let left = differences(ctx, &session).await?;
    for difference in &left {
        warn!(job = ctx.job(), "after the rollback: {difference}");
    }
    let tx = session.client.transaction().await?;
    lease::fence(&tx, &ctx.lease).await?;
    let reason = match left.as_slice() {
        [] => "everything is as it was".to_owned(),
        some => format!("rolled back; changed by others meanwhile: {}", some.join("; ")),
    };
    job::set_status(&tx, ctx.job(), &[Status::RollingBack], Status::RolledBack, &reason, "").await?;
    event::record(&tx, ctx.job(), "rolled_back", serde_json::json!({ "drop_column": drop_column, "left": left }))
        .await?;
    tx.commit().await?;
    info!(job = ctx.job(), "{reason}");
    Ok(())
}

/// Puts the old policies and functions back.
///
/// # Errors
/// DDL errors.
pub async fn unflip(ctx: &Context, session: &mut Session) -> Result<()> {
    let table = &ctx.spec.target.table;
    let target = table.sql();
    let mut prelude = Vec::new();
    // What the flip added goes last: policies can depend on it until they are gone.
    let mut drops = Vec::new();
    for function in &ctx.spec.functions {
        let (restore, drop) = restore_function(ctx, session, &function.signature).await?;
        prelude.extend(restore);
        drops.extend(drop);
    }
    let policies = ctx.spec.policies.as_ref();
    let then: Option<Security> = read(ctx, session, "policies", &table.to_string()).await?;
    let locks = policies.map(|_| (target.clone(), Strength::Everything)).into_iter().collect();
    let change = Change { what: "put the old policies and functions back", locks, prelude, ..Default::default() };
    ddl::transaction(ctx, session, &change, async |tx| {
        if let (Some(policies), Some(then)) = (policies, &then) {
            let now = snapshot::security(tx, table).await?;
            for ours in &policies.create {
                let foreign_name =
                    then.policies.iter().any(|p| p.name == ours.name.as_str() && !policies.replace.contains(&p.name));
                if !foreign_name && now.policies.iter().any(|p| p.name == ours.name.as_str()) {
                    tx.batch_execute(&format!("drop policy {} on {target}", ours.name.sql())).await?;
                }
            }
            let now = snapshot::security(tx, table).await?;
            for policy in then.policies.iter().filter(|p| policies.replace.contains(&p.name)) {
                if !now.policies.iter().any(|p| p.name == policy.name) {
                    for sql in policy.create(&target) {
                        tx.batch_execute(&sql).await?;
                    }
                }
            }
        }
        for sql in &drops {
            tx.batch_execute(sql).await?;
        }
        verdict::forget_flipped(tx, ctx.job()).await?;
        watch::forget(tx, ctx.job()).await?;
        objects::removed(tx, ctx.job(), "flip", &table.to_string()).await
    })
    .await
}

/// The statements that bring a function back to its snapshot, and the one that drops it if it is new.
async fn restore_function(ctx: &Context, session: &Session, signature: &str) -> Result<(Vec<String>, Option<String>)> {
    let then: Option<Option<FunctionState>> = read(ctx, session, "function", signature).await?;
    let Some(then) = then else { return Ok((Vec::new(), None)) };
    let now = snapshot::function(&session.client, signature).await?;
    let Some(then) = then else {
        return Ok((Vec::new(), now.map(|n| format!("drop {} {signature}", n.kind))));
    };
    if now.as_ref() == Some(&then) {
        return Ok((Vec::new(), None));
    }
    let kind = &then.kind;
    let mut out = vec![then.definition.clone()];
    let comment = then.comment.as_ref().map_or("null".to_owned(), |c| literal(c));
    out.push(format!("comment on {kind} {signature} is {comment}"));
    if now.as_ref().is_none_or(|n| n.owner != then.owner) {
        out.push(format!("alter {kind} {signature} owner to {}", quote(&then.owner)));
    }
    if now.as_ref().is_none_or(|n| n.acl != then.acl) {
        let grantees: Vec<String> = now.iter().flat_map(|n| &n.acl).map(|a| a.0.clone()).collect();
        let role = |name: &str| if name == "public" { "public".to_owned() } else { quote(name) };
        for name in grantees.iter().map(String::as_str).chain(["public"]) {
            out.push(format!("revoke all on {kind} {signature} from {}", role(name)));
        }
        for (name, grantable) in &then.acl {
            let option = if *grantable { " with grant option" } else { "" };
            out.push(format!("grant execute on {kind} {signature} to {}{option}", role(name)));
        }
    }
    Ok((out, None))
}

fn exclusive<'a>(what: &'a str, table: &str) -> Change<'a> {
    Change { what, locks: vec![(table.to_owned(), Strength::Everything)], ..Default::default() }
}

async fn unconstrain(ctx: &Context, session: &mut Session) -> Result<()> {
    let target = ctx.spec.target.table.sql();
    for column in &ctx.spec.columns {
        let name = column.name.as_str();
        if objects::is_ours(&session.client, ctx.job(), "not_null", name).await? {
            let what = format!("allow NULL in {name} again");
            ddl::transaction(ctx, session, &exclusive(&what, &target), async |tx| {
                tx.batch_execute(&format!("alter table {target} alter column {} drop not null", column.name.sql()))
                    .await?;
                objects::removed(tx, ctx.job(), "not_null", name).await
            })
            .await?;
        }
    }
    let mut constraints: Vec<String> = ctx.spec.foreign_keys.iter().map(|k| k.name.as_str().to_owned()).collect();
    constraints.extend(
        (0..ctx.facts.shape.columns.len())
            .map(|i| crate::plan::steps::not_null_check(&ctx.facts.shape, i).as_str().to_owned()),
    );
    for name in constraints {
        if objects::is_ours(&session.client, ctx.job(), "constraint", &name).await? {
            let what = format!("drop constraint {name}");
            let keys = ctx.spec.foreign_keys.iter().filter(|k| k.name.as_str() == name);
            let change =
                Change { also_locked: keys.map(|k| k.references.sql()).collect(), ..exclusive(&what, &target) };
            ddl::transaction(ctx, session, &change, async |tx| {
                tx.batch_execute(&format!("alter table {target} drop constraint if exists {}", quote(&name))).await?;
                objects::removed(tx, ctx.job(), "constraint", &name).await
            })
            .await?;
        }
    }
    for index in &ctx.spec.indexes {
        let name = format!("{}.{}", ctx.spec.target.table.schema.sql(), index.name.sql());
        if objects::is_ours(&session.client, ctx.job(), "index", &name).await? {
            let what = format!("drop index {name}");
            ddl::concurrently(ctx, session, &what, &format!("drop index concurrently if exists {name}")).await?;
            objects::removed(&session.client, ctx.job(), "index", &name).await?;
        }
    }
    Ok(())
}

async fn unexpand(ctx: &Context, session: &mut Session, drop_column: bool) -> Result<()> {
    let shape = &ctx.facts.shape;
    let target = shape.target.sql();
    let mut tables = vec![target.clone()];
    tables.extend(shape.joins.iter().map(|j| j.table.sql()));
    tables.dedup();
    for table in &tables {
        let triggers: Vec<_> = sync_sql::triggers(shape).into_iter().filter(|t| t.table == *table).collect();
        let there: i64 = session
            .client
            .query_one(
                "select count(*) from pg_trigger where tgrelid = to_regclass($1) and tgname = any ($2)",
                &[table, &triggers.iter().map(|t| t.name.clone()).collect::<Vec<_>>()],
            )
            .await?
            .get(0);
        if there == 0 {
            continue;
        }
        let what = format!("drop the sync triggers on {table}");
        ddl::transaction(ctx, session, &exclusive(&what, table), async |tx| {
            for trigger in &triggers {
                tx.batch_execute(&sync_sql::drop_trigger(trigger)).await?;
                objects::removed(tx, ctx.job(), "trigger", &format!("{} on {}", trigger.name, trigger.table)).await?;
            }
            Ok(())
        })
        .await?;
    }
    let functions = sync_sql::functions(shape);
    let names: Vec<String> = functions.iter().map(|f| format!("{}()", f.name)).collect();
    let there = "select exists (select from unnest($1::text[]) n where to_regprocedure(n) is not null)";
    if session.client.query_one(there, &[&names]).await?.get(0) {
        let change = Change { what: "drop the sync functions", ..Default::default() };
        ddl::transaction(ctx, session, &change, async |tx| {
            for function in &functions {
                tx.batch_execute(&format!("drop function if exists {}()", function.name)).await?;
                objects::removed(tx, ctx.job(), "function", &function.name).await?;
            }
            drop_empty_schema(tx).await
        })
        .await?;
    }
    for column in &ctx.spec.columns {
        restore_column(ctx, session, &target, column.name.as_str(), drop_column).await?;
    }
    Ok(())
}

async fn drop_empty_schema(tx: &Transaction<'_>) -> Result<()> {
    let empty: bool = tx
        .query_one(
            "select to_regnamespace($1) is not null
                and not exists (select from pg_proc where pronamespace = to_regnamespace($1))
                and not exists (select from pg_class where relnamespace = to_regnamespace($1))",
            &[&crate::plan::shape::SYNC_SCHEMA],
        )
        .await?
        .get(0);
    if empty {
        tx.batch_execute(&format!("drop schema \"{}\"", crate::plan::shape::SYNC_SCHEMA)).await?;
    }
    Ok(())
}

async fn restore_column(ctx: &Context, session: &mut Session, target: &str, name: &str, drop: bool) -> Result<()> {
    let now = snapshot::column(&session.client, &ctx.spec.target.table, name).await?;
    let then: Option<ColumnState> = read(ctx, session, "column", name).await?;
    let ours = objects::is_ours(&session.client, ctx.job(), "column", name).await?;
    if !now.existed {
        return Ok(());
    }
    let (what, sql) = if drop && ours {
        (format!("drop column {name}"), format!("alter table {target} drop column {}", quote(name)))
    } else {
        let comment = then.as_ref().and_then(|t| t.comment.clone());
        if comment == now.comment {
            return Ok(());
        }
        let comment = comment.map_or("null".to_owned(), |c| literal(&c));
        (format!("put the comment of {name} back"), format!("comment on column {target}.{} is {comment}", quote(name)))
    };
    ddl::transaction(ctx, session, &exclusive(&what, target), async |tx| {
        tx.batch_execute(&sql).await?;
        if drop { objects::removed(tx, ctx.job(), "column", name).await } else { Ok(()) }
    })
    .await
}

/// Compares policies, functions and triggers with the snapshot.
async fn differences(ctx: &Context, session: &Session) -> Result<Vec<String>> {
    let mut out = Vec::new();
    let table = &ctx.spec.target.table;
    let then: Option<Security> = read(ctx, session, "policies", &table.to_string()).await?;
    if let Some(then) = then
        && let Some(found) = flip::difference(&then, &snapshot::security(&session.client, table).await?)
    {
        out.push(format!("policies on {table}: {found}"));
    }
    for function in &ctx.spec.functions {
        let then: Option<Option<FunctionState>> = read(ctx, session, "function", &function.signature).await?;
        if let Some(then) = then
            && then != snapshot::function(&session.client, &function.signature).await?
        {
            out.push(format!("function {} is another", function.signature));
        }
    }
    let mut tables = vec![table.clone()];
    tables.extend(ctx.spec.source.iter().map(|j| j.table.clone()));
    tables.dedup();
    for table in tables {
        let then: Option<Vec<(String, String, String)>> =
            read(ctx, session, "trigger_list", &table.to_string()).await?;
        if let Some(then) = then
            && then != snapshot::triggers(&session.client, &table).await?
        {
            out.push(format!("triggers on {table} are others"));
        }
    }
    Ok(out)
}

async fn read<T: serde::de::DeserializeOwned>(
    ctx: &Context,
    session: &Session,
    kind: &str,
    ident: &str,
) -> Result<Option<T>> {
    objects::kept(&session.client, ctx.job(), kind, ident)
        .await?
        .map(|v| {
            serde_json::from_value(v).map_err(|e| Error::internal(format!("snapshot of {kind} {ident}")).with_source(e))
        })
        .transpose()
}
