//! The policies that are there, against those that the job names.

use super::check::{Check, Tally};
use super::policy_lint;
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::spec::PolicyCommand;
use crate::plan::Facts;

/// A policy as it is.
pub struct Found {
    /// Name.
    pub name: String,
    /// `pg_policy.polcmd`.
    pub command: String,
    /// Not restrictive.
    pub permissive: bool,
    /// Roles; `public` for everyone.
    pub roles: Vec<String>,
    /// USING, with the schema of everything outside pg_catalog.
    pub using: Option<String>,
    /// WITH CHECK.
    pub check: Option<String>,
}

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    let found = policies(p, facts.target.oid).await;
    let checks = match &found {
        Ok((enabled, found)) => {
            let lint = policy_lint::policy_lint(p, facts, *enabled, found).await;
            Ok(vec![before(p, facts, *enabled, found), p.settle("policy_lint", lint)?])
        }
        Err(e) => Ok(vec![Check::could_not("policies_before", e), Check::could_not("policy_lint", e)]),
    };
    p.settle_all(&["policies_before", "policy_lint"], checks)
}

async fn policies(p: &Probe<'_>, oid: u32) -> Result<(bool, Vec<Found>)> {
    let oid = oid.to_string();
    let enabled: bool =
        p.one("select relrowsecurity from pg_class where oid = $1::text::oid", &[text(&oid)]).await?.get(0);
    let rows = p
        .rows(
            "select p.polname::text, p.polcmd::text, p.polpermissive,
                    array(select coalesce(r.rolname::text, 'public') from unnest(p.polroles) as x(oid)
                          left join pg_roles r on r.oid = x.oid order by 1),
                    pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)
             from pg_policy p where p.polrelid = $1::text::oid order by p.polname",
            &[text(&oid)],
        )
        .await?;
    let found = rows
        .iter()
        .map(|r| Found {
            name: r.get(0),
            command: r.get(1),
            permissive: r.get(2),
            roles: r.get(3),
            using: r.get(4),
            check: r.get(5),
        })
        .collect();
    Ok((enabled, found))
}

impl Found {
    fn line(&self) -> String {
        let command = [PolicyCommand::All, PolicyCommand::Select, PolicyCommand::Insert, PolicyCommand::Update]
            .into_iter()
            .find(|c| c.catalog_code() == self.command)
            .unwrap_or(PolicyCommand::Delete);
        format!(
            "{:?} for {} to {}{}{}{}",
            self.name,
            command.sql(),
            self.roles.join(", "),
            if self.permissive { "" } else { ", restrictive" },
            if self.using.is_some() { ", using" } else { "" },
            if self.check.is_some() { ", with check" } else { "" },
        )
    }
}

/// The exact set: a leftover permissive policy would be ORed with the new ones (hazard 41).
fn before(p: &Probe<'_>, facts: &Facts, enabled: bool, found: &[Found]) -> Check {
    let name = "policies_before";
    let lines: Vec<String> = found.iter().map(Found::line).collect();
    let Some(wanted) = &p.spec.policies else {
        return Check::skip(name, format!("the job replaces no policy; the table has {}", found.len()));
    };
    let expected: Vec<&str> = if p.flipped() {
        wanted.create.iter().map(|c| c.name.as_str()).chain(wanted.keep.iter().map(String::as_str)).collect()
    } else {
        wanted.replace.iter().chain(&wanted.keep).map(String::as_str).collect()
    };
    let mut tally = Tally::default();
    let target = &facts.target.name;
    if !enabled {
        tally.fail(
            format!("row level security is not enabled on {target}"),
            format!("policies mean nothing without it: alter table {target} enable row level security"),
        );
    }
    for policy in found.iter().filter(|f| !expected.contains(&f.name.as_str())) {
        tally.fail(
            format!("policy {:?} is on the table and not in the job", policy.name),
            "name every policy of the table in policies.replace or policies.keep",
        );
    }
    for missing in expected.iter().filter(|e| !found.iter().any(|f| f.name == **e)) {
        tally.fail(
            format!("policy {missing:?} is in the job and not on the table"),
            "correct the name in policies.replace or policies.keep; it is written exactly as in the catalog",
        );
    }
    let stage = if p.flipped() { " (the new ones)" } else { "" };
    tally.check(name, format!("exactly the {} policies that the job names{stage}", found.len())).details(lines)
}
