//! Room: transaction ids, replication slots, disk.

use super::check::{Check, Tally};
use super::probe::{Probe, text};
use crate::error::Result;
use crate::plan::Facts;

/// Wraparound stops writes at about 2.1 billion; the server warns from 40 million before.
const XID_WARN: i64 = 1_000_000_000;
const XID_FAIL: i64 = 1_800_000_000;
/// Share of autovacuum_freeze_max_age from which an anti-wraparound vacuum is likely to start during the job.
const FREEZE_SOON: f64 = 0.9;
/// WAL per row in keyset batches: measured 1.2 kB (bigint key) to 8 kB (uuid v4 key, full page images).
const WAL_PER_ROW: i64 = 8 * 1024;

/// The checks of this file that do not need the job's tables.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>) -> Result<Vec<Check>> {
    Ok(vec![p.settle("xid_age", xid_age(p).await)?, p.settle("replication_slots", replication_slots(p).await)?])
}

/// An anti-wraparound vacuum gives way to nobody, and every batch takes a transaction id (hazard 25).
async fn xid_age(p: &Probe<'_>) -> Result<Check> {
    let (schema, table) = (p.spec.target.table.schema.as_str(), p.spec.target.table.name.as_str());
    let row = p
        .one(
            "select (select greatest(age(datfrozenxid), mxid_age(datminmxid))::int8 from pg_database
                     where datname = current_database()),
                    (select max(greatest(age(c.relfrozenxid), mxid_age(c.relminmxid)))::int8 from pg_class c
                     join pg_namespace n on n.oid = c.relnamespace
                     where n.nspname = $1 and c.relname = $2 and c.relkind = 'r'),
                    current_setting('autovacuum_freeze_max_age')::int8, current_setting('autovacuum')::bool,
                    exists (select from pg_stat_activity a where a.backend_type = 'autovacuum worker'
                              and a.datname = current_database() and a.query like '%to prevent wraparound%')",
            &[text(&schema), text(&table)],
        )
        .await?;
    let (database, table_age): (i64, Option<i64>) = (row.get(0), row.get(1));
    let (freeze, autovacuum, running): (i64, bool, bool) = (row.get(2), row.get(3), row.get(4));
    let mut tally = Tally::default();
    if database > XID_FAIL {
        tally.fail(
            format!("the database is {database} transactions old: wraparound is near"),
            "vacuum (freeze) the oldest tables first",
        );
    } else if database > XID_WARN {
        tally.warn(format!("the database is {database} transactions old"), "find out why autovacuum does not freeze");
    }
    if table_age.is_some_and(|age| age as f64 > freeze as f64 * FREEZE_SOON) {
        tally.warn(
            "an anti-wraparound vacuum of the target is due",
            "index builds and validations wait for it: vacuum (freeze) the table first",
        );
    }
    if running {
        tally.warn("an anti-wraparound vacuum is running", "if it is on the job's tables, DDL waits until it is done");
    }
    if !autovacuum {
        tally.warn(
            "autovacuum is off",
            "nobody cleans up after the batches: the table grows by every row that is updated",
        );
    }
    Ok(tally.check("xid_age", format!("the database is {database} transactions old")))
}

/// A slot that lags fills the disk, or is invalidated, and with it the subscriber (hazard 26).
async fn replication_slots(p: &Probe<'_>) -> Result<Check> {
    let name = "replication_slots";
    let sql =
        "select slot_name::text, slot_type::text, active, coalesce(wal_status::text, ''), safe_wal_size, plugin::text
               from pg_replication_slots
               where not temporary order by 1";
    let rows = p.rows(sql, &[]).await?;
    if rows.is_empty() {
        return Ok(Check::pass(name, "there are none").count(0));
    }
    let estimate: i64 = p
        .one(
            "select coalesce((select greatest(c.reltuples, 0)::int8 from pg_class c join pg_namespace n
                              on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2), 0)",
            &[text(&p.spec.target.table.schema.as_str()), text(&p.spec.target.table.name.as_str())],
        )
        .await?
        .get(0);
    let wal = estimate.saturating_mul(WAL_PER_ROW);
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    for row in &rows {
        let (slot, kind, active, status): (String, String, bool, String) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        let safe: Option<i64> = row.get(4);
        let plugin: Option<String> = row.get(5);
        lines.push(format!(
            "{slot} ({kind}{}, {})",
            plugin.map_or(String::new(), |x| format!(" {x}")),
            if active { "active" } else { "inactive" }
        ));
        let hint = "advance or drop it first, or raise max_slot_wal_keep_size; the backfill writes WAL of its own";
        if !matches!(status.as_str(), "reserved" | "") {
            tally.warn(format!("slot {slot} is {status}"), hint);
        }
        if !active {
            tally.warn(format!("slot {slot} is inactive and retains WAL"), hint);
        }
        if let Some(safe) = safe.filter(|s| *s < wal) {
            tally.warn(
                format!("slot {slot} may lag {} MB before it is lost, the backfill may write {} MB", safe >> 20, wal >> 20),
                "a consumer that keeps up is safe; with a slow one raise max_slot_wal_keep_size, or pause between batches",
            );
        }
    }
    Ok(tally.check(name, format!("{} slot(s), active and with room", rows.len())).details(lines))
}

/// What the batches will add, by the measurements in ARCHITECTURE.md.
///
/// # Errors
/// Whatever the server says.
pub async fn table_growth(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "table_growth";
    let row = p
        .one(
            "select pg_size_pretty(pg_table_size(c.oid)), pg_size_pretty(pg_indexes_size(c.oid)),
                    pg_size_pretty((pg_table_size(c.oid) * $2::text::float8)::int8),
                    pg_size_pretty((pg_indexes_size(c.oid) * $3::text::float8 + greatest(c.reltuples, 0) * $4::text::float8)::int8),
                    pg_size_pretty((greatest(c.reltuples, 0) * $5::text::float8)::int8),
                    coalesce((select bool_or(o in ('autovacuum_enabled=false', 'autovacuum_enabled=off',
                                                   'autovacuum_enabled=0')) from unnest(c.reloptions) as o), false),
                    coalesce((select n_dead_tup from pg_stat_user_tables s where s.relid = c.oid), 0)
             from pg_class c where c.oid = $1::text::oid",
            &[
                text(&facts.target.oid.to_string()),
                // Keyset batches in heap order (a serial key) find every page full and double table and indexes.
                text(&"1.05"),
                text(&"0.98"),
                // One entry of a new index with its share of free space.
                text(&(p.spec.indexes.len() * 40).to_string()),
                text(&WAL_PER_ROW.to_string()),
            ],
        )
        .await?;
    let get = |i: usize| row.get::<_, String>(i);
    let mut tally = Tally::default();
    if row.get(5) {
        tally.warn(
            format!("autovacuum is disabled for {}", facts.target.name),
            "nobody cleans up after the batches: alter table ... reset (autovacuum_enabled)",
        );
    }
    let dead: i64 = row.get(6);
    if dead as f64 > f64::from(facts.target.rows_estimate).max(1000.0) * 0.5 {
        tally.warn(
            format!("{dead} dead rows wait for vacuum"),
            "vacuum the table first: then the batches find room on its pages",
        );
    }
    let summary = format!(
        "table {}, indexes {}; at most {} and {} more, and {} of WAL (check the free disk space: SQL cannot see it)",
        get(0),
        get(1),
        get(2),
        get(3),
        get(4)
    );
    Ok(tally.check(name, summary))
}
