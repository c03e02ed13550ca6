//! The policies that are there, against those that the job names; and a critical look at those that it creates.

use super::check::{Check, Tally};
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::lex::{self, Token, TokenKind};
use crate::job::spec::{Policies, Policy, PolicyCommand};
use crate::plan::Facts;

/// A policy as it is.
pub struct Found {
    name: String,
    /// `pg_policy.polcmd`.
    command: String,
    permissive: bool,
    roles: Vec<String>,
    has_using: bool,
    has_check: bool,
}

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    let found = policies(p, facts.target.oid).await;
    let checks = match &found {
        Ok((enabled, found)) => Ok(vec![before(p, facts, *enabled, found), lint(p, facts, found)]),
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
                    p.polqual is not null, p.polwithcheck is not null
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
            has_using: r.get(4),
            has_check: r.get(5),
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
            if self.has_using { ", using" } else { "" },
            if self.has_check { ", with check" } else { "" },
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

fn lint(p: &Probe<'_>, facts: &Facts, found: &[Found]) -> Check {
    let name = "policy_lint";
    let Some(policies) = &p.spec.policies else { return Check::skip(name, "the job creates no policy") };
    let mut tally = Tally::default();
    for policy in &policies.create {
        one(p, facts, policy, &mut tally);
    }
    together(policies, found, &mut tally);
    tally.check(name, format!("{} new policies, nothing to remark", policies.create.len()))
}

fn one(p: &Probe<'_>, facts: &Facts, policy: &Policy, tally: &mut Tally) {
    let name = policy.name.as_str();
    for expression in [&policy.using, &policy.check].into_iter().flatten() {
        for call in bare_calls(expression) {
            tally.warn(
                format!("{name:?} calls {call}() for every row"),
                format!("write (select {call}(...)): then it is evaluated once per statement"),
            );
        }
    }
    if policy.roles.iter().any(|r| r.as_str() == "public") {
        tally.warn(
            format!("{name:?} is for public"),
            "name the roles (to authenticated): for the others the expression need not be evaluated at all",
        );
    }
    // Reads find their rows by the policy's column, if there is an index that leads with it.
    let Some(using) = &policy.using else { return };
    let words = lex::tokens(using).unwrap_or_default();
    let used = |name: &str| words.iter().any(|t| t.kind != TokenKind::Str && t.value == name);
    for column in facts.shape.columns.iter().filter(|c| used(c.name.as_str())) {
        if !p.spec.indexes.iter().any(|i| i.columns.first() == Some(&column.name)) {
            tally.warn(
                format!("{name:?} goes by {}, which no index of the job leads with", column.name),
                "add an index on it, or every read under this policy scans the table",
            );
        }
    }
}

/// What only the set as a whole shows.
fn together(policies: &Policies, found: &[Found], tally: &mut Tally) {
    let kept: Vec<&Found> = found.iter().filter(|f| policies.keep.contains(&f.name)).collect();
    for command in [PolicyCommand::Select, PolicyCommand::Insert, PolicyCommand::Update, PolicyCommand::Delete] {
        let covers = |code: &str| code == "*" || code == command.catalog_code();
        let old = found.iter().filter(|f| f.permissive && covers(&f.command)).count();
        let new: Vec<(&str, Vec<&str>)> = policies
            .create
            .iter()
            .filter(|c| c.permissive && covers(c.command.catalog_code()))
            .map(|c| (c.name.as_str(), c.roles.iter().map(|r| r.as_str()).collect()))
            .chain(
                kept.iter()
                    .filter(|f| f.permissive && covers(&f.command))
                    .map(|f| (f.name.as_str(), f.roles.iter().map(String::as_str).collect())),
            )
            .collect();
        if old > 0 && new.is_empty() {
            tally.warn(
                format!("no permissive policy for {} any more", command.sql()),
                "without one the command is refused for everybody to whom policies apply; add one if that is not meant",
            );
        }
        for (i, (a, roles)) in new.iter().enumerate() {
            let overlap =
                |other: &[&str]| roles.iter().any(|r| *r == "public" || other.contains(r) || other.contains(&"public"));
            if let Some((b, _)) = new[i + 1..].iter().find(|(_, other)| overlap(other)) {
                tally.warn(
                    format!("{a:?} and {b:?} are both permissive for {}", command.sql()),
                    "permissive policies are ORed: the wider one decides, and both are evaluated",
                );
            }
        }
    }
}

/// Names of functions that are called outside any `(select ...)` and are worth calling once: settings and `auth.*`.
fn bare_calls(expression: &str) -> Vec<String> {
    let tokens = lex::tokens(expression).unwrap_or_default();
    let symbol = |t: &Token, s: &str| t.kind == TokenKind::Symbol && t.value == s;
    let is_name = |t: &Token| matches!(t.kind, TokenKind::Word | TokenKind::Quoted);
    let mut open: Vec<bool> = Vec::new();
    let mut out: Vec<String> = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        if symbol(token, ")") {
            open.pop();
        }
        if !symbol(token, "(") {
            continue;
        }
        let selected = open.last().copied().unwrap_or(false);
        let subselect = tokens.get(i + 1).is_some_and(|t| t.kind == TokenKind::Word && t.value == "select");
        open.push(selected || subselect);
        let Some(name) = i.checked_sub(1).and_then(|k| tokens.get(k)).filter(|t| is_name(t)) else { continue };
        let schema = (i >= 3 && symbol(&tokens[i - 2], ".") && is_name(&tokens[i - 3])).then(|| &tokens[i - 3].value);
        let full = schema.map_or_else(|| name.value.clone(), |s| format!("{s}.{}", name.value));
        let per_statement = name.value == "current_setting" || schema.is_some_and(|s| s == "auth");
        if per_statement && !selected && !out.contains(&full) {
            out.push(full);
        }
    }
    out
}

/// Functions that an expression calls with their schema: `(schema, name)`.
pub fn called_functions(expression: &str) -> Vec<(String, String)> {
    let tokens = lex::tokens(expression).unwrap_or_default();
    let is_name = |t: &Token| matches!(t.kind, TokenKind::Word | TokenKind::Quoted);
    let mut out = Vec::new();
    for w in tokens.windows(4) {
        let symbols =
            w[1].value == "." && w[3].value == "(" && w[1].kind == TokenKind::Symbol && w[3].kind == TokenKind::Symbol;
        if symbols && is_name(&w[0]) && is_name(&w[2]) {
            let call = (w[0].value.clone(), w[2].value.clone());
            if !out.contains(&call) {
                out.push(call);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_inside_a_subselect_are_fine() {
        assert_eq!(bare_calls("auth_user_id = auth.uid()"), ["auth.uid"]);
        assert!(bare_calls("auth_user_id = (select auth.uid())").is_empty());
        assert!(bare_calls("lower(name) = 'auth.uid()'").is_empty());
        assert_eq!(
            bare_calls("x in (select y from s.z where (auth.uid() = a)) or current_setting('a') = b"),
            ["current_setting"]
        );
        assert_eq!(bare_calls("(auth.jwt() ->> 'a') = b"), ["auth.jwt"]);
    }

    #[test]
    fn called_functions_have_their_schema() {
        let found = called_functions("a = (select auth.uid()) and \"My\".\"F\"(lower(b)) and c.d = 1");
        assert_eq!(found, [("auth".to_owned(), "uid".to_owned()), ("My".to_owned(), "F".to_owned())]);
    }
}
