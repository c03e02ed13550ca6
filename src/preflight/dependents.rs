//! What hangs on the target from elsewhere: views, policies of other tables, referenced tables.

use super::check::{Check, Tally};
use super::privileges::quote;
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::spec::Index;
use crate::plan::Facts;

/// From here on views can read with their caller's rights.
const SECURITY_INVOKER: i32 = 150_000;

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    Ok(vec![
        p.settle("unindexed_keys", unindexed_keys(p, facts).await)?,
        p.settle("views", views(p, facts).await)?,
        p.settle("policies_elsewhere", policies_elsewhere(p, facts).await)?,
    ])
}

/// Deleting a row of the table that a foreign key leads to looks for its referring rows: without an index, in all of them
/// (hazard 70). The keys that the job adds are looked at by `constraints`.
async fn unindexed_keys(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let rows = p
        .rows(
            "select c.conname::text, c.confrelid::regclass::text, k.names
             from pg_constraint c
             cross join lateral (select array_agg(a.attname::text order by x.n) as names
               from unnest(c.conkey) with ordinality as x(attnum, n)
               join pg_attribute a on a.attrelid = c.conrelid and a.attnum = x.attnum) as k
             where c.conrelid = $1::text::oid and c.contype = 'f'
               and not exists (select from pg_index i where i.indrelid = c.conrelid and i.indisvalid and i.indpred is null
                 and i.indnkeyatts >= cardinality(c.conkey)
                 and (select count(*) from unnest(i.indkey::int2[]) with ordinality as y(attnum, n)
                      where y.n <= cardinality(c.conkey) and y.attnum = any (c.conkey)) = cardinality(c.conkey))
             order by 1",
            &[text(&facts.target.oid.to_string())],
        )
        .await?;
    let target = &facts.target.name;
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    for row in &rows {
        let (name, references, columns): (String, String, Vec<String>) = (row.get(0), row.get(1), row.get(2));
        let what = format!("no index of {target} leads with ({}), foreign key {name}", columns.join(", "));
        if p.spec.indexes.iter().any(|i| leads(i, &columns)) {
            lines.push(format!("{what}; the job builds one"));
            continue;
        }
        let list: Vec<String> = columns.iter().map(|c| quote(c)).collect();
        tally.warn(
            what,
            format!(
                "deleting one row of {references} scans all of {target}: create index concurrently on {} ({})",
                target.sql(),
                list.join(", ")
            ),
        );
    }
    Ok(tally.check("unindexed_keys", "every foreign key of the target has an index").details(lines))
}

fn leads(index: &Index, columns: &[String]) -> bool {
    let first = index.columns.get(..columns.len()).unwrap_or_default();
    index.predicate.is_none()
        && !first.is_empty()
        && columns.iter().all(|c| first.iter().any(|i| i.as_str() == c.as_str()))
}

/// Views over the target, over views over it as well: as whom they read, and whether that survives the flip.
async fn views(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "views";
    let oid = facts.target.oid.to_string();
    let secured = "select c.relrowsecurity from pg_class c where c.oid = $1::text::oid";
    if p.spec.policies.is_none() && !p.one(secured, &[text(&oid)]).await?.get::<_, bool>(0) {
        return Ok(Check::pass(name, "the table has no row level security and the job creates no policy"));
    }
    let sql = format!(
        "with recursive over as (
           select $1::text::oid as oid
           union
           select w.ev_class from over o
           join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = o.oid
             and d.classid = 'pg_rewrite'::regclass
           join pg_rewrite w on w.oid = d.objid join pg_class v on v.oid = w.ev_class
           where v.relkind in ('v', 'm') and w.ev_class <> o.oid)
         select format('%I.%I', n.nspname, v.relname), v.relkind::text, r.rolname::text, {},
                coalesce((select bool_or(o in ('security_invoker=true', 'security_invoker=on', 'security_invoker=1',
                                               'security_invoker=yes')) from unnest(v.reloptions) as o), false),
                array(select x.rolname::text from pg_roles x where pg_has_role(r.oid, x.oid, 'MEMBER'))
         from over o join pg_class v on v.oid = o.oid join pg_namespace n on n.oid = v.relnamespace
         join pg_roles r on r.oid = v.relowner join pg_class c on c.oid = $1::text::oid
         where v.oid <> c.oid order by 1",
        super::access::BYPASSES
    );
    let rows = p.rows(&sql, &[text(&oid)]).await?;
    let mut tally = Tally::default();
    for row in &rows {
        let (view, kind, owner): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let (bypasses, invoker, member): (bool, bool, Vec<String>) = (row.get(3), row.get(4), row.get(5));
        if kind == "m" {
            tally.warn(
                format!("materialized view {view} holds rows of the table, past the policies"),
                format!("it shows all that {owner} saw, to whoever may read it: revoke all on {view} from public, ..."),
            );
        } else if !invoker && bypasses {
            tally.warn(
                format!("view {view} reads the table with its owner's rights ({owner}), past the policies"),
                fix(p, &view),
            );
        } else if !invoker && !p.flipped() && !reached(p, &member) {
            tally.warn(
                format!("view {view} reads as its owner {owner}, to whom none of the new policies applies"),
                format!("it is empty after the flip, for everybody: {}", fix(p, &view)),
            );
        }
    }
    Ok(tally.check(name, format!("{} over the table, none to remark", rows.len())))
}

fn fix(p: &Probe<'_>, view: &str) -> String {
    if p.server.version_num >= SECURITY_INVOKER {
        format!("alter view {view} set (security_invoker = true)")
    } else {
        format!(
            "before PostgreSQL 15 a view cannot read as its caller: revoke all on {view} from the application's roles"
        )
    }
}

/// Whether a policy for SELECT that the table will have is for one of these roles. Jobs without policies change nothing.
fn reached(p: &Probe<'_>, member: &[String]) -> bool {
    let Some(policies) = &p.spec.policies else { return true };
    !policies.keep.is_empty()
        || policies
            .create
            .iter()
            .filter(|c| matches!(c.command.catalog_code(), "r" | "*"))
            .flat_map(|c| &c.roles)
            .any(|r| r.as_str() == "public" || member.iter().any(|m| m == r.as_str()))
}

/// Policies of other tables that look into the target: what they let through depends on the target's policies as well.
async fn policies_elsewhere(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "policies_elsewhere";
    let rows = p
        .rows(
            "select distinct l.polname::text, n.nspname::text, c.relname::text
             from pg_depend d join pg_policy l on l.oid = d.objid join pg_class c on c.oid = l.polrelid
             join pg_namespace n on n.oid = c.relnamespace
             where d.classid = 'pg_policy'::regclass and d.refclassid = 'pg_class'::regclass
               and d.refobjid = $1::text::oid and l.polrelid <> d.refobjid
             order by 2, 3, 1",
            &[text(&facts.target.oid.to_string())],
        )
        .await?;
    let target = &facts.target.name;
    let mut tally = Tally::default();
    for row in &rows {
        let (policy, schema, table): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let quoted = format!("{}.{}", quote(&schema), quote(&table));
        if let Some(ours) = new_policy_that_reads(p, &schema, &table) {
            tally.fail(
                format!("new policy {ours:?} reads {schema}.{table}, whose policy {policy:?} reads {target}"),
                "every query would fail (42P17, infinite recursion): go by the new column alone, or look into the other \
                 table through a security definer function",
            );
            continue;
        }
        tally.warn(
            format!("policy {policy:?} of {schema}.{table} reads {target}"),
            format!(
                "its subselect is filtered by the target's policies, so what it lets through is only as equal before and \
                 after as they are, and the access comparison does not look at {schema}.{table}: compare select count(*) \
                 from {quoted} as some users; or drop the dependence with alter policy {} on {quoted} using (...)",
                quote(&policy)
            ),
        );
    }
    Ok(tally.check(name, "no policy of another table reads the target"))
}

/// Name of a policy of the job whose expression names the table with its schema.
fn new_policy_that_reads(p: &Probe<'_>, schema: &str, table: &str) -> Option<String> {
    let policies = p.spec.policies.as_ref()?;
    let reads = |expression: &String| {
        let tokens = crate::job::lex::tokens(expression).unwrap_or_default();
        let called = |i: usize| tokens.get(i + 3).is_some_and(|t| t.value == "(");
        tokens
            .windows(3)
            .enumerate()
            .any(|(i, w)| w[0].value == schema && w[1].value == "." && w[2].value == table && !called(i))
    };
    let found = policies.create.iter().find(|c| [&c.using, &c.check].into_iter().flatten().any(reads));
    found.map(|c| c.name.as_str().to_owned())
}
