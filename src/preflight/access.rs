//! Whom policies apply to: us, the sync triggers, the application; and grants that a new column breaks.

use super::check::{Check, Tally};
use super::privileges::quote;
use super::probe::{Param, Probe, text};
use crate::error::Result;
use crate::pg::ident::QualifiedName;
use crate::plan::Facts;

/// Tools in which a person sits, as opposed to an application.
const TOOLS: &str = "^(psql|pg_dump|pg_dumpall|pg_restore|pgAdmin|DBeaver|DataGrip)";

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    Ok(vec![
        p.settle("app_bypass", app_bypass(p, facts).await)?,
        p.settle("column_grants", column_grants(p, facts).await)?,
        p.settle("rls_visibility", rls_visibility(p).await)?,
        p.settle("rls_sync_functions", rls_sync_functions(p, facts).await)?,
    ])
}

/// Every table that the job reads: target, sources, other paths, referenced tables.
pub fn tables_read(p: &Probe<'_>) -> Vec<QualifiedName> {
    let mut all = vec![p.spec.target.table.clone()];
    all.extend(p.spec.source.iter().chain(p.spec.agree.iter().flat_map(|a| &a.source)).map(|j| j.table.clone()));
    all.extend(p.spec.foreign_keys.iter().map(|k| k.references.clone()));
    let mut out: Vec<QualifiedName> = Vec::new();
    for table in all {
        if !out.contains(&table) {
            out.push(table);
        }
    }
    out
}

/// SQL: whether role `r` is above the policies of table `c`, as check_enable_rls() of the server decides it.
pub(super) const BYPASSES: &str = "(r.rolsuper or r.rolbypassrls
   or pg_has_role(r.oid, c.relowner, 'USAGE') and not c.relforcerowsecurity)";

async fn applies(p: &Probe<'_>, role: &str, tables: &[QualifiedName]) -> Result<Vec<(String, bool)>> {
    let mut out = Vec::new();
    for table in tables {
        let sql = format!(
            "select c.relrowsecurity and not {BYPASSES}, c.relforcerowsecurity from pg_roles r, pg_class c
             join pg_namespace n on n.oid = c.relnamespace
             where r.rolname = $1 and n.nspname = $2 and c.relname = $3"
        );
        let (schema, name) = (table.schema.as_str(), table.name.as_str());
        let rows = p.rows(&sql, &[text(&role), text(&schema), text(&name)]).await?;
        out.extend(rows.iter().filter(|r| r.get(0)).map(|r| (table.to_string(), r.get(1))));
    }
    Ok(out)
}

/// Every session of ours runs with `row_security = off`: where policies apply to us, each query fails (I8).
///
/// # Errors
/// Whatever the server says.
pub async fn rls_visibility(p: &Probe<'_>) -> Result<Check> {
    let name = "rls_visibility";
    let tables = tables_read(p);
    let login = &p.server.login;
    let hidden = applies(p, login, &tables).await?;
    if hidden.is_empty() {
        return Ok(Check::pass(name, format!("no policy applies to {login} on {} tables", tables.len())));
    }
    let names: Vec<String> =
        hidden.iter().map(|(t, forced)| format!("{t}{}", if *forced { " (forced)" } else { "" })).collect();
    Ok(Check::fail(name, format!("policies apply to {login} on {}", names.join(", ")))
        .count(hidden.len() as i64)
        .samples(hidden.into_iter().map(|h| h.0).collect())
        .hint("rows would be hidden, so every query of ours fails instead (42501): give the login BYPASSRLS, or run as the \
               tables' owner")
        .grants(vec![format!("alter role {} bypassrls", quote(login))]))
}

/// The sync functions run as the target's owner, also with `row_security = off`: where policies apply to it, every
/// write of the application would fail.
async fn rls_sync_functions(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "rls_sync_functions";
    let owner = &facts.target.owner;
    let mut tables = vec![facts.target.name.clone()];
    tables.extend(facts.shape.joins.iter().map(|j| j.table.clone()));
    let hidden = applies(p, owner, &tables).await?;
    if hidden.is_empty() {
        return Ok(Check::pass(name, format!("no policy applies to {owner}, as which they run")));
    }
    let names: Vec<String> =
        hidden.iter().map(|(t, forced)| format!("{t}{}", if *forced { " (forced)" } else { "" })).collect();
    Ok(Check::fail(
        name,
        format!("policies apply to {owner}, as which the sync functions run, on {}", names.join(", ")),
    )
    .count(hidden.len() as i64)
    .samples(hidden.into_iter().map(|h| h.0).collect())
    .hint(
        "every write of the application to these tables would fail with 42501: give the owner BYPASSRLS, or take \
               FORCE ROW LEVEL SECURITY off (alter table ... no force row level security)",
    )
    .grants(vec![format!("alter role {} bypassrls", quote(owner))]))
}

/// Roles that policies do not stop (hazard 42).
async fn app_bypass(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "app_bypass";
    let oid = facts.target.oid.to_string();
    let secured = "select c.relrowsecurity from pg_class c where c.oid = $1::text::oid";
    if p.spec.policies.is_none() && !p.one(secured, &[text(&oid)]).await?.get::<_, bool>(0) {
        return Ok(Check::skip(name, "the table has no row level security and the job creates no policy"));
    }
    let target = &facts.target.name;
    let mut tally = Tally::default();
    // What counts is who is at work: every database has an owner and a superuser.
    let params: [Param<'_>; 2] = [text(&oid), text(&TOOLS)];
    let sql = format!(
        "select format('%s (%s%s)', a.usename,
                       case when r.rolsuper then 'superuser' when r.rolbypassrls then 'bypassrls' else 'owner' end,
                       case when a.application_name <> '' then ', ' || a.application_name else '' end)
         from pg_stat_activity a join pg_roles r on r.oid = a.usesysid join pg_class c on c.oid = $1::text::oid
         where a.datname = current_database() and a.backend_type = 'client backend' and a.usename <> session_user
           and not starts_with(a.application_name, 'backfilld/') and a.application_name !~ $2
           and {BYPASSES}
         group by 1 order by 1 limit 10"
    );
    for session in p.texts(&sql, &params).await? {
        tally.warn(
            format!("connected and not subject to policies: {session}"),
            "if that is the application, the policies protect nothing: give it a role of its own",
        );
    }
    let roles = p
        .texts(
            "select r.rolname::text || case when r.rolsuper then ' (superuser)' when r.rolbypassrls then ' (bypassrls)'
                                            else ' (owner)' end
             from pg_roles r, pg_class c where c.oid = $1::text::oid
               and (r.rolsuper or r.rolbypassrls or r.oid = c.relowner and not c.relforcerowsecurity)
             order by r.rolname limit 10",
            &[text(&oid)],
        )
        .await?;
    Ok(tally.check(
        name,
        format!("no application session bypasses the policies of {target}; roles that could: {}", roles.join(", ")),
    ))
}

/// A role with grants on single columns fails at `select *` once there is a column more (hazard 47).
async fn column_grants(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "column_grants";
    let new = super::column::new_columns(facts);
    if new.is_empty() {
        return Ok(Check::skip(name, "the job adds no column"));
    }
    let roles = p
        .texts(
            "select distinct case when x.grantee = 0 then 'public' else quote_ident(r.rolname) end
             from pg_attribute a cross join lateral aclexplode(a.attacl) as x left join pg_roles r on r.oid = x.grantee
             where a.attrelid = $1::text::oid and a.attnum > 0 and not a.attisdropped and x.privilege_type = 'SELECT'
               and not exists (select from pg_class c cross join lateral aclexplode(c.relacl) as t
                               where c.oid = a.attrelid and t.privilege_type = 'SELECT' and t.grantee in (0, x.grantee))
             order by 1",
            &[text(&facts.target.oid.to_string())],
        )
        .await?;
    if roles.is_empty() {
        return Ok(Check::pass(name, "no role has SELECT on single columns only"));
    }
    let columns: Vec<String> = new.iter().map(|c| c.name.sql()).collect();
    let grant = format!("grant select ({}) on {} to {}", columns.join(", "), facts.target.name.sql(), roles.join(", "));
    Ok(Check::warn(name, format!("SELECT is granted on single columns to {}", roles.join(", ")))
        .count(roles.len() as i64)
        .samples(roles)
        .hint(format!(
            "with the new column, \"select *\" fails for them with 42501: name columns in the application, or, as soon as \
             the column is there: {grant}"
        )))
}
