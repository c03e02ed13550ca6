//! Golden tests: every statement that contains names or expressions of a job, for six kinds of jobs. What a change does
//! to the SQL is seen in the difference of the snapshots.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::facts::{Facts, Table};
use super::shape::{ColumnShape, JoinShape, KeyColumn, OnShape, Shape};
use super::{batch_sql, contract, steps, sync_sql, verify_sql};
use crate::job::{JobSpec, lex, load};
use crate::pg::ident::Ident;

fn ident(name: &str) -> Ident {
    Ident::new(name).expect("a name")
}

/// The shape that the catalog would give: `covered` joins have a foreign key (NO ACTION if the name ends in `!`), the
/// values are of type `text`.
fn shape(spec: &JobSpec, key: &[(&str, &str)], covered: &[&str]) -> Shape {
    let join = |j: &crate::job::spec::Join| JoinShape {
        alias: j.alias.clone(),
        table: j.table.clone(),
        on: j
            .on
            .iter()
            .map(|(column, r)| OnShape {
                column: column.clone(),
                ref_alias: r.alias.clone(),
                ref_column: r.column.clone(),
                operator: "operator(pg_catalog.=)".into(),
            })
            .collect(),
        kind: j.join,
        covered: covered.iter().any(|c| c.trim_end_matches('!') == j.alias.as_str()),
        replaceable: covered.contains(&format!("{}!", j.alias).as_str()),
        hashable: true,
    };
    let column = |c: &crate::job::spec::Column| ColumnShape {
        name: c.name.clone(),
        sql_type: c.sql_type.clone().unwrap_or_else(|| "text".into()),
        value: c.value.clone(),
        not_null: c.not_null,
        nullable: !c.not_null || lex::plain_reference(&c.value).is_none(),
        as_text: c.sql_type.as_deref() == Some("json"),
        converts_to: c.sql_type.as_deref().filter(|t| t.starts_with("varchar")).map(|_| "character varying".into()),
    };
    Shape {
        job: spec.name.clone(),
        target: spec.target.table.clone(),
        key: key
            .iter()
            .map(|(name, sql_type)| KeyColumn {
                name: ident(name),
                sql_type: (*sql_type).to_owned(),
                operators: ident(if sql_type.starts_with("public.") { "public" } else { "pg_catalog" }),
            })
            .collect(),
        joins: spec.source.iter().map(join).collect(),
        columns: spec.columns.iter().map(column).collect(),
        exempt_login: Some("backfilld".into()),
        no_equality: BTreeSet::new(),
    }
}

/// Every statement of the sync triggers, the batches and the proof.
fn render(spec: &JobSpec, shape: &Shape) -> String {
    let mut out = String::new();
    let mut add = |title: &str, sql: &str| write!(out, "-- {title}\n{sql};\n\n").expect("a string");
    for function in sync_sql::functions(shape) {
        add(&function.name, &function.create);
    }
    for trigger in sync_sql::triggers(shape) {
        add(&trigger.name, &format!("{};\n{}", trigger.create, sync_sql::enable_always(&trigger)));
    }
    let range = batch_sql::key_range(shape, true);
    add("last key", &batch_sql::last_key(shape));
    add("first bound", &batch_sql::bound(shape, false, true));
    add("bound", &batch_sql::bound(shape, true, true));
    add("fill", &batch_sql::fill(shape, &range));
    if let Some(recheck) = batch_sql::recheck(shape, &range) {
        add("recheck", &recheck);
    }
    let from = verify_sql::from(shape, &spec.foreign_keys, &[]);
    let findings = verify_sql::findings(shape, &spec.foreign_keys, &[]);
    add("proof", &verify_sql::count(&from, &findings, &verify_sql::page_range(0, Some(4096))));
    let exact = |_: &crate::pg::ident::Ident| Some("uuid");
    if let Some(columns) = verify_sql::groups(shape, &[], &spec.foreign_keys, exact) {
        let range = verify_sql::page_range(0, Some(4096));
        add("proof by groups", &verify_sql::count_groups(shape, &spec.foreign_keys, &[], &columns, &findings, &range));
    }
    add("sample", &verify_sql::sample(shape, &from, &findings[0], &verify_sql::page_range(0, None), 20));
    if let Some((_, tail)) = verify_sql::unusable_sources(shape, &spec.foreign_keys) {
        add("unusable sources", &format!("select count(*) {tail}"));
    }
    if let Some(u) = verify_sql::unusable(shape, &spec.foreign_keys) {
        add("unusable sources, a chunk", &u.count(&u.table.sql(), 0, 4096));
    }
    out.push_str(&contract::comment(shape));
    out
}

fn spec(text: &str) -> JobSpec {
    load::parse(text, "job.toml", |_| unreachable!("no files")).unwrap_or_else(|e| panic!("{}", e.render()))
}

#[test]
fn the_shipped_job() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs/messages_auth_user_id");
    let spec = load::load(&dir).expect("loads");
    let shape = shape(&spec, &[("id", "uuid")], &["c"]);
    let table = |name: &crate::pg::ident::QualifiedName| Table {
        name: name.clone(),
        oid: 0,
        kind: 'r',
        owner: "app_owner".into(),
        rows_estimate: 0.0,
        pages_estimate: 0,
        access_method: "heap".into(),
        columns: Vec::new(),
    };
    let facts = Facts {
        server_version: 150_000,
        login: "backfilld".into(),
        target: table(&spec.target.table),
        sources: spec.source.iter().map(|j| table(&j.table)).collect(),
        existing: vec![None],
        shape: shape.clone(),
        agree: Vec::new(),
    };
    let mut plan = String::new();
    for step in steps::all(&spec, &facts, "200ms") {
        writeln!(plan, "-- {}\n{};\n", step.what, step.sql.join(";\n")).expect("a string");
    }
    insta::assert_snapshot!("shipped_plan", plan);
    insta::assert_snapshot!("shipped_statements", render(&spec, &shape));
}

#[test]
fn a_chain_with_a_left_join_and_an_expression_over_all_tables() {
    let spec = spec(
        r#"name = "chain"
        target.table = "public.items"
        [[source]]
        alias = "p"
        table = "public.projects"
        on = { id = "t.project_id" }
        [[source]]
        alias = "a"
        table = "public.accounts"
        on = { id = "p.account_id", region = "t.region" }
        join = "left"
        [[columns]]
        name = "account"
        value = "coalesce(t.own, a.name, p.fallback)""#,
    );
    insta::assert_snapshot!(render(&spec, &shape(&spec, &[("id", "bigint")], &["p!"])));
}

#[test]
fn a_composite_key_and_names_that_need_quotes() {
    let long = "n".repeat(63);
    let spec = spec(
        &format!(
            r#"name = "names"
        [target]
        table = '"My ""Schema"."{long}"'
        [[source]]
        alias = "p"
        table = 'public."Parent; drop"'
        on = {{ "Id" = 't."ParentId"' }}
        [[columns]]
        name = 'Own"er'
        value = 'p."It''s"'"#
        )
        .replace("It''s", "It's")
        .replace("'p.\"It's\"'", "\"p.\\\"It's\\\"\""),
    );
    insta::assert_snapshot!(render(
        &spec,
        &shape(&spec, &[("Tenant", "uuid"), ("key", "public.citext"), ("n", "bigint")], &["p"])
    ));
}

#[test]
fn a_type_without_equality() {
    let spec = spec(
        r#"name = "json"
        target.table = "public.items"
        source = [{ alias = "p", table = "public.projects", on = { id = "t.project_id" } }]
        columns = [{ name = "settings", type = "json", value = "p.settings", not_null = true }]"#,
    );
    let mut shape = shape(&spec, &[("id", "bigint")], &["p"]);
    shape.no_equality.insert(("p".into(), "settings".into()));
    insta::assert_snapshot!(render(&spec, &shape));
}

#[test]
fn several_columns() {
    let spec = spec(
        r#"name = "several"
        target.table = "public.items"
        source = [{ alias = "p", table = "public.projects", on = { id = "t.project_id" }, join = "left" }]
        columns = [
          { name = "owner", value = "p.owner" },
          { name = "label", type = "varchar(10)", value = "p.label" },
        ]"#,
    );
    insta::assert_snapshot!(render(&spec, &shape(&spec, &[("id", "bigint")], &[])));
}

#[test]
fn no_source() {
    let spec = spec(
        r#"name = "own"
        target.table = "public.items"
        columns = [{ name = "lower_name", value = "lower(t.name)" }]"#,
    );
    let mut shape = shape(&spec, &[("id", "bigint")], &[]);
    shape.exempt_login = None;
    insta::assert_snapshot!(render(&spec, &shape));
}
