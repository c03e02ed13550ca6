//! Whether access can be compared before and after the flip: roles, rights, policies that a stand-in can have.

use super::check::{Check, Tally};
use super::owners;
use super::privileges::quote;
use super::probe::{Probe, text};
use crate::access::{Stage, probe_role, rules};
use crate::error::Result;
use crate::expand::snapshot;
use crate::job::access::Access;
use crate::plan::Facts;
use crate::plan::access_sql::Rule;

/// The check of this file.
///
/// # Errors
/// Whatever the server says.
pub async fn access(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "access";
    let Some(access) = &p.spec.access else {
        return Ok(if p.spec.policies.is_some() {
            Check::warn(name, "the job replaces policies and has no [access]: who sees what is not compared")
                .hint("name the roles in [access], and how a user is known; docs/job-reference.md explains it")
        } else {
            Check::skip(name, "the job replaces no policies")
        });
    };
    let mut tally = Tally::default();
    let mut stand_ins = 0;
    let lists = [(&access.roles, false), (&access.anonymous, false), (&access.bypass, true)];
    for (role, bypass) in lists.iter().flat_map(|(list, bypass)| list.iter().map(move |r| (r.as_str(), *bypass))) {
        let n = (!bypass).then_some(stand_ins);
        stand_ins += usize::from(!bypass);
        one_role(p, role, bypass, n, &mut tally).await?;
    }
    policies(p, facts, access, &mut tally).await?;
    writes(p, access, &mut tally).await?;
    for (key, sql) in [
        ("access.user", access.user.as_ref().map(|u| format!("select ({u})"))),
        ("access.users", access.users.clone().map(|q| format!("select x.v::text from ({q}) as x(v)"))),
    ] {
        if let Some(Err(e)) = match &sql {
            Some(sql) => Some(p.prepare(sql).await),
            None => None,
        } {
            tally.fail(format!("{key}: {}", e.line()), "correct it; functions outside pg_catalog need their schema");
        }
    }
    let by_sets = if access.user.is_some() { "all users by sets, " } else { "" };
    let writes = if access.writes { "with writes" } else { "reads only" };
    Ok(tally.check(
        name,
        format!(
            "compared before and after the flip: {by_sets}{} users of each of {} role(s) as enforced, {writes}",
            access.sample,
            access.roles.len()
        ),
    ))
}

/// `n`: the number of the role's stand-in, if it gets one.
async fn one_role(p: &Probe<'_>, role: &str, bypass: bool, n: Option<usize>, tally: &mut Tally) -> Result<()> {
    let set = if p.server.version_num >= 160_000 { "SET" } else { "MEMBER" };
    let table = p.spec.target.table.sql();
    let rows = p
        .rows(
            "select pg_has_role(session_user, r.oid, $2),
                    r.rolsuper or r.rolbypassrls or pg_has_role(r.oid, c.relowner, 'USAGE') and not c.relforcerowsecurity,
                    me.rolsuper, me.rolcreaterole, pg_has_role(session_user, r.oid, 'MEMBER WITH ADMIN OPTION')
             from pg_roles r, pg_class c, pg_roles me
             where r.rolname = $1 and c.oid = to_regclass($3) and me.rolname = session_user",
            &[text(&role), text(&set), text(&table)],
        )
        .await?;
    let Some(row) = rows.first() else {
        tally.fail(format!("role {role:?} does not exist"), "correct its name in [access]");
        return Ok(());
    };
    let login = quote(&p.server.login);
    if !row.get::<_, bool>(0) {
        tally.fail(format!("this login may not act as {role}"), "it has to, to see what the role sees");
        tally.grant(format!("grant {} to {login}", quote(role)));
    }
    match (bypass, row.get::<_, bool>(1)) {
        (false, true) => tally.fail(
            format!("{role} bypasses row level security: no policy protects anything from it"),
            "name it in access.bypass if that is meant, or take superuser, BYPASSRLS or ownership away",
        ),
        (true, false) => tally.fail(
            format!("policies apply to {role}, which access.bypass says they do not"),
            "name it in access.roles or access.anonymous",
        ),
        _ => {}
    }
    let Some(n) = n.filter(|_| p.spec.policies.is_some()) else { return Ok(()) };
    let (superuser, may_create, may_give): (bool, bool, bool) = (row.get(2), row.get(3), row.get(4));
    // Before 16, who may create roles may give every role but a superuser's.
    if superuser || (may_create && (may_give || p.server.version_num < 160_000)) {
        return Ok(());
    }
    let stand_in = probe_role::name(p.client, &p.spec.name, n).await?;
    let there = p
        .rows(
            "select 1 from pg_roles where rolname = $1 and pg_has_role(oid, $2, 'USAGE') and pg_has_role(session_user, oid, 'MEMBER')",
            &[text(&stand_in), text(&role)],
        )
        .await?;
    if there.is_empty() {
        tally.fail(
            format!("this login may not make the role on which the policies for {role} are tried"),
            format!(
                "give it the rights below, or let an administrator make it: create role {0} nologin in role {1}; grant {0} to {login}",
                quote(&stand_in),
                quote(role)
            ),
        );
        if !may_create {
            tally.grant(format!("alter role {login} createrole"));
        }
        if !may_give {
            tally.grant(format!("grant {} to {login} with admin option", quote(role)));
        }
    }
    Ok(())
}

async fn policies(p: &Probe<'_>, facts: &Facts, access: &Access, tally: &mut Tally) -> Result<()> {
    let Some(policies) = p.spec.policies.as_ref().filter(|_| !p.flipped()) else { return Ok(()) };
    let now = snapshot::security(p.client, &p.spec.target.table).await?;
    let before: Vec<Rule> = now.policies.iter().map(Rule::from).collect();
    let kept = before.iter().filter(|r| policies.keep.contains(&r.name)).cloned();
    let after: Vec<Rule> = kept.chain(policies.create.iter().map(Rule::from)).collect();
    if let Some(why) = rules::cannot_stand_in(&before, &after, Stage::Before) {
        tally.fail(
            why,
            "write the policy by a setting or claim instead, or leave [access] out: then nothing is compared",
        );
        return Ok(());
    }
    left_out(p, access, &before, &after, tally).await?;
    owners::role_functions(p, &before.iter().chain(&after).collect::<Vec<_>>(), tally).await?;
    owners::several(p, facts, access, &before, &after, tally).await
}

/// Roles with a right on the table that are in no list, and for which other policies are to hold than now: nobody would see what that
/// does to them.
async fn left_out(p: &Probe<'_>, access: &Access, before: &[Rule], after: &[Rule], tally: &mut Tally) -> Result<()> {
    let rows = p
        .rows(
            "select r.rolname::text, array(select m.rolname::text from pg_roles m where pg_has_role(r.oid, m.oid, 'USAGE'))
             from pg_class c cross join lateral aclexplode(c.relacl) as x join pg_roles r on r.oid = x.grantee
             where c.oid = to_regclass($1::text) and r.oid <> c.relowner and not r.rolsuper and not r.rolbypassrls
               and not pg_has_role(r.oid, c.relowner, 'USAGE')
             group by r.oid, r.rolname order by 1",
            &[text(&p.spec.target.table.sql())],
        )
        .await?;
    let lists = [&access.roles, &access.anonymous, &access.bypass];
    for row in rows {
        let (role, is): (String, Vec<String>) = (row.get(0), row.get(1));
        if lists.iter().any(|l| l.iter().any(|r| r.as_str() == role)) {
            continue;
        }
        let holds = |r: &&Rule| r.roles.iter().any(|of| of == "public" || is.contains(of));
        let (then, now): (Vec<_>, Vec<_>) =
            (before.iter().filter(holds).collect(), after.iter().filter(holds).collect());
        if then != now {
            tally.fail(
                format!("{role} may use the table, other policies are to hold for it, and [access] does not name it"),
                "name it in access.roles or access.anonymous, so that it is compared, or revoke its rights on the table",
            );
        }
    }
    Ok(())
}

async fn writes(p: &Probe<'_>, access: &Access, tally: &mut Tally) -> Result<()> {
    if !access.writes || access.writes_can_be_undone || p.spec.policies.is_none() {
        return Ok(());
    }
    let triggers = rules::application_triggers(p.client, &p.spec.target.table).await?;
    if !triggers.is_empty() {
        tally.fail(
            format!("access.writes_can_be_undone: trying writes fires {}", triggers.join(", ")),
            "true if a rollback undoes what they do (no calls to the outside), else set access.writes = false",
        );
    }
    Ok(())
}
