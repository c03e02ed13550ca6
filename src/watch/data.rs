//! Rows against their source, some of the table with each look: so many that the whole table is compared once in the time of
//! the watch, and a small one each time. Ranges with wrong rows are looked at again each time.

use std::collections::BTreeMap;

use crate::context::Context;
use crate::error::Result;
use crate::job::spec::Watch;
use crate::ledger::watch::Watched;
use crate::pg::connect::Session;
use crate::throttle::Throttle;
use crate::verify;

/// Ranges with wrong rows that are remembered: enough to see whether they are mended.
const MAX_DIRTY: usize = 64;

/// Keys of wrong rows by kind.
pub type Keys = BTreeMap<String, Vec<Vec<String>>>;

/// Looks at the next pages; with `all` at the whole table.
pub async fn look(ctx: &Context, session: &Session, watch: &Watch, all: bool, now: &mut Watched) -> Result<Keys> {
    let proof = verify::for_job(ctx, session).await?;
    let row = session
        .client
        .query_one(
            "select pg_relation_filenode(to_regclass($1)), pg_relation_size(to_regclass($1)) / current_setting('block_size')::int8",
            &[&ctx.facts.shape.target.sql()],
        )
        .await?;
    let (filenode, pages): (u32, i64) = (row.get(0), row.get(1));
    let chunk = i64::from(ctx.spec.verification.chunk_pages);
    if all || filenode != now.filenode {
        // The table was rewritten: its pages are others.
        (now.filenode, now.page) = (filenode, 0);
        now.dirty.clear();
    }
    let mut low = now.page - now.page % chunk;
    if low >= pages {
        low = 0;
    }
    let mut ranges = std::mem::take(&mut now.dirty);
    for _ in 0..if all { pages / chunk + 1 } else { chunks(watch, pages, chunk) } {
        if !ranges.contains(&low) {
            ranges.push(low);
        }
        low = if low + chunk >= pages { 0 } else { low + chunk };
    }
    now.page = low;
    let reading = verify::reading(ctx);
    let throttle = Throttle::start(&reading, std::iter::once(session));
    let mut counts: BTreeMap<String, i64> = BTreeMap::new();
    let mut keys = Keys::new();
    for low in ranges {
        ctx.check()?;
        throttle.clear(&reading, false).await?;
        let (found, samples) = proof.look(&session.client, low.unsigned_abs(), (low + chunk).unsigned_abs()).await?;
        if found.values().sum::<i64>() > 0 && now.dirty.len() < MAX_DIRTY {
            now.dirty.push(low);
        }
        found.into_iter().for_each(|(kind, n)| *counts.entry(kind).or_default() += n);
        samples.into_iter().for_each(|(kind, more)| keys.entry(kind).or_default().extend(more));
    }
    let most = ctx.spec.verification.sample as usize;
    keys.values_mut().for_each(|list| list.truncate(most));
    for (kind, n) in counts.into_iter().filter(|(_, n)| *n > 0) {
        let some: Vec<String> = keys.get(&kind).into_iter().flatten().take(3).map(|k| k.join(",")).collect();
        now.findings.insert(kind, vec![format!("{n} rows, such as key {}", some.join(" | "))]);
    }
    Ok(keys)
}

/// Chunks of one look, so that the whole table is looked at in the time of the watch, even where a look takes as long as the time
/// between two.
fn chunks(watch: &Watch, pages: i64, chunk: i64) -> i64 {
    let looks = (watch.lasts.as_secs_f64() / watch.every.as_secs_f64().max(0.001) / 2.0).floor().max(1.0);
    let all = (pages / chunk + 1) as f64;
    (all / looks).ceil().max(1.0) as i64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_whole_table_is_looked_at_in_the_time_of_the_watch() {
        let day = Watch { lasts: Duration::from_secs(86_400), every: Duration::from_secs(300) };
        assert_eq!(chunks(&day, 100, 4096), 1, "a small table each time");
        let all = 10_000_000 / 4096 + 1;
        assert!(chunks(&day, 10_000_000, 4096) * 144 >= all);
        let once = Watch { lasts: Duration::from_secs(1), every: Duration::from_secs(5) };
        assert_eq!(chunks(&once, 10_000_000, 4096), all);
    }
}
