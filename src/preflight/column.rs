//! The columns to fill, what their sources guarantee, and the kinds of the tables.

use super::check::{Check, Tally};
use super::probe::{Probe, text};
use super::scan::{self, Scan};
use crate::error::Result;
use crate::job::lex;
use crate::job::spec::TARGET_ALIAS;
use crate::plan::facts::Table;
use crate::plan::shape::ColumnShape;
use crate::plan::{Facts, verify_sql};

/// `MaxHeapAttributeNumber`; dropped columns count.
const MAX_COLUMNS: i64 = 1600;

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    Ok(vec![
        p.settle("existing_column", existing_column(p, facts).await)?,
        p.settle("source_nullable", source_nullable(p, facts).await)?,
        p.settle("table_kind", table_kind(p, facts).await)?,
        p.settle("key_order", key_order(p, facts).await)?,
    ])
}

/// A column that is there already: NULL must mean "not filled", and what it holds must be right (hazard 23).
async fn existing_column(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "existing_column";
    if p.expanded() {
        return Ok(Check::pass(name, "added by this job"));
    }
    let sql = "select attname::text, attgenerated <> '', attidentity <> '', atttypid from pg_attribute
               where attrelid = $1::text::oid and attnum > 0 and not attisdropped";
    let oid = facts.target.oid.to_string();
    let generated = p.rows(sql, &[text(&oid)]).await?;
    let mut tally = Tally::default();
    let mut existing: Vec<&ColumnShape> = Vec::new();
    for (column, found) in facts.shape.columns.iter().zip(&facts.existing) {
        let Some(found) = found else {
            rewritten_for_a_domain(p, column, &mut tally).await?;
            continue;
        };
        let attribute = generated.iter().find(|r| r.get::<_, String>(0) == column.name.as_str());
        let flag = |i: usize| attribute.is_some_and(|r| r.get(i));
        let label = format!("{} exists", column.name);
        let wanted = p.prepare(&format!("select null::{}", column.sql_type)).await?.map_or(0, |t| t.oid());
        let same_type = attribute.is_some_and(|r| r.get::<_, u32>(3) == wanted);
        if flag(1) || flag(2) {
            tally.fail(
                format!("{label} and is generated"),
                "a generated or identity column cannot be filled: choose another name",
            );
        } else if !same_type {
            tally.fail(
                format!("{label} with type {}, the job says {}", found.sql_type, column.sql_type),
                "set columns.type to the type that is there, or choose another name",
            );
        } else if found.not_null {
            tally.fail(
                format!("{label} and is NOT NULL{}", if found.has_default { " with a default" } else { "" }),
                "NULL cannot tell what is still to be filled, which this version needs: drop NOT NULL and the default and \
                 set the values to NULL, or choose another name",
            );
        } else {
            existing.push(column);
            if found.has_default {
                tally.warn(
                    format!("{label} with a default"),
                    "the sync trigger overrides the default; drop it, as it means nothing any more",
                );
            }
        }
    }
    held_values(p, facts, &existing, &mut tally).await?;
    let used: i64 =
        p.one("select max(attnum)::int8 from pg_attribute where attrelid = $1::text::oid", &[text(&oid)]).await?.get(0);
    let new = facts.existing.iter().filter(|e| e.is_none()).count() as i64;
    if used + new > MAX_COLUMNS {
        tally.fail(
            format!("the table has used {used} of {MAX_COLUMNS} column numbers"),
            "only a rewritten table gets them back",
        );
    }
    let names: Vec<&str> = facts.shape.columns.iter().map(|c| c.name.as_str()).collect();
    let kind = if new > 0 { "new" } else { "there, empty and nullable" };
    Ok(tally.check(name, format!("{}: {kind}", names.join(", "))))
}

/// To add a column of a domain with constraints rewrites the table, with everybody else shut out (ATExecAddColumn in the server's
/// `tablecmds.c`).
async fn rewritten_for_a_domain(p: &Probe<'_>, column: &ColumnShape, tally: &mut Tally) -> Result<()> {
    let sql = "with recursive chain as (
                 select oid, typtype, typbasetype, typtypmod, typnotnull, 0 as depth from pg_type where oid = to_regtype($1::text)
                 union all
                 select b.oid, b.typtype, b.typbasetype, b.typtypmod, b.typnotnull, depth + 1
                 from chain c join pg_type b on b.oid = c.typbasetype where c.typtype = 'd')
               select coalesce(bool_or(typtype = 'd' and (typnotnull or exists (
                        select from pg_constraint where contypid = chain.oid))), false),
                      (select format_type(b.oid, (select max(typtypmod) from chain))
                       from chain b order by depth desc limit 1)
               from chain";
    let row = p.one(sql, &[text(&column.sql_type)]).await?;
    if row.get(0) {
        tally.fail(
            format!(
                "{}: type {} is a domain with constraints, and to add such a column rewrites the table",
                column.name, column.sql_type
            ),
            format!("set columns.type to what it is made of, {}", row.get::<_, String>(1)),
        );
    }
    Ok(())
}

/// Values that are there already stay: batches fill NULLs only. So wrong ones would block the flip for ever.
async fn held_values(p: &Probe<'_>, facts: &Facts, columns: &[&ColumnShape], tally: &mut Tally) -> Result<()> {
    if columns.is_empty() {
        return Ok(());
    }
    let shape = &facts.shape;
    let mut conditions = Vec::new();
    for column in columns {
        let stored = format!("t.{}", column.name.sql());
        conditions.push(format!("{stored} is not null"));
        conditions.push(format!("({stored} is not null and {})", column.differs(&stored, &shape.left_value(column))));
    }
    let tail = format!("from {}\nwhere true", verify_sql::from(shape, &[], &[]));
    let key = shape.key_as_text(TARGET_ALIAS);
    let found = scan::count(p, &Scan { oid: facts.target.oid, alias: TARGET_ALIAS, tail, conditions, key }).await?;
    for (i, column) in columns.iter().enumerate() {
        let (held, wrong) = (found.counts[2 * i], found.counts[2 * i + 1]);
        if wrong > 0 {
            let keys: Vec<&str> = found.samples[2 * i + 1].iter().take(5).map(String::as_str).collect();
            tally.fail(
                format!("{wrong} rows hold another {} than their source, such as {}", column.name, keys.join(", ")),
                "batches fill NULLs only: set these to NULL first, or find out which side is right",
            );
        } else if held > 0 {
            tally.warn(
                format!("{held} rows have a value in {} already, all equal to their source", column.name),
                "they are left as they are; make sure that nobody else keeps this column",
            );
        }
    }
    Ok(())
}

/// Every source row must yield a legal value, or the first target row inserted for it fails after Constrain (I6).
async fn source_nullable(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "source_nullable";
    let (mut problems, mut applies) = (Vec::new(), false);
    for column in &facts.shape.columns {
        let keys: Vec<_> =
            p.spec.foreign_keys.iter().filter(|k| k.columns.as_slice() == [column.name.clone()]).collect();
        applies |= column.not_null || !keys.is_empty();
        if column.not_null && column.nullable {
            problems.push((format!("{} may be NULL ({})", column.value, "23502"), remedy_null(facts, column)));
        }
        for key in keys {
            if !refers(p, facts, column, key).await? {
                problems.push((
                    format!("{} need not exist in {} (23503)", column.value, key.references),
                    format!("put a foreign key to {} on the source column", key.references),
                ));
            }
        }
    }
    if !applies {
        return Ok(Check::skip(name, "the job adds neither NOT NULL nor a foreign key"));
    }
    if problems.is_empty() {
        return Ok(Check::pass(name, "NOT NULL and foreign keys of the sources guarantee a legal value"));
    }
    let what: Vec<&str> = problems.iter().map(|x| x.0.as_str()).collect();
    let mut hints: Vec<&str> = problems.iter().map(|x| x.1.as_str()).collect();
    hints.dedup();
    let summary = format!(
        "{}: once the constraint is in place, inserting a row of {} for such a source row fails",
        what.join(", "),
        facts.target.name
    );
    let (status, consent) = if p.spec.side_effects.source_may_lack_value {
        (super::Status::Warn, "side_effects.source_may_lack_value = true consents to it".to_owned())
    } else {
        (super::Status::Fail, "or consent with side_effects.source_may_lack_value = true".to_owned())
    };
    Ok(Check::new(name, status, summary).count(problems.len() as i64).hint(format!("{}; {consent}", hints.join("; "))))
}

fn remedy_null(facts: &Facts, column: &ColumnShape) -> String {
    let place = lex::plain_reference(&column.value).and_then(|r| {
        let join = facts.shape.joins.iter().find(|j| j.alias.as_str() == r.alias)?;
        Some(format!("alter table {} alter column {} set not null", join.table, super::privileges::quote(&r.column)))
    });
    match place {
        Some(sql) => format!("{sql} (after a validated check, to avoid the scan under lock)"),
        None => {
            "make the sources of the expression NOT NULL and their joins foreign keys, or add a fallback".to_owned()
        }
    }
}

/// Whether a validated foreign key of the source column leads to where the job's foreign key leads.
async fn refers(
    p: &Probe<'_>,
    facts: &Facts,
    column: &ColumnShape,
    key: &crate::job::spec::ForeignKey,
) -> Result<bool> {
    let Some(reference) = lex::plain_reference(&column.value) else { return Ok(false) };
    let source = match facts.shape.joins.iter().position(|j| j.alias.as_str() == reference.alias) {
        Some(k) => &facts.sources[k],
        None => &facts.target,
    };
    if source.name == key.references && key.referenced_columns.iter().all(|c| c.as_str() == reference.column) {
        return Ok(true);
    }
    let sql = "select exists (select from pg_constraint c
                 join pg_attribute a on a.attrelid = c.conrelid and a.attnum = c.conkey[1]
                 join pg_attribute r on r.attrelid = c.confrelid and r.attnum = c.confkey[1]
                 join pg_class rc on rc.oid = c.confrelid join pg_namespace rn on rn.oid = rc.relnamespace
               where c.contype = 'f' and c.convalidated and cardinality(c.conkey) = 1
                 and coalesce((to_jsonb(c) ->> 'conenforced')::bool, true)
                 and c.conrelid = $1::text::oid and a.attname = $2 and rn.nspname = $3 and rc.relname = $4
                 and r.attname = $5)";
    let oid = source.oid.to_string();
    let (schema, table) = (key.references.schema.as_str(), key.references.name.as_str());
    let referenced = key.referenced_columns.first().map_or("", |c| c.as_str());
    let params = [text(&oid), text(&reference.column), text(&schema), text(&table), text(&referenced)];
    Ok(p.one(sql, &params).await?.get(0))
}

/// Tables that triggers cannot guard, or to which a column cannot be added.
async fn table_kind(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let mut tally = Tally::default();
    let mut tables: Vec<&Table> = vec![&facts.target];
    tables.extend(&facts.sources);
    for table in tables {
        one_kind(p, facts, table, &mut tally).await?;
    }
    Ok(tally.check("table_kind", "ordinary tables, without inheritance"))
}

async fn one_kind(p: &Probe<'_>, facts: &Facts, table: &Table, tally: &mut Tally) -> Result<()> {
    let row = p
        .one(
            "select c.relispartition, c.relkind = 'r' and exists (select from pg_inherits i where i.inhparent = c.oid),
                    not c.relispartition and exists (select from pg_inherits i where i.inhrelid = c.oid),
                    c.relpersistence::text, c.reloftype <> 0
             from pg_class c where c.oid = $1::text::oid",
            &[text(&table.oid.to_string())],
        )
        .await?;
    let (partition, has_children, child): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
    let persistence: String = row.get(3);
    let typed: bool = row.get(4);
    let (name, is_target) = (&table.name, table.oid == facts.target.oid);
    if partition && is_target {
        tally.fail(
            format!("{name} is a partition"),
            "a column is added to the partitioned table, which is not implemented",
        );
    } else if has_children {
        tally.fail(
            format!("{name} has inheritance children"),
            "triggers of the parent do not fire for the children's rows, so writers would be missed",
        );
    } else if child {
        tally.warn(
            format!("{name} inherits from another table"),
            "DDL on the parent reaches it; make sure that there is none",
        );
    }
    if typed && is_target {
        tally.fail(format!("{name} is a typed table"), "a column cannot be added to it");
    }
    if persistence == "t" {
        tally.fail(format!("{name} is temporary"), "name a permanent table");
    } else if persistence == "u" {
        tally.warn(format!("{name} is unlogged"), "a crash empties it; the job's ledger survives");
    }
    if is_target && table.access_method != "heap" {
        tally.warn(
            format!("{name} uses access method {}", table.access_method),
            "only heap is tested: try the job on a copy first",
        );
    }
    Ok(())
}

/// Batches walk the key in its order; if the operating system's or ICU's idea of that order has changed since the index was
/// built, they skip rows (hazard 20). Only text is concerned.
async fn key_order(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let names: Vec<&str> = facts.shape.key.iter().map(|k| k.name.as_str()).collect();
    // The database's own collation has a version from 15 on.
    let database = if p.server.version_num >= 150_000 {
        "(select d.datcollversion from pg_database d where d.datname = current_database()),
         (select pg_database_collation_actual_version(d.oid) from pg_database d where d.datname = current_database())"
    } else {
        "null::text, null::text"
    };
    let sql = format!(
        "select a.attname::text, c.collname::text, c.collname = 'default', c.collversion,
                pg_collation_actual_version(c.oid), {database}
         from pg_attribute a join pg_collation c on c.oid = a.attcollation
         where a.attrelid = $1::text::oid and a.attname = any ($2)"
    );
    let oid = facts.target.oid.to_string();
    let rows = p.rows(&sql, &[text(&oid), (&names, tokio_postgres::types::Type::TEXT_ARRAY)]).await?;
    let mut tally = Tally::default();
    for row in &rows {
        let (column, collation, default): (String, String, bool) = (row.get(0), row.get(1), row.get(2));
        let at = if default { 5 } else { 3 };
        let (built, now): (Option<String>, Option<String>) = (row.get(at), row.get(at + 1));
        if let (Some(built), Some(now)) = (built, now)
            && built != now
        {
            tally.fail(
                format!("key column {column}: collation {collation} was version {built} and is {now}"),
                "the index of the key may be out of order, and batches would skip rows: reindex, then alter collation (or \
                 database) ... refresh version",
            );
        }
    }
    let kind = if rows.is_empty() { "does not depend on a collation" } else { "has its collation's current version" };
    Ok(tally.check("key_order", format!("the order of key ({}) {kind}", names.join(", "))))
}

/// Columns that the job creates: in the shape and not in the table.
pub fn new_columns(facts: &Facts) -> Vec<&ColumnShape> {
    facts.shape.columns.iter().zip(&facts.existing).filter(|(_, e)| e.is_none()).map(|(c, _)| c).collect()
}
