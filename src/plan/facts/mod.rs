//! What the plan needs to know from the catalog, read in one go. Reads only; needs no write right.

mod joins;
mod values;

use std::collections::BTreeSet;

use tokio_postgres::Client;

use self::joins::joins;
use self::values::{columns, no_equality};
use super::shape::{KeyColumn, SEARCH_PATH, Shape};
use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::job::spec::Column;
use crate::pg::ident::{Ident, QualifiedName};

/// Everything the plan needs from the catalog.
#[derive(Debug, Clone)]
pub struct Facts {
    /// `server_version_num`, such as 150018.
    pub server_version: i32,
    /// The login of this session.
    pub login: String,
    /// The target.
    pub target: Table,
    /// The source tables, in the order of the job's joins.
    pub sources: Vec<Table>,
    /// The columns to fill that exist already, as the job orders them.
    pub existing: Vec<Option<ExistingColumn>>,
    /// Names, joins and dependencies for the SQL renderers.
    pub shape: Shape,
    /// The other paths to the value, each with its own shape.
    pub agree: Vec<Shape>,
}

/// A table as the catalog has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Name.
    pub name: QualifiedName,
    /// `pg_class.oid`.
    pub oid: u32,
    /// `relkind`: `r` table, `p` partitioned, `v` view, `f` foreign.
    pub kind: char,
    /// Owner's name.
    pub owner: String,
    /// Estimated rows; negative: never analyzed.
    pub rows_estimate: f32,
    /// Its pages by then.
    pub pages_estimate: i32,
    /// Table access method, `heap` as a rule.
    pub access_method: String,
    /// Its columns.
    pub columns: Vec<TableColumn>,
}

/// A column as the catalog has it.
#[derive(Debug, Clone, PartialEq)]
pub struct TableColumn {
    /// Name.
    pub name: String,
    /// Type, as `format_type` writes it.
    pub sql_type: String,
    /// NOT NULL.
    pub not_null: bool,
    /// Has a default, is an identity or generated column.
    pub has_default: bool,
    /// Is generated: empty in BEFORE triggers.
    pub generated: bool,
}

/// A column to fill that is there already.
#[derive(Debug, Clone, PartialEq)]
pub struct ExistingColumn {
    /// Its type.
    pub sql_type: String,
    /// NOT NULL.
    pub not_null: bool,
    /// Has a default or is generated.
    pub has_default: bool,
}

impl Facts {
    /// Reads the catalog for `spec`. `dedicated_login`: the operator says that nobody but us uses our login.
    ///
    /// # Errors
    /// Input errors that name the key of the job whose table, column, key or expression is not as expected.
    pub async fn read(client: &Client, spec: &JobSpec, dedicated_login: bool) -> Result<Self> {
        client.batch_execute(&format!("set search_path = {SEARCH_PATH}")).await?;
        let row =
            client.query_one("select current_setting('server_version_num')::int4, session_user::text", &[]).await?;
        let (server_version, login): (i32, String) = (row.get(0), row.get(1));
        let target = table(client, &spec.target.table, "target.table").await?;
        let key = key(client, spec, &target).await?;
        let (sources, joins) = joins(client, "source", &spec.source, &target).await?;
        let mut shape = Shape {
            job: spec.name.clone(),
            target: spec.target.table.clone(),
            key: key.clone(),
            joins,
            columns: Vec::new(),
            exempt_login: dedicated_login.then(|| login.clone()),
            no_equality: BTreeSet::new(),
        };
        shape.columns = columns(client, "columns", &spec.columns, &shape, &target, &sources).await?;
        shape.no_equality = no_equality(client, &shape).await?;
        let mut agree = Vec::new();
        for (i, path) in spec.agree.iter().enumerate() {
            agree.push(agree_path(client, spec, i, path, &shape, &target).await?);
        }
        let existing = spec.columns.iter().map(|c| existing(&target, c)).collect();
        Ok(Self { server_version, login, target, sources, existing, shape, agree })
    }
}

impl Facts {
    /// For a rollback where the catalog is no longer as the job says: it goes by what is noted as ours.
    pub fn unknown(spec: &JobSpec) -> Self {
        let target = Table {
            name: spec.target.table.clone(),
            oid: 0,
            kind: '?',
            owner: String::new(),
            rows_estimate: -1.0,
            pages_estimate: 0,
            access_method: String::new(),
            columns: Vec::new(),
        };
        let shape = Shape {
            job: spec.name.clone(),
            target: spec.target.table.clone(),
            key: Vec::new(),
            joins: Vec::new(),
            columns: Vec::new(),
            exempt_login: None,
            no_equality: BTreeSet::new(),
        };
        let (server_version, login) = (0, String::new());
        Self { server_version, login, target, sources: Vec::new(), existing: Vec::new(), shape, agree: Vec::new() }
    }
}

fn existing(target: &Table, column: &Column) -> Option<ExistingColumn> {
    target.columns.iter().find(|c| c.name == column.name.as_str()).map(|c| ExistingColumn {
        sql_type: c.sql_type.clone(),
        not_null: c.not_null,
        has_default: c.has_default,
    })
}

async fn agree_path(
    client: &Client,
    spec: &JobSpec,
    i: usize,
    path: &crate::job::spec::Agree,
    shape: &Shape,
    target: &Table,
) -> Result<Shape> {
    let where_ = format!("agree[{i}]");
    let (sources, joins) = joins(client, &format!("{where_}.source"), &path.source, target).await?;
    let mut own = Shape { joins, columns: Vec::new(), ..shape.clone() };
    let column = Column { value: path.value.clone(), sql_type: None, ..spec.columns[0].clone() };
    own.columns = columns(client, &where_, &[column], &own, target, &sources).await?;
    Ok(own)
}

/// Reads one table. `key` is the job's key to blame.
///
/// # Errors
/// An input error if it does not exist or is not a table.
pub async fn table(client: &Client, name: &QualifiedName, key: &str) -> Result<Table> {
    let row = client
        .query_opt(
            "select c.oid, c.relkind::text, r.rolname::text, c.reltuples, coalesce(am.amname::text, ''),
                    exists (select from pg_inherits i where i.inhparent = c.oid), c.relpages
             from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_roles r on r.oid = c.relowner
             left join pg_am am on am.oid = c.relam
             where n.nspname = $1 and c.relname = $2",
            &[&name.schema.as_str(), &name.name.as_str()],
        )
        .await?;
    let Some(row) = row else {
        let database: String = client.query_one("select current_database()::text", &[]).await?.get(0);
        return Err(Error::input(format!("{key}: table {name} does not exist in database {database}"))
            .with_hint("check the name (quote mixed case as in SQL) and the database that the settings name"));
    };
    let kind: String = row.get(1);
    let oid: u32 = row.get(0);
    let columns = client
        .query(
            "select a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                    a.atthasdef or a.attidentity <> '' or a.attgenerated <> '', a.attgenerated <> ''
             from pg_attribute a where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum",
            &[&oid],
        )
        .await?;
    let table = Table {
        name: name.clone(),
        oid,
        kind: kind.chars().next().unwrap_or('?'),
        owner: row.get(2),
        rows_estimate: row.get(3),
        pages_estimate: row.get(6),
        access_method: row.get(4),
        columns: columns
            .iter()
            .map(|c| TableColumn {
                name: c.get(0),
                sql_type: c.get(1),
                not_null: c.get(2),
                has_default: c.get(3),
                generated: c.get(4),
            })
            .collect(),
    };
    let inherited: bool = row.get(5);
    match table.kind {
        'r' if inherited => Err(Error::input(format!("{key}: other tables inherit from {name}")).with_hint(
            "their rows would be read and written as its own, but not watched; inheritance is not supported",
        )),
        'r' => Ok(table),
        'p' if key == "target.table" => Err(Error::input(format!(
            "{key}: {name} is partitioned; partitioned targets are not implemented in this version"
        ))
        .with_hint("a job for each partition, with the partition as its target, does the same")),
        'p' => Ok(table),
        _ => Err(Error::input(format!("{key}: {name} is not an ordinary table (relkind {kind})"))
            .with_hint("name the table behind it: triggers and row locks need one")),
    }
}

async fn key(client: &Client, spec: &JobSpec, target: &Table) -> Result<Vec<KeyColumn>> {
    let wanted: Vec<&str> = spec.target.key.iter().map(Ident::as_str).collect();
    let rows = client
        .query(
            "select i.indisprimary, array_agg(a.attname::text order by k.n), bool_and(a.attnotnull),
                    array_agg(coalesce(on_.nspname::text, '') order by k.n)
             from pg_index i
             cross join lateral unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality as k(attnum, opclass, n)
             join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
             join pg_opclass oc on oc.oid = k.opclass
             left join pg_amop ao on ao.amopfamily = oc.opcfamily and ao.amopstrategy = 3
                                 and ao.amoplefttype = oc.opcintype and ao.amoprighttype = oc.opcintype
             left join pg_operator o on o.oid = ao.amopopr
             left join pg_namespace on_ on on_.oid = o.oprnamespace
             where i.indrelid = $1 and i.indisunique and i.indisvalid and i.indimmediate
               and i.indpred is null and i.indexprs is null and k.n <= i.indnkeyatts
             group by i.indexrelid, i.indisprimary",
            &[&target.oid],
        )
        .await?;
    let found = rows.iter().find(|r| {
        let columns: Vec<String> = r.get(1);
        let all_not_null: bool = r.get(2);
        all_not_null && if wanted.is_empty() { r.get::<_, bool>(0) } else { columns == wanted }
    });
    let Some(row) = found else {
        let message = if wanted.is_empty() {
            format!("target.table: {} has no primary key", target.name)
        } else {
            format!(
                "target.key: {} has no unique index on exactly ({}) with all columns NOT NULL",
                target.name,
                wanted.join(", ")
            )
        };
        return Err(Error::input(message).with_hint(
            "batches and checkpoints go by a unique NOT NULL key: set target.key to the columns of such an index, or \
             create one (create unique index concurrently)",
        ));
    };
    let (names, schemas): (Vec<String>, Vec<String>) = (row.get(1), row.get(3));
    names
        .into_iter()
        .zip(schemas)
        .map(|(name, schema)| {
            let sql_type =
                target.columns.iter().find(|c| c.name == name).map(|c| c.sql_type.clone()).unwrap_or_default();
            let operators = Ident::new(schema).map_err(Error::internal)?;
            Ok(KeyColumn { name: Ident::new(name).map_err(Error::internal)?, sql_type, operators })
        })
        .collect()
}
