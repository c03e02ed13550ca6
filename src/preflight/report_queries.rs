//! The queries of `[report]` are prepared as their roles.

use super::check::{Check, Tally};
use super::privileges::quote;
use super::probe::Probe;
use crate::error::Result;
use crate::report::explain;

/// `report_queries`.
///
/// # Errors
/// Whatever the server says.
pub async fn report_queries(p: &Probe<'_>) -> Result<Check> {
    let name = "report_queries";
    let report = &p.spec.report;
    if report.queries.is_empty() {
        return Ok(Check::pass(name, "the job has none; the report then shows no plans of queries"));
    }
    let mut tally = Tally::default();
    for (i, query) in report.queries.iter().enumerate() {
        let tried = async {
            explain::enter(p.client, report, query, "").await?;
            // Not run: it could take long, and there is no user yet for whom it means something.
            p.client.prepare(&query.sql).await.map(|_| ()).map_err(crate::Error::from)
        }
        .await;
        p.client.batch_execute("rollback").await?;
        let Err(e) = tried else { continue };
        if p.client.is_closed() {
            return Err(e);
        }
        let place = format!("report.queries[{i}]");
        let role = query.role.as_str();
        let state = e.sqlstate().map_or(String::new(), |s| format!(" (SQLSTATE {s})"));
        let member = "select coalesce((select pg_has_role(session_user, oid, 'MEMBER') from pg_roles where rolname = $1), false)";
        if e.sqlstate() == Some("42501") && !p.one(member, &[super::probe::text(&role)]).await?.get::<_, bool>(0) {
            tally.fail(format!("{place}: this login may not run as {role}{state}"), "grant it the role");
            tally.grant(format!("grant {} to {}", quote(role), quote(&p.server.login)));
        } else {
            tally.fail(
                format!("{place}: {e}{state}"),
                "write one SELECT that the role may run, tables and functions with their schema, and settings that it takes",
            );
        }
    }
    Ok(tally.check(name, format!("{} queries can be prepared as their roles", report.queries.len())))
}
