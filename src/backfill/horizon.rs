//! Who keeps dead row versions from being pruned.
//!
//! A version can be removed once no snapshot is older than its deletion. A long transaction, a prepared transaction, a
//! replication slot with `xmin` or a standby with `hot_standby_feedback` that holds an old one keeps all of them; so does a transaction
//! that has written and is idle now, which has an id and no snapshot. A vacuum's snapshot does not count (`ComputeXidHorizons` in the
//! server's `procarray.c`).

use tokio_postgres::Client;

use crate::error::Result;

/// The holder of the oldest snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Names it for good: the same text means the same holder.
    pub id: String,
    /// For people: what it is, whose, since when. No query text.
    pub what: String,
}

/// The holder of the oldest snapshot that is not newer than transaction `xid` (as text); `None`: nobody.
///
/// # Errors
/// Whatever the server says.
pub async fn holder(client: &Client, xid: &str) -> Result<Option<Holder>> {
    let row = client
        .query_opt(
            "select h.id, h.what from (
               select 'session ' || a.pid || ' ' || coalesce(a.backend_start::text, '') as id,
                      'session ' || a.pid || ' of ' || coalesce(a.usename::text, a.backend_type, 'unknown')
                        || coalesce(' (' || nullif(a.application_name, '') || ')', '')
                        || coalesce(', transaction since ' || date_trunc('second', a.xact_start)::text, '') as what,
                      greatest(age(a.backend_xmin), age(a.backend_xid)) as age
               from pg_stat_activity a
               where a.pid <> pg_backend_pid() and (a.backend_xmin is not null or a.backend_xid is not null)
                 and not exists (select from pg_stat_progress_vacuum v where v.pid = a.pid)
                 and (a.datname = current_database() or a.datname is null)
               union all
               select 'slot ' || s.slot_name, 'replication slot ' || s.slot_name || case when s.active then '' else ', which nobody reads' end,
                      age(s.xmin)
               from pg_replication_slots s where s.xmin is not null
               union all
               select 'prepared ' || p.gid, 'prepared transaction ' || p.gid || ' since ' || date_trunc('second', p.prepared)::text,
                      age(p.transaction)
               from pg_prepared_xacts p where p.database = current_database()
             ) h where h.age >= age(($1::text)::xid8::xid) order by h.age desc limit 1",
            &[&xid],
        )
        .await?;
    Ok(row.map(|r| Holder { id: r.get(0), what: r.get(1) }))
}
