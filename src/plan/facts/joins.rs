//! The joins of a job: each finds one row at most, by a unique key, and maybe a foreign key says that the row is there.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::{Table, table};
use crate::error::{Error, Result};
use crate::job::spec::{Join, TARGET_ALIAS};
use crate::pg::ident::Ident;
use crate::plan::shape::{JoinShape, OnShape};

pub(super) async fn joins(
    client: &Client,
    path: &str,
    joins: &[Join],
    target: &Table,
) -> Result<(Vec<Table>, Vec<JoinShape>)> {
    let mut tables: Vec<Table> = Vec::new();
    let mut out: Vec<JoinShape> = Vec::new();
    for (i, join) in joins.iter().enumerate() {
        let where_ = format!("{path}[{i}]");
        let found = table(client, &join.table, &format!("{where_}.table")).await?;
        let by_alias = |alias: &str| -> Option<&Table> {
            if alias == TARGET_ALIAS {
                return Some(target);
            }
            joins.iter().position(|j| j.alias.as_str() == alias).and_then(|k| tables.get(k))
        };
        for (column, reference) in &join.on {
            has_column(&found, column, &format!("{where_}.on"))?;
            if let Some(table) = by_alias(reference.alias.as_str()) {
                has_column(table, &reference.column, &format!("{where_}.on.{column}"))?;
            }
            if reference.alias.as_str() == TARGET_ALIAS {
                not_generated(target, &reference.column, &format!("{where_}.on.{column}"))?;
            }
        }
        let operators = unique_operators(client, &found, join, &where_).await?;
        let aliases: BTreeSet<&str> = join.on.values().map(|r| r.alias.as_str()).collect();
        let covered = match (aliases.first().and_then(|a| by_alias(a)), aliases.len()) {
            (Some(from), 1) => foreign_key(client, from, &found, join).await?,
            _ => None,
        };
        let hashable = hashable(client, join, &found, by_alias).await?;
        out.push(JoinShape {
            alias: join.alias.clone(),
            table: join.table.clone(),
            on: join
                .on
                .iter()
                .map(|(column, reference)| OnShape {
                    column: column.clone(),
                    ref_alias: reference.alias.clone(),
                    ref_column: reference.column.clone(),
                    operator: operators
                        .iter()
                        .find(|(name, _)| name == column.as_str())
                        .map_or_else(|| "operator(pg_catalog.=)".to_owned(), |(_, op)| op.clone()),
                })
                .collect(),
            kind: join.join,
            covered: covered.is_some(),
            replaceable: covered == Some(NO_ACTION),
            hashable,
        });
        tables.push(found);
    }
    Ok((tables, out))
}

pub(super) fn has_column(table: &Table, column: &Ident, key: &str) -> Result<()> {
    if table.columns.iter().any(|c| c.name == column.as_str()) {
        return Ok(());
    }
    let names: Vec<&str> = table.columns.iter().map(|c| c.name.as_str()).collect();
    Err(Error::input(format!("{key}: {} has no column {:?}", table.name, column.as_str()))
        .with_hint(format!("its columns are {}", names.join(", "))))
}

pub(super) fn not_generated(target: &Table, column: &Ident, key: &str) -> Result<()> {
    if target.columns.iter().any(|c| c.name == column.as_str() && c.generated) {
        return Err(Error::input(format!("{key}: {column} is a generated column of {}", target.name))
            .with_hint("it has no value yet when BEFORE triggers run: write its expression instead"));
    }
    Ok(())
}

/// The equality operators of a unique index that the join's columns contain: proof that a join finds one row at most.
async fn unique_operators(client: &Client, table: &Table, join: &Join, where_: &str) -> Result<Vec<(String, String)>> {
    let rows = client
        .query(
            "select array_agg(a.attname::text order by k.n),
                    array_agg(format('operator(%I.%s)', on_.nspname, o.oprname) order by k.n)
             from pg_index i
             cross join lateral unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality as k(attnum, opclass, n)
             join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
             join pg_opclass oc on oc.oid = k.opclass
             join pg_amop ao on ao.amopfamily = oc.opcfamily and ao.amopstrategy = 3
                            and ao.amoplefttype = oc.opcintype and ao.amoprighttype = oc.opcintype
             join pg_operator o on o.oid = ao.amopopr
             join pg_namespace on_ on on_.oid = o.oprnamespace
             where i.indrelid = $1 and i.indisunique and i.indisvalid and i.indimmediate
               and i.indpred is null and i.indexprs is null and k.n <= i.indnkeyatts
             group by i.indexrelid, i.indnkeyatts having count(*) = i.indnkeyatts",
            &[&table.oid],
        )
        .await?;
    for row in &rows {
        let columns: Vec<String> = row.get(0);
        let operators: Vec<String> = row.get(1);
        if columns.iter().all(|c| join.on.keys().any(|k| k.as_str() == c)) {
            return Ok(columns.into_iter().zip(operators).collect());
        }
    }
    let on: Vec<&str> = join.on.keys().map(Ident::as_str).collect();
    Err(Error::input(format!(
        "{where_}.on: ({}) is not a unique key of {}, so a row could have several values",
        on.join(", "),
        table.name
    ))
    .with_hint("join by a primary key or by the columns of a valid, not partial, unique index"))
}

/// `pg_constraint.confdeltype`.
const NO_ACTION: i8 = b'a' as i8;

/// What deleting a referenced row does, if a validated foreign key guarantees that the row of `join` exists.
async fn foreign_key(client: &Client, from: &Table, to: &Table, join: &Join) -> Result<Option<i8>> {
    let rows = client
        .query(
            "select array_agg(fa.attname::text order by k.n), array_agg(ta.attname::text order by k.n), c.confdeltype
             from pg_constraint c
             cross join lateral unnest(c.conkey, c.confkey) with ordinality as k(f, t, n)
             join pg_attribute fa on fa.attrelid = c.conrelid and fa.attnum = k.f
             join pg_attribute ta on ta.attrelid = c.confrelid and ta.attnum = k.t
             where c.contype = 'f' and c.conrelid = $1 and c.confrelid = $2 and c.convalidated
               and coalesce((to_jsonb(c) ->> 'conenforced')::bool, true)
             group by c.oid",
            &[&from.oid, &to.oid],
        )
        .await?;
    let covers = |row: &&tokio_postgres::Row| {
        let (f, t): (Vec<String>, Vec<String>) = (row.get(0), row.get(1));
        f.len() == join.on.len()
            && f.iter().zip(&t).all(|(f, t)| {
                join.on.iter().any(|(column, reference)| column.as_str() == t && reference.column.as_str() == f)
            })
    };
    // With two foreign keys, the stricter action decides: NO ACTION is the one that lets a row be replaced.
    let actions: Vec<i8> = rows.iter().filter(covers).map(|row| row.get(2)).collect();
    Ok(actions.iter().copied().find(|a| *a != NO_ACTION).or_else(|| actions.first().copied()))
}

/// Whether equal keys of the join have equal hashes: key and reference are of one type, or both are integers, whose hash
/// functions agree; and the type has one.
async fn hashable<'a>(
    client: &Client,
    join: &Join,
    found: &Table,
    by_alias: impl Fn(&str) -> Option<&'a Table>,
) -> Result<bool> {
    for (column, reference) in &join.on {
        let type_of = |table: &Table, name: &Ident| {
            table.columns.iter().find(|c| c.name == name.as_str()).map(|c| c.sql_type.clone())
        };
        let key = type_of(found, column).unwrap_or_default();
        let other = by_alias(reference.alias.as_str()).and_then(|t| type_of(t, &reference.column)).unwrap_or_default();
        let integer = |t: &str| matches!(t, "smallint" | "integer" | "bigint");
        if key != other && !(integer(&key) && integer(&other)) {
            return Ok(false);
        }
        match client.query_one(&format!("select hash_record_extended(row(null::{key}), 0)"), &[]).await {
            Ok(_) => {}
            Err(e) if e.as_db_error().is_some() => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}
