//! SQL of the batches. Golden tests hold its output.

use super::shape::{ColumnShape, JoinShape, Shape, join_sql};
use crate::job::spec::{JoinKind, TARGET_ALIAS};

/// Number of rows and last key of the next batch. Parameters: row limit (`bigint`), then the key behind which to start
/// (if `after`), then the last key to take (if `upto`). Result: `n bigint`, then the key as text; no row at the end.
pub fn bound(shape: &Shape, after: bool, upto: bool) -> String {
    let n = shape.key.len();
    let mut conditions = Vec::new();
    if after {
        conditions.push(shape.key_is(">", 2));
    }
    if upto {
        let first = if after { 2 + n } else { 2 };
        conditions.push(shape.key_is("<=", first));
    }
    let place = if conditions.is_empty() { String::new() } else { format!(" where {}", conditions.join(" and ")) };
    format!(
        "select s.n, {} from (select row_number() over (order by {key}) as n, {key} from {} as t{place} \
         order by {key} limit $1) as s order by s.n desc limit 1",
        shape.key_as_text("s"),
        shape.target.sql(),
        key = shape.key_of("t"),
    )
}

/// The last key of the table, as text: the fixed upper bound of a sweep. What is inserted later is the triggers' affair.
pub fn last_key(shape: &Shape) -> String {
    let desc: Vec<String> = shape.key.iter().map(|k| format!("t.{} desc", k.name.sql())).collect();
    format!("select {} from {} as t order by {} limit 1", shape.key_as_text("t"), shape.target.sql(), desc.join(", "))
}

/// The key range of a batch. Parameters: the key behind which it starts (if `after`), then its last key.
pub fn key_range(shape: &Shape, after: bool) -> String {
    let mut out = String::new();
    let mut first = 1;
    if after {
        out = format!("{} and ", shape.key_is(">", first));
        first += shape.key.len();
    }
    format!("{out}{}", shape.key_is("<=", first))
}

/// Fills the rows of `range` (a condition on `t`) that are still NULL.
///
/// One statement is enough because of the `is null` guard in it: a row that somebody changed while the statement waited
/// for it has been filled by the sync trigger, so it is skipped (I2). Where NULL is a legal value, [`recheck`] follows.
pub fn fill(shape: &Shape, range: &str) -> String {
    let several = shape.columns.len() > 1;
    match joined_form(shape) {
        Some((from, conditions)) => {
            let set: Vec<String> = shape
                .columns
                .iter()
                .map(|c| match several {
                    true => format!("{0} = coalesce(t.{0}, {1})", c.name.sql(), c.typed_value()),
                    false => format!("{} = ({})", c.name.sql(), c.value),
                })
                .collect();
            let missing: Vec<String> = shape
                .columns
                .iter()
                .map(|c| format!("(t.{} is null and ({}) is not null)", c.name.sql(), c.value))
                .collect();
            let from = if from.is_empty() { String::new() } else { format!("\nfrom {from}") };
            let joins: String = conditions.iter().map(|c| format!(" and {c}")).collect();
            format!(
                "update {} as t set {}{from}\nwhere {range}{joins}\n  and ({})",
                shape.target.sql(),
                set.join(", "),
                missing.join(" or ")
            )
        }
        None => {
            let set: Vec<String> = shape
                .columns
                .iter()
                .map(|c| match several {
                    true => format!("{0} = coalesce(t.{0}, {1})", c.name.sql(), typed_scalar(shape, c)),
                    false => format!("{} = {}", c.name.sql(), shape.scalar(c, "t")),
                })
                .collect();
            let missing: Vec<String> = shape
                .columns
                .iter()
                .map(|c| format!("(t.{} is null and {} is not null)", c.name.sql(), shape.scalar(c, "t")))
                .collect();
            format!(
                "update {} as t set {}\nwhere {range}\n  and ({})",
                shape.target.sql(),
                set.join(", "),
                missing.join(" or ")
            )
        }
    }
}

/// Takes back what [`fill`] wrote where the source became NULL between its snapshot and its row lock: then the sync
/// trigger left NULL behind, which the guard took for "not yet filled". All rows of `range` that [`fill`] wrote are locked
/// by now, and this statement's snapshot is newer than the locks. `None` where NULL cannot be a value, and where batches
/// are not exempt from the sync trigger: then that has read the source under the row's lock.
pub fn recheck(shape: &Shape, range: &str) -> Option<String> {
    if shape.null_is_marker() || shape.exempt_login.is_none() {
        return None;
    }
    let columns: Vec<_> = shape.columns.iter().filter(|c| c.nullable).collect();
    let set: Vec<String> = columns
        .iter()
        .map(|c| format!("{0} = case when {1} is not null then t.{0} end", c.name.sql(), shape.scalar(c, "t")))
        .collect();
    Some(format!("update {} as t set {}\nwhere {range}\n  and ({})", shape.target.sql(), set.join(", "), stale(shape)))
}

/// Whether a row has a value although its source has none, as a condition on `t`.
pub fn stale(shape: &Shape) -> String {
    let columns = shape.columns.iter().filter(|c| c.nullable);
    let stale: Vec<String> =
        columns.map(|c| format!("(t.{} is not null and {} is null)", c.name.sql(), shape.scalar(c, "t"))).collect();
    stale.join(" or ")
}

fn typed_scalar(shape: &Shape, column: &ColumnShape) -> String {
    let typed = ColumnShape { value: column.typed_value(), ..column.clone() };
    shape.scalar(&typed, "t")
}

/// FROM list and WHERE conditions for `update ... from`. `None` if a LEFT JOIN refers to the target itself, which an
/// UPDATE cannot express that way.
fn joined_form(shape: &Shape) -> Option<(String, Vec<String>)> {
    let refers_to_target = |j: &JoinShape| j.on.iter().any(|o| o.ref_alias.as_str() == TARGET_ALIAS);
    if shape.joins.iter().any(|j| j.kind == JoinKind::Left && refers_to_target(j)) {
        return None;
    }
    let mut from = String::new();
    let mut conditions = Vec::new();
    for join in &shape.joins {
        if from.is_empty() {
            from = format!("{} as {}", join.table.sql(), join.alias.sql());
            conditions.extend(join.on.iter().map(|on| on.sql(&join.alias)));
        } else if join.kind == JoinKind::Inner {
            // ON true and the condition in WHERE: an ON clause here could not see the target.
            from.push_str(&format!("\n  cross join {} as {}", join.table.sql(), join.alias.sql()));
            conditions.extend(join.on.iter().map(|on| on.sql(&join.alias)));
        } else {
            from.push_str(&format!("\n  {}", join_sql(join, join.kind)));
        }
    }
    Some((from, conditions))
}
