//! Constrain: each constraint the online way, each step skipped when it is done already.

use tokio_postgres::Client;
use tracing::{info, warn};

use crate::access;
use crate::context::{Context, Outcome};
use crate::ddl::{self, Change, Strength};
use crate::error::{Error, Result};
use crate::job::spec::{Action, ForeignKey, Index};
use crate::ledger::objects;
use crate::metrics;
use crate::pg::connect::Session;
use crate::pg::ident::Ident;
use crate::phase::Phase;
use crate::plan::steps::{self, Step};
use crate::verify;

/// Builds of one index that are begun before a deadlock with somebody else's DDL needs a human.
const MAX_BUILDS: u32 = 5;

/// Runs the phase. Without a passing verdict it goes back to the verification.
///
/// # Errors
/// Refused if something else has the name of what we want to make; DDL errors.
pub async fn run(ctx: &Context) -> Result<Outcome> {
    let mut session = ctx.connect_ddl("constrain").await?;
    if !verify::verdict_holds(ctx, &session.client).await? || !access::holds(ctx, &session.client).await? {
        return Ok(Outcome::BackTo(Phase::Verify));
    }
    let steps = steps::constrain(&ctx.spec, &ctx.facts.shape, "");
    for index in &ctx.spec.indexes {
        build_index(ctx, &session, index).await?;
    }
    for key in &ctx.spec.foreign_keys {
        foreign_key(ctx, &mut session, key, &steps).await?;
    }
    for (i, column) in ctx.facts.shape.columns.iter().enumerate().filter(|(_, c)| c.not_null) {
        not_null(ctx, &mut session, i, column.name.as_str(), &steps).await?;
    }
    if let Some(analyze) = steps.last() {
        let sql = &analyze.sql[0];
        ddl::transaction(ctx, &mut session, &maintenance(ctx, &analyze.what), async |tx| {
            Ok(tx.batch_execute(sql).await?)
        })
        .await?;
    }
    Ok(Outcome::Complete)
}

fn maintenance<'a>(ctx: &Context, what: &'a str) -> Change<'a> {
    Change { what, locks: vec![(ctx.spec.target.table.sql(), Strength::Maintenance)], ..Default::default() }
}

fn step<'a>(steps: &'a [Step], what: &str) -> Result<&'a Step> {
    steps.iter().find(|s| s.what == what).ok_or_else(|| Error::internal(format!("the plan has no step {what:?}")))
}

/// What stands under an index's name.
#[derive(Debug, PartialEq, Eq)]
enum IndexState {
    Missing,
    Valid,
    Invalid,
    Other(String),
}

async fn index_state(ctx: &Context, client: &Client, index: &Index) -> Result<IndexState> {
    let schema = &ctx.spec.target.table.schema;
    let row = client
        .query_opt(
            "select c.relkind::text, i.indisvalid and i.indisready, i.indrelid = to_regclass($3), i.indisunique, am.amname::text,
                    (select array_agg(a.attname::text order by k.n) from unnest(i.indkey::int2[]) with ordinality k(attnum, n)
                     left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum),
                    i.indpred is not null, pg_get_indexdef(c.oid)
             from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_index i on i.indexrelid = c.oid
             left join pg_am am on am.oid = c.relam
             where n.nspname = $1 and c.relname = $2",
            &[&schema.as_str(), &index.name.as_str(), &ctx.spec.target.table.sql()],
        )
        .await?;
    let Some(row) = row else { return Ok(IndexState::Missing) };
    if row.get::<_, String>(0) != "i" {
        return Ok(IndexState::Other(format!("a relation of kind {}", row.get::<_, String>(0))));
    }
    let columns: Vec<Option<String>> = row.get(5);
    let wanted: Vec<Option<String>> = index.columns.iter().map(|c| Some(c.as_str().to_owned())).collect();
    let same = row.get::<_, bool>(2)
        && row.get::<_, bool>(3) == index.unique
        && row.get::<_, String>(4) == index.method.as_str()
        && columns == wanted
        && row.get::<_, bool>(6) == index.predicate.is_some();
    Ok(match (same, row.get::<_, bool>(1)) {
        (true, true) => IndexState::Valid,
        (true, false) => IndexState::Invalid,
        (false, _) => IndexState::Other(row.get(7)),
    })
}

/// A build that was the victim of a deadlock (with VACUUM, or another index) leaves an INVALID index and is begun again.
async fn build_index(ctx: &Context, session: &Session, index: &Index) -> Result<()> {
    for build in 1.. {
        match try_index(ctx, session, index).await {
            Err(e) if e.sqlstate() == Some("40P01") && build < MAX_BUILDS => {
                warn!(job = ctx.job(), index = %index.name, build, "the index build was cancelled, building again: {e}");
            }
            other => return other,
        }
    }
    Ok(())
}

async fn try_index(ctx: &Context, session: &Session, index: &Index) -> Result<()> {
    let name = format!("{}.{}", ctx.spec.target.table.schema.sql(), index.name.sql());
    match index_state(ctx, &session.client, index).await? {
        IndexState::Valid => {
            metrics::invalid_indexes(ctx.job(), 0);
            info!(job = ctx.job(), index = %index.name, "the index is in place");
            return Ok(());
        }
        IndexState::Other(found) => {
            return Err(Error::refused(format!("index {name}: the name is taken by {found}"))
                .with_hint("rename one of the two"));
        }
        IndexState::Invalid => {
            metrics::invalid_indexes(ctx.job(), 1);
            // `if not exists` would keep it (hazard 32): it costs writes and serves no query.
            warn!(job = ctx.job(), index = %index.name, "an INVALID index is left over from a failed build; dropping it");
            ddl::concurrently(
                ctx,
                session,
                &format!("drop the invalid index {name}"),
                &format!("drop index concurrently {name}"),
            )
            .await?;
        }
        IndexState::Missing => {}
    }
    // Noted before it is built: a build that is killed leaves an INVALID index that is ours to remove.
    objects::created(&session.client, ctx.job(), "index", &name).await?;
    ctx.progress.update(|p| p.note = format!("building index {}", index.name));
    let sql = steps::create_index(&ctx.facts.shape, index);
    let built = ddl::concurrently(ctx, session, &format!("build index {}", index.name), &sql).await;
    // A build that failed leaves the index behind, invalid, until the next one removes it.
    metrics::invalid_indexes(ctx.job(), u64::from(built.is_err()));
    built?;
    match index_state(ctx, &session.client, index).await? {
        IndexState::Valid => Ok(()),
        other => Err(Error::failed(format!("index {name} is not valid after its build: {other:?}"))),
    }
}

async fn foreign_key(ctx: &Context, session: &mut Session, key: &ForeignKey, steps: &[Step]) -> Result<()> {
    let target = ctx.spec.target.table.sql();
    let row = session
        .client
        .query_opt(
            "select c.convalidated, pg_get_constraintdef(c.oid),
                    c.contype = 'f' and c.confrelid = to_regclass($3)
                    and (select array_agg(a.attname::text order by k.n) from unnest(c.conkey) with ordinality k(attnum, n)
                         join pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.attnum) = $4
                    and (select array_agg(a.attname::text order by k.n) from unnest(c.confkey) with ordinality k(attnum, n)
                         join pg_attribute a on a.attrelid = c.confrelid and a.attnum = k.attnum) = $5
                    and c.confdeltype::text = $6 and c.confupdtype::text = $7
             from pg_constraint c where c.conrelid = to_regclass($1) and c.conname = $2",
            &[
                &target,
                &key.name.as_str(),
                &key.references.sql(),
                &names(&key.columns),
                &names(&key.referenced_columns),
                &action_code(key.on_delete),
                &action_code(key.on_update),
            ],
        )
        .await?;
    let validated = match &row {
        None => {
            let step = step(steps, &format!("add foreign key {} without checking", key.name))?;
            let change = Change {
                what: &step.what,
                locks: vec![(target.clone(), Strength::Writes)],
                also_locked: vec![key.references.sql()],
                ..Default::default()
            };
            ddl::transaction(ctx, session, &change, async |tx| {
                tx.batch_execute(&step.sql[0]).await?;
                objects::created(tx, ctx.job(), "constraint", key.name.as_str()).await
            })
            .await?;
            false
        }
        Some(row) => {
            if row.get::<_, Option<bool>>(2) != Some(true) {
                let found: String = row.get(1);
                return Err(Error::refused(format!("constraint {}: the name is taken by {found}", key.name))
                    .with_hint("rename one of the two"));
            }
            row.get(0)
        }
    };
    if !validated {
        let step = step(steps, &format!("validate foreign key {}", key.name))?;
        ctx.progress.update(|p| p.note = step.what.clone());
        ddl::transaction(ctx, session, &maintenance(ctx, &step.what), async |tx| {
            Ok(tx.batch_execute(&step.sql[0]).await?)
        })
        .await?;
    }
    Ok(())
}

fn names(idents: &[Ident]) -> Vec<&str> {
    idents.iter().map(Ident::as_str).collect()
}

/// `pg_constraint.confdeltype`.
fn action_code(action: Action) -> &'static str {
    match action {
        Action::NoAction => "a",
        Action::Restrict => "r",
        Action::Cascade => "c",
        Action::SetNull => "n",
    }
}

async fn not_null(ctx: &Context, session: &mut Session, i: usize, column: &str, steps: &[Step]) -> Result<()> {
    let target = ctx.spec.target.table.sql();
    let check = steps::not_null_check(&ctx.facts.shape, i);
    let row = session
        .client
        .query_one(
            "select a.attnotnull, (select c.convalidated from pg_constraint c
                                   where c.conrelid = a.attrelid and c.conname = $3 and c.contype = 'c')
             from pg_attribute a where a.attrelid = to_regclass($1) and a.attname = $2",
            &[&target, &column, &check.as_str()],
        )
        .await?;
    let (is_set, validated): (bool, Option<bool>) = (row.get(0), row.get(1));
    if is_set && validated.is_none() {
        return Ok(());
    }
    let exclusive = |what| Change { what, locks: vec![(target.clone(), Strength::Everything)], ..Default::default() };
    if validated.is_none() {
        let step = step(steps, &format!("add check that {column} is not null, without checking"))?;
        ddl::transaction(ctx, session, &exclusive(&step.what), async |tx| {
            tx.batch_execute(&step.sql[0]).await?;
            objects::created(tx, ctx.job(), "constraint", check.as_str()).await
        })
        .await?;
    }
    if validated != Some(true) {
        let step = step(steps, &format!("validate that {column} is not null"))?;
        ctx.progress.update(|p| p.note = step.what.clone());
        ddl::transaction(ctx, session, &maintenance(ctx, &step.what), async |tx| {
            Ok(tx.batch_execute(&step.sql[0]).await?)
        })
        .await?;
    }
    let step = step(steps, &format!("set {column} not null"))?;
    ddl::transaction(ctx, session, &exclusive(&step.what), async |tx| {
        for sql in &step.sql {
            tx.batch_execute(sql).await?;
        }
        objects::removed(tx, ctx.job(), "constraint", check.as_str()).await?;
        objects::created(tx, ctx.job(), "not_null", column).await
    })
    .await
}
