//! The values of a job: what they depend on, their types, and whether they can be NULL.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::Table;
use super::joins::{has_column, not_generated};
use crate::error::{Error, Result};
use crate::job::lex;
use crate::job::spec::{Column, JoinKind, TARGET_ALIAS};
use crate::pg::ident::{Ident, QualifiedName};
use crate::plan::shape::{ColumnShape, SEARCH_PATH, Shape};

pub(super) async fn columns(
    client: &Client,
    path: &str,
    columns: &[Column],
    shape: &Shape,
    target: &Table,
    sources: &[Table],
) -> Result<Vec<ColumnShape>> {
    let mut trial = Shape { columns: Vec::new(), ..shape.clone() };
    for column in columns {
        trial.columns.push(ColumnShape {
            name: column.name.clone(),
            sql_type: String::new(),
            value: column.value.clone(),
            not_null: column.not_null,
            nullable: true,
            as_text: false,
            converts_to: None,
        });
    }
    check_references(path, &trial, target, sources)?;
    for (i, column) in columns.iter().enumerate() {
        check_functions(client, &column.value, &format!("{path}[{i}]")).await?;
    }
    for (i, column) in columns.iter().enumerate() {
        let where_ = format!("{path}[{i}]");
        let value = value_type(client, &trial, i, &where_).await?;
        let wanted = match &column.sql_type {
            Some(sql_type) => declared_type(client, sql_type, &where_).await?,
            None => value.clone(),
        };
        if matches!(wanted.kind.as_str(), "c" | "p") {
            return Err(Error::input(format!("{where_}.type: {} is a composite or pseudo type", wanted.name))
                .with_hint("\"is null\" means something else for rows; fill its fields as columns of their own"));
        }
        // The value must be assignable to the column, as in an UPDATE; the cast alone would accept too much.
        if !assignable(client, &value, &wanted).await? {
            return Err(Error::input(format!(
                "{where_}.value: has type {}, the column has {}",
                value.name, wanted.name
            ))
            .with_hint("cast the value in the expression"));
        }
        trial.columns[i].sql_type = wanted.name.clone();
        let narrower = wanted.modifier != -1 && wanted.modifier != value.modifier;
        trial.columns[i].converts_to = (wanted.oid != value.oid || narrower).then_some(wanted.unlimited);
        let same = format!("select null::{0} is distinct from null::{0}", wanted.name);
        trial.columns[i].as_text = client.prepare(&same).await.is_err();
        let nullable = trial.columns[i].may_raise() || nullable(&trial, &column.value, target, sources);
        trial.columns[i].nullable = nullable;
    }
    Ok(trial.columns)
}

/// A type with its modifier, such as `varchar(10)`.
#[derive(Debug, Clone)]
struct SqlType {
    oid: u32,
    modifier: i32,
    /// `pg_type.typtype`.
    kind: String,
    /// As in `create table`.
    name: String,
    /// Without modifier; `bpchar` and not `character`, which would be one character.
    unlimited: String,
}

impl SqlType {
    /// The oid has to come from `pg_typeof`: the description of a result gives a domain's base type instead.
    async fn read(client: &Client, oid: u32, modifier: i32) -> Result<Self> {
        let row = client
            .query_one(
                "select format_type(oid, $2), format_type(oid, -1), typtype::text from pg_type where oid = $1",
                &[&oid, &modifier],
            )
            .await?;
        Ok(Self { oid, modifier, name: row.get(0), unlimited: row.get(1), kind: row.get(2) })
    }
}

async fn declared_type(client: &Client, sql_type: &str, where_: &str) -> Result<SqlType> {
    let bad = |e: tokio_postgres::Error| {
        Error::from(e)
            .context(format!("{where_}.type: {sql_type:?}"))
            .into_input()
            .with_hint("write the type as in create table; types outside pg_catalog with their schema")
    };
    let sql = format!("select cast(null as {sql_type}), pg_typeof(cast(null as {sql_type}))::oid");
    let statement = client.prepare(&sql).await.map_err(bad)?;
    let oid: u32 = client.query_one(&statement, &[]).await.map_err(bad)?.get(1);
    let described = &statement.columns()[0];
    let modifier = if described.type_().oid() == oid { described.type_modifier() } else { -1 };
    SqlType::read(client, oid, modifier).await
}

async fn assignable(client: &Client, from: &SqlType, to: &SqlType) -> Result<bool> {
    let row = client
        .query_one(
            "select $1::oid = $2::oid or $1 = 'unknown'::regtype::oid
                 or exists (select from pg_cast where castsource = $1 and casttarget = $2 and castcontext in ('a', 'i'))
                 or exists (select from pg_type where oid = $2 and (typcategory = 'S' or typtype = 'd'))
                 or exists (select from pg_type where oid = $1 and typbasetype = $2)",
            &[&from.oid, &to.oid],
        )
        .await?;
    Ok(row.get(0))
}

fn check_references(path: &str, shape: &Shape, target: &Table, sources: &[Table]) -> Result<()> {
    let aliases = shape.aliases();
    for (i, column) in shape.columns.iter().enumerate() {
        for reference in lex::references(&column.value, &aliases).map_err(Error::input)? {
            let table = match shape.joins.iter().position(|j| j.alias.as_str() == reference.alias) {
                Some(k) => &sources[k],
                None => target,
            };
            let name = Ident::new(reference.column).map_err(Error::input)?;
            has_column(table, &name, &format!("{path}[{i}].value"))?;
            if reference.alias == TARGET_ALIAS {
                not_generated(target, &name, &format!("{path}[{i}].value"))?;
            }
        }
        // A table read here would be one whose changes no trigger watches.
        let selects = |t: &lex::Token| t.kind == lex::TokenKind::Word && matches!(t.value.as_str(), "select" | "table");
        if lex::tokens(&column.value).map_err(Error::input)?.iter().any(selects) {
            return Err(Error::input(format!("{path}[{i}].value: has a subselect"))
                .with_hint("name the tables it reads as sources: a change of anything else would not be noticed"));
        }
    }
    Ok(())
}

/// Functions and words whose result is that of a session or a moment, though they are not volatile.
const OF_SESSION: [&str; 5] =
    ["current_setting", "now", "statement_timestamp", "transaction_timestamp", "pg_backend_pid"];
const MOMENT: [&str; 10] = [
    "current_user",
    "session_user",
    "current_role",
    "user",
    "current_schema",
    "current_date",
    "current_time",
    "current_timestamp",
    "localtime",
    "localtimestamp",
];

/// A value that differs from one evaluation to the next can never be proven, and one that a function reads elsewhere can change
/// without a trigger noticing.
async fn check_functions(client: &Client, value: &str, where_: &str) -> Result<()> {
    let tokens = lex::tokens(value).map_err(Error::input)?;
    let names: Vec<&str> = tokens.iter().filter(|t| t.kind != lex::TokenKind::Str).map(|t| t.value.as_str()).collect();
    let called = |i: &usize| names.get(i + 1) == Some(&"(");
    let ours = |i: &usize| *i < 2 || names[i - 1] != "." || names[i - 2] == "pg_catalog";
    let functions: Vec<&str> = (0..names.len()).filter(|i| called(i) && ours(i)).map(|i| names[i]).collect();
    let mut words = tokens
        .iter()
        .enumerate()
        .filter(|(i, t)| t.kind == lex::TokenKind::Word && (*i == 0 || tokens[i - 1].value != "."));
    let of_session = functions.iter().copied().find(|f| OF_SESSION.contains(f));
    if let Some(word) = of_session.or_else(|| words.find_map(|(_, t)| MOMENT.iter().copied().find(|m| t.value == *m))) {
        return Err(Error::input(format!("{where_}.value: {word} depends on the session or the moment"))
            .with_hint("another session, or the same one later, would find another value"));
    }
    let foreign: (Vec<&str>, Vec<&str>) =
        (2..names.len()).filter(|i| called(i) && !ours(i)).map(|i| (names[i - 2], names[i])).unzip();
    let changeable = client
        .query_opt(
            "select format('%I.%I', n.nspname, p.proname) from unnest($1::text[], $2::text[]) as x(s, f)
             join pg_namespace n on n.nspname = s join pg_proc p on p.pronamespace = n.oid and p.proname = f
             where p.provolatile <> 'i' limit 1",
            &[&foreign.0, &foreign.1],
        )
        .await?;
    if let Some(row) = changeable {
        let name: String = row.get(0);
        return Err(Error::input(format!("{where_}.value: function {name} is not IMMUTABLE")).with_hint(
            "what it reads could change and no trigger would notice: name the tables that it reads as sources; if it reads none, \
             declare it IMMUTABLE",
        ));
    }
    let found = client
        .query_opt(
            "select proname::text from pg_proc where pronamespace = 'pg_catalog'::regnamespace and proname = any($1)
             group by proname having bool_and(provolatile = 'v') limit 1",
            &[&functions],
        )
        .await?;
    match found {
        None => Ok(()),
        Some(row) => Err(Error::input(format!("{where_}.value: {} is volatile", row.get::<_, String>(0)))
            .with_hint("each evaluation gives another value, so no row could ever be proven right")),
    }
}

/// Prepares the expression over subselects that offer only the columns that [`Shape::reads`] found, so that a dependency
/// which the lexer overlooked is an error here and not a change that the triggers miss; and in VALUES, where neither
/// aggregates nor window functions nor sets can stand. Gives the value's type.
async fn value_type(client: &Client, shape: &Shape, i: usize, where_: &str) -> Result<SqlType> {
    let offer = |alias: &str, table: &QualifiedName| {
        // Fields of a row that is not there: needs no right on the table, and no policy applies.
        let field = |c: &Ident| format!("(null::{}).{} as {}", table.sql(), c.sql(), c.sql());
        let columns: Vec<String> = shape.reads(alias).iter().map(field).collect();
        format!("(select {}) as \"{alias}\"", columns.join(", "))
    };
    let mut from = offer(TARGET_ALIAS, &shape.target);
    for join in &shape.joins {
        let on: Vec<String> = join.on.iter().map(|on| on.sql(&join.alias)).collect();
        let keyword = if join.kind == JoinKind::Left { "left join" } else { "join" };
        from.push_str(&format!(" {keyword} {} on {}", offer(join.alias.as_str(), &join.table), on.join(" and ")));
    }
    let bad = |e: tokio_postgres::Error| {
        Error::from(e).context(format!("{where_}.value: {:?}", shape.columns[i].value)).into_input().with_hint(format!(
            "write every column with its alias ({}) and functions, types and operators outside pg_catalog with \
                 their schema: expressions run with search_path = {SEARCH_PATH}",
            shape.aliases().join(", ")
        ))
    };
    let value = &shape.columns[i].value;
    let sql = format!("select \"V\".v from {from} cross join lateral (values (({value}))) as \"V\"(v)");
    let statement = client.prepare(&sql).await.map_err(bad)?;
    let described = &statement.columns()[0];
    // No row is read; the type of the missing one is the declared one, domains included.
    let sql = format!("select pg_typeof(r.v)::oid from (select 1) as one left join ({sql} limit 0) as r on true");
    let oid: u32 = client.query_one(&sql, &[]).await.map_err(bad)?.get(0);
    let modifier = if described.type_().oid() == oid { described.type_modifier() } else { -1 };
    SqlType::read(client, oid, modifier).await
}

/// Whether the value can be NULL, as far as NOT NULL constraints and foreign keys tell. In doubt: yes.
fn nullable(shape: &Shape, value: &str, target: &Table, sources: &[Table]) -> bool {
    let Some(reference) = lex::plain_reference(value) else { return true };
    let not_null = |alias: &str, column: &str| {
        let table = match shape.joins.iter().position(|j| j.alias.as_str() == alias) {
            Some(k) => &sources[k],
            None => target,
        };
        table.columns.iter().any(|c| c.name == column && c.not_null)
    };
    let chain = shape.joins.iter().all(|j| {
        j.kind == JoinKind::Inner
            && j.covered
            && j.on.iter().all(|o| not_null(o.ref_alias.as_str(), o.ref_column.as_str()))
    });
    !(chain && not_null(&reference.alias, &reference.column))
}

pub(super) async fn no_equality(client: &Client, shape: &Shape) -> Result<BTreeSet<(String, String)>> {
    let mut out = BTreeSet::new();
    for alias in shape.aliases() {
        let table = shape.joins.iter().find(|j| j.alias.as_str() == alias).map_or(&shape.target, |j| &j.table);
        let mut columns = shape.reads(alias);
        if alias == TARGET_ALIAS {
            columns.extend(shape.key.iter().map(|k| k.name.clone()));
        }
        for column in columns {
            let sql = format!("select (null::{1}).{0} is distinct from (null::{1}).{0}", column.sql(), table.sql());
            if client.prepare(&sql).await.is_err() {
                out.insert((alias.to_owned(), column.as_str().to_owned()));
            }
        }
    }
    Ok(out)
}
