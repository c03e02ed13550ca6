//! The data checks as a plain script for psql, for those who want to read what they run. Pure.

use std::fmt::Write as _;

use super::estimate::{WRITE_BASE, WRITE_PER_INDEX, WRITE_SPREAD};
use crate::job::JobSpec;
use crate::job::spec::{Join, JoinKind, TARGET_ALIAS};
use crate::pg::ident::{Ident, literal};
use crate::plan::Shape;
use crate::plan::shape::{ColumnShape, JoinShape, OnShape};
use crate::plan::verify_sql::{self, AgreeShape};

/// A script with the seven checks of the reference migration, in its order, made from the job; and, if the job names
/// other paths to the value, an eighth that compares them.
pub fn validation_queries(spec: &JobSpec, shape: &Shape) -> String {
    let mut out = head(spec);
    let target = &shape.target;
    section(&mut out, &format!("{target}: rows"));
    reference_null(&mut out, shape);
    orphans(&mut out, shape);
    total(&mut out, shape);
    let sources: Vec<String> = shape.joins.iter().map(|j| j.table.to_string()).collect();
    section(&mut out, &format!("{}: values", sources.join(", ")));
    source_nulls(&mut out, shape);
    source_references(&mut out, spec, shape);
    section(&mut out, &format!("{target}: row level security"));
    policies(&mut out, spec, shape);
    section(&mut out, "functions");
    functions(&mut out, spec);
    if !spec.agree.is_empty() {
        section(&mut out, "other paths to the value");
        paths(&mut out, spec, shape);
    }
    echo(&mut out, "");
    echo(&mut out, "All checks complete. Every status must be PASS; backfilld check says what to do about the others.");
    out.push_str("rollback;\n");
    out
}

fn head(spec: &JobSpec) -> String {
    format!(
        "-- Validation queries of job {}; made from job.toml by backfilld, do not edit.\n\
         -- psql -X -d <database> -f validation_queries.sql\n\
         -- Reads only. Each query reads whole tables: on large ones run it against a standby, or use backfilld check,\n\
         -- which reads in chunks.\n\
         \\set ON_ERROR_STOP on\n\
         begin transaction read only;\n\
         -- A role to which policies apply gets an error instead of too small a count.\n\
         set local row_security = off;\n\
         set local search_path = pg_catalog, pg_temp;\n",
        spec.name
    )
}

/// `\echo` with its text quoted for psql.
fn echo(out: &mut String, text: &str) {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let _ = writeln!(out, "\\echo '{}'", text.replace('\\', "\\\\").replace('\'', "''"));
}

fn section(out: &mut String, title: &str) {
    out.push('\n');
    echo(out, "");
    echo(out, &format!("=== {} ===", title));
}

fn check(out: &mut String, n: u32, title: &str, sql: &str) {
    echo(out, &format!("Check {n}: {title}"));
    let _ = writeln!(out, "{sql};");
}

fn nothing(out: &mut String, n: u32, title: &str, why: &str) {
    check(out, n, title, &format!("select {} as note, 'PASS' as status", literal(why)));
}

/// `count(*)` with its verdict.
fn counted(name: &str, tail: &str) -> String {
    format!("select count(*) as {name},\n  case when count(*) = 0 then 'PASS' else 'FAIL' end as status\n{tail}")
}

fn or(parts: Vec<String>) -> Option<String> {
    (!parts.is_empty()).then(|| format!("({})", parts.join(" or ")))
}

fn null_reference(shape: &Shape) -> Option<String> {
    or(shape
        .joins
        .iter()
        .filter(|j| j.kind == JoinKind::Inner)
        .flat_map(|j| &j.on)
        .filter(|on| on.ref_alias.as_str() == TARGET_ALIAS)
        .map(|on| format!("t.{} is null", on.ref_column.sql()))
        .collect())
}

fn reference_null(out: &mut String, shape: &Shape) {
    let columns: Vec<String> = shape.ref_columns(TARGET_ALIAS).iter().map(|c| c.to_string()).collect();
    let title = format!("rows with NULL {}", columns.join(", "));
    match null_reference(shape) {
        Some(null) => {
            let tail = format!("from {} as t\nwhere {null}", shape.target.sql());
            check(out, 1, &title, &counted("null_reference_count", &tail));
        }
        None => nothing(out, 1, &title, "no row needs a reference"),
    }
}

fn orphans(out: &mut String, shape: &Shape) {
    let title = "orphaned rows (source row deleted)";
    let missing = or(shape
        .joins
        .iter()
        .filter(|j| j.kind == JoinKind::Inner)
        .filter_map(|j| j.on.first().map(|on| format!("{}.{} is null", j.alias.sql(), on.column.sql())))
        .collect());
    match missing {
        Some(missing) => {
            let not_null = null_reference(shape).map_or(String::new(), |n| format!("\n  and not {n}"));
            let tail = format!("from {}\nwhere {missing}{not_null}", verify_sql::from(shape, &[], &[]));
            check(out, 2, title, &counted("orphaned_count", &tail));
        }
        None => nothing(out, 2, title, "no row needs a source row"),
    }
}

/// Rows of the sample that is read for the estimate: enough to be far above the clock's noise, few enough to be quick.
const SAMPLE_ROWS: u32 = 5000;

/// Rows, and a time from measurement: rows are read in key order with their values, as batches read them, and the time
/// is multiplied by what writing costs beside that.
fn total(out: &mut String, shape: &Shape) {
    let values: Vec<String> = shape.columns.iter().map(|c| format!("count({})", shape.left_value(c))).collect();
    let target = shape.target.sql();
    let sql = format!(
        "with began as materialized (select clock_timestamp() as at),\n\
         sample as materialized (\n  select count(*) as n, {}\n  from began cross join lateral (\n    \
         select x.* from {target} as x where began.at is not null order by {} limit {SAMPLE_ROWS}\n  ) as t{}\n),\n\
         timed as materialized (\n  select extract(epoch from clock_timestamp() - began.at) / greatest(sample.n, 1) as row_s\n  \
         from sample cross join began\n),\n\
         cost as materialized (\n  select row_s * ({WRITE_BASE:.1} + {WRITE_PER_INDEX} * count(*)) as row_s\n  \
         from timed, pg_index where indrelid = {}::regclass group by row_s\n),\n\
         total as (select count(*) as n from {target})\n\
         select total.n as total_rows,\n  format('estimated %s to %s seconds (measured on {SAMPLE_ROWS} rows)',\n    \
         round(total.n * cost.row_s, 2), round(total.n * cost.row_s * {WRITE_SPREAD:.1}, 2)) as estimate\n\
         from total cross join cost",
        values.join(", "),
        shape.key_of("x"),
        shape.left_join_tail().replace('\n', "\n  "),
        literal(&target)
    );
    check(out, 3, "rows to backfill", &sql);
}

fn source_nulls(out: &mut String, shape: &Shape) {
    let title = "source rows that give no value";
    if !shape.columns.iter().any(|c| c.not_null) {
        return nothing(out, 4, title, "no column is to be NOT NULL");
    }
    let tail = match verify_sql::unusable_sources(shape, &[]) {
        Some((_, tail)) => tail,
        None => {
            let empty = shape.columns.iter().filter(|c| c.not_null).map(|c| format!("{} is null", shape.left_value(c)));
            let empty = or(empty.collect()).unwrap_or_else(|| "false".into());
            format!("from {}\nwhere {empty}", verify_sql::from(shape, &[], &[]))
        }
    };
    check(out, 4, title, &counted("null_value_count", &tail));
}

fn source_references(out: &mut String, spec: &JobSpec, shape: &Shape) {
    let title = "values that the foreign key would refuse";
    if spec.foreign_keys.is_empty() {
        return nothing(out, 5, title, "the job adds no foreign key");
    }
    let mut nullable = shape.clone();
    nullable.columns.iter_mut().for_each(|c| c.not_null = false);
    match verify_sql::unusable_sources(&nullable, &spec.foreign_keys) {
        Some((_, tail)) => check(out, 5, title, &counted("invalid_references", &tail)),
        None => nothing(out, 5, title, "depends on each row; see source_references of backfilld check"),
    }
}

fn policies(out: &mut String, spec: &JobSpec, shape: &Shape) {
    let expected: Vec<String> =
        spec.policies.iter().flat_map(|p| p.replace.iter().chain(&p.keep)).map(|name| literal(name)).collect();
    let place = format!(
        "schemaname = {} and tablename = {}",
        literal(shape.target.schema.as_str()),
        literal(shape.target.name.as_str())
    );
    let verdict = if spec.policies.is_some() {
        let list = expected.join(", ");
        format!(
            ",\n  case when policyname = any (array[{list}]::text[]) then 'PASS' else 'FAIL: not in the job' end as status"
        )
    } else {
        String::new()
    };
    let listing = format!(
        "select policyname, cmd, qual is not null as has_using, with_check is not null as has_check{verdict}\n\
         from pg_policies\nwhere {place}\norder by policyname"
    );
    check(out, 6, "policies now", &listing);
    if spec.policies.is_some() {
        let missing = format!(
            "select count(*) as missing_policies,\n  case when count(*) = 0 then 'PASS' else 'FAIL' end as status\n\
             from unnest(array[{}]::text[]) as wanted(name)\n\
             where not exists (select from pg_policies where {place} and policyname = wanted.name)",
            expected.join(", ")
        );
        let _ = writeln!(out, "{missing};");
    }
}

fn functions(out: &mut String, spec: &JobSpec) {
    let title = "functions to replace, with their signatures";
    if spec.functions.is_empty() {
        return nothing(out, 7, title, "the job replaces no function");
    }
    let list: Vec<String> = spec.functions.iter().map(|f| format!("({})", literal(&f.signature))).collect();
    let sql = format!(
        "select wanted.signature, p.proname as function_name,\n  pg_get_function_identity_arguments(p.oid) as parameters,\n  \
         case when p.oid is not null then 'PASS' else 'FAIL' end as status\n\
         from (values {}) as wanted(signature)\nleft join pg_proc as p on p.oid = to_regprocedure(wanted.signature)",
        list.join(", ")
    );
    check(out, 7, title, &sql);
}

fn paths(out: &mut String, spec: &JobSpec, shape: &Shape) {
    let Some(first) = shape.columns.first() else { return };
    for path in &spec.agree {
        let column = ColumnShape { value: path.value.clone(), ..first.clone() };
        let joins = path.source.iter().map(|join| path_join(shape, join)).collect();
        let own = Shape { joins, columns: vec![column], ..shape.clone() };
        let lateral: Vec<AgreeShape> = vec![verify_sql::agree_shape(path, &own)];
        let differs = first.differs(&shape.left_value(first), &verify_sql::agree_value(0));
        let tail = format!("from {}\nwhere {differs}", verify_sql::from(shape, &[], &lateral));
        check(out, 8, &format!("rows whose value differs by {}", path.name), &counted("disagreeing_rows", &tail));
    }
}

/// A join of another path. Without the catalog its equality operators are known only where the job's own joins use the
/// same table; else they are those of the built-in types.
fn path_join(shape: &Shape, join: &Join) -> JoinShape {
    let known = shape.joins.iter().filter(|j| j.table == join.table).flat_map(|j| &j.on);
    let known: Vec<&OnShape> = known.collect();
    let operator = |column: &Ident| {
        let same = known.iter().find(|on| on.column == *column);
        same.map_or_else(|| "operator(pg_catalog.=)".to_owned(), |on| on.operator.clone())
    };
    JoinShape {
        alias: join.alias.clone(),
        table: join.table.clone(),
        on: join
            .on
            .iter()
            .map(|(column, r)| OnShape {
                column: column.clone(),
                ref_alias: r.alias.clone(),
                ref_column: r.column.clone(),
                operator: operator(column),
            })
            .collect(),
        kind: join.join,
        covered: false,
        replaceable: true,
        hashable: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::shape::KeyColumn;
    use std::collections::BTreeSet;

    /// The shape that the catalog would give for the shipped job.
    fn shape(spec: &JobSpec) -> Shape {
        let first = &spec.columns[0];
        let mut shape = Shape {
            job: spec.name.clone(),
            target: spec.target.table.clone(),
            key: vec![KeyColumn {
                name: "id".parse().unwrap(),
                sql_type: "uuid".into(),
                operators: "pg_catalog".parse().unwrap(),
            }],
            joins: Vec::new(),
            columns: vec![ColumnShape {
                name: first.name.clone(),
                sql_type: "uuid".into(),
                value: first.value.clone(),
                not_null: first.not_null,
                nullable: true,
                as_text: false,
                converts_to: None,
            }],
            exempt_login: None,
            no_equality: BTreeSet::new(),
        };
        shape.joins = spec.source.iter().map(|j| path_join(&shape, j)).collect();
        shape
    }

    #[test]
    fn the_shipped_script_is_what_the_job_gives() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs/messages_auth_user_id");
        let spec = crate::job::load(&dir).expect("loads");
        let script = validation_queries(&spec, &shape(&spec));
        let file = dir.join("validation_queries.sql");
        if std::env::var_os("BACKFILLD_TEST_BLESS").is_some() {
            std::fs::write(&file, &script).expect("writes");
        }
        let shipped = std::fs::read_to_string(&file).expect("is there");
        assert!(script == shipped, "{} is stale: run the test with BACKFILLD_TEST_BLESS=1", file.display());
        assert!((1..=8).all(|n| script.contains(&format!("\\echo 'Check {n}: "))));
    }

    #[test]
    fn hostile_names_stay_inside_their_quotes() {
        let mut out = String::new();
        echo(&mut out, "it's \\! rm\n-rf");
        assert_eq!(out, "\\echo 'it''s \\\\! rm -rf'\n");
    }
}
