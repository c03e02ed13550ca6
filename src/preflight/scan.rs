//! Counting in chunks: each a snapshot of its own over a range of pages, so that no long one holds back vacuum.

use std::time::{Duration, Instant};

use super::probe::{Probe, text};
use crate::error::{Error, Result};
use crate::plan::verify_sql::page_range;

/// A chunk is meant to take about this long: far below every timeout, far above a round trip.
const CHUNK_TARGET: Duration = Duration::from_secs(1);
/// Smallest chunk: half a megabyte.
const MIN_PAGES: u64 = 64;
/// Largest chunk: 512 MB.
const MAX_PAGES: u64 = 65_536;
/// Chunks read of a table when not every row is asked for.
const SAMPLE_CHUNKS: u64 = 16;
/// Attempts at one chunk that a standby cancels in favour of replay, or that takes too long.
const ATTEMPTS: u32 = 6;

/// What to read.
pub struct Scan<'a> {
    /// The table whose pages are walked.
    pub oid: u32,
    /// Its alias in `tail`; `t` for the target.
    pub alias: &'a str,
    /// `from ... where ...`, to which the page range is added.
    pub tail: String,
    /// What is counted.
    pub conditions: Vec<String>,
    /// Columns, as text, that name a row.
    pub key: String,
}

/// What was counted.
#[derive(Debug, Clone, Default)]
pub struct Counted {
    /// Rows read.
    pub rows: i64,
    /// For each condition, rows for which it holds.
    pub counts: Vec<i64>,
    /// For each condition, keys of some of these rows.
    pub samples: Vec<Vec<String>>,
    /// Every page was read.
    pub complete: bool,
    /// Share of the pages that was read.
    pub share: f64,
    /// Time it took.
    pub elapsed: Duration,
}

impl Counted {
    /// `200000 rows read`, or with the share that was read.
    pub fn coverage(&self) -> String {
        if self.complete {
            return format!("{} rows read", self.rows);
        }
        format!("{} rows read, {:.1}% of the table: a sample", self.rows, self.share * 100.0)
    }

    /// `at least ` before a count, if not everything was read.
    pub fn at_least(&self) -> &'static str {
        if self.complete { "" } else { "at least " }
    }
}

/// Reads the table, or a sample of it, and counts.
///
/// # Errors
/// Whatever the server says, once for good.
pub async fn count(p: &Probe<'_>, scan: &Scan<'_>) -> Result<Counted> {
    let started = Instant::now();
    let total = pages(p, scan.oid).await?;
    let mut size = u64::from(p.spec.verification.chunk_pages);
    let mut out = Counted {
        counts: vec![0; scan.conditions.len()],
        samples: vec![Vec::new(); scan.conditions.len()],
        complete: p.options.deep || total <= size * SAMPLE_CHUNKS,
        ..Counted::default()
    };
    // A sample is as many chunks, evenly spread.
    let stride = if out.complete { 0 } else { total / SAMPLE_CHUNKS };
    let (mut low, mut read) = (0, 0);
    loop {
        // The last range of a whole table is open: rows appended since belong to it.
        let open = out.complete && low + size >= total;
        let began = Instant::now();
        let done = chunk(p, scan, low, size, open, &mut out).await?;
        read += done.unwrap_or(size).min(total.saturating_sub(low));
        let Some(pages) = done else { break };
        low += if stride > 0 { stride } else { pages };
        if !out.complete && low + size > total {
            break;
        }
        if out.complete {
            size = resize(pages, began.elapsed());
        }
    }
    out.share = if total == 0 { 1.0 } else { read as f64 / total as f64 };
    out.elapsed = started.elapsed();
    Ok(out)
}

fn resize(pages: u64, took: Duration) -> u64 {
    let size = if took > CHUNK_TARGET * 2 {
        pages / 2
    } else if took < CHUNK_TARGET / 2 {
        pages * 2
    } else {
        pages
    };
    size.clamp(MIN_PAGES, MAX_PAGES)
}

/// Counts a range, or, where the server cancels that, the first part of it. Gives the number of pages done; `None`:
/// done to the end of the table.
async fn chunk(
    p: &Probe<'_>,
    scan: &Scan<'_>,
    low: u64,
    mut size: u64,
    mut open: bool,
    out: &mut Counted,
) -> Result<Option<u64>> {
    for attempt in 1.. {
        let high = (!open).then_some(low + size);
        let range = page_range(low, high).replace("t.ctid", &format!("\"{}\".ctid", scan.alias));
        match count_range(p, scan, &range, out).await {
            Ok(()) => return Ok((!open).then_some(size)),
            // 57014: too slow; 40001: a standby's replay goes first. A smaller range is quicker.
            Err(e) if attempt < ATTEMPTS && matches!(e.sqlstate(), Some("57014" | "40001")) => {
                size = (size / 4).max(MIN_PAGES);
                open = false;
            }
            Err(e) => return Err(e),
        }
    }
    Err(Error::internal("unreachable: the last attempt returns"))
}

async fn count_range(p: &Probe<'_>, scan: &Scan<'_>, range: &str, out: &mut Counted) -> Result<()> {
    let filters: String = scan.conditions.iter().map(|c| format!(",\n  count(*) filter (where {c})")).collect();
    let row = p.one(&format!("select count(*){filters}\n{}\n  and {range}", scan.tail), &[]).await?;
    let limit = p.spec.verification.sample as usize;
    for (i, condition) in scan.conditions.iter().enumerate() {
        let found: i64 = row.get(i + 1);
        let missing = limit.saturating_sub(out.samples[i].len());
        if found > 0 && missing > 0 {
            let sql = format!(
                "select array[{}]::text[]\n{}\n  and {range} and ({condition})\nlimit {missing}",
                scan.key, scan.tail
            );
            out.samples[i]
                .extend(p.rows(&sql, &[]).await?.iter().map(|r| key_text(&r.get::<_, Vec<Option<String>>>(0))));
        }
        out.counts[i] += found;
    }
    out.rows += row.get::<_, i64>(0);
    Ok(())
}

/// A key for people: bare, or in parentheses if it has several columns.
fn key_text(key: &[Option<String>]) -> String {
    let parts: Vec<&str> = key.iter().map(|k| k.as_deref().unwrap_or("null")).collect();
    match parts.as_slice() {
        [one] => (*one).to_owned(),
        _ => format!("({})", parts.join(", ")),
    }
}

/// Pages of a table; of its largest partition, if it has any: a range of pages then is one of every partition.
pub async fn pages(p: &Probe<'_>, oid: u32) -> Result<u64> {
    let row = p
        .one(
            "select coalesce(max(pg_relation_size(relid)), 0) / current_setting('block_size')::int8
             from (select relid::oid from pg_partition_tree($1::text::oid::regclass) where isleaf
                   union select $1::text::oid) as leaf(relid)",
            &[text(&oid.to_string())],
        )
        .await?;
    Ok(u64::try_from(row.get::<_, i64>(0)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_grow_and_shrink_within_bounds() {
        assert_eq!(resize(4096, Duration::from_millis(10)), 8192);
        assert_eq!(resize(4096, Duration::from_secs(1)), 4096);
        assert_eq!(resize(4096, Duration::from_secs(9)), 2048);
        assert_eq!(resize(100, Duration::from_secs(9)), MIN_PAGES);
        assert_eq!(resize(MAX_PAGES, Duration::ZERO), MAX_PAGES);
    }

    #[test]
    fn keys_are_readable() {
        assert_eq!(key_text(&[Some("7".into())]), "7");
        assert_eq!(key_text(&[Some("a".into()), None]), "(a, null)");
    }
}
