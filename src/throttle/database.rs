//! What the database says of itself: sessions, ages, the target's dead rows and vacuum.

use tokio_postgres::Client;

use super::signal::Reading;
use crate::error::Result;
use crate::job::throttle::{OLDEST_TRANSACTION, Throttle};

/// What the server shows instead of a query to those who may not see it.
const HIDDEN: &str = "<insufficient privilege>";

/// Sessions that wait for locks or are active, and the ages of the oldest transaction and multixact ids.
///
/// # Errors
/// What the server says.
pub async fn sessions(client: &Client, t: &Throttle) -> Result<Vec<Reading>> {
    let row = client
        .query_one(
            "select (select count(distinct l.pid) from pg_locks l join pg_database d on d.datname = current_database()
                     where not l.granted and coalesce(l.database, d.oid) in (d.oid, 0))::float8,
                    age(d.datfrozenxid)::float8, mxid_age(d.datminmxid)::float8, a.active::float8, a.hidden::int8
             from pg_database d cross join (
               select count(*) filter (where state = 'active' and backend_type = 'client backend') as active,
                      count(*) filter (where query = $1) as hidden
               from pg_stat_activity) a
             where d.datname = current_database()",
            &[&HIDDEN],
        )
        .await?;
    let mut out = vec![
        Reading::at_most("lock_waiters", row.get(0), f64::from(t.lock_waiters), "sessions"),
        Reading::at_most("xid_age", row.get(1), f64::from(t.xid_age), "transactions"),
        Reading::at_most("multixact_age", row.get(2), f64::from(t.multixact_age), "multixacts"),
    ];
    if let Some(most) = t.active_sessions {
        out.push(match row.get::<_, i64>(4) {
            0 => Reading::at_most("active_sessions", row.get(3), f64::from(most), "sessions"),
            hidden => cannot_see("active_sessions", hidden),
        });
    }
    Ok(out)
}

fn cannot_see(signal: &str, sessions: i64) -> Reading {
    Reading::no(signal, format!("{sessions} sessions may not be seen: grant pg_monitor to this login"))
}

/// The oldest transaction that keeps dead rows of this database from being removed: one with a snapshot or a transaction
/// id, or a prepared one. A vacuum's does not count for the server.
///
/// # Errors
/// What the server says.
pub async fn oldest_transaction(client: &Client, t: &Throttle) -> Result<Reading> {
    let signal = "oldest_transaction";
    let rows = client
        .query(
            "select o.who, extract(epoch from clock_timestamp() - o.since)::float8, o.hidden
             from (select 'pid ' || a.pid || ' of ' || coalesce(a.usename::text, '?') || coalesce(' ' || nullif(a.application_name, ''), '') as who,
                          a.xact_start as since, a.query = $1 as hidden
                   from pg_stat_activity a
                   where a.datname = current_database() and a.pid <> pg_backend_pid()
                     and (a.query = $1 or a.backend_type = 'client backend'
                          and (a.backend_xmin is not null or a.backend_xid is not null)
                          and not exists (select from pg_stat_progress_vacuum v where v.pid = a.pid))
                   union all
                   select 'prepared transaction ' || p.gid, p.prepared, false
                   from pg_prepared_xacts p where p.database = current_database()) o
             order by o.since",
            &[&HIDDEN],
        )
        .await?;
    let hidden = rows.iter().filter(|r| r.get::<_, bool>(2)).count();
    if hidden > 0 && t.oldest_transaction.is_some() {
        return Ok(cannot_see(signal, hidden as i64));
    }
    let limit = t.oldest_transaction.unwrap_or(OLDEST_TRANSACTION).as_secs_f64();
    let oldest = rows.iter().find_map(|r| Some((r.get::<_, String>(0), r.get::<_, Option<f64>>(1)?)));
    let (who, age) = oldest.unwrap_or_default();
    Ok(Reading::at_most(signal, age, limit, "s").of(who))
}

/// The target's dead rows, and whether an anti-wraparound vacuum is at work on it, which nobody may cancel and which a
/// backfill makes longer. `target` is as in SQL. A vacuum is known by its lock on a table that is due, since its query is
/// hidden from most logins.
///
/// # Errors
/// What the server says.
pub async fn target(client: &Client, t: &Throttle, target: &str) -> Result<Vec<Reading>> {
    let row = client
        .query_one(
            "with tables as (select to_regclass($1)::oid as oid union select relid from pg_partition_tree(to_regclass($1)))
             select coalesce(sum(s.n_dead_tup) * 100.0 / greatest(sum(s.n_live_tup), 1), 0)::float8,
                    (select min(c.oid::regclass::text) from tables join pg_class c using (oid)
                     cross join lateral (
                       select min(option_value::int8) filter (where option_name = 'autovacuum_freeze_max_age') as xid,
                              min(option_value::int8) filter (where option_name = 'autovacuum_multixact_freeze_max_age') as mxid
                       from pg_options_to_table(c.reloptions) where option_name like 'autovacuum%freeze_max_age') o
                     where exists (select from pg_locks l join pg_database d on d.oid = l.database
                                   where d.datname = current_database() and l.relation = c.oid and l.granted
                                     and l.mode = 'ShareUpdateExclusiveLock' and l.pid <> pg_backend_pid())
                       and (age(c.relfrozenxid) > least(current_setting('autovacuum_freeze_max_age')::int8, o.xid)
                            or mxid_age(c.relminmxid) > least(current_setting('autovacuum_multixact_freeze_max_age')::int8, o.mxid)))
             from tables left join pg_stat_user_tables s on s.relid = tables.oid",
            &[&target],
        )
        .await?;
    let mut out = vec![match row.get::<_, Option<String>>(1) {
        None => Reading::at_most("wraparound_vacuum", 0.0, 1.0, ""),
        Some(table) => Reading::no("wraparound_vacuum", format!("a vacuum against wraparound is at work on {table}")),
    }];
    if let Some(most) = t.dead_rows_percent {
        out.push(Reading::at_most("dead_rows", row.get(0), f64::from(most), "%"));
    }
    Ok(out)
}
