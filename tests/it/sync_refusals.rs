//! What the plan refuses to build on, and that it names the key of the job to blame.

use crate::sync_fixture::{OWNED, read, spec, tables};

/// The refusal of `job` on `schema`.
async fn refusal(schema: &str, job: &str) -> String {
    let db = tables(schema).await;
    match read(&db, &spec(job), true).await {
        Ok(facts) => panic!("accepted: {:?}", facts.shape),
        Err(e) => {
            assert!(e.hint().is_some(), "{}", e.render());
            e.render()
        }
    }
}

async fn refused(schema: &str, job: &str, expected: &[&str]) {
    let found = refusal(schema, job).await;
    for part in expected {
        assert!(found.contains(part), "expected {part:?} in:\n{found}\n{schema}\n{job}");
    }
}

fn with_value(value: &str) -> String {
    OWNED.job.replace("\"p.owner\"", &format!("{value:?}"))
}

#[tokio::test]
async fn a_join_by_a_key_that_is_not_unique_is_refused() {
    let plain = OWNED
        .schema
        .replace("id bigint primary key, owner", "id bigint, owner")
        .replace("references public.parents on delete cascade on update cascade", "");
    for index in [
        "",
        "create index on public.parents (id);",
        "create unique index on public.parents (id) where id > 0;",
        "create unique index on public.parents ((id + 0));",
        "create unique index on public.parents (id, owner);",
        "alter table public.parents add unique (id) deferrable;",
    ] {
        refused(&format!("{plain}{index}"), OWNED.job, &["source[0].on: (id) is not a unique key of public.parents"])
            .await;
    }
}

#[tokio::test]
async fn a_target_without_a_key_to_walk_is_refused() {
    let plain = OWNED.schema.replace("kids (id bigint primary key", "kids (id bigint");
    refused(&plain, OWNED.job, &["target.table: public.kids has no primary key"]).await;
    let keyed =
        OWNED.job.replace("target.table = \"public.kids\"", "target = { table = \"public.kids\", key = [\"id\"] }");
    for index in [
        "",
        "create unique index on public.kids (id);",
        "alter table public.kids alter id set not null; create unique index on public.kids (id) where id > 0;",
        "alter table public.kids alter id set not null; create unique index on public.kids (id, parent_id);",
        "alter table public.kids alter id set not null, add unique (id) deferrable;",
    ] {
        refused(&format!("{plain}{index}"), &keyed, &["target.key: public.kids has no unique index on exactly (id)"])
            .await;
    }
    let db = tables(&format!(
        "{plain} alter table public.kids alter id set not null; create unique index on public.kids (id) include (body)"
    ))
    .await;
    read(&db, &spec(&keyed), true).await.expect("a unique index on a NOT NULL column is a key");
}

#[tokio::test]
async fn tables_that_are_not_ordinary_are_refused() {
    for (schema, part) in [
        ("create view public.kids as select 1::bigint as id, 1::bigint as parent_id", "relkind v"),
        ("create materialized view public.kids as select 1::bigint as id", "relkind m"),
        ("create table public.kids (id bigint primary key, parent_id bigint) partition by range (id)", "partitioned"),
        (
            "create table public.kids (id bigint primary key, parent_id bigint); create table public.more () inherits (public.kids)",
            "inherit",
        ),
        ("select", "does not exist"),
    ] {
        refused(
            &format!("create table public.parents (id bigint primary key, owner text); {schema}"),
            OWNED.job,
            &["target.table: ", part],
        )
        .await;
    }
    let kids = "create table public.kids (id bigint primary key, parent_id bigint);";
    for (schema, part) in [
        ("create view public.parents as select 1::bigint as id, ''::text as owner", "relkind v"),
        (
            "create table public.parents (id bigint primary key, owner text); create table public.more () inherits (public.parents)",
            "inherit",
        ),
    ] {
        refused(&format!("{kids} {schema}"), OWNED.job, &["source[0].table: ", part]).await;
    }
}

#[tokio::test]
async fn expressions_that_the_triggers_could_not_follow_are_refused() {
    for (value, part) in [
        ("owner", "column \"owner\" does not exist"),
        ("p.nothing", "public.parents has no column \"nothing\""),
        ("nothing(p.owner)", "function nothing(text) does not exist"),
        ("citext(p.owner)", "does not exist"),
        ("max(p.owner)", "aggregate functions are not allowed"),
        ("row_number() over (order by p.id)::text", "window functions are not allowed"),
        ("unnest(array[p.owner])", "set-returning functions are not allowed"),
        ("(select max(k.body) from public.kids k where k.parent_id = p.id)", "subselect"),
        ("array(table public.other)", "subselect"),
        ("(p.id = 1)::text || p.id::nothing", "does not exist"),
        ("p.owner || t.twice", "generated column"),
        ("p.ctid::text", "no column \"ctid\""),
        ("row(p.id, p.owner)", "columns[0]"),
        ("clock_timestamp()::text", "volatile"),
        ("p.owner || pg_catalog.random()::text", "volatile"),
        ("p.owner || current_setting('a.b')", "current_setting depends on the session or the moment"),
        ("p.owner || pg_catalog.now()::text", "now depends on"),
        ("p.owner || current_user", "current_user depends on"),
        ("public.of_parent(p.owner)", "function public.of_parent is not IMMUTABLE"),
    ] {
        let schema = format!(
            "{} alter table public.kids add twice text generated always as (body || body) stored;
             create function public.of_parent(text) returns text language sql stable as 'select $1'",
            OWNED.schema
        );
        refused(&schema, &with_value(value), &["columns[0]", part]).await;
    }
    // What needs no database is refused before.
    for (value, part) in [
        ("p", "whole row"),
        ("p.*", "whole row"),
        ("p.owner; drop table x", "semicolon"),
        ("p.owner) + (1", "unbalanced"),
        ("$1", "parameters"),
        ("t.owner", "uses a column that this job fills"),
    ] {
        let error = backfilld::job::load::parse(&with_value(value), "job.toml", |_| unreachable!())
            .expect_err("is refused")
            .render();
        assert!(error.contains("columns[0].value") && error.contains(part), "{value}: {error}");
    }
}

#[tokio::test]
async fn types_that_are_no_types_or_do_not_fit_are_refused() {
    for (sql_type, part) in [
        ("nothing", "does not exist"),
        ("citext", "does not exist"),
        ("uuid", "has type text, the column has uuid"),
        ("text, drop body", "columns[0].type"),
        ("text, 1", "columns[0].type"),
        ("text default 'x'", "columns[0].type"),
        ("text collate \"C\"", "columns[0].type"),
        ("text) as x, (1", "columns[0].type"),
        ("public.parents", "columns[0]"),
    ] {
        let job = OWNED.job.replace("value = ", &format!("type = {sql_type:?}\nvalue = "));
        let error = match backfilld::job::load::parse(&job, "job.toml", |_| unreachable!()) {
            Err(e) => e.render(),
            Ok(_) => refusal(OWNED.schema, &job).await,
        };
        assert!(error.contains("columns[0]") && error.contains(part), "{sql_type}: {error}");
    }
}

#[tokio::test]
async fn a_composite_value_is_refused() {
    let schema = OWNED.schema.replace("owner text", "owner public.pair");
    let schema = schema.replace(
        "insert into public.parents values (1, 'a'), (2, 'b'), (3, null);",
        "insert into public.parents values (1), (2), (3);",
    );
    refused(
        &format!("create type public.pair as (a int, b int); {schema}"),
        OWNED.job,
        &["columns[0].type", "composite"],
    )
    .await;
}
