//! Every right that the job needs, by name, with the statement that would give it.

use super::access::tables_read;
use super::calls::called_functions;
use super::check::{Check, Tally};
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::spec::TriggerMode;
use crate::pg::ident::QualifiedName;
use crate::plan::Facts;
use crate::plan::shape::SYNC_SCHEMA;

/// Quotes a name of any length, as the catalog has it.
pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    Ok(vec![
        p.settle("privilege:owner", owner(p, facts).await)?,
        p.settle("privilege:sources", sources(p, facts).await)?,
        p.settle("privilege:rows", rows(p).await)?,
        p.settle("privilege:sync", sync(p, facts).await)?,
        p.settle("privilege:references", references(p).await)?,
        p.settle("privilege:schemas", schemas(p, facts).await)?,
        p.settle("privilege:index", index(p, facts).await)?,
        p.settle("privilege:replica", replica(p).await)?,
        p.settle("privilege:functions", functions(p).await)?,
        p.settle("privilege:policies", policies(p, facts).await)?,
        p.settle("privilege:monitor", monitor(p).await)?,
    ])
}

/// What our login is to another role.
struct Membership {
    /// Has its rights without SET ROLE.
    usage: bool,
    /// May give objects to it.
    set: bool,
    /// Is a member at all.
    member: bool,
}

async fn membership(p: &Probe<'_>, role: &str) -> Result<Membership> {
    // Before 16 every member may SET ROLE.
    let set = if p.server.version_num >= 160_000 { "SET" } else { "MEMBER" };
    let sql = "select pg_has_role(session_user, oid, 'USAGE'), pg_has_role(session_user, oid, $2),
                      pg_has_role(session_user, oid, 'MEMBER') from pg_roles where rolname = $1";
    let row = p.one(sql, &[text(&role), text(&set)]).await?;
    Ok(Membership { usage: row.get(0), set: row.get(1), member: row.get(2) })
}

/// Adds what is missing to act as `role`.
async fn require_role(p: &Probe<'_>, role: &str, why: &str, give: bool, tally: &mut Tally) -> Result<()> {
    let found = membership(p, role).await?;
    if found.usage && (found.set || !give) {
        return Ok(());
    }
    let login = quote(&p.server.login);
    tally.fail(
        format!(
            "{} is no member of {role}{}",
            p.server.login,
            if found.member { " that inherits its rights" } else { "" }
        ),
        why,
    );
    let options = if p.server.version_num >= 160_000 { " with inherit true, set true" } else { "" };
    tally.grant(format!("grant {} to {login}{options}", quote(role)));
    if found.member && p.server.version_num < 160_000 {
        tally.grant(format!("alter role {login} inherit"));
    }
    Ok(())
}

/// ALTER TABLE, triggers, policies, indexes: the owner's rights.
async fn owner(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let mut tally = Tally::default();
    let owner = &facts.target.owner;
    let why = format!("only the owner of {} may add columns, triggers, policies and indexes", facts.target.name);
    require_role(p, owner, &why, true, &mut tally).await?;
    Ok(tally.check("privilege:owner", format!("has the rights of {owner}, the owner of {}", facts.target.name)))
}

/// ENABLE ALWAYS takes the source's owner.
async fn sources(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "privilege:sources";
    if facts.sources.is_empty() {
        return Ok(Check::skip(name, "the job has no source table"));
    }
    let mut tally = Tally::default();
    let mut owners: Vec<&str> = facts.sources.iter().map(|s| s.owner.as_str()).collect();
    owners.sort_unstable();
    owners.dedup();
    for owner in &owners {
        let tables: Vec<String> =
            facts.sources.iter().filter(|s| s.owner == **owner).map(|s| s.name.to_string()).collect();
        let why = format!("only the owner of {} may make a trigger fire always", tables.join(", "));
        require_role(p, owner, &why, false, &mut tally).await?;
    }
    Ok(tally.check(name, format!("has the rights of {}, the owner of the sources", owners.join(", "))))
}

/// Rights of a role on a table; `None`: there is no such table.
struct Rights {
    schema: bool,
    select: bool,
    update: bool,
    references: bool,
}

async fn rights(p: &Probe<'_>, role: &str, table: &QualifiedName) -> Result<Option<Rights>> {
    let (schema, name) = (table.schema.as_str(), table.name.as_str());
    let rows = p
        .rows(
            "select has_schema_privilege($1::name, n.oid, 'USAGE'), has_table_privilege($1::name, c.oid, 'SELECT'),
                    has_any_column_privilege($1::name, c.oid, 'UPDATE'),
                    has_any_column_privilege($1::name, c.oid, 'REFERENCES')
             from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = $2 and c.relname = $3",
            &[text(&role), text(&schema), text(&name)],
        )
        .await?;
    Ok(rows.first().map(|r| Rights { schema: r.get(0), select: r.get(1), update: r.get(2), references: r.get(3) }))
}

/// Our own reads and writes of rows.
///
/// # Errors
/// Whatever the server says.
pub async fn rows(p: &Probe<'_>) -> Result<Check> {
    let mut tally = Tally::default();
    let tables = tables_read(p);
    row_rights(p, &tables, &mut tally).await?;
    Ok(tally.check("privilege:rows", format!("may read {} tables and update the target", tables.len())))
}

/// What is missing to read these tables, and to update the target.
async fn row_rights(p: &Probe<'_>, tables: &[QualifiedName], tally: &mut Tally) -> Result<()> {
    let login = &p.server.login;
    for table in tables {
        let Some(r) = rights(p, login, table).await? else { continue };
        if !r.schema {
            tally.fail(format!("no USAGE on schema {}", table.schema), "batches and proofs read these tables");
            tally.grant(format!("grant usage on schema {} to {}", table.schema.sql(), quote(login)));
        }
        if !r.select {
            tally.fail(format!("no SELECT on {table}"), "batches and proofs read these tables");
            tally.grant(format!("grant select on {} to {}", table.sql(), quote(login)));
        }
        if *table == p.spec.target.table && !r.update {
            tally.fail(format!("no UPDATE on {table}"), "batches update it");
            tally.grant(format!("grant update on {} to {}", table.sql(), quote(login)));
        }
    }
    Ok(())
}

/// The sync functions read and lock (FOR SHARE takes UPDATE) as the target's owner.
async fn sync(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "privilege:sync";
    let owner = &facts.target.owner;
    let mut tally = Tally::default();
    let why = "the sync functions run as the target's owner; without this every write of the application fails";
    let mut tables = vec![facts.target.name.clone()];
    tables.extend(facts.sources.iter().map(|s| s.name.clone()));
    for table in &tables {
        let Some(r) = rights(p, owner, table).await? else { continue };
        if !r.schema {
            tally.fail(format!("{owner} has no USAGE on schema {}", table.schema), why);
            tally.grant(format!("grant usage on schema {} to {}", table.schema.sql(), quote(owner)));
        }
        if !r.select {
            tally.fail(format!("{owner} has no SELECT on {table}"), why);
            tally.grant(format!("grant select on {} to {}", table.sql(), quote(owner)));
        }
        if !r.update {
            tally.fail(format!("{owner} has no UPDATE on {table}, which FOR SHARE takes"), why);
            tally.grant(format!("grant update on {} to {}", table.sql(), quote(owner)));
        }
    }
    let values: Vec<&str> = facts.shape.columns.iter().map(|c| c.value.as_str()).collect();
    callable(p, owner, &values, &mut tally).await?;
    Ok(tally.check(name, format!("{owner} may read and lock {} tables", tables.len())))
}

/// EXECUTE on the functions that expressions call with their schema, and USAGE on that schema.
async fn callable(p: &Probe<'_>, role: &str, expressions: &[&str], tally: &mut Tally) -> Result<()> {
    let mut calls: Vec<(String, String)> = expressions.iter().flat_map(|e| called_functions(e)).collect();
    calls.sort();
    calls.dedup();
    for (schema, function) in &calls {
        let found = p
            .rows(
                "select has_function_privilege($3::name, p.oid, 'EXECUTE'), p.oid::regprocedure::text
                 from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                 where n.nspname = $1 and p.proname = $2",
                &[text(schema), text(function), text(&role)],
            )
            .await?;
        if !found.is_empty() && !found.iter().any(|r| r.get(0)) {
            tally.fail(
                format!("{role} may not execute {schema}.{function}"),
                "expressions run with the rights of whoever they are evaluated for",
            );
            let to = if role == "public" { role.to_owned() } else { quote(role) };
            for r in &found {
                tally.grant(format!("grant execute on function {} to {to}", r.get::<_, String>(1)));
            }
        }
    }
    Ok(())
}

/// REFERENCES on what the foreign keys refer to.
async fn references(p: &Probe<'_>) -> Result<Check> {
    let name = "privilege:references";
    if p.spec.foreign_keys.is_empty() {
        return Ok(Check::skip(name, "the job adds no foreign key"));
    }
    let login = &p.server.login;
    let mut tally = Tally::default();
    for key in &p.spec.foreign_keys {
        let Some(r) = rights(p, login, &key.references).await? else { continue };
        if !r.references {
            tally.fail(format!("no REFERENCES on {}", key.references), format!("needed for foreign key {}", key.name));
            let columns: Vec<String> = key.referenced_columns.iter().map(|c| c.sql()).collect();
            tally.grant(format!(
                "grant references ({}) on {} to {}",
                columns.join(", "),
                key.references.sql(),
                quote(login)
            ));
        }
    }
    Ok(tally.check(name, "may refer to every referenced table"))
}

/// Schema `backfilld` for our state, and the schema of the sync functions.
async fn schemas(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let mut tally = Tally::default();
    let (login, owner) = (&p.server.login, &facts.target.owner);
    let row = p
        .one(
            "select has_database_privilege(session_user, current_database(), 'CREATE'),
                    quote_ident(current_database()::text),
                    (select has_schema_privilege(session_user, n.oid, 'USAGE')
                            and has_schema_privilege(session_user, n.oid, 'CREATE')
                     from pg_namespace n where n.nspname = 'backfilld'),
                    (select has_schema_privilege(session_user, n.oid, 'CREATE') from pg_namespace n where n.nspname = $1),
                    (select has_schema_privilege($2::name, n.oid, 'CREATE') from pg_namespace n where n.nspname = $1)",
            &[text(&SYNC_SCHEMA), text(owner)],
        )
        .await?;
    let (create, database): (bool, String) = (row.get(0), row.get(1));
    let (state, ours, owners): (Option<bool>, Option<bool>, Option<bool>) = (row.get(2), row.get(3), row.get(4));
    let why = "backfilld keeps its state and its trigger functions in schemas of its own";
    if !create && (state.is_none() || ours.is_none()) {
        tally.fail(format!("no CREATE on database {database}"), why);
        tally.grant(format!("grant create on database {database} to {}", quote(login)));
    }
    if state == Some(false) {
        tally.fail("no USAGE and CREATE on schema backfilld", why);
        tally.grant(format!("grant usage, create on schema backfilld to {}", quote(login)));
    }
    if ours == Some(false) {
        tally.fail(format!("no CREATE on schema {SYNC_SCHEMA}"), why);
        tally.grant(format!("grant usage, create on schema {SYNC_SCHEMA} to {}", quote(login)));
    }
    if owners == Some(false) {
        tally.fail(format!("{owner} has no CREATE on schema {SYNC_SCHEMA}"), "it is to own the functions there");
        tally.grant(format!("grant usage, create on schema {SYNC_SCHEMA} to {}", quote(owner)));
    }
    Ok(tally.check("privilege:schemas", format!("schemas backfilld and {SYNC_SCHEMA} are there or can be created")))
}

/// CREATE INDEX takes CREATE on the schema as well.
async fn index(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "privilege:index";
    if p.spec.indexes.is_empty() {
        return Ok(Check::skip(name, "the job builds no index"));
    }
    let schema = &facts.target.name.schema;
    let sql = "select has_schema_privilege(session_user, oid, 'CREATE') from pg_namespace where nspname = $1";
    let allowed: bool = p.one(sql, &[text(&schema.as_str())]).await?.get(0);
    let mut tally = Tally::default();
    if !allowed {
        tally.fail(format!("no CREATE on schema {schema}"), "an index lives in the schema of its table");
        tally.grant(format!("grant create on schema {} to {}", schema.sql(), quote(&p.server.login)));
    }
    Ok(tally.check(name, format!("CREATE on schema {schema}")))
}

/// Tried, not looked up: hosting platforms allow it in ways that the catalog does not show.
async fn replica(p: &Probe<'_>) -> Result<Check> {
    let name = "privilege:replica";
    if p.spec.side_effects.triggers != Some(TriggerMode::Skip) {
        return Ok(Check::skip(name, "batches leave the application's triggers on"));
    }
    match p.may_set("set local session_replication_role = replica").await {
        Ok(()) => Ok(Check::pass(name, "SET session_replication_role is allowed")),
        Err(e) if p.client.is_closed() => Err(e),
        Err(e) => {
            let login = quote(&p.server.login);
            let mut tally = Tally::default();
            if p.server.version_num >= 150_000 {
                tally.fail(format!("{e}"), "needed for side_effects.triggers = \"skip\"");
                tally.grant(format!("grant set on parameter session_replication_role to {login}"));
            } else {
                tally.fail(
                    format!("{e}"),
                    "before PostgreSQL 15 only a superuser may set it (or a role that the hosting platform lets): use such \
                     a login, or side_effects.triggers = \"fire\"",
                );
            }
            Ok(tally.check(name, ""))
        }
    }
}

/// CREATE OR REPLACE takes the function's owner and CREATE on its schema.
async fn functions(p: &Probe<'_>) -> Result<Check> {
    let name = "privilege:functions";
    if p.spec.functions.is_empty() {
        return Ok(Check::skip(name, "the job replaces no function"));
    }
    let mut tally = Tally::default();
    for function in &p.spec.functions {
        let rows = p
            .rows(
                "select r.rolname::text, n.nspname::text, has_schema_privilege(session_user, n.oid, 'CREATE'),
                        has_language_privilege(session_user, f.prolang, 'USAGE')
                 from pg_proc f join pg_roles r on r.oid = f.proowner join pg_namespace n on n.oid = f.pronamespace
                 where f.oid = to_regprocedure($1)",
                &[text(&function.signature)],
            )
            .await?;
        let Some(row) = rows.first() else { continue };
        let (owner, schema): (String, String) = (row.get(0), row.get(1));
        let why = format!("only its owner may replace {}", function.signature);
        require_role(p, &owner, &why, false, &mut tally).await?;
        if !row.get::<_, bool>(2) {
            tally.fail(format!("no CREATE on schema {schema}"), "replacing a function takes it");
            tally.grant(format!("grant create on schema {} to {}", quote(&schema), quote(&p.server.login)));
        }
        if !row.get::<_, bool>(3) {
            tally.fail(format!("no USAGE on the language of {}", function.signature), "replacing a function takes it");
        }
    }
    Ok(tally.check(name, format!("may replace {} function(s)", p.spec.functions.len())))
}

/// A policy's roles must exist, and must be able to call what its expressions call (hazard 46).
async fn policies(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "privilege:policies";
    let Some(policies) = &p.spec.policies else { return Ok(Check::skip(name, "the job creates no policy")) };
    let mut tally = Tally::default();
    let mut schemas = Vec::new();
    for policy in &policies.create {
        let expressions: Vec<&str> = [&policy.using, &policy.check].into_iter().flatten().map(String::as_str).collect();
        schemas.extend(expressions.iter().flat_map(|e| called_functions(e)).map(|c| c.0));
        for role in &policy.roles {
            let sql = "select $1 = 'public' or exists (select from pg_roles where rolname = $1)";
            if !p.one(sql, &[text(&role.as_str())]).await?.get::<_, bool>(0) {
                tally.fail(format!("role {role} does not exist"), "correct the role in policies.create");
                continue;
            }
            callable(p, role.as_str(), &expressions, &mut tally).await?;
        }
    }
    schemas.sort();
    schemas.dedup();
    for schema in schemas {
        let sql = "select has_schema_privilege(session_user, oid, 'USAGE') from pg_namespace where nspname = $1";
        if p.rows(sql, &[text(&schema)]).await?.first().is_some_and(|r| !r.get::<_, bool>(0)) {
            tally.fail(format!("no USAGE on schema {schema}"), "needed to create policies that call its functions");
            tally.grant(format!("grant usage on schema {} to {}", quote(&schema), quote(&p.server.login)));
        }
    }
    Ok(tally.check(name, format!("roles of {} policies on {} are in order", policies.create.len(), facts.target.name)))
}

/// Who blocks whom, how old transactions are: without it we see only ourselves.
async fn monitor(p: &Probe<'_>) -> Result<Check> {
    let name = "privilege:monitor";
    let row = p.one("select pg_has_role(session_user, 'pg_read_all_stats', 'USAGE')", &[]).await?;
    if row.get(0) {
        return Ok(Check::pass(name, "has pg_read_all_stats"));
    }
    Ok(Check::warn(name, format!("{} does not see what other sessions do", p.server.login))
        .hint("then nothing says who is in the way of DDL, and long transactions stay unseen")
        .grants(vec![format!("grant pg_monitor to {}", quote(&p.server.login))]))
}
