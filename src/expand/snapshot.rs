//! How things are before we touch them: policies, functions, columns, triggers. Read with our search path, under which
//! every name outside `pg_catalog` comes out qualified.

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::ledger::objects;
use crate::pg::ident::{QualifiedName, literal};
use crate::plan::steps::quote;

/// Row level security of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// `relrowsecurity`.
    pub enabled: bool,
    /// `relforcerowsecurity`.
    pub forced: bool,
    /// Its policies, by name.
    pub policies: Vec<PolicyState>,
}

/// A policy as the catalog has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyState {
    /// Name.
    pub name: String,
    /// `r`, `a`, `w`, `d` or `*`.
    pub command: String,
    /// Permissive or restrictive.
    pub permissive: bool,
    /// Role names, sorted; `public` for everyone.
    pub roles: Vec<String>,
    /// USING.
    pub using: Option<String>,
    /// WITH CHECK.
    pub check: Option<String>,
    /// Comment.
    pub comment: Option<String>,
}

impl PolicyState {
    /// The statements that make it again.
    pub fn create(&self, table: &str) -> Vec<String> {
        let command = match self.command.as_str() {
            "r" => "select",
            "a" => "insert",
            "w" => "update",
            "d" => "delete",
            _ => "all",
        };
        let roles: Vec<String> =
            self.roles.iter().map(|r| if r == "public" { "public".to_owned() } else { quote(r) }).collect();
        let mut sql = format!(
            "create policy {} on {table} as {} for {command} to {}",
            quote(&self.name),
            if self.permissive { "permissive" } else { "restrictive" },
            roles.join(", ")
        );
        if let Some(using) = &self.using {
            sql.push_str(&format!(" using ({using})"));
        }
        if let Some(check) = &self.check {
            sql.push_str(&format!(" with check ({check})"));
        }
        let mut out = vec![sql];
        if let Some(comment) = &self.comment {
            out.push(format!("comment on policy {} on {table} is {}", quote(&self.name), literal(comment)));
        }
        out
    }
}

/// A function as the catalog has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// `pg_get_functiondef`.
    pub definition: String,
    /// Owner.
    pub owner: String,
    /// Access privileges as (grantee, with grant option), EXECUTE being the only one; the default is written out.
    pub acl: Vec<(String, bool)>,
    /// Comment.
    pub comment: Option<String>,
    /// `function` or `procedure`.
    pub kind: String,
}

/// A column before us.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnState {
    /// It was there.
    pub existed: bool,
    /// It was NOT NULL.
    pub not_null: bool,
    /// Its comment.
    pub comment: Option<String>,
}

/// Takes all snapshots of the job. A second call changes nothing.
///
/// # Errors
/// Database errors.
pub async fn take(ctx: &Context, client: &Client) -> Result<()> {
    let job = ctx.job();
    let target = &ctx.spec.target.table;
    let security = security(client, target).await?;
    objects::keep(client, job, "policies", &target.to_string(), &json(&security)?).await?;
    for f in &ctx.spec.functions {
        let state = function(client, &f.signature).await?;
        objects::keep(client, job, "function", &f.signature, &json(&state)?).await?;
    }
    for column in &ctx.spec.columns {
        let state = self::column(client, target, column.name.as_str()).await?;
        objects::keep(client, job, "column", column.name.as_str(), &json(&state)?).await?;
    }
    let mut tables = vec![target.clone()];
    tables.extend(ctx.spec.source.iter().map(|j| j.table.clone()));
    for table in tables {
        let list = triggers(client, &table).await?;
        objects::keep(client, job, "trigger_list", &table.to_string(), &json(&list)?).await?;
    }
    Ok(())
}

fn json(value: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::internal("snapshot as JSON").with_source(e))
}

/// Row level security of a table, now.
///
/// # Errors
/// Database errors.
pub async fn security(client: &impl tokio_postgres::GenericClient, table: &QualifiedName) -> Result<Security> {
    let name = table.sql();
    let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&name, Type::TEXT)];
    // The flip runs this under ACCESS EXCLUSIVE: both go out at once, without being prepared, in one round trip.
    let (flags, rows) = tokio::try_join!(
        client.query_typed_one(
            "select relrowsecurity, relforcerowsecurity from pg_class where oid = to_regclass($1)",
            &parameters,
        ),
        client.query_typed(
            "select p.polname::text, p.polcmd::text, p.polpermissive,
                    (select array_agg(coalesce(r.rolname::text, 'public') order by coalesce(r.rolname::text, 'public'))
                     from unnest(p.polroles) x(oid) left join pg_roles r on r.oid = x.oid),
                    pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid),
                    obj_description(p.oid, 'pg_policy')
             from pg_policy p where p.polrelid = to_regclass($1) order by 1",
            &parameters,
        ),
    )?;
    Ok(Security {
        enabled: flags.get(0),
        forced: flags.get(1),
        policies: rows
            .iter()
            .map(|r| PolicyState {
                name: r.get(0),
                command: r.get(1),
                permissive: r.get(2),
                roles: r.get(3),
                using: r.get(4),
                check: r.get(5),
                comment: r.get(6),
            })
            .collect(),
    })
}

/// A function, now; `None` if there is none with this signature.
///
/// # Errors
/// Database errors.
pub async fn function(client: &impl tokio_postgres::GenericClient, signature: &str) -> Result<Option<FunctionState>> {
    let row = client
        .query_opt(
            "select pg_get_functiondef(p.oid), r.rolname::text, obj_description(p.oid, 'pg_proc'),
                    case p.prokind when 'p' then 'procedure' else 'function' end,
                    (select coalesce(jsonb_agg(jsonb_build_array(coalesce(g.rolname, 'public'), a.is_grantable)
                                               order by coalesce(g.rolname, 'public')), '[]')
                     from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                     left join pg_roles g on g.oid = a.grantee)
             from pg_proc p join pg_roles r on r.oid = p.proowner where p.oid = to_regprocedure($1)",
            &[&signature],
        )
        .await?;
    row.map(|r| {
        Ok(FunctionState {
            definition: r.get(0),
            owner: r.get(1),
            comment: r.get(2),
            kind: r.get(3),
            acl: serde_json::from_value(r.get(4)).map_err(|e| Error::internal("function privileges").with_source(e))?,
        })
    })
    .transpose()
}

/// A column, now.
///
/// # Errors
/// Database errors.
pub async fn column(
    client: &impl tokio_postgres::GenericClient,
    table: &QualifiedName,
    name: &str,
) -> Result<ColumnState> {
    let row = client
        .query_opt(
            "select attnotnull, col_description(attrelid, attnum) from pg_attribute
             where attrelid = to_regclass($1) and attname = $2 and attnum > 0 and not attisdropped",
            &[&table.sql(), &name],
        )
        .await?;
    Ok(match row {
        Some(r) => ColumnState { existed: true, not_null: r.get(0), comment: r.get(1) },
        None => ColumnState { existed: false, not_null: false, comment: None },
    })
}

/// The triggers of a table, now: name, definition, `tgenabled`.
///
/// # Errors
/// Database errors.
pub async fn triggers(
    client: &impl tokio_postgres::GenericClient,
    table: &QualifiedName,
) -> Result<Vec<(String, String, String)>> {
    let rows = client
        .query(
            "select tgname::text, pg_get_triggerdef(oid), tgenabled::text from pg_trigger
             where tgrelid = to_regclass($1) and not tgisinternal order by 1",
            &[&table.sql()],
        )
        .await?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect())
}
