//! What a change of a source row costs the application: how its target rows are found, and how many they are.

use super::check::{Check, Tally};
use super::estimate::span;
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::spec::{JoinKind, TARGET_ALIAS};
use crate::pg::ident::Ident;
use crate::plan::Facts;
use crate::plan::facts::Table;
use crate::plan::shape::{Shape, join_sql};

/// Smaller tables are scanned in milliseconds.
const SMALL_ROWS: f32 = 10_000.0;
/// So many rows, changed in one application transaction, are noticed: half a second and more.
const LARGE_FANOUT: i64 = 10_000;
/// Up to this many rows are grouped exactly; the estimate of pg_stats must do for more.
const EXACT_ROWS: f32 = 20_000_000.0;
/// An UPDATE of one row by a trigger function, with three indexes; of the order of what the benchmark shows.
const UPDATE_US: f64 = 30.0;

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    Ok(vec![
        p.settle("propagation_index", propagation_index(p, facts).await)?,
        p.settle("largest_fanout", largest_fanout(p, facts).await)?,
    ])
}

/// Whether a valid index of the table, not partial, leads with these columns in any order.
///
/// # Errors
/// Whatever the server says.
pub async fn has_leading_index(p: &Probe<'_>, oid: u32, columns: &[Ident]) -> Result<bool> {
    let names: Vec<&str> = columns.iter().map(Ident::as_str).collect();
    let sql = "select exists (
                 select from pg_index i where i.indrelid = $1::text::oid and i.indisvalid and i.indpred is null
                   and i.indnkeyatts >= cardinality($2)
                   and (select count(*) from unnest(i.indkey::int2[]) with ordinality as k(attnum, n)
                        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
                        where k.n <= cardinality($2) and a.attname = any ($2)) = cardinality($2))";
    Ok(p.one(sql, &[text(&oid.to_string()), (&names, tokio_postgres::types::Type::TEXT_ARRAY)]).await?.get(0))
}

fn table_of<'a>(facts: &'a Facts, alias: &str) -> Option<&'a Table> {
    if alias == TARGET_ALIAS {
        return Some(&facts.target);
    }
    facts.shape.joins.iter().position(|j| j.alias.as_str() == alias).and_then(|k| facts.sources.get(k))
}

/// Propagation goes from a source row back to the rows that refer to it, hop by hop.
async fn propagation_index(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "propagation_index";
    if facts.shape.joins.is_empty() {
        return Ok(Check::skip(name, "the value comes from the target row itself"));
    }
    let mut tally = Tally::default();
    for join in &facts.shape.joins {
        let mut aliases: Vec<&str> = join.on.iter().map(|o| o.ref_alias.as_str()).collect();
        aliases.dedup();
        for alias in aliases {
            let Some(table) = table_of(facts, alias) else { continue };
            let columns: Vec<Ident> =
                join.on.iter().filter(|o| o.ref_alias.as_str() == alias).map(|o| o.ref_column.clone()).collect();
            if has_leading_index(p, table.oid, &columns).await? {
                continue;
            }
            let list: Vec<String> = columns.iter().map(Ident::sql).collect();
            let size: String = p
                .one("select pg_size_pretty(pg_relation_size($1::text::oid))", &[text(&table.oid.to_string())])
                .await?
                .get(0);
            let what = format!(
                "no index of {} leads with ({}): each change of a row of {} scans {size}",
                table.name,
                columns.iter().map(Ident::as_str).collect::<Vec<_>>().join(", "),
                join.table
            );
            let hint = format!(
                "in the application's own transaction: create index concurrently on {} ({})",
                table.name.sql(),
                list.join(", ")
            );
            if table.rows_estimate > SMALL_ROWS {
                tally.fail(what, hint);
            } else {
                tally.warn(what, hint);
            }
        }
    }
    Ok(tally.check(name, "every step from a source row to its target rows has its index"))
}

/// The fan-out of one change runs in the application's transaction (hazard 74).
async fn largest_fanout(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "largest_fanout";
    let shape = &facts.shape;
    if shape.joins.is_empty() {
        return Ok(Check::skip(name, "the value comes from the target row itself"));
    }
    let mut worst: Option<(i64, bool, String, Vec<String>)> = None;
    for k in 0..shape.joins.len() {
        let exact = if p.options.deep && facts.target.rows_estimate < EXACT_ROWS {
            match exact(p, shape, k).await {
                Ok(found) => found,
                Err(e) if e.sqlstate() == Some("57014") => None,
                Err(e) => return Err(e),
            }
        } else {
            None
        };
        let found = match exact {
            Some((n, key)) => Some((n, true, key)),
            None if k == 0 => estimated(p, facts).await?.map(|n| (n, false, Vec::new())),
            None => None,
        };
        if let Some((n, is_exact, key)) = found
            && worst.as_ref().is_none_or(|w| n > w.0)
        {
            worst = Some((n, is_exact, shape.joins[k].table.to_string(), key));
        }
    }
    let Some((n, is_exact, table, key)) = worst else {
        return Ok(Check::skip(name, "no statistics, and too many rows to count: analyze the target"));
    };
    let about = if is_exact { "" } else { "about " };
    let summary = format!("one row of {table} has {about}{n} target rows");
    if n <= LARGE_FANOUT {
        return Ok(Check::pass(name, format!("at most that: {summary}")).count(n));
    }
    Ok(Check::warn(name, summary).count(n).samples(key).hint(format!(
        "changing its value updates them all in the application's transaction: about {} and as many row locks; mind the \
         application's timeouts",
        span(n as f64 * UPDATE_US / 1e6)
    )))
}

async fn exact(p: &Probe<'_>, shape: &Shape, k: usize) -> Result<Option<(i64, Vec<String>)>> {
    let join = &shape.joins[k];
    let path: String = shape.path_to(k).iter().map(|j| format!(" {}", join_sql(j, JoinKind::Inner))).collect();
    let keys: Vec<String> = join.on.iter().map(|o| format!("{}.{}", o.ref_alias.sql(), o.ref_column.sql())).collect();
    let present: Vec<String> = keys.iter().map(|key| format!("{key} is not null")).collect();
    let shown: Vec<String> = keys.iter().map(|key| format!("({key})::text")).collect();
    let sql = format!(
        "select count(*), array[{}] from {} as t{path} where {} group by {} order by 1 desc limit 1",
        shown.join(", "),
        shape.target.sql(),
        present.join(" and "),
        keys.join(", ")
    );
    Ok(p.rows(&sql, &[]).await?.first().map(|r| (r.get(0), r.get(1))))
}

/// From the statistics: the share of the most common value times the number of rows.
async fn estimated(p: &Probe<'_>, facts: &Facts) -> Result<Option<i64>> {
    let Some(column) = facts.shape.ref_columns(TARGET_ALIAS).into_iter().next() else { return Ok(None) };
    let (schema, table) = (facts.target.name.schema.as_str(), facts.target.name.name.as_str());
    let rows = p
        .rows(
            "select coalesce(s.most_common_freqs[1], 0)::float8,
                    case when s.n_distinct < 0 then -1 / s.n_distinct else $4::text::float8 / greatest(s.n_distinct, 1) end::float8
             from pg_stats s where s.schemaname = $1 and s.tablename = $2 and s.attname = $3",
            &[text(&schema), text(&table), text(&column.as_str()), text(&facts.target.rows_estimate.to_string())],
        )
        .await?;
    Ok(rows.first().map(|r| {
        let (frequency, mean): (f64, f64) = (r.get(0), r.get(1));
        (frequency * f64::from(facts.target.rows_estimate)).max(mean) as i64
    }))
}
