//! Names: ours must fit into 63 bytes and be free; leftovers of earlier attempts are named.

use super::check::{Check, Tally};
use super::probe::{Probe, text};
use crate::error::Result;
use crate::pg::ident::MAX_IDENT_BYTES;
use crate::plan::shape::SYNC_SCHEMA;
use crate::plan::{Facts, steps, sync_sql};

/// Columns that every table has.
const SYSTEM_COLUMNS: [&str; 6] = ["tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"];

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    Ok(vec![p.settle("names", names(p, facts).await)?, p.settle("invalid_indexes", invalid_indexes(p, facts).await)?])
}

async fn names(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let mut tally = Tally::default();
    length(facts, &mut tally);
    for column in &facts.shape.columns {
        if SYSTEM_COLUMNS.contains(&column.name.as_str()) {
            tally.fail(format!("{} is a system column", column.name), "choose another name for the column");
        }
    }
    triggers(p, facts, &mut tally).await?;
    functions(p, facts, &mut tally).await?;
    relations(p, facts, &mut tally).await?;
    constraints(p, facts, &mut tally).await?;
    policies(p, facts, &mut tally).await?;
    Ok(tally.check("names", "all names of triggers, functions, indexes, constraints and policies are free and fit"))
}

/// The server cuts longer names silently (hazard 38). Names in the job are checked when it is loaded; these are made of
/// it.
fn length(facts: &Facts, tally: &mut Tally) {
    let triggers = sync_sql::triggers(&facts.shape).into_iter().map(|t| t.name);
    let functions = sync_sql::functions(&facts.shape).into_iter().filter_map(|f| bare_function(&f.name));
    for name in triggers.chain(functions).filter(|n| n.len() > MAX_IDENT_BYTES) {
        tally.fail(
            format!("{name} has {} bytes, of which the server keeps {MAX_IDENT_BYTES}", name.len()),
            "give the job a shorter name",
        );
    }
}

/// The name out of `"schema"."name"`.
fn bare_function(qualified: &str) -> Option<String> {
    qualified.parse::<crate::pg::ident::QualifiedName>().ok().map(|q| q.name.as_str().to_owned())
}

async fn triggers(p: &Probe<'_>, facts: &Facts, tally: &mut Tally) -> Result<()> {
    for trigger in sync_sql::triggers(&facts.shape) {
        let Ok(table) = trigger.table.parse::<crate::pg::ident::QualifiedName>() else { continue };
        let (schema, name) = (table.schema.as_str(), table.name.as_str());
        let rows = p
            .rows(
                "select fn.nspname = $4 from pg_trigger t join pg_class c on c.oid = t.tgrelid
                 join pg_namespace n on n.oid = c.relnamespace join pg_proc f on f.oid = t.tgfoid
                 join pg_namespace fn on fn.oid = f.pronamespace
                 where n.nspname = $1 and c.relname = $2 and t.tgname = $3 and not t.tgisinternal",
                &[text(&schema), text(&name), text(&trigger.name), text(&SYNC_SCHEMA)],
            )
            .await?;
        match rows.first().map(|r| r.get::<_, bool>(0)) {
            Some(true) if !p.expanded() => leftover(tally, &format!("trigger {} on {table}", trigger.name)),
            Some(false) => tally.fail(
                format!("a trigger {} that is not ours is on {table}", trigger.name),
                "rename or drop it, or give the job another name",
            ),
            _ => {}
        }
    }
    Ok(())
}

fn leftover(tally: &mut Tally, what: &str) {
    tally.fail(
        format!("{what} is there, left over from an earlier job of this name"),
        "the ledger does not know that job any more: backfilld uninstall removes what it left, or drop it by hand",
    );
}

async fn functions(p: &Probe<'_>, facts: &Facts, tally: &mut Tally) -> Result<()> {
    if p.expanded() {
        return Ok(());
    }
    let wanted: Vec<String> = sync_sql::functions(&facts.shape).iter().filter_map(|f| bare_function(&f.name)).collect();
    let found = p
        .texts(
            "select f.proname::text from pg_proc f join pg_namespace n on n.oid = f.pronamespace
             where n.nspname = $1 and f.proname = any ($2) order by 1",
            &[text(&SYNC_SCHEMA), (&wanted, tokio_postgres::types::Type::TEXT_ARRAY)],
        )
        .await?;
    for name in found {
        // Replaced by Expand, and nobody calls them without our triggers.
        tally.warn(
            format!("function {SYNC_SCHEMA}.{name} is there, left over from an earlier job of this name"),
            "it will be replaced",
        );
    }
    Ok(())
}

/// Indexes share their names with tables, views and sequences of the schema.
async fn relations(p: &Probe<'_>, facts: &Facts, tally: &mut Tally) -> Result<()> {
    let schema = facts.target.name.schema.as_str();
    let oid = facts.target.oid.to_string();
    for index in &p.spec.indexes {
        let name = index.name.as_str();
        let rows = p
            .rows(
                "select c.relkind::text, coalesce(i.indrelid = $3::text::oid, false), coalesce(i.indisvalid, false),
                        coalesce(i.indisunique, false), coalesce(am.amname::text, ''), i.indpred is not null,
                        array(select a.attname::text from unnest(i.indkey::int2[]) with ordinality as k(attnum, n)
                              join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum order by k.n)
                 from pg_class c join pg_namespace n on n.oid = c.relnamespace
                 left join pg_index i on i.indexrelid = c.oid left join pg_am am on am.oid = c.relam
                 where n.nspname = $1 and c.relname = $2",
                &[text(&schema), text(&name), text(&oid)],
            )
            .await?;
        let Some(row) = rows.first() else { continue };
        if p.expanded() {
            continue;
        }
        let (kind, on_target, valid): (String, bool, bool) = (row.get(0), row.get(1), row.get(2));
        if !on_target {
            let what = if kind == "i" { "an index of another table" } else { "another relation" };
            tally.fail(format!("{schema}.{name} is {what} (relkind {kind})"), "choose another index name");
            continue;
        }
        if !valid {
            continue; // invalid_indexes tells
        }
        let columns: Vec<String> = row.get(6);
        let same = row.get::<_, bool>(3) == index.unique
            && row.get::<_, String>(4) == index.method.as_str()
            && row.get::<_, bool>(5) == index.predicate.is_some()
            && columns.iter().map(String::as_str).eq(index.columns.iter().map(|c| c.as_str()));
        if same {
            tally.warn(
                format!("index {name} is there already"),
                "it is kept, and so it slows the batches down (hazard 30): drop it first if you can",
            );
        } else {
            tally.fail(
                format!("index {name} is there with another definition: ({})", columns.join(", ")),
                "choose another index name",
            );
        }
    }
    Ok(())
}

async fn constraints(p: &Probe<'_>, facts: &Facts, tally: &mut Tally) -> Result<()> {
    if p.expanded() {
        return Ok(());
    }
    let oid = facts.target.oid.to_string();
    let sql = "select conname::text, contype::text, coalesce(convalidated, true) from pg_constraint
               where conrelid = $1::text::oid";
    let found = p.rows(sql, &[text(&oid)]).await?;
    let get = |name: &str| found.iter().find(|r| r.get::<_, String>(0) == name);
    for key in &p.spec.foreign_keys {
        if let Some(row) = get(key.name.as_str()) {
            let what = if row.get::<_, String>(1) == "f" { "a foreign key" } else { "a constraint of another kind" };
            tally.fail(
                format!("{what} named {} is on the table", key.name),
                "drop it if it is a leftover, or choose another name",
            );
        }
    }
    for i in 0..facts.shape.columns.len() {
        let name = steps::not_null_check(&facts.shape, i);
        if get(name.as_str()).is_some() {
            leftover(tally, &format!("constraint {name}"));
        }
    }
    Ok(())
}

async fn policies(p: &Probe<'_>, facts: &Facts, tally: &mut Tally) -> Result<()> {
    let Some(policies) = p.spec.policies.as_ref().filter(|_| !p.flipped()) else { return Ok(()) };
    let sql = "select polname::text from pg_policy where polrelid = $1::text::oid";
    let there = p.texts(sql, &[text(&facts.target.oid.to_string())]).await?;
    for policy in &policies.create {
        let name = policy.name.as_str();
        if there.iter().any(|t| t == name) && !policies.replace.iter().any(|r| r == name) {
            tally.fail(
                format!("a policy {name:?} is on the table already"),
                "name it in policies.replace, or choose another name for the new one",
            );
        }
    }
    Ok(())
}

/// An invalid index costs writes, a unique one still rejects rows, and IF NOT EXISTS would keep it (hazard 32).
async fn invalid_indexes(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let rows = p
        .rows(
            "select i.indexrelid::regclass::text, c.relname::text, i.indisunique,
                    exists (select from pg_stat_progress_create_index b where b.index_relid = i.indexrelid)
             from pg_index i join pg_class c on c.oid = i.indexrelid
             where i.indrelid = $1::text::oid and not (i.indisvalid and i.indisready and i.indislive) order by 1",
            &[text(&facts.target.oid.to_string())],
        )
        .await?;
    let mut tally = Tally::default();
    let mut names = Vec::new();
    for row in &rows {
        let (shown, name, unique, building): (String, String, bool, bool) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        let ours = p.spec.indexes.iter().any(|i| i.name.as_str() == name);
        if building {
            tally.warn(
                format!("{shown} is being built by another session"),
                "wait for it: DDL of this job would wait, too",
            );
        } else if ours {
            tally.warn(
                format!("{shown} is an invalid leftover with a name of this job"),
                format!("it will be dropped and built again; or drop it now: drop index concurrently {shown}"),
            );
        } else {
            let rejects = if unique { ", and still rejects duplicates" } else { "" };
            tally.warn(
                format!("{shown} is invalid: it costs every write{rejects}"),
                format!("drop it, or build it again: drop index concurrently {shown}"),
            );
        }
        names.push(shown);
    }
    Ok(tally.check("invalid_indexes", "every index is valid").samples(names))
}
