//! Samples of a job's course, for the report.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio_postgres::GenericClient;

use crate::error::Result;

/// Rows per job at which every second one is dropped: a chart on a wide screen shows no more.
pub const MAX_SAMPLES: i64 = 1000;

/// A moment of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds since 1970, by the server's clock.
    pub at: f64,
    /// Phase or status.
    pub phase: String,
    /// Rows looked at so far.
    pub rows_scanned: i64,
    /// Rows filled so far.
    pub rows_updated: i64,
    /// Batches so far.
    pub batches: i64,
    /// WAL of the whole server since its beginning.
    pub wal_bytes: i64,
    /// Size of the target with its TOAST table and maps.
    pub table_bytes: i64,
    /// Size of its indexes.
    pub index_bytes: i64,
    /// Milliseconds that batches have waited so far, by signal.
    pub throttled_ms: BTreeMap<String, u64>,
    /// Median of the batches since the sample before, in milliseconds.
    pub batch_p50_ms: Option<f64>,
    /// Their 99th percentile.
    pub batch_p99_ms: Option<f64>,
}

/// What the daemon itself knows of a moment; the rest is read where it is.
#[derive(Debug, Clone, Default)]
pub struct Own<'a> {
    /// Phase or status.
    pub phase: &'a str,
    /// The target, quoted.
    pub table: &'a str,
    /// Milliseconds that batches have waited so far, by signal.
    pub throttled_ms: BTreeMap<String, u64>,
    /// Median and 99th percentile of the batches since the sample before, in milliseconds.
    pub batch_ms: Option<(f64, f64)>,
}

/// Writes a sample.
///
/// # Errors
/// Whatever the server says.
pub async fn put(client: &impl GenericClient, job: &str, own: &Own<'_>) -> Result<()> {
    let throttled = serde_json::to_value(&own.throttled_ms).unwrap_or_default();
    let (p50, p99) = own.batch_ms.unzip();
    client
        .execute(
            "insert into backfilld.sample (job, phase, rows_scanned, rows_updated, batches, wal_bytes, table_bytes,
               index_bytes, throttled_ms, batch_p50_ms, batch_p99_ms)
             select $1, $2, coalesce(sum(c.rows_scanned), 0), coalesce(sum(c.rows_updated), 0),
                    coalesce(sum(c.batches), 0), pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0'),
                    coalesce((select sum(pg_table_size(relid)) from pg_partition_tree(to_regclass($3))),
                             pg_table_size(to_regclass($3)), 0),
                    coalesce((select sum(pg_indexes_size(relid)) from pg_partition_tree(to_regclass($3))),
                             pg_indexes_size(to_regclass($3)), 0),
                    $4, $5, $6
             from backfilld.checkpoint c where c.job = $1",
            &[&job, &own.phase, &own.table, &throttled, &p50, &p99],
        )
        .await?;
    Ok(())
}

/// Drops every second sample once there are [`MAX_SAMPLES`]; the one that stays keeps the worse percentile of the two.
///
/// # Errors
/// Whatever the server says.
pub async fn thin(client: &impl GenericClient, job: &str) -> Result<()> {
    client
        .execute(
            "with numbered as (
               select at, row_number() over w as n, lag(batch_p99_ms) over w as p99
               from backfilld.sample where job = $1 window w as (order by at)
             ), worse as (
               update backfilld.sample s set batch_p99_ms = greatest(s.batch_p99_ms, n.p99)
               from numbered n where s.job = $1 and s.at = n.at and n.n % 2 = 0 and n.p99 > coalesce(s.batch_p99_ms, 0)
                 and (select count(*) from numbered) >= $2
             )
             delete from backfilld.sample s using numbered n
             where s.job = $1 and s.at = n.at and n.n % 2 = 1 and n.n > 1 and (select count(*) from numbered) >= $2",
            &[&job, &MAX_SAMPLES],
        )
        .await?;
    Ok(())
}

/// How often to take one: four times a second at first, so that a job of seconds has a course as well; every ten seconds
/// from about seven minutes on; and so rarely after hours that dropping every second one keeps the spacing even.
pub fn spacing(age: Duration) -> Duration {
    let seconds = age.as_secs_f64();
    Duration::from_secs_f64((seconds / 40.0).min(10.0).max(seconds / 500.0).max(0.25))
}

/// Age of the oldest sample, and how long batches had waited by the latest one.
///
/// # Errors
/// Whatever the server says.
pub async fn latest(client: &impl GenericClient, job: &str) -> Result<(Duration, BTreeMap<String, u64>)> {
    let row = client
        .query_one(
            "select coalesce(extract(epoch from clock_timestamp() - min(at)), 0)::float8,
                    (select throttled_ms from backfilld.sample where job = $1 order by at desc limit 1)
             from backfilld.sample where job = $1",
            &[&job],
        )
        .await?;
    let throttled: Option<serde_json::Value> = row.get(1);
    let throttled = throttled.and_then(|v| serde_json::from_value(v).ok()).unwrap_or_default();
    Ok((Duration::try_from_secs_f64(row.get(0)).unwrap_or_default(), throttled))
}

/// All samples of a job, oldest first.
///
/// # Errors
/// Whatever the server says.
pub async fn all(client: &impl GenericClient, job: &str) -> Result<Vec<Sample>> {
    let rows = client
        .query(
            "select extract(epoch from at)::float8, phase, rows_scanned, rows_updated, batches, wal_bytes, table_bytes,
                    index_bytes, throttled_ms, batch_p50_ms, batch_p99_ms
             from backfilld.sample where job = $1 order by at",
            &[&job],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|r| Sample {
            at: r.get(0),
            phase: r.get(1),
            rows_scanned: r.get(2),
            rows_updated: r.get(3),
            batches: r.get(4),
            wal_bytes: r.get(5),
            table_bytes: r.get(6),
            index_bytes: r.get(7),
            throttled_ms: serde_json::from_value(r.get(8)).unwrap_or_default(),
            batch_p50_ms: r.get(9),
            batch_p99_ms: r.get(10),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_dense_at_first_and_even_in_the_end() {
        let spacing = |s: f64| spacing(Duration::from_secs_f64(s)).as_secs_f64();
        assert_eq!((spacing(0.0), spacing(20.0), spacing(1000.0), spacing(5000.0)), (0.25, 0.5, 10.0, 10.0));
        // Six weeks: never more than a thousand with every second one dropped at that.
        let (mut t, mut n, mut most) = (0.0, 0u32, 0u32);
        while t < 42.0 * 86_400.0 {
            t += spacing(t);
            n += 1;
            if n >= 1000 {
                n /= 2;
            }
            most = most.max(n);
        }
        assert!(most < 1000 && n > 300, "{n} of {most}");
    }
}
