//! What the job will run later is analysed by the server now, over a table that has the new columns already.

use super::check::{Check, Tally};
use super::column::new_columns;
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::spec::{ForeignKey, Index};
use crate::plan::Facts;

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    Ok(vec![
        p.settle("expressions", expressions(p, facts).await)?,
        p.settle("constraints", constraints(p, facts).await)?,
    ])
}

/// The target with its new columns, under its own name, so that expressions may say `messages.auth_user_id` as well.
fn target_to_be(facts: &Facts) -> String {
    let new: String =
        new_columns(facts).iter().map(|c| format!(", null::{} as {}", c.sql_type, c.name.sql())).collect();
    format!("(select x.*{new} from {} as x) as {}", facts.target.name.sql(), facts.target.name.name.sql())
}

/// Policy expressions and index predicates must be boolean, and resolve with the search path of the flip.
async fn expressions(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let mut all: Vec<(String, &str)> = Vec::new();
    for (i, policy) in p.spec.policies.iter().flat_map(|x| &x.create).enumerate() {
        for (key, text) in [("using", &policy.using), ("check", &policy.check)] {
            all.extend(text.as_deref().map(|t| (format!("policies.create[{i}].{key}"), t)));
        }
    }
    for (i, index) in p.spec.indexes.iter().enumerate() {
        all.extend(index.predicate.as_deref().map(|t| (format!("indexes[{i}].where"), t)));
    }
    if all.is_empty() {
        return Ok(Check::skip("expressions", "the job has no policy and no index predicate"));
    }
    let from = target_to_be(facts);
    let mut tally = Tally::default();
    for (key, expression) in &all {
        match p.prepare(&format!("select ({expression}) from {from}")).await {
            Ok(Some(found)) if found.name() == "bool" => {}
            Ok(found) => tally.fail(
                format!("{key} is {}, not boolean", found.map_or("nothing".to_owned(), |t| t.name().to_owned())),
                "write a condition",
            ),
            Err(e) if p.client.is_closed() => return Err(e),
            Err(e) => tally.fail(
                format!("{key}: {e}{}", state(&e)),
                "write bare columns of the target, and functions and tables outside pg_catalog with their schema",
            ),
        }
    }
    Ok(tally.check("expressions", format!("{} expressions compile", all.len())))
}

fn state(e: &crate::error::Error) -> String {
    e.sqlstate().map_or(String::new(), |s| format!(" (SQLSTATE {s})"))
}

/// Foreign keys need a unique key of a comparable type; indexes need their columns and method.
async fn constraints(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let mut tally = Tally::default();
    for (i, key) in p.spec.foreign_keys.iter().enumerate() {
        foreign_key(p, facts, i, key, &mut tally).await?;
    }
    for (i, index) in p.spec.indexes.iter().enumerate() {
        self::index(p, facts, i, index, &mut tally).await?;
    }
    for (i, key) in p.spec.foreign_keys.iter().enumerate() {
        if !indexed(p, facts, key).await? {
            tally.warn(
                format!("foreign_keys[{i}]: no index on ({})", join(&key.columns)),
                "without one, deleting one referenced row scans the whole target: add it to the job's indexes",
            );
        }
    }
    if p.spec.foreign_keys.is_empty() && p.spec.indexes.is_empty() {
        return Ok(Check::skip("constraints", "the job adds neither foreign key nor index"));
    }
    Ok(tally.check(
        "constraints",
        format!("{} foreign key(s) and {} index(es) can be made", p.spec.foreign_keys.len(), p.spec.indexes.len()),
    ))
}

fn join(names: &[crate::pg::ident::Ident]) -> String {
    names.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ")
}

async fn foreign_key(p: &Probe<'_>, facts: &Facts, i: usize, key: &ForeignKey, tally: &mut Tally) -> Result<()> {
    let (schema, table) = (key.references.schema.as_str(), key.references.name.as_str());
    let wanted: Vec<&str> = key.referenced_columns.iter().map(|c| c.as_str()).collect();
    let row = p
        .one(
            "with ref as (select c.oid, c.relkind from pg_class c join pg_namespace n on n.oid = c.relnamespace
                          where n.nspname = $1 and c.relname = $2)
             select (select relkind::text from ref),
               exists (select from ref join pg_index i on i.indrelid = ref.oid
                 where i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null
                   and (select array_agg(a.attname::text order by a.attname::text)
                        from unnest(i.indkey::int2[]) with ordinality as k(attnum, n)
                        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
                        where k.n <= i.indnkeyatts)
                     = (select array_agg(x order by x) from unnest($3) as x))",
            &[text(&schema), text(&table), (&wanted, tokio_postgres::types::Type::TEXT_ARRAY)],
        )
        .await?;
    let place = format!("foreign_keys[{i}]");
    match row.get::<_, Option<String>>(0).as_deref() {
        None => {
            tally.fail(format!("{place}.references: table {} does not exist", key.references), "correct the name");
            return Ok(());
        }
        Some("r" | "p") => {}
        Some(kind) => {
            tally.fail(
                format!("{place}.references: {} is not a table (relkind {kind})", key.references),
                "name a table",
            );
            return Ok(());
        }
    }
    if !row.get::<_, bool>(1) {
        tally.fail(
            format!("{place}.referenced_columns: ({}) is not a unique key of {}", wanted.join(", "), key.references),
            "refer to a primary key or a unique constraint",
        );
        return Ok(());
    }
    let name = facts.target.name.name.sql();
    let equal: Vec<String> = key
        .columns
        .iter()
        .zip(&key.referenced_columns)
        .map(|(c, r)| format!("{name}.{} = \"#ref\".{}", c.sql(), r.sql()))
        .collect();
    let sql = format!(
        "select 1 from {}, (select * from {}) as \"#ref\" where {}",
        target_to_be(facts),
        key.references.sql(),
        equal.join(" and ")
    );
    if let Err(e) = p.prepare(&sql).await {
        if p.client.is_closed() {
            return Err(e);
        }
        tally.fail(format!("{place}: {e}{}", state(&e)), "the column and what it refers to need comparable types");
    }
    Ok(())
}

async fn index(p: &Probe<'_>, facts: &Facts, i: usize, index: &Index, tally: &mut Tally) -> Result<()> {
    let place = format!("indexes[{i}]");
    let method = index.method.as_str();
    let row = p
        .one(
            "select exists (select from pg_am where amname = $1 and amtype = 'i'),
                    coalesce((select pg_indexam_has_property(oid, 'can_unique') from pg_am where amname = $1), false)",
            &[text(&method)],
        )
        .await?;
    if !row.get::<_, bool>(0) {
        tally.fail(format!("{place}.method: there is no index method {method:?}"), "btree is the usual one");
        return Ok(());
    }
    if index.unique && !row.get::<_, bool>(1) {
        tally.fail(format!("{place}.unique: {method} indexes cannot be unique"), "use btree");
    }
    for column in &index.columns {
        let new = facts.shape.columns.iter().find(|c| c.name == *column);
        let old = facts.target.columns.iter().find(|c| c.name == column.as_str());
        let Some(sql_type) = old.map(|c| &c.sql_type).or(new.map(|c| &c.sql_type)) else {
            tally.fail(
                format!(
                    "{place}.columns: {} has no column {:?}, and the job adds none",
                    facts.target.name,
                    column.as_str()
                ),
                "correct the name",
            );
            continue;
        };
        if !has_operator_class(p, sql_type, method).await? {
            tally.fail(
                format!("{place}: type {sql_type} has no default operator class for {method}"),
                "choose another method or another column",
            );
        }
    }
    Ok(())
}

/// A default operator class for the type itself, its base type, or a pseudo-type that it belongs to.
async fn has_operator_class(p: &Probe<'_>, sql_type: &str, method: &str) -> Result<bool> {
    let Some(found) = p.prepare(&format!("select null::{sql_type}")).await? else { return Ok(true) };
    let row = p
        .one(
            "with recursive base as (
               select oid, typtype, typbasetype, typcategory, typelem from pg_type where oid = $1::text::oid
               union all
               select t.oid, t.typtype, t.typbasetype, t.typcategory, t.typelem from base b join pg_type t on t.oid = b.typbasetype)
             select exists (
               select from base b join pg_opclass oc on true join pg_am am on am.oid = oc.opcmethod
               where am.amname = $2 and oc.opcdefault and (oc.opcintype = b.oid
                 or exists (select from pg_cast where castsource = b.oid and casttarget = oc.opcintype
                              and castmethod = 'b' and castcontext = 'i')
                 or oc.opcintype = 'anyarray'::regtype and b.typcategory = 'A'
                 or oc.opcintype = 'anyenum'::regtype and b.typtype = 'e'
                 or oc.opcintype = 'anyrange'::regtype and b.typtype = 'r'
                 or oc.opcintype = 'anymultirange'::regtype and b.typtype = 'm'
                 or oc.opcintype = 'record'::regtype and b.typtype = 'c'))",
            &[text(&found.oid().to_string()), text(&method)],
        )
        .await?;
    Ok(row.get(0))
}

/// Whether an index that leads with the foreign key's columns is there, or is one of the job's.
async fn indexed(p: &Probe<'_>, facts: &Facts, key: &ForeignKey) -> Result<bool> {
    let leads = |columns: &[crate::pg::ident::Ident]| {
        columns.len() >= key.columns.len() && columns[..key.columns.len()].iter().all(|c| key.columns.contains(c))
    };
    if p.spec.indexes.iter().any(|i| i.predicate.is_none() && leads(&i.columns)) {
        return Ok(true);
    }
    super::propagation::has_leading_index(p, facts.target.oid, &key.columns).await
}
