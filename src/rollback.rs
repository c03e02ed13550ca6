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
use crate::job::spec::Column;
use crate::ledger::{event, job, lease, objects, verdict, watch};
use crate::pg::connect::Session;
use crate::pg::ident::literal;
use crate::phase::Status;
use crate::plan::steps::quote;

/// How the reason of a job begins whose rollback failed and will be tried again.
pub const FAILED: &str = "rollback: ";

/// Runs the rollback to its end.
///
/// # Errors
/// DDL errors, lease lost, interrupted; refused if something stands in the way that is not ours.
pub async fn run(ctx: &Context) -> Result<()> {
    let mut session = ctx.connect_ddl("rollback").await?;
    access::probe_role::drop_all(ctx, &mut session).await?;
    if flip::is_flipped(ctx, &session.client).await? {
        unflip(ctx, &mut session).await?;
    }
    let there = is_there(ctx, &session).await?;
    if there {
        unconstrain(ctx, &mut session).await?;
    }
    unexpand(ctx, &mut session).await?;
    let left = if there {
        differences(ctx, &session).await?
    } else {
        // Whatever was on it went with it.
        let kinds = ["not_null", "constraint", "index", "column"];
        objects::all_removed(&session.client, ctx.job(), &kinds).await?;
        vec![format!("table {} is gone", ctx.spec.target.table)]
    };
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
    let drop_column = job::get(&tx, ctx.job()).await?.drop_column;
    event::record(&tx, ctx.job(), "rolled_back", serde_json::json!({ "drop_column": drop_column, "left": left }))
        .await?;
    tx.commit().await?;
    info!(job = ctx.job(), "{reason}");
    Ok(())
}

async fn is_there(ctx: &Context, session: &Session) -> Result<bool> {
    let sql = "select to_regclass($1) is not null";
    Ok(session.client.query_one(sql, &[&ctx.spec.target.table.sql()]).await?.get(0))
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
    let there = is_there(ctx, session).await?;
    let policies = ctx.spec.policies.as_ref().filter(|_| there);
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
    for name in objects::all(&session.client, ctx.job(), "constraint").await? {
        let what = format!("drop constraint {name}");
        let keys = ctx.spec.foreign_keys.iter().filter(|k| k.name.as_str() == name);
        let change = Change { also_locked: keys.map(|k| k.references.sql()).collect(), ..exclusive(&what, &target) };
        ddl::transaction(ctx, session, &change, async |tx| {
            tx.batch_execute(&format!("alter table {target} drop constraint if exists {}", quote(&name))).await?;
            objects::removed(tx, ctx.job(), "constraint", &name).await
        })
        .await?;
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

/// Sync triggers, their functions and columns. The triggers are found by their functions, whatever became of the tables: this is the
/// way out also where a table or a column that the job names is there no more.
async fn unexpand(ctx: &Context, session: &mut Session) -> Result<()> {
    let functions = objects::all(&session.client, ctx.job(), "function").await?;
    let signatures: Vec<String> = functions.iter().map(|f| format!("{f}()")).collect();
    let found = session
        .client
        .query(
            "select t.tgname::text, format('%I.%I', n.nspname, c.relname)
             from unnest($1::text[]) s join pg_trigger t on t.tgfoid = to_regprocedure(s)
             join pg_class c on c.oid = t.tgrelid join pg_namespace n on n.oid = c.relnamespace
             where not t.tgisinternal and t.tgparentid = 0
             order by c.oid is distinct from to_regclass($2), 2, 1",
            &[&signatures, &ctx.spec.target.table.sql()],
        )
        .await?;
    let found: Vec<(String, String)> = found.iter().map(|r| (r.get(0), r.get(1))).collect();
    for triggers in found.chunk_by(|a, b| a.1 == b.1) {
        let table = &triggers[0].1;
        let what = format!("drop the sync triggers on {table}");
        let drops: String = triggers
            .iter()
            .map(|(name, table)| format!("drop trigger if exists {} on {table};", quote(name)))
            .collect();
        ddl::transaction(ctx, session, &exclusive(&what, table), async |tx| Ok(tx.batch_execute(&drops).await?))
            .await?;
    }
    if !functions.is_empty() {
        let change = Change { what: "drop the sync functions", ..Default::default() };
        ddl::transaction(ctx, session, &change, async |tx| {
            for signature in &signatures {
                tx.batch_execute(&format!("drop function if exists {signature}")).await?;
            }
            objects::all_removed(tx, ctx.job(), &["trigger", "function"]).await?;
            drop_empty_schema(tx).await
        })
        .await?;
    }
    for column in &ctx.spec.columns {
        restore_column(ctx, session, column).await?;
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

async fn restore_column(ctx: &Context, session: &mut Session, column: &Column) -> Result<()> {
    let (name, target) = (column.name.as_str(), ctx.spec.target.table.sql());
    let now = snapshot::column(&session.client, &ctx.spec.target.table, name).await?;
    let then: Option<ColumnState> = read(ctx, session, "column", name).await?;
    let ours = objects::is_ours(&session.client, ctx.job(), "column", name).await?;
    if !now.existed {
        return Ok(());
    }
    let drop = ours && job::get(&session.client, ctx.job()).await?.drop_column;
    let (what, sql) = if drop {
        (format!("drop column {name}"), format!("alter table {target} drop column {}", quote(name)))
    } else {
        // A comment that is not the job's is somebody else's.
        let Some(then) = then.filter(|t| column.comment == now.comment && t.comment != now.comment) else {
            return Ok(());
        };
        let comment = then.comment.map_or("null".to_owned(), |c| literal(&c));
        (format!("put the comment of {name} back"), format!("comment on column {target}.{} is {comment}", quote(name)))
    };
    ddl::transaction(ctx, session, &exclusive(&what, &target), async |tx| {
        // It may have waited for its lock for a while, and the operator have changed their mind.
        if drop && !job::get(tx, ctx.job()).await?.drop_column {
            return Ok(());
        }
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
