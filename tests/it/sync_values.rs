//! Values: expressions that raise, types of values and keys, unusual names.

use crate::sync_fixture::{Case, Fixture, LOOSE, OWNED};

fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

/// [`OWNED`] with another value; the oracle must say what a raising row has.
fn with_value(value: &str, oracle: &'static str) -> Case {
    Case { job: leak(OWNED.job.replace("\"p.owner\"", &format!("{value:?}"))), oracle, ..OWNED }
}

const RAISING: &str = "create function public.refuse(v text) returns text language plpgsql immutable as $$ begin
      if v = 'bad' then raise exception 'no' using errcode = 'insufficient_privilege'; end if;
      if v = 'assert' then assert false; end if;
      if v = 'custom' then raise exception 'no' using errcode = 'ZZ001'; end if;
      return v; end $$;
    create table public.parents (id bigint primary key, owner text, note text);
    create table public.kids (id bigint primary key, parent_id bigint not null
      references public.parents on delete cascade on update cascade, body text);
    insert into public.parents values (1, '1'), (2, '2');
    insert into public.kids values (1, 1, 'x'), (2, 2, 'x');";

#[tokio::test]
async fn an_expression_that_raises_leaves_null_and_breaks_no_write() {
    let parent = "(select p.owner from public.parents p where p.id = t.parent_id)";
    let divided = leak(format!("case when {parent} ~ '^[1-9]' then (10 / {parent}::int)::text end"));
    let refused = leak(format!("nullif(nullif(nullif({parent}, 'bad'), 'assert'), 'custom')"));
    let cases = [
        (with_value("(10 / p.owner::int)::text", divided), ["0", "oops", ""]),
        (with_value("public.refuse(p.owner)", refused), ["bad", "assert", "custom"]),
    ];
    for (case, values) in cases {
        let f = Fixture::new(Case { schema: RAISING, ..case }).await;
        for value in values {
            for sql in [
                format!("update public.parents set owner = '{value}' where id = 1"),
                "update public.kids set body = 'y' where parent_id = 1".to_owned(),
                "insert into public.kids (id, parent_id) values (10, 1)".to_owned(),
                "update public.kids set parent_id = 1 where id = 2".to_owned(),
                "delete from public.kids where id = 10; update public.kids set parent_id = 2 where id = 2".to_owned(),
                "update public.parents set owner = '2' where id = 1".to_owned(),
            ] {
                f.sql(&sql).await;
                let stale = f.stale().await;
                assert!(stale.is_none(), "{value:?}: {sql}: {stale:?}");
            }
        }
        f.assert_no_drift("at the end").await;
    }
}

#[tokio::test]
async fn what_is_not_the_values_fault_reaches_the_application() {
    let f = Fixture::new(Case {
        schema: RAISING,
        ..with_value("upper(p.owner)", "(select upper(p.owner) from public.parents p where p.id = t.parent_id)")
    })
    .await;
    let (holder, mut writer) = (f.app("holder").await, f.app("writer").await);
    holder.run("begin; update public.parents set owner = 'new' where id = 1").await;
    writer.run("set lock_timeout = '50ms'").await;
    writer.send("insert into public.kids (id, parent_id) values (10, 1)");
    assert_eq!(writer.finish_err().await, "55P03");
    writer.send("update public.kids set body = 'y' where id = 1");
    assert_eq!(writer.finish_err().await, "55P03");
    // The commit itself is not bounded by statement_timeout, only by lock_timeout; a statement is.
    writer.run("set lock_timeout = 0; set statement_timeout = '50ms'").await;
    writer.run("begin; insert into public.kids (id, parent_id) values (10, 1)").await;
    writer.send("set constraints all immediate");
    assert_eq!(writer.finish_err().await, "57014");
    writer.run("rollback").await;
    holder.run("commit").await;
    // Inside of the expression as well.
    let f = Fixture::new(Case {
        schema: RAISING,
        ..with_value("public.refuse(p.owner)", "(select p.owner from public.parents p where p.id = t.parent_id)")
    })
    .await;
    f.sql(
        "create or replace function public.refuse(v text) returns text language plpgsql as $$ begin
             raise exception 'again' using errcode = 'serialization_failure'; end $$",
    )
    .await;
    let mut writer = f.app("writer").await;
    writer.send("insert into public.kids (id, parent_id) values (10, 1)");
    assert_eq!(writer.finish_err().await, "40001");
}

#[tokio::test]
async fn a_value_that_does_not_fit_the_column_leaves_null_and_breaks_no_write() {
    for (sql_type, fits, too_much) in [
        ("varchar(3)", "abc", "abcd"),
        ("numeric(4,1)", "1.25", "12345"),
        ("smallint", "7", "70000"),
        ("public.small", "7", "70000"),
    ] {
        let (source, cast) = if sql_type == "varchar(3)" { ("text", "varchar(3)") } else { ("bigint", sql_type) };
        let source = if sql_type.starts_with("numeric") { "numeric" } else { source };
        let schema = leak(format!(
            "create domain public.small as bigint check (value < 100);
             create table public.parents (id bigint primary key, owner {source});
             create table public.kids (id bigint primary key, parent_id bigint not null references public.parents, body text);
             insert into public.parents values (1, '{fits}');
             insert into public.kids values (1, 1, 'x');"));
        let job = leak(OWNED.job.replace("value = ", &format!("type = {sql_type:?}\nvalue = ")));
        let oracle = leak(format!(
            "(select case when p.owner::text <> '{too_much}' then p.owner::{cast} end
                                    from public.parents p where p.id = t.parent_id)"
        ));
        let f = Fixture::new(Case { schema, job, oracle }).await;
        f.assert_no_drift(sql_type).await;
        f.sql(&format!(
            "update public.parents set owner = '{too_much}'; update public.kids set body = 'y';
            insert into public.kids (id, parent_id) values (2, 1)"
        ))
        .await;
        assert_eq!((f.value(1).await, f.value(2).await, f.stale().await), (None, None, None), "{sql_type}");
        f.sql(&format!("update public.parents set owner = '{fits}'")).await;
        f.assert_no_drift(sql_type).await;
    }
}

/// Types of values: two values of each, and perhaps a third one that is equal to the second but not the same.
const TYPES: &[(&str, &str, &str)] = &[
    ("uuid", "00000000-0000-4000-8000-000000000001", "ffffffff-ffff-4fff-8fff-ffffffffffff"),
    ("bigint", "-9223372036854775808", "7"),
    ("text", "it's \\ \"q\" $backfilld$ $$", ""),
    ("public.citext", "Mixed", "mixed"),
    ("json", "{\"a\": 1}", "{\"a\":1}"),
    ("jsonb", "{\"a\": 1}", "[]"),
    ("xml", "<a/>", "<b/>"),
    ("point", "(1,2)", "(1,3)"),
    ("public.mood", "sad", "happy"),
    ("public.name_d", "x", "y"),
    ("numeric(10,2)", "1.20", "-3.40"),
    ("varchar(5)", "abc", "abcde"),
    ("char(5)", "abc", "abcde"),
    ("bit(3)", "101", "111"),
    ("text[]", "{a,NULL,\"b c\"}", "{}"),
    ("numeric(6,2)[]", "{1.10}", "{2.20}"),
    ("timestamptz", "2024-02-29 12:00:00+00", "infinity"),
    ("timestamp(3)", "2024-02-29 12:00:00.123", "-infinity"),
    ("float8", "NaN", "-0"),
    ("bytea", "\\x00ff", "\\x"),
    ("int4range", "[1,3)", "empty"),
    ("interval", "1 mon", "30 days"),
    ("inet", "10.0.0.1", "::1"),
];

#[tokio::test]
async fn values_of_every_type_arrive_and_change() {
    let mut schema = String::from(
        "create type public.mood as enum ('sad', 'happy'); create domain public.name_d as text check (value <> '');
         create table public.parents (id bigint primary key",
    );
    let mut job = OWNED.job.split("[[columns]]").next().expect("a head").to_owned();
    for (i, (sql_type, ..)) in TYPES.iter().enumerate() {
        schema.push_str(&format!(", c{i} {sql_type}"));
        // Every second type is the value's own.
        let declared = if i % 2 == 0 { format!("type = {sql_type:?}") } else { String::new() };
        job.push_str(&format!("\n[[columns]]\nname = \"v{i}\"\nvalue = \"p.c{i}\"\n{declared}"));
    }
    schema.push_str(
        "); create table public.kids (id bigint primary key, parent_id bigint references public.parents, body text);",
    );
    let list = |value: fn(&(&'static str, &'static str, &'static str)) -> &'static str| {
        TYPES.iter().map(|t| backfilld::pg::ident::literal(value(t))).collect::<Vec<_>>().join(", ")
    };
    schema.push_str(&format!("insert into public.parents values (1, {}), (2, {});", list(|t| t.1), list(|t| t.2)));
    schema.push_str("insert into public.kids values (1, 1), (2, 2), (3, null);");
    let oracle = "(select p.c0 from public.parents p where p.id = t.parent_id)";
    let f = Fixture::new(Case { schema: leak(schema), job: leak(job), oracle }).await;
    for (shape, (sql_type, ..)) in f.facts.shape.columns.iter().zip(TYPES) {
        assert_eq!(shape.converts_to, None, "{sql_type}");
    }
    let all = TYPES.iter().enumerate().map(|(i, _)| format!("t.v{i}::text is distinct from p.c{i}::text"));
    let all = format!(
        "select string_agg(t::text, ' ') from public.kids t left join public.parents p on p.id = t.parent_id where {}",
        all.collect::<Vec<_>>().join(" or ")
    );
    for sql in [
        "select",
        "insert into public.kids (id, parent_id) values (4, 1), (5, 2), (6, null)",
        "update public.kids set parent_id = 3 - parent_id",
        "update public.kids set v0 = null, v4 = null, v6 = null",
        "update public.parents a set (c0, c3, c4, c8, c13) = (select c0, c3, c4, c8, c13 from public.parents b where b.id = 3 - a.id)",
    ] {
        f.sql(sql).await;
        assert_eq!(f.text(&all).await, None, "{sql}");
        f.assert_no_drift(sql).await;
    }
}

#[tokio::test]
async fn keys_of_every_type_are_walked_without_gaps_and_found_again() {
    for (sql_type, keys) in [
        ("uuid", "select gen_random_uuid() from generate_series(1, 40)"),
        ("bigint", "select n from generate_series(-20, 19) n"),
        ("text", "select n || e'\\'\"\\\\ %$$\\n,{}()\\u00e4\\U0001F600' from generate_series(1, 40) n"),
        ("text collate \"C\"", "select chr(n) || 'x' from generate_series(60, 99) n"),
        (
            "public.citext",
            "select case n % 2 when 0 then chr(65 + n / 2) else chr(97 + n / 2) || '_' end from generate_series(0, 39) n",
        ),
        ("numeric", "select (n / 7.0) - 2 from generate_series(1, 40) n"),
        (
            "timestamptz",
            "select timestamptz '2024-03-31 00:30+00' + n * interval '17 min 3.000001 s' from generate_series(1, 40) n",
        ),
        ("char(6)", "select 'k' || n from generate_series(1, 40) n"),
        ("date", "select date '0044-03-15 BC' + n from generate_series(1, 40) n"),
        ("bytea", "select decode(lpad(to_hex(n), 4, '0'), 'hex') from generate_series(1, 40) n"),
        ("float8", "select 1.0::float8 / n from generate_series(1, 40) n"),
        ("public.mood_k", "select ('m' || n)::public.mood_k from generate_series(1, 40) n"),
        ("text[]", "select array['a', null, n::text] from generate_series(1, 40) n"),
    ] {
        let labels: Vec<String> = (1..=40).map(|n| format!("'m{n}'")).collect();
        let schema = leak(format!(
            "create type public.mood_k as enum ({});
             create table public.parents (id {sql_type} primary key, owner text);
             create table public.kids (key {sql_type}, b smallint, parent_id {sql_type} not null references public.parents
               on update cascade, body text, primary key (key, b));
             insert into public.parents select k, 'o' || row_number() over () from ({keys}) k(k);
             insert into public.kids select id, 1, id from public.parents union all select id, -2, id from public.parents",
            labels.join(", ")
        ));
        let f = Fixture::new(Case { schema, ..OWNED }).await;
        f.assert_no_drift(sql_type).await;
        f.unfill().await;
        assert_eq!(f.sweep(7).await, 80, "{sql_type}");
        f.assert_no_drift(sql_type).await;
        f.sql("update public.parents set owner = 'new ' || owner").await;
        f.sql("insert into public.kids select key, 5, parent_id from public.kids where b = 1").await;
        f.assert_no_drift(sql_type).await;
    }
}

#[tokio::test]
async fn keys_that_are_equal_without_being_the_same_share_the_place_of_a_missing_row() {
    for (sql_type, key, reference) in [
        ("public.citext", "ABC", "abc"),
        ("numeric", "9.00", "9"),
        ("timestamptz", "2024-01-01 00:00+00", "2024-01-01 01:00+01"),
        ("money", "9", "9.00"),
        ("text", "it's", "it's"),
    ] {
        let schema = leak(
            LOOSE
                .schema
                .replace("id bigint primary key, owner", &format!("id {sql_type} primary key, owner"))
                .replace("parent_id bigint", &format!("parent_id {sql_type}"))
                .split("insert")
                .next()
                .expect("a head")
                .to_owned(),
        );
        let f = Fixture::new(Case { schema, ..LOOSE }).await;
        let (mut writer, mut maker) = (f.app("writer").await, f.app("maker").await);
        writer.run("set timezone = 'Asia/Tokyo'; set datestyle = 'german'").await;
        writer
            .run(&format!(
                "begin; insert into public.kids (id, parent_id) values (10, '{}')",
                reference.replace('\'', "''")
            ))
            .await;
        writer.run("set constraints all immediate").await;
        maker.send(&format!("insert into public.parents values ('{}', 'new')", key.replace('\'', "''")));
        f.db.wait_blocked(&maker).await;
        writer.send("commit");
        writer.finish_ok().await;
        maker.finish_ok().await;
        assert_eq!(f.value(10).await.as_deref(), Some("new"), "{sql_type}");
        f.assert_no_drift(sql_type).await;
    }
}

#[tokio::test]
async fn a_conversion_to_text_does_not_depend_on_the_writers_session() {
    let schema = "create table public.parents (id bigint primary key, owner timestamptz);
        create table public.kids (id bigint primary key, parent_id bigint not null references public.parents, body text);
        insert into public.parents values (1, '2024-01-01 00:00+00');
        insert into public.kids values (1, 1, 'x');";
    let job = leak(OWNED.job.replace("value = ", "type = \"text\"\nvalue = "));
    let f = Fixture::new(Case {
        schema,
        job,
        oracle: "(select '2024-01-01 00:00:00+00' from public.parents p where p.id = t.parent_id)",
    })
    .await;
    let writer = f.app("writer").await;
    writer.run("set timezone = 'Asia/Tokyo'; set datestyle = 'german'; insert into public.kids (id, parent_id) values (2, 1);
                update public.kids set body = 'y' where id = 1").await;
    f.assert_no_drift("timezone").await;
}

const NAMES: Case = Case {
    schema: r#"create schema "We""ird";
        create table "We""ird"."Pärents; drop table x --" ("Id" bigint primary key, "own'er" text);
        create table "We""ird"."{table}" ("Kéy one" bigint, "new" bigint, "{table}" bigint not null references "We""ird"."Pärents; drop table x --",
          v0 text, "a
  from b" int, primary key ("Kéy one", "new"));
        insert into "We""ird"."Pärents; drop table x --" values (1, 'a'), (2, 'b');
        insert into "We""ird"."{table}" values (1, 1, 1, 'z'), (1, 2, 2, 'z'), (2, 1, 1, 'z');"#,
    job: r#"name = "a2345678901234567890123456789012345678"
        [target]
        table = '"We""ird"."{table}"'
        [[source]]
        alias = "backfilld"
        table = '"We""ird"."Pärents; drop table x --"'
        on = { Id = 't."{table}"' }
        [[columns]]
        name = 'x"; drop table y; --'
        comment = "it's \\ $$"
        value = """
  (case when t.\"a
  from b\" is null or true then backfilld.\"own'er\" end)
"""
        [[columns]]
        name = "tg_op"
        value = """t.\"a
  from b\" + 1"""
"#,
    oracle: r#"(select p."own'er" from "We""ird"."Pärents; drop table x --" p where p."Id" = t."{table}")"#,
};

#[tokio::test]
async fn unusual_names_and_texts_are_only_names_and_texts() {
    let f = Fixture::new(NAMES).await;
    f.assert_no_drift("after the sweep").await;
    f.sql(r#"update "We""ird"."Pärents; drop table x --" set "own'er" = 'new' where "Id" = 1"#).await;
    f.sql(r#"insert into "We""ird"."{table}" values (3, 3, 2, 'z', 5); update "We""ird"."{table}" set "{table}" = 2, v0 = null"#).await;
    f.assert_no_drift("after writes").await;
    let names =
        f.text("select string_agg(tgname, ',') from pg_trigger where tgname like 'zzz%' and length(tgname) > 63").await;
    assert_eq!(names, None);
    for trigger in backfilld::plan::sync_sql::triggers(&f.facts.shape) {
        assert!(trigger.name.len() <= 63, "{}", trigger.name);
    }
}

#[tokio::test]
async fn a_column_that_raises_leaves_the_others_alone() {
    let job =
        leak(format!("{}\n[[columns]]\nname = \"part\"\ntype = \"int\"\nvalue = \"10 / p.note::int\"", OWNED.job));
    let schema =
        leak(OWNED.schema.replace("(1, 'a'), (2, 'b'), (3, null)", "(1, 'a', '5'), (2, 'b', '1'), (3, null, null)"));
    let f = Fixture::new(Case { job, schema, ..OWNED }).await;
    f.sql("update public.parents set note = '0', owner = 'new' where id = 1; update public.kids set owner = null, part = 7;
           insert into public.kids (id, parent_id) values (10, 1)").await;
    assert_eq!((f.stale().await, f.value(10).await.as_deref()), (None, Some("new")));
    let parts = "select string_agg(id || ':' || coalesce(part::text, '-'), ' ' order by id) from public.kids";
    assert_eq!(f.text(parts).await.as_deref(), Some("1:- 2:10 3:- 4:- 10:-"));
    f.sql("update public.parents set note = '2' where id = 1").await;
    f.assert_no_drift("the divisor is back").await;
}
