//! How long the backfill may take: measured on this server, on this data, without writing.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio_postgres::types::Type;

use super::probe::{Param, Probe, text};
use super::scan;
use crate::error::Result;
use crate::plan::{Facts, batch_sql};

/// Key ranges that are read, each of the size of a first batch.
const RANGES: usize = 16;

/// A batch that writes against the same batch that only reads: a fixed part and one per index, since an update that
/// finds no room on its page makes an entry in each. Measured with 200,000 rows of 250 bytes (uuid keys, warm cache,
/// PostgreSQL 15, two cores): 1.2 to 1.9 with three indexes, 2.4 with six.
pub(super) const WRITE_BASE: f64 = 1.0;
pub(super) const WRITE_PER_INDEX: f64 = 0.2;

/// Upper end: full page images and checkpoints on tables larger than the cache, measured as 3.7 with a `max_wal_size` of
/// 192 MB and a million rows; a daemon on a busy machine took 3.3.
pub(super) const WRITE_SPREAD: f64 = 4.0;

/// What our own UPDATE trigger adds to each row of a batch that is not exempt from it, in microseconds
/// (ARCHITECTURE.md).
const TRIGGER_US: f64 = 5.9;

/// An estimate, with what it was measured on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Rows to fill.
    pub rows: i64,
    /// Whether they were counted, or are the planner's guess.
    pub rows_counted: bool,
    /// Rows per second at which sampled key ranges were read, joined to their sources.
    pub read_rows_per_second: f64,
    /// Rows that were read for this.
    pub sampled_rows: i64,
    /// Ranges in which they were read.
    pub sampled_ranges: usize,
    /// By what the time for reading is multiplied.
    pub write_factor: f64,
    /// Shortest time to expect, in seconds.
    pub seconds_low: f64,
    /// Longest time to expect on an otherwise idle server, in seconds.
    pub seconds_high: f64,
    /// Microseconds for a row, lower end.
    #[serde(skip)]
    row_us: f64,
    /// Pause between batches and rows of a batch.
    #[serde(skip)]
    pause: (Duration, f64),
}

impl Estimate {
    /// Takes a better number of rows.
    pub fn set_rows(&mut self, rows: i64, counted: bool) {
        let rows_f = rows.max(0) as f64;
        let pauses = self.pause.0.as_secs_f64() * rows_f / self.pause.1.max(1.0);
        (self.rows, self.rows_counted) = (rows, counted);
        self.seconds_low = rows_f * self.row_us / 1e6 + pauses;
        self.seconds_high = rows_f * self.row_us * WRITE_SPREAD / 1e6 + pauses;
    }

    /// Seconds to write this many rows, lower and upper end.
    pub fn seconds_for(&self, rows: i64) -> (f64, f64) {
        let low = rows.max(0) as f64 * self.row_us / 1e6;
        (low, low * WRITE_SPREAD)
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows{}, {} to {} without throttling; read {:.0} rows/s on {} rows in {} key ranges, times {:.1} to {:.1} \
             for writing (an estimate: load, checkpoints and triggers decide)",
            self.rows,
            if self.rows_counted { "" } else { " (planner's guess)" },
            span(self.seconds_low),
            span(self.seconds_high),
            self.read_rows_per_second,
            self.sampled_rows,
            self.sampled_ranges,
            self.write_factor,
            self.write_factor * WRITE_SPREAD,
        )
    }
}

/// Seconds for people.
pub fn span(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1000.0),
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5_400.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3_600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

/// Reads the first batches of some key ranges spread over the table, with the statements of real batches: the bound,
/// then the rows with their values. `None`: there is no row.
///
/// # Errors
/// Whatever the server says.
pub async fn measure(p: &Probe<'_>, facts: &Facts) -> Result<Option<Estimate>> {
    let shape = &facts.shape;
    let starts = starts(p, facts).await?;
    let limit = i64::from(p.spec.batching.initial_rows);
    let values: Vec<String> = shape.columns.iter().map(|c| format!("count(({}))", c.value)).collect();
    let read = format!(
        "select count(*), {} from {} as t{} where {}",
        values.join(", "),
        shape.target.sql(),
        shape.join_tail(),
        batch_sql::key_range(shape, true)
    );
    let bound = batch_sql::bound(shape, true, false);
    let (mut rows, mut ranges, mut time) = (0, 0, Duration::ZERO);
    for start in &starts {
        let began = Instant::now();
        let mut params: Vec<Param<'_>> = vec![(&limit, Type::INT8)];
        params.extend(start.iter().map(text));
        let Some(end) = p.rows(&bound, &params).await?.pop() else { continue };
        let n: i64 = end.get(0);
        let last: Vec<String> = (0..shape.key.len()).map(|i| end.get(i + 1)).collect();
        let params: Vec<Param<'_>> = start.iter().chain(&last).map(text).collect();
        p.rows(&read, &params).await?;
        time += began.elapsed();
        rows += n;
        ranges += 1;
    }
    if rows == 0 {
        return Ok(None);
    }
    let guess = facts.target.rows_estimate.max(0.0) as i64;
    let factor = WRITE_BASE + WRITE_PER_INDEX * indexes(p, facts).await? as f64;
    let read_us = time.as_secs_f64() * 1e6 / rows as f64;
    let trigger = if shape.exempt_login.is_none() { TRIGGER_US } else { 0.0 };
    let mut estimate = Estimate {
        rows: 0,
        rows_counted: false,
        read_rows_per_second: 1e6 / read_us,
        sampled_rows: rows,
        sampled_ranges: ranges,
        write_factor: factor,
        seconds_low: 0.0,
        seconds_high: 0.0,
        row_us: read_us * factor + trigger,
        pause: (p.spec.batching.pause, rows as f64 / ranges as f64),
    };
    estimate.set_rows(guess, false);
    Ok(Some(estimate))
}

/// Keys from all over the table: TABLESAMPLE takes whole pages, so this reads few.
async fn starts(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Vec<String>>> {
    let shape = &facts.shape;
    let pages = scan::pages(p, facts.target.oid).await?.max(1);
    // About 64 pages, so that 16 rows of different ones are likely among them.
    let percent = (6400.0 / pages as f64).clamp(0.000_001, 100.0);
    let sql = format!(
        "select array[{}] from (select {}, row_number() over (partition by (t.ctid::text::point)[0]) as \"#\"
           from {} as t tablesample system ({percent}) repeatable (1)) as s where s.\"#\" = 1 limit {RANGES}",
        shape.key_as_text("s"),
        shape.key_of("t"),
        shape.target.sql(),
    );
    Ok(p.rows(&sql, &[]).await?.iter().map(|r| r.get(0)).collect())
}

async fn indexes(p: &Probe<'_>, facts: &Facts) -> Result<i64> {
    let sql = "select count(*) from pg_index where indrelid = $1::text::oid";
    Ok(p.one(sql, &[text(&facts.target.oid.to_string())]).await?.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_scales_with_rows_and_pauses() {
        let mut e = Estimate {
            rows: 0,
            rows_counted: false,
            read_rows_per_second: 100_000.0,
            sampled_rows: 8000,
            sampled_ranges: 16,
            write_factor: 1.6,
            seconds_low: 0.0,
            seconds_high: 0.0,
            row_us: 16.0,
            pause: (Duration::from_secs(1), 500.0),
        };
        e.set_rows(1_000_000, true);
        assert_eq!((e.seconds_low.round(), e.seconds_high.round()), (2016.0, 2064.0));
        assert!(e.to_string().starts_with("1000000 rows, 34 min to 34 min"), "{e}");
        assert!(e.to_string().contains("times 1.6 to 6.4"), "{e}");
    }

    #[test]
    fn spans_are_short() {
        assert_eq!([span(0.02), span(80.0), span(600.0), span(7200.0)], ["20 ms", "80 s", "10 min", "2.0 h"]);
    }
}
