//! What the comparison of access cannot mend: rows that the old policies show to several users, where the new ones go by one
//! owner; and functions that tell the role on which policies are tried from the application's.

use super::check::Tally;
use super::privileges::quote;
use super::probe::{Probe, text};
use crate::access::explain::INEXPRESSIBLE;
use crate::error::Result;
use crate::job::access::Access;
use crate::job::lex;
use crate::plan::Facts;
use crate::plan::access_sets::{self, Way};
use crate::plan::access_sql::{self, Rule};

/// Planner cost up to which rows are looked at: some seconds. Beyond it the comparison before the flip says it.
const MOST_COST: f64 = 2e6;
/// Keys that are named.
const KEYS: i64 = 3;

/// Looks whether some row is visible to several users now, where no new policy could show it to more than one.
///
/// # Errors
/// Whatever the server says of anything but the policies' expressions.
pub async fn several(
    p: &Probe<'_>,
    facts: &Facts,
    access: &Access,
    before: &[Rule],
    after: &[Rule],
    tally: &mut Tally,
) -> Result<()> {
    let Some(user) = &access.user else { return Ok(()) };
    for role in &access.roles {
        let of = |rules: &[Rule]| -> Vec<Rule> {
            rules.iter().filter(|r| r.covers("r") && r.applies(&[role.as_str().to_owned()])).cloned().collect()
        };
        let (old, new) = (of(before), of(after));
        let Some(column) = facts.shape.columns.first().map(|c| c.name.as_str()) else { continue };
        if !new.iter().filter(|r| r.permissive).all(|r| goes_by_owner(r, column)) {
            continue;
        }
        let condition = access_sql::condition(&old.iter().collect::<Vec<_>>(), "r", false);
        let Ok(condition) = access_sets::bind_user(&condition, user) else { continue };
        if let Some(keys) = shared(p, facts, access, &condition).await?.filter(|keys| !keys.is_empty()) {
            tally.fail(
                format!(
                    "the old policies show rows to several users of {role}, such as key {}, and the new ones to one owner each: \
                     {INEXPRESSIBLE}",
                    keys.join(" | ")
                ),
                "let a new policy show these rows as well, by OR or in one of its own, or leave the old policy in policies.keep; \
                 else this job is not for this table",
            );
            return Ok(());
        }
    }
    Ok(())
}

/// Whether a policy shows a row to nobody but the owner in the new column: it names the column, and no alternative.
fn goes_by_owner(rule: &Rule, column: &str) -> bool {
    let Some(using) = &rule.using else { return false };
    let tokens = lex::tokens(using).unwrap_or_default();
    tokens.iter().any(|t| t.value == column) && !tokens.iter().any(|t| t.value == "or" || t.value == "any")
}

/// Keys of rows that several users see under a condition; `None`: that is too expensive to ask here.
async fn shared(p: &Probe<'_>, facts: &Facts, access: &Access, condition: &str) -> Result<Option<Vec<String>>> {
    let users = match &access.users {
        Some(query) => query.clone(),
        None => {
            let paths = std::iter::once(&facts.shape).chain(&facts.agree);
            let all: Vec<String> = paths.filter_map(access_sql::distinct_values).collect();
            all.join(" union ")
        }
    };
    let mut cheapest: Option<(f64, String)> = None;
    for way in [Way::Rows, Way::Users] {
        let sql = access_sets::shared(&facts.shape, condition, way, &users, KEYS);
        // What the server says of the expression the check of the policies says better.
        let Ok(row) = p.one(&format!("explain (format json) {sql}"), &[]).await else { return Ok(None) };
        let plan: serde_json::Value = row.get(0);
        let cost = plan[0]["Plan"]["Total Cost"].as_f64().unwrap_or(f64::MAX);
        if cost < MOST_COST && cheapest.as_ref().is_none_or(|c| cost < c.0) {
            cheapest = Some((cost, sql));
        }
    }
    let Some((_, sql)) = cheapest else { return Ok(None) };
    Ok(Some(p.rows(&sql, &[]).await?.iter().map(|r| r.get(0)).collect()))
}

/// Functions that policies call and that look at the role: on a stand-in it is another one than for the application.
///
/// # Errors
/// Whatever the server says.
pub async fn role_functions(p: &Probe<'_>, rules: &[&Rule], tally: &mut Tally) -> Result<()> {
    for rule in rules {
        for (schema, name) in [&rule.using, &rule.check].into_iter().flatten().flat_map(|e| lex::qualified_calls(e)) {
            let sql = "select p.prosrc from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                       where n.nspname = $1 and p.proname = $2 and n.nspname <> 'pg_catalog'";
            for body in p.texts(sql, &[text(&schema), text(&name)]).await? {
                let tokens = lex::tokens(&body).unwrap_or_default();
                let Some(word) = access_sets::names_session_user(tokens.iter()) else { continue };
                tally.warn(
                    format!("policy {:?} calls {schema}.{name}(), which looks at {word}", rule.name),
                    format!(
                        "policies are tried as a stand-in, whose name is another one, so the comparison of access may say too \
                         much or too little: let {}.{} go by a setting or claim, or by pg_has_role()",
                        quote(&schema),
                        quote(&name)
                    ),
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_policy_that_goes_by_the_column_alone_shows_each_row_to_one_user() {
        let rule = |using: &str| Rule {
            name: "p".into(),
            command: "r".into(),
            permissive: true,
            roles: vec!["public".into()],
            using: Some(using.into()),
            check: None,
        };
        assert!(goes_by_owner(&rule("owner = (select app.me())"), "owner"));
        assert!(!goes_by_owner(&rule("owner = app.me() or is_public"), "owner"));
        assert!(!goes_by_owner(&rule("true"), "owner"));
    }
}
