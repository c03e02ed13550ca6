//! A critical look at the policies that the table will have: those that the job creates and those that it leaves. What
//! is wrong with one that the job replaces is told as what the job mends.

use std::collections::BTreeSet;

use tokio_postgres::types::Type;

use super::calls::{Call, bare_calls, wrap};
use super::check::{Check, Tally};
use super::policies::Found;
use super::privileges::quote;
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::lex::{self, TokenKind};
use crate::job::spec::PolicyCommand;
use crate::plan::Facts;

/// A policy that the table will have.
struct After {
    found: Found,
    /// It is in the job; otherwise it is on the table and stays.
    ours: bool,
}

/// `policy_lint`.
///
/// # Errors
/// Whatever the server says.
pub async fn policy_lint(p: &Probe<'_>, facts: &Facts, enabled: bool, found: &[Found]) -> Result<Check> {
    let after = after(p, found);
    let replaced: Vec<&Found> = found.iter().filter(|f| after.iter().all(|a| a.found.name != f.name)).collect();
    let expressions = after.iter().map(|a| &a.found).chain(replaced.iter().copied()).flat_map(texts);
    let slow = stable(p, expressions).await?;
    let grantees = grantees(p, facts).await?;
    let mut tally = Tally::default();
    for policy in &after {
        calls(facts, policy, &slow, &mut tally);
        roles(facts, policy, &grantees, &mut tally);
        if policy.ours {
            indexed(p, facts, &policy.found, &mut tally);
        }
    }
    together(found, &after, &mut tally);
    switched_on(p, facts, enabled, &after, &mut tally);
    let lines = replaced.iter().filter_map(|f| mended(f, &slow)).collect();
    Ok(tally.check("policy_lint", format!("{} policies after the job, nothing to remark", after.len())).details(lines))
}

fn after(p: &Probe<'_>, found: &[Found]) -> Vec<After> {
    let own = |f: &Found| Found {
        name: f.name.clone(),
        command: f.command.clone(),
        permissive: f.permissive,
        roles: f.roles.clone(),
        using: f.using.clone(),
        check: f.check.clone(),
    };
    let Some(policies) = &p.spec.policies else {
        return found.iter().map(|f| After { found: own(f), ours: false }).collect();
    };
    let created = policies.create.iter().map(|c| After {
        found: Found {
            name: c.name.as_str().to_owned(),
            command: c.command.catalog_code().to_owned(),
            permissive: c.permissive,
            roles: c.roles.iter().map(|r| r.as_str().to_owned()).collect(),
            using: c.using.clone(),
            check: c.check.clone(),
        },
        ours: true,
    });
    let kept = found.iter().filter(|f| policies.keep.contains(&f.name));
    created.chain(kept.map(|f| After { found: own(f), ours: false })).collect()
}

fn texts(policy: &Found) -> impl Iterator<Item = &String> {
    [&policy.using, &policy.check].into_iter().flatten()
}

/// The functions called outside a scalar subselect that are not immutable: the server calls those per row, unless an index
/// condition takes them. Of pg_catalog, `current_setting` alone is worth a word; `now()` and the like cost nothing.
async fn stable(p: &Probe<'_>, expressions: impl Iterator<Item = &String>) -> Result<BTreeSet<(String, String)>> {
    let calls: BTreeSet<(String, String)> =
        expressions.flat_map(|e| bare_calls(e)).filter_map(|c| Some((c.schema?, c.name))).collect();
    let mut out = BTreeSet::from([("pg_catalog".to_owned(), "current_setting".to_owned())]);
    if calls.is_empty() {
        return Ok(out);
    }
    let (schemas, names): (Vec<String>, Vec<String>) = calls.into_iter().unzip();
    let rows = p
        .rows(
            "select distinct n.nspname::text, f.proname::text
             from unnest($1, $2) as x(schema, name) join pg_namespace n on n.nspname = x.schema
             join pg_proc f on f.pronamespace = n.oid and f.proname = x.name
             where f.provolatile <> 'i' and n.nspname <> 'pg_catalog'",
            &[(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)],
        )
        .await?;
    out.extend(rows.iter().map(|r| (r.get(0), r.get(1))));
    Ok(out)
}

fn slow_calls(expression: &str, slow: &BTreeSet<(String, String)>) -> Vec<Call> {
    let mut calls = bare_calls(expression);
    calls.retain(|c| slow.contains(&(c.schema.clone().unwrap_or_else(|| "pg_catalog".into()), c.name.clone())));
    calls
}

/// Roles other than the owner that may read the table and are subject to policies: whom a policy could be for.
async fn grantees(p: &Probe<'_>, facts: &Facts) -> Result<Vec<String>> {
    p.texts(
        "select distinct quote_ident(r.rolname) from pg_class c cross join lateral aclexplode(c.relacl) as x
         join pg_roles r on r.oid = x.grantee
         where c.oid = $1::text::oid and r.oid <> c.relowner and not r.rolsuper and not r.rolbypassrls order by 1",
        &[text(&facts.target.oid.to_string())],
    )
    .await
}

fn calls(facts: &Facts, policy: &After, slow: &BTreeSet<(String, String)>, tally: &mut Tally) {
    let f = &policy.found;
    for (key, expression) in [("using", &f.using), ("with check", &f.check)] {
        let Some(expression) = expression else { continue };
        let found = slow_calls(expression, slow);
        for call in &found {
            let what = format!("{:?} calls {}() for every row", f.name, call.shown());
            if call.takes_columns {
                let turn = "it takes a column, so it cannot be called once: let a function without arguments give the \
                            set of what its caller may see, and write column in (select it())";
                tally.warn(what, turn);
                continue;
            }
            let better = wrap(expression, &found.iter().collect::<Vec<_>>());
            let place = if policy.ours {
                format!("in the job, {} = {better:?}", if key == "using" { "using" } else { "check" })
            } else {
                format!("alter policy {} on {} {key} ({better})", quote(&f.name), facts.target.name.sql())
            };
            tally.warn(what, format!("in (select ...) it is called once per statement: {place}"));
        }
    }
}

fn roles(facts: &Facts, policy: &After, grantees: &[String], tally: &mut Tally) {
    let f = &policy.found;
    // A restrictive policy for everyone is what makes it a restriction.
    if !f.permissive || !f.roles.iter().any(|r| r == "public") {
        return;
    }
    let list = if grantees.is_empty() { "...".to_owned() } else { grantees.join(", ") };
    let fix = if policy.ours {
        format!("in the job, roles = [...] with the roles that need it; the table is granted to {list}")
    } else {
        format!("alter policy {} on {} to {list}", quote(&f.name), facts.target.name.sql())
    };
    tally.warn(
        format!("{:?} is for public", f.name),
        format!("name the roles: for the others the expression need not be evaluated at all: {fix}"),
    );
}

/// Reads find their rows by the policy's column, if there is an index that leads with it.
fn indexed(p: &Probe<'_>, facts: &Facts, policy: &Found, tally: &mut Tally) {
    let Some(using) = &policy.using else { return };
    let words = lex::tokens(using).unwrap_or_default();
    let used = |name: &str| words.iter().any(|t| t.kind != TokenKind::Str && t.value == name);
    for column in facts.shape.columns.iter().filter(|c| used(c.name.as_str())) {
        if !p.spec.indexes.iter().any(|i| i.columns.first() == Some(&column.name)) {
            tally.warn(
                format!("{:?} goes by {}, which no index of the job leads with", policy.name, column.name),
                "add an index on it, or every read under this policy scans the table",
            );
        }
    }
}

/// What only the set as a whole shows.
fn together(before: &[Found], after: &[After], tally: &mut Tally) {
    for command in [PolicyCommand::Select, PolicyCommand::Insert, PolicyCommand::Update, PolicyCommand::Delete] {
        let counts = |f: &Found| f.permissive && (f.command == "*" || f.command == command.catalog_code());
        let old = before.iter().filter(|f| counts(f)).count();
        let new: Vec<&After> = after.iter().filter(|a| counts(&a.found)).collect();
        if old > 0 && new.is_empty() {
            tally.warn(
                format!("no permissive policy for {} any more", command.sql()),
                "without one the command is refused for everybody to whom policies apply; add one if that is not meant",
            );
        }
        for (i, a) in new.iter().enumerate() {
            let public = |f: &Found| f.roles.iter().any(|r| r == "public");
            let overlap = |other: &Found| {
                public(&a.found) || public(other) || a.found.roles.iter().any(|r| other.roles.contains(r))
            };
            if let Some(b) = new[i + 1..].iter().find(|b| overlap(&b.found)) {
                tally.warn(
                    format!("{:?} and {:?} are both permissive for {}", a.found.name, b.found.name, command.sql()),
                    "permissive policies are ORed: the wider one decides, and both are evaluated; make one of them, with \
                     both conditions, or give them other roles",
                );
            }
        }
    }
}

/// Policies without the switch, and the switch without policies.
fn switched_on(p: &Probe<'_>, facts: &Facts, enabled: bool, after: &[After], tally: &mut Tally) {
    let target = &facts.target.name;
    if enabled && after.is_empty() {
        tally.warn(
            format!("row level security is enabled on {target} without any policy"),
            format!(
                "everybody but its owner and roles with BYPASSRLS sees no row: create a policy, or alter table {} \
                 disable row level security",
                target.sql()
            ),
        );
    }
    // With policies in the job, policies_before fails for this.
    if !enabled && !after.is_empty() && p.spec.policies.is_none() {
        tally.warn(
            format!("{target} has policies, and row level security is not enabled"),
            format!("they mean nothing without it: alter table {} enable row level security", target.sql()),
        );
    }
}

/// What the job mends by replacing this policy.
fn mended(policy: &Found, slow: &BTreeSet<(String, String)>) -> Option<String> {
    let mut faults: Vec<String> = Vec::new();
    for call in texts(policy).flat_map(|e| slow_calls(e, slow)) {
        let fault = format!("calls {}() for every row", call.shown());
        if !faults.contains(&fault) {
            faults.push(fault);
        }
    }
    if policy.permissive && policy.roles.iter().any(|r| r == "public") {
        faults.push("is for public".into());
    }
    (!faults.is_empty()).then(|| format!("{:?} {}; the job replaces it", policy.name, faults.join(" and ")))
}
