//! Other sessions and the settings under which they run: isolation, timeouts, long and prepared transactions.

use super::check::{Check, Tally};
use super::estimate::span;
use super::probe::{Probe, text};
use crate::error::Result;

/// Batches give up a lock before the server looks for deadlocks, which needs some room.
const MIN_DEADLOCK_TIMEOUT_MS: i64 = 100;

/// The checks of this file. None of them needs the job's tables.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>) -> Result<Vec<Check>> {
    Ok(vec![
        p.settle("isolation", isolation(p).await)?,
        p.settle("lock_timeouts", lock_timeouts(p).await)?,
        p.settle("long_transactions", long_transactions(p).await)?,
        p.settle("prepared_transactions", prepared_transactions(p).await)?,
    ])
}

/// A setting of a role or of the database: whose, name, value.
async fn role_settings(p: &Probe<'_>, names: &[&str]) -> Result<Vec<(String, String, String)>> {
    let names: Vec<&str> = names.to_vec();
    let rows = p
        .rows(
            "select case when s.setrole = 0 then 'database ' || coalesce(d.datname, 'any')
                         else 'role ' || r.rolname || case when s.setdatabase <> 0 then ' in ' || d.datname else '' end end,
                    split_part(c.line, '=', 1), substr(c.line, strpos(c.line, '=') + 1)
             from pg_db_role_setting s left join pg_roles r on r.oid = s.setrole
             left join pg_database d on d.oid = s.setdatabase cross join lateral unnest(s.setconfig) as c(line)
             where (s.setdatabase = 0 or d.datname = current_database()) and split_part(c.line, '=', 1) = any ($1)
               and coalesce(r.rolname, '') <> session_user
             order by 1, 2",
            &[(&names, tokio_postgres::types::Type::TEXT_ARRAY)],
        )
        .await?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect())
}

/// At other levels a change of a source row raises an error, since it could miss rows (hazard 64).
async fn isolation(p: &Probe<'_>) -> Result<Check> {
    let name = "isolation";
    if p.spec.source.is_empty() {
        return Ok(Check::skip(name, "the job has no source table whose changes would have to be propagated"));
    }
    let strict = |level: &str| {
        !matches!(level.trim_matches('\'').to_lowercase().as_str(), "read committed" | "read uncommitted")
    };
    let mut found: Vec<String> = role_settings(p, &["default_transaction_isolation"])
        .await?
        .into_iter()
        .filter(|(_, _, level)| strict(level))
        .map(|(whose, _, level)| format!("{whose}: {level}"))
        .collect();
    // reset_val of our session is the server's or our role's value, whatever SET has been done since.
    let server: String = p
        .one("select coalesce(reset_val, '') from pg_settings where name = 'default_transaction_isolation'", &[])
        .await?
        .get(0);
    if strict(&server) {
        found.push(format!("server: {server}"));
    }
    if found.is_empty() {
        return Ok(Check::pass(
            name,
            "no role or database defaults to a stricter level; what a transaction sets itself cannot be seen here",
        ));
    }
    let summary = format!("stricter than READ COMMITTED by default: {}", found.join(", "));
    let n = found.len() as i64;
    if p.spec.side_effects.strict_isolation_raises {
        return Ok(Check::warn(name, summary)
            .count(n)
            .hint("side_effects.strict_isolation_raises consents: their changes of a source's value raise 0A000"));
    }
    Ok(Check::fail(name, summary).count(n).hint(
        "a change of a source's value by them raises 0A000, since it could miss target rows: let them use READ COMMITTED for \
         it, or consent with side_effects.strict_isolation_raises = true",
    ))
}

/// Our sessions set their own; the application's must not be shorter than what our DDL may make it wait.
async fn lock_timeouts(p: &Probe<'_>) -> Result<Check> {
    let mut tally = Tally::default();
    let wait_ms = p.options.ddl_lock_timeout.as_millis() as i64;
    for (whose, setting, value) in role_settings(p, &["lock_timeout", "statement_timeout"]).await? {
        let sql = "select case when $1 ~ '^[0-9]+$' then $1::text::int8
                               else (extract(epoch from $1::text::interval) * 1000)::int8 end";
        let ms: i64 = match p.one(sql, &[text(&value)]).await {
            Ok(row) => row.get(0),
            Err(_) => continue,
        };
        if ms > 0 && ms <= wait_ms {
            tally.warn(
                format!("{whose}: {setting} = {value}"),
                format!(
                    "while our DDL waits for its lock, up to {wait_ms} ms, such statements queue behind it and would fail: \
                     set ddl.lock_timeout below that"
                ),
            );
        }
    }
    let row = p
        .one(
            "select (extract(epoch from current_setting('deadlock_timeout')::interval) * 1000)::int8,
                    coalesce((select string_agg(split_part(c.line, '=', 1) || ' = ' || substr(c.line, strpos(c.line, '=') + 1), ', ')
                              from pg_db_role_setting s join pg_roles r on r.oid = s.setrole
                              cross join lateral unnest(s.setconfig) as c(line)
                              where r.rolname = session_user and c.line like '%timeout=%'), '')",
            &[],
        )
        .await?;
    let (deadlock, own): (i64, String) = (row.get(0), row.get(1));
    if deadlock < MIN_DEADLOCK_TIMEOUT_MS {
        tally.warn(
            format!("deadlock_timeout is {deadlock} ms"),
            "batches give up a lock well before it, so they will often have to retry; 1 s is the usual value",
        );
    }
    let own = if own.is_empty() { String::new() } else { format!("; ours ({own}) are overridden in our sessions") };
    Ok(tally.check("lock_timeouts", format!("no timeout shorter than the {wait_ms} ms that our DDL may wait{own}")))
}

/// They hold back vacuum and pruning, and DDL waits for them.
async fn long_transactions(p: &Probe<'_>) -> Result<Check> {
    let name = "long_transactions";
    let limit = p.options.long_transaction.as_secs_f64();
    let rows = p
        .rows(
            "select a.pid, coalesce(a.usename::text, a.backend_type),
                    extract(epoch from clock_timestamp() - a.xact_start)::float8, coalesce(a.state, ''),
                    coalesce(a.application_name, '')
             from pg_stat_activity a
             where a.xact_start < clock_timestamp() - $1::text::interval and a.pid <> pg_backend_pid()
               and (a.datname = current_database() or a.backend_xmin is not null)
             order by a.xact_start limit 10",
            &[text(&format!("{limit} s"))],
        )
        .await?;
    let blind: bool = p.one("select not pg_has_role(session_user, 'pg_read_all_stats', 'USAGE')", &[]).await?.get(0);
    let oldest = rows.first().map_or(0.0, |r| r.get::<_, f64>(2));
    if rows.is_empty() {
        let blind = if blind { " (other users' are hidden from this login)" } else { "" };
        return Ok(Check::pass(name, format!("none older than {}{blind}", span(limit))).count(0));
    }
    let samples = rows
        .iter()
        .map(|r| {
            let (pid, who, age): (i32, String, f64) = (r.get(0), r.get(1), r.get(2));
            let (state, application): (String, String) = (r.get(3), r.get(4));
            let application = if application.is_empty() { String::new() } else { format!(" {application}") };
            format!("pid {pid} {who}{application} ({}, {state})", span(age))
        })
        .collect();
    Ok(Check::warn(name, format!("{} transactions are older than {}; the oldest {}", rows.len(), span(limit), span(oldest)))
        .count(rows.len() as i64)
        .samples(samples)
        .hint("until they end, index builds wait, dead rows stay, and DDL on tables that they have used is retried: end them first"))
}

/// A forgotten prepared transaction holds its locks for ever, across restarts.
async fn prepared_transactions(p: &Probe<'_>) -> Result<Check> {
    let name = "prepared_transactions";
    let limit = p.options.long_transaction.as_secs_f64();
    let rows = p
        .rows(
            "select gid, owner::text, extract(epoch from clock_timestamp() - prepared)::float8
             from pg_prepared_xacts where database = current_database() order by prepared limit 10",
            &[],
        )
        .await?;
    let old: Vec<String> = rows
        .iter()
        .filter(|r| r.get::<_, f64>(2) > limit)
        .map(|r| format!("{:?} of {} ({})", r.get::<_, String>(0), r.get::<_, String>(1), span(r.get(2))))
        .collect();
    let held = p
        .texts(
            "select distinct l.relation::regclass::text from pg_locks l
             where l.locktype = 'relation' and l.pid is null and l.database = (select oid from pg_database
               where datname = current_database())",
            &[],
        )
        .await?;
    let mut tables = vec![p.spec.target.table.sql()];
    tables.extend(p.spec.source.iter().map(|j| j.table.sql()));
    let ours: Vec<String> = held
        .into_iter()
        .filter(|h| tables.iter().any(|t| t.parse::<crate::pg::ident::QualifiedName>().ok() == h.parse().ok()))
        .collect();
    if !ours.is_empty() {
        return Ok(Check::fail(name, format!("a prepared transaction holds locks on {}", ours.join(", ")))
            .count(ours.len() as i64)
            .samples(rows.iter().map(|r| format!("{:?}", r.get::<_, String>(0))).collect())
            .hint("commit prepared or rollback prepared it; DDL of this job would wait for it in vain"));
    }
    if !old.is_empty() {
        return Ok(Check::warn(name, format!("{} prepared transactions are older than {}", old.len(), span(limit)))
            .count(old.len() as i64)
            .samples(old)
            .hint("they hold back vacuum and index builds: commit prepared or rollback prepared them"));
    }
    Ok(Check::pass(name, "none is old or holds a table of this job").count(0))
}
