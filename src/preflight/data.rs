//! The data: rows that could not be filled, rows whose value would be refused, paths that disagree.

use super::check::{Check, Status};
use super::estimate::{Estimate, span};
use super::probe::Probe;
use super::scan::{self, Counted, Scan};
use crate::error::{Error, Result};
use crate::job::spec::{ForeignKey, JoinKind, TARGET_ALIAS};
use crate::plan::verify_sql::{self, AgreeShape};
use crate::plan::{Facts, Shape};

/// A count below this share of the planner's estimate means that rows were hidden, or the statistics are far off.
const IMPLAUSIBLE_SHARE: f64 = 0.5;
/// Below this estimate the share means nothing.
const IMPLAUSIBLE_MIN_ROWS: f64 = 1000.0;

/// Conditions on rows of the target joined to everything, in the order of the scan.
struct Conditions {
    reference_null: String,
    orphan: String,
    no_value: String,
}

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts, estimate: &mut Option<Estimate>) -> Result<Vec<Check>> {
    let mut out = Vec::new();
    let target = target_scan(p, facts).await;
    let names = ["total_rows", "reference_null", "orphans"];
    let no_value = target.as_ref().ok().map(|t| (t.counts[2], t.samples[2].clone()));
    let found = target.map(|t| target_checks(p, facts, &t, estimate));
    out.extend(p.settle_all(&names, found)?);
    out.push(p.settle("source_nulls", source_nulls(p, facts, no_value).await)?);
    out.push(p.settle("source_references", source_references(p, facts).await)?);
    out.push(p.settle("paths_agree", paths_agree(p, facts).await)?);
    Ok(out)
}

async fn target_scan(p: &Probe<'_>, facts: &Facts) -> Result<Counted> {
    let shape = &facts.shape;
    let c = conditions(shape);
    let tail = format!("from {}\nwhere true", verify_sql::from(shape, &[], &[]));
    let conditions = vec![c.reference_null, c.orphan, c.no_value];
    count_target(p, facts, tail, conditions).await
}

async fn count_target(p: &Probe<'_>, facts: &Facts, tail: String, conditions: Vec<String>) -> Result<Counted> {
    let key = facts.shape.key_as_text(TARGET_ALIAS);
    scan::count(p, &Scan { oid: facts.target.oid, alias: TARGET_ALIAS, tail, conditions, key }).await
}

fn conditions(shape: &Shape) -> Conditions {
    let inner = || shape.joins.iter().filter(|j| j.kind == JoinKind::Inner);
    let or =
        |parts: Vec<String>| if parts.is_empty() { "false".to_owned() } else { format!("({})", parts.join(" or ")) };
    let reference_null = or(inner()
        .flat_map(|j| &j.on)
        .filter(|on| on.ref_alias.as_str() == TARGET_ALIAS)
        .map(|on| format!("t.{} is null", on.ref_column.sql()))
        .collect());
    let missing = or(inner()
        .filter_map(|j| j.on.first().map(|on| format!("{}.{} is null", j.alias.sql(), on.column.sql())))
        .collect());
    let empty =
        or(shape.columns.iter().filter(|c| c.not_null).map(|c| format!("{} is null", shape.left_value(c))).collect());
    Conditions {
        orphan: format!("({missing} and not {reference_null})"),
        no_value: format!("({empty} and not {missing})"),
        reference_null,
    }
}

fn target_checks(p: &Probe<'_>, facts: &Facts, found: &Counted, estimate: &mut Option<Estimate>) -> Vec<Check> {
    let target = &facts.target.name;
    let total = total_rows(p, facts, found, estimate);
    let references: Vec<String> = facts.shape.ref_columns(TARGET_ALIAS).iter().map(|c| c.to_string()).collect();
    let columns = references.join(", ");
    let null = row_check(
        "reference_null",
        found,
        0,
        &format!("rows of {target} without {columns}"),
        &format!(
            "they can get no value: give them their {columns} or delete them; a LEFT JOIN in the job with a fallback in \
             the expression is the other way"
        ),
    );
    let orphans = row_check(
        "orphans",
        found,
        1,
        &format!("rows of {target} whose source row is missing"),
        "restore what they refer to, or delete them; a foreign key keeps it from happening again",
    );
    vec![total, null, orphans]
}

fn row_check(name: &'static str, found: &Counted, i: usize, what: &str, hint: &str) -> Check {
    let n = found.counts[i];
    if n == 0 {
        return Check::pass(name, format!("no {what} ({})", found.coverage())).count(0);
    }
    Check::fail(name, format!("{}{n} {what}", found.at_least())).count(n).samples(found.samples[i].clone()).hint(hint)
}

/// Total rows and time; and whether the count is plausible, since policies hide rows without an error (hazard 39).
fn total_rows(p: &Probe<'_>, facts: &Facts, found: &Counted, estimate: &mut Option<Estimate>) -> Check {
    let name = "total_rows";
    let guess = f64::from(facts.target.rows_estimate);
    let rows = if found.complete { found.rows } else { guess.max(found.rows as f64) as i64 };
    if let Some(e) = estimate.as_mut() {
        e.set_rows(rows, found.complete);
    }
    if rows == 0 {
        return Check::warn(name, format!("{} is empty: there is nothing to fill", facts.target.name))
            .count(0)
            .hint("check that this is the database you mean; the rest of the job (triggers, policies) still applies");
    }
    if found.complete && guess > IMPLAUSIBLE_MIN_ROWS && (rows as f64) < guess * IMPLAUSIBLE_SHARE {
        return Check::warn(name, format!("{rows} rows counted, while the statistics say about {guess:.0}"))
            .count(rows)
            .hint("either the statistics are old (analyze the table), or rows are hidden from this login");
    }
    let kind = if found.complete { "" } else { "about " };
    let time = estimate.as_ref().map_or("no estimate could be measured".to_owned(), |e| {
        format!("estimated {} to {} (see below)", span(e.seconds_low), span(e.seconds_high))
    });
    let deep = if p.options.deep { "" } else { ", not deep" };
    Check::pass(name, format!("{kind}{rows} rows{deep}, {time}; read once in {}", span(found.elapsed.as_secs_f64())))
        .count(rows)
}

/// Rows of the first source that give no value, with or without target rows (I6); target rows on which they hang.
async fn source_nulls(p: &Probe<'_>, facts: &Facts, no_value: Option<(i64, Vec<String>)>) -> Result<Check> {
    let name = "source_nulls";
    let shape = &facts.shape;
    if !shape.columns.iter().any(|c| c.not_null) {
        return Ok(Check::skip(name, "no column of the job is to be NOT NULL"));
    }
    let (hanging, keys) = no_value.unwrap_or_default();
    let Some((table, found)) = unusable(p, facts, shape, &[]).await? else {
        // The value depends on the target row itself: only those rows can be asked.
        let what = format!("rows of {} whose value would be NULL", facts.target.name);
        return Ok(match hanging {
            0 => Check::pass(name, format!("no {what}")).count(0),
            n => Check::fail(name, format!("{n} {what}")).count(n).samples(keys).hint(
                "put the source data right, or give the expression a fallback, or drop not_null from the job's column",
            ),
        });
    };
    let n = found.counts[0];
    let what = format!("rows of {table} give no value");
    if n == 0 {
        return Ok(Check::pass(name, format!("no {what} ({})", found.complete_or_share())).count(0));
    }
    let consent = p.spec.side_effects.source_may_lack_value;
    let status = if consent && hanging == 0 { Status::Warn } else { Status::Fail };
    let effect = match hanging {
        0 => "none has target rows, but the first one inserted would fail with 23502 after the flip".to_owned(),
        h => format!("{h} target rows hang on them and cannot be filled"),
    };
    Ok(Check::new(name, status, format!("{}{n} {what}; {effect}", found.at_least()))
        .count(n)
        .samples(found.samples[0].clone())
        .hint(
            "fill in the source rows or delete them; with no target rows on them, \
               side_effects.source_may_lack_value = true consents",
        ))
}

impl Counted {
    /// How much was read, where rows were not counted themselves.
    fn complete_or_share(&self) -> String {
        if self.complete { "all read".into() } else { format!("{:.1}% read: a sample", self.share * 100.0) }
    }
}

/// Source rows that are unusable because of NULLs (without `keys`) or because of foreign keys (with them).
async fn unusable(
    p: &Probe<'_>,
    facts: &Facts,
    shape: &Shape,
    keys: &[ForeignKey],
) -> Result<Option<(String, Counted)>> {
    let Some((table, tail)) = verify_sql::unusable_sources(shape, keys) else { return Ok(None) };
    let (Some(join), Some(source)) = (shape.joins.first(), facts.sources.first()) else { return Ok(None) };
    let alias = join.alias.as_str();
    let key: Vec<String> = join.on.iter().map(|on| format!("{}.{}::text", join.alias.sql(), on.column.sql())).collect();
    let scan = Scan { oid: source.oid, alias, tail, conditions: vec!["true".into()], key: key.join(", ") };
    Ok(Some((table.to_string(), scan::count(p, &scan).await?)))
}

/// Values that the foreign key's table does not have (the reference's fifth question).
async fn source_references(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "source_references";
    let keys = &p.spec.foreign_keys;
    if keys.is_empty() {
        return Ok(Check::skip(name, "the job adds no foreign key"));
    }
    let tables: Vec<String> = keys.iter().map(|k| k.references.to_string()).collect();
    let tables = tables.join(", ");
    let mut shape = facts.shape.clone();
    shape.columns.iter_mut().for_each(|c| c.not_null = false);
    let (owner, found) = match unusable(p, facts, &shape, keys).await? {
        Some(found) => found,
        None => (facts.target.name.to_string(), target_references(p, facts).await?),
    };
    let n = found.counts[0];
    if n == 0 {
        let read = found.complete_or_share();
        return Ok(Check::pass(name, format!("every value of {owner} exists in {tables} ({read})")).count(0));
    }
    Ok(Check::fail(name, format!("{}{n} rows of {owner} give a value that {tables} does not have", found.at_least()))
        .count(n)
        .samples(found.samples[0].clone())
        .hint(format!(
            "the foreign key would refuse them: correct or delete these rows, and put a foreign key on the source column \
             (references {tables}) so that it stays so"
        )))
}

/// The same from the target's side, where the value depends on the target row.
async fn target_references(p: &Probe<'_>, facts: &Facts) -> Result<Counted> {
    let shape = &facts.shape;
    let mut from = verify_sql::from(shape, &[], &[]);
    let mut wrong = Vec::new();
    for (i, key) in p.spec.foreign_keys.iter().enumerate() {
        let ([column], [referenced]) = (key.columns.as_slice(), key.referenced_columns.as_slice()) else { continue };
        let Some(value) = shape.columns.iter().find(|c| c.name == *column).map(|c| shape.left_value(c)) else {
            continue;
        };
        from.push_str(&format!(
            "\n  left join {} as fk{i} on fk{i}.{} = {value}",
            key.references.sql(),
            referenced.sql()
        ));
        wrong.push(format!("({value} is not null and fk{i}.{} is null)", referenced.sql()));
    }
    if wrong.is_empty() {
        return Err(Error::internal("no foreign key on a column that this job fills"));
    }
    count_target(p, facts, format!("from {from}\nwhere true"), vec![format!("({})", wrong.join(" or "))]).await
}

/// Where old policies find the owner on one path and the new column on another, a disagreement silently changes access.
async fn paths_agree(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "paths_agree";
    let (Some(first), false) = (facts.shape.columns.first(), facts.agree.is_empty()) else {
        return Ok(Check::skip(name, "the job names no other path to the value"));
    };
    let (mut total, mut samples, mut lines, mut read) = (0, Vec::new(), Vec::new(), String::new());
    let mut at_least = "";
    for (path, shape) in p.spec.agree.iter().zip(&facts.agree) {
        let paths: Vec<AgreeShape> = vec![verify_sql::agree_shape(path, shape)];
        let tail = format!("from {}\nwhere true", verify_sql::from(&facts.shape, &[], &paths));
        let differs = first.differs(&facts.shape.left_value(first), &verify_sql::agree_value(0));
        let found = count_target(p, facts, tail, vec![differs]).await?;
        if found.counts[0] > 0 {
            lines.push(format!("{} by {}", found.counts[0], path.name));
            samples.extend(found.samples[0].iter().cloned());
            at_least = found.at_least();
        }
        total += found.counts[0];
        read = found.coverage();
    }
    let target = &facts.target.name;
    if total == 0 {
        let n = facts.agree.len();
        return Ok(Check::pass(name, format!("{n} other path(s) lead to the same value ({read})")).count(0));
    }
    samples.truncate(p.spec.verification.sample as usize);
    Ok(Check::fail(name, format!("{at_least}{total} rows of {target} would change hands: {}", lines.join(", ")))
        .count(total)
        .samples(samples)
        .hint(
            "who sees these rows would change at the flip: decide which path is right and correct the other one's data",
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_fails_with_count_and_keys_and_none_passes() {
        let found = Counted {
            rows: 10,
            counts: vec![0, 2],
            samples: vec![vec![], vec!["7".into()]],
            complete: true,
            ..Counted::default()
        };
        assert_eq!(row_check("orphans", &found, 0, "rows", "fix").status, Status::Pass);
        let check = row_check("orphans", &found, 1, "rows", "fix");
        assert_eq!((check.status, check.count, check.samples.len()), (Status::Fail, Some(2), 1));
        assert_eq!(check.summary, "2 rows");
    }
}
