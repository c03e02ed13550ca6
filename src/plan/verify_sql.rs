//! SQL of the proofs: counts and sample keys, chunk by chunk.

use std::collections::BTreeSet;

use super::shape::Shape;
use crate::job::spec::{Agree, ForeignKey};
use crate::pg::ident::{Ident, QualifiedName};

/// A kind of finding with the condition on a row of the verification's FROM that is one.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// Stable name: `nulls` (NULL although NOT NULL is wanted), `unfilled` (NULL although the source has a value), `drift`
    /// (another value than the source), `orphans` (no source row), `references:<constraint>` (the foreign key would
    /// refuse it), `agree:<path>` (the paths disagree).
    pub kind: String,
    /// SQL condition.
    pub condition: String,
}

/// The FROM of every verification query: target, sources, referenced tables and other paths, all LEFT JOINed, so that
/// every target row is there exactly once (all joins go by unique keys). Our aliases are upper case; a job's are not.
pub fn from(shape: &Shape, keys: &[ForeignKey], agree: &[AgreeShape]) -> String {
    format!("{} as t{}", shape.target.sql(), joins(shape, keys, agree))
}

/// The joins of [`from`].
fn joins(shape: &Shape, keys: &[ForeignKey], agree: &[AgreeShape]) -> String {
    let mut out = shape.left_join_tail();
    for (i, key) in keys.iter().enumerate() {
        let on: Vec<String> = key
            .columns
            .iter()
            .zip(&key.referenced_columns)
            .map(|(c, r)| format!("\"FK{i}\".{} = t.{}", r.sql(), c.sql()))
            .collect();
        out.push_str(&format!("\n  left join {} as \"FK{i}\" on {}", key.references.sql(), on.join(" and ")));
    }
    for (i, path) in agree.iter().enumerate() {
        out.push_str(&format!("\n  left join lateral ({}) as \"AG{i}\" on true", path.select));
    }
    out
}

/// Another path to the value, ready for a lateral join.
#[derive(Debug, Clone, PartialEq)]
pub struct AgreeShape {
    /// What people call it.
    pub name: String,
    /// `select value as v from ...` over an outer `t`.
    pub select: String,
}

/// The value of path number `i` of [`from`].
pub fn agree_value(i: usize) -> String {
    format!("\"AG{i}\".v")
}

/// Makes the lateral subselect of a path; `shape` is the path's own shape (its joins and its value as only column).
pub fn agree_shape(agree: &Agree, shape: &Shape) -> AgreeShape {
    let value = shape.columns.first().map_or("null", |c| c.value.as_str());
    AgreeShape {
        name: agree.name.clone(),
        select: format!("select ({value}) as v from {}{}", shape.row_as_target("t"), shape.join_tail()),
    }
}

/// Everything that may be wrong with a row.
pub fn findings(shape: &Shape, keys: &[ForeignKey], agree: &[AgreeShape]) -> Vec<Finding> {
    let mut out = Vec::new();
    let required: Vec<String> =
        shape.columns.iter().filter(|c| c.not_null).map(|c| format!("t.{} is null", c.name.sql())).collect();
    let mut add = |kind: String, conditions: Vec<String>| {
        if !conditions.is_empty() {
            out.push(Finding { kind, condition: conditions.join(" or ") });
        }
    };
    add("nulls".into(), required);
    let unfilled = shape
        .columns
        .iter()
        .map(|c| format!("(t.{} is null and {} is not null)", c.name.sql(), shape.left_value(c)))
        .collect();
    add("unfilled".into(), unfilled);
    let drift = shape
        .columns
        .iter()
        .map(|c| {
            let stored = format!("t.{}", c.name.sql());
            format!("({stored} is not null and {})", c.differs(&stored, &shape.left_value(c)))
        })
        .collect();
    add("drift".into(), drift);
    let missing: Vec<String> = shape
        .joins
        .iter()
        .filter(|j| j.kind == crate::job::spec::JoinKind::Inner)
        .filter_map(|j| j.on.first().map(|on| format!("{}.{} is null", j.alias.sql(), on.column.sql())))
        .collect();
    add("orphans".into(), missing);
    for (i, key) in keys.iter().enumerate() {
        let filled: Vec<String> = key.columns.iter().map(|c| format!("t.{} is not null", c.sql())).collect();
        let absent = key.referenced_columns.first().map(|r| format!("\"FK{i}\".{} is null", r.sql()));
        add(
            format!("references:{}", key.name),
            vec![format!("({} and {})", filled.join(" and "), absent.unwrap_or_default())],
        );
    }
    if let Some(first) = shape.columns.first() {
        for (i, path) in agree.iter().enumerate() {
            add(format!("agree:{}", path.name), vec![first.differs(&shape.left_value(first), &agree_value(i))]);
        }
    }
    out
}

/// `select count(*), count(*) filter (...), ...` over `range`.
pub fn count(from: &str, findings: &[Finding], range: &str) -> String {
    let counts: String = findings.iter().map(|f| format!(",\n  count(*) filter (where {})", f.condition)).collect();
    format!("select count(*){counts}\nfrom {from}\nwhere {range}")
}

/// The same, as [`count`] with the number of groups, by way of the chunk's distinct combinations of `columns`: messages of one
/// conversation are joined and compared once. `columns` from [`groups`].
pub fn count_groups(
    shape: &Shape,
    keys: &[ForeignKey],
    agree: &[AgreeShape],
    columns: &[Ident],
    findings: &[Finding],
    range: &str,
) -> String {
    let list = columns.iter().map(|c| format!("t.{}", c.sql())).collect::<Vec<_>>().join(", ");
    let counts: String = findings
        .iter()
        .map(|f| format!(",\n  coalesce(sum(t.\"N\") filter (where {}), 0)::int8", f.condition))
        .collect();
    format!(
        "select coalesce(sum(t.\"N\"), 0)::int8{counts}, count(*)\nfrom (select {list}, count(*) as \"N\" from {} as t \
         where {range} group by {list}) as t{}",
        shape.target.sql(),
        joins(shape, keys, agree)
    )
}

/// The columns of the target that decide about every finding, if rows that are equal in them may be looked at as one.
/// `type_of` gives a column's type. `None` where equal is not the same (`1.0` and `1.00`), since a value could tell them
/// apart, or where a type has no equality.
pub fn groups<'a>(
    shape: &Shape,
    agree: &[Shape],
    keys: &[ForeignKey],
    type_of: impl Fn(&Ident) -> Option<&'a str>,
) -> Option<Vec<Ident>> {
    /// Types of which equal values are the same.
    const EXACT: [&str; 10] = [
        "uuid",
        "smallint",
        "integer",
        "bigint",
        "boolean",
        "date",
        "oid",
        "timestamp with time zone",
        "timestamp without time zone",
        "bytea",
    ];
    let read: BTreeSet<Ident> = std::iter::once(shape).chain(agree).flat_map(|s| s.reads("t")).collect();
    // What is stored is only compared, so that its equality may be coarser.
    let stored = shape.columns.iter().map(|c| &c.name).chain(keys.iter().flat_map(|k| &k.columns));
    if read.iter().any(|c| !type_of(c).is_some_and(|t| EXACT.contains(&t))) || shape.columns.iter().any(|c| c.as_text) {
        return None;
    }
    Some(read.iter().chain(stored).cloned().collect::<BTreeSet<_>>().into_iter().collect())
}

/// Keys, as text, of up to `limit` rows of `range` that are a finding.
pub fn sample(shape: &Shape, from: &str, finding: &Finding, range: &str, limit: u32) -> String {
    format!("{}\nlimit {limit}", keys(shape, from, finding, range))
}

/// Keys, as text, of all rows of `range` that are a finding.
pub fn keys(shape: &Shape, from: &str, finding: &Finding, range: &str) -> String {
    format!("select {} from {from}\nwhere {range} and ({})", shape.key_as_text("t"), finding.condition)
}

/// A range of heap pages as a condition on `t`: pages `low` up to but without `high`; `None`: to the end. A TID range
/// scan reads just these pages (PostgreSQL 14 and later).
pub fn page_range(low: u64, high: Option<u64>) -> String {
    match high {
        Some(high) => format!("t.ctid >= '({low},0)'::tid and t.ctid < '({high},0)'::tid"),
        None => format!("t.ctid >= '({low},0)'::tid"),
    }
}

/// Rows of the first source that would give a new target row no legal value: NULL where NOT NULL is wanted, or a value
/// that the foreign key would refuse. `None` where that depends on the target row itself. The table, and FROM and WHERE.
pub fn unusable_sources(shape: &Shape, keys: &[ForeignKey]) -> Option<(QualifiedName, String)> {
    let u = unusable(shape, keys)?;
    Some((u.table.clone(), format!("from {}\nwhere ({})", u.from(&u.table.sql()), u.condition)))
}

/// The parts of [`unusable_sources`].
#[derive(Debug, Clone, PartialEq)]
pub struct Unusable {
    /// The first source.
    pub table: QualifiedName,
    alias: Ident,
    joins: String,
    condition: String,
    key: Vec<Ident>,
}

impl Unusable {
    fn from(&self, relation: &str) -> String {
        format!("{relation} as {}{}", self.alias.sql(), self.joins)
    }

    fn range(&self, low: u64, high: u64) -> String {
        let t = self.alias.sql();
        format!("{t}.ctid >= '({low},0)'::tid and {t}.ctid < '({high},0)'::tid")
    }

    /// Number of rows, and how many are unusable, in pages of `relation`: the table, or a partition of it.
    pub fn count(&self, relation: &str, low: u64, high: u64) -> String {
        format!(
            "select count(*), count(*) filter (where {}) from {}\nwhere {}",
            self.condition,
            self.from(relation),
            self.range(low, high)
        )
    }

    /// Keys of some of them, as text.
    pub fn sample(&self, relation: &str, low: u64, high: u64, limit: u32) -> String {
        let key: Vec<String> = self.key.iter().map(|k| format!("{}.{}::text", self.alias.sql(), k.sql())).collect();
        format!(
            "select {} from {}\nwhere {} and ({}) limit {limit}",
            key.join(", "),
            self.from(relation),
            self.range(low, high),
            self.condition
        )
    }
}

/// See [`unusable_sources`].
pub fn unusable(shape: &Shape, keys: &[ForeignKey]) -> Option<Unusable> {
    let first = shape.joins.first()?;
    let later_need_target = shape.joins[1..].iter().any(|j| j.on.iter().any(|o| o.ref_alias.as_str() == "t"));
    let values_need_target =
        shape.columns.iter().any(|c| crate::job::lex::references(&c.value, &["t"]).map_or(true, |r| !r.is_empty()));
    if later_need_target || values_need_target || first.kind == crate::job::spec::JoinKind::Left {
        return None;
    }
    let mut joins = String::new();
    for join in &shape.joins[1..] {
        joins.push_str(&format!("\n  {}", super::shape::join_sql(join, crate::job::spec::JoinKind::Left)));
    }
    let mut wrong: Vec<String> =
        shape.columns.iter().filter(|c| c.not_null).map(|c| format!("({}) is null", c.value)).collect();
    for (i, key) in keys.iter().enumerate() {
        let [column] = key.columns.as_slice() else { continue };
        let Some(value) = shape.columns.iter().find(|c| c.name == *column) else { continue };
        let [referenced] = key.referenced_columns.as_slice() else { continue };
        joins.push_str(&format!(
            "\n  left join {} as \"FK{i}\" on \"FK{i}\".{} = ({})",
            key.references.sql(),
            referenced.sql(),
            value.value
        ));
        wrong.push(format!("(({}) is not null and \"FK{i}\".{} is null)", value.value, referenced.sql()));
    }
    if wrong.is_empty() {
        return None;
    }
    Some(Unusable {
        table: first.table.clone(),
        alias: first.alias.clone(),
        joins,
        condition: wrong.join(" or "),
        key: first.on.iter().map(|on| on.column.clone()).collect(),
    })
}
