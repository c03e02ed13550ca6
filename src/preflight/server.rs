//! The server and the way to it: version, standby, read-only mode, poolers, who else uses our login.

use std::collections::BTreeSet;

use super::check::Check;
use super::probe::{Probe, text};
use crate::error::Result;
use crate::pg::pooler;

/// Oldest supported: TID range scans and `create or replace trigger` are from 14.
const OLDEST: i32 = 140_000;
/// Before it, CREATE INDEX CONCURRENTLY could leave out rows silently (hazard 34; release notes of 14.4).
const CORRUPTING_BELOW: i32 = 140_004;
/// Newest major version that the tests run on.
const NEWEST_MAJOR: i32 = 18;
/// Questions asked in a row to see whether the server process changes in between.
const POOLER_TRIES: usize = 8;

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>) -> Result<Vec<Check>> {
    Ok(vec![
        version(p),
        standby(p),
        p.settle("read_only", read_only(p).await)?,
        p.settle("pooler", pooler_mode(p).await)?,
        p.settle("dedicated_login", dedicated_login(p).await)?,
    ])
}

fn version(p: &Probe<'_>) -> Check {
    version_check(p.server.version_num, &p.server.version)
}

fn version_check(num: i32, version: &str) -> Check {
    let name = "server_version";
    match num {
        n if n < OLDEST => Check::fail(name, format!("PostgreSQL {version} is not supported"))
            .hint("14 to 18 are; upgrade the server first"),
        n if n < CORRUPTING_BELOW => {
            Check::fail(name, format!("PostgreSQL {version}: CREATE INDEX CONCURRENTLY can silently leave out rows"))
                .hint("update to the newest 14.x (at least 14.4) first; REINDEX what was built concurrently")
        }
        n if n / 10_000 > NEWEST_MAJOR => {
            Check::warn(name, format!("PostgreSQL {version} is newer than what this version was tested with"))
                .hint("try it on a copy first, or look for a newer backfilld")
        }
        _ => Check::pass(name, format!("PostgreSQL {version}")),
    }
}

fn standby(p: &Probe<'_>) -> Check {
    if p.server.in_recovery {
        return Check::warn("standby", "this server is a standby: it can be checked, and the job cannot run here")
            .hint("run against the primary; lag may hide the newest rows from this check");
    }
    Check::pass("standby", "a primary")
}

/// `default_transaction_read_only`, as set for server, database or role; hosting platforms set it when the disk is
/// full.
async fn read_only(p: &Probe<'_>) -> Result<Check> {
    let row = p
        .one(
            "select current_setting('default_transaction_read_only')::bool,
                    coalesce((select source || coalesce(' ' || sourcefile, '') from pg_settings
                              where name = 'default_transaction_read_only'), '')",
            &[],
        )
        .await?;
    let (on, source): (bool, String) = (row.get(0), row.get(1));
    if on {
        return Ok(Check::warn("read_only", format!("default_transaction_read_only is on (from {source})")).hint(
            "fine for checking; to run, log in as a role without it, or find out why the platform set it (disk full?)",
        ));
    }
    Ok(Check::pass("read_only", "transactions may write by default"))
}

/// Transaction pooling breaks session settings, session locks and named statements (hazard 59).
async fn pooler_mode(p: &Probe<'_>) -> Result<Check> {
    let name = "pooler";
    let hint = "connect directly or in session mode (with Supabase: port 5432, not 6543)";
    let transaction_mode = |how: &str| Check::fail(name, format!("a pooler in transaction mode: {how}")).hint(hint);
    let mut pids = BTreeSet::new();
    for _ in 0..POOLER_TRIES {
        pids.insert(pooler::backend_pid(p.client).await?);
    }
    if pids.len() > 1 {
        return Ok(transaction_mode("the server process changed between two statements").count(pids.len() as i64));
    }
    if let Some(other) = p.options.other
        && pooler::in_transaction_mode(p.client, other).await?
    {
        return Ok(transaction_mode("two sessions share one server process"));
    }
    let application: String = p.one("select current_setting('application_name')", &[]).await?.get(0);
    let lower = application.to_lowercase();
    if ["supavisor", "pgbouncer", "pgcat", "odyssey"].iter().any(|known| lower.contains(known)) {
        return Ok(Check::warn(
            name,
            format!("the session comes through a pooler ({application:?}), its mode unknown"),
        )
        .hint(hint));
    }
    let certain = if p.options.other.is_some() { "" } else { " (one session cannot prove it)" };
    Ok(Check::pass(name, format!("the session keeps its server process{certain}")))
}

/// Batches of a dedicated login skip our own UPDATE trigger (I1), so nobody else may write as that login.
async fn dedicated_login(p: &Probe<'_>) -> Result<Check> {
    let name = "dedicated_login";
    if !p.options.dedicated_login {
        return Ok(Check::skip(name, "database.dedicated_login is not set; batches fire our own trigger for each row"));
    }
    let row = p
        .one(
            "select rolsuper, (select count(*) from pg_class c where c.relowner = r.oid and c.relkind in ('r', 'p')
                                 and c.relnamespace not in (select oid from pg_namespace where nspname = 'backfilld'))
             from pg_roles r where rolname = session_user",
            &[],
        )
        .await?;
    let (superuser, tables): (bool, i64) = (row.get(0), row.get(1));
    let foreign = p
        .texts(
            "select format('%s (pid %s)', coalesce(nullif(application_name, ''), 'no application_name'), pid)
             from pg_stat_activity where usename = session_user and backend_type = 'client backend'
               and pid <> pg_backend_pid() and not starts_with(application_name, 'backfilld/') order by pid limit 20",
            &[],
        )
        .await?;
    let login = &p.server.login;
    if !foreign.is_empty() {
        let n = i64::try_from(foreign.len()).unwrap_or(i64::MAX);
        return Ok(Check::fail(name, format!("others are logged in as {login}")).count(n).samples(foreign).hint(
            "what they write to the target skips the sync trigger: give backfilld a login of its own, or unset \
             database.dedicated_login",
        ));
    }
    if superuser {
        return Ok(Check::fail(name, format!("{login} is a superuser, which is nobody's dedicated login"))
            .hint("give backfilld a login of its own, or unset database.dedicated_login"));
    }
    if tables > 0 {
        return Ok(Check::warn(name, format!("{login} owns {tables} tables, so migrations may log in as it"))
            .count(tables)
            .hint("a login of backfilld's own owns nothing; make sure that nobody else uses this one"));
    }
    let members = members(p, login).await?;
    Ok(Check::pass(name, format!("nobody else is logged in as {login}{members}")))
}

async fn members(p: &Probe<'_>, login: &str) -> Result<String> {
    let sql = "select count(*) from pg_auth_members m join pg_roles r on r.oid = m.roleid where r.rolname = $1";
    let n: i64 = p.one(sql, &[text(&login)]).await?.get(0);
    // Members can SET ROLE, which leaves session_user alone: no danger, worth a word.
    Ok(if n > 0 { format!("; {n} roles are members of it") } else { String::new() })
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn versions_are_judged_by_their_number() {
        let status = |num| version_check(num, "x").status;
        assert_eq!(status(130_020), Status::Fail);
        assert_eq!(status(140_003), Status::Fail);
        assert_eq!(status(140_004), Status::Pass);
        assert_eq!(status(180_001), Status::Pass);
        assert_eq!(status(190_000), Status::Warn);
    }
}
