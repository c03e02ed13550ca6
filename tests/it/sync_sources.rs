//! Writers of source tables: what reaches the target rows, and what is refused.

use crate::support::has_version;
use crate::sync_fixture::{CHAIN, Case, Fixture, LEVELS, LOOSE, OWNED};

/// At READ COMMITTED the change reaches the rows; at other levels it is refused with 0A000.
async fn change(case: Case, sql: &str) {
    let f = Fixture::new(case).await;
    let mut writer = f.app("writer").await;
    for level in LEVELS {
        f.reset().await;
        writer.send(&format!("begin isolation level {level}; {sql}; commit"));
        let what = format!("{}: {level}: {sql}", f.spec.name);
        if level == "read committed" {
            writer.finish().await.unwrap_or_else(|e| panic!("{what}: {e:?}"));
        } else {
            let result = writer.finish().await.map(|_| ());
            let code = result.err().and_then(|e| e.code().map(|c| c.code().to_owned()));
            assert_eq!(code.as_deref(), Some("0A000"), "{what}");
            writer.run("rollback").await;
        }
        f.assert_no_drift(&what).await;
    }
}

#[tokio::test]
async fn a_change_of_the_value_reaches_the_rows_or_is_refused() {
    change(OWNED, "update public.parents set owner = 'new' where id = 1").await;
    change(OWNED, "update public.parents set owner = null where id = 1").await;
    change(CHAIN, "update public.accounts set name = 'new' where id = 1").await;
    change(CHAIN, "update public.parents set account_id = 2 where id = 1").await;
    change(LOOSE, "update public.parents set owner = null where id = 3 or id = 1").await;
}

#[tokio::test]
async fn a_change_of_the_sources_key_reaches_the_rows_that_it_left_and_those_it_came_to() {
    change(OWNED, "update public.parents set id = 7 where id = 1").await;
    change(LOOSE, "update public.parents set id = 9 where id = 1").await;
    let f = Fixture::new(LOOSE).await;
    f.sql("update public.parents set id = -id; update public.parents set id = 4 + id").await;
    f.assert_no_drift("keys that rotate").await;
}

#[tokio::test]
async fn source_rows_that_come_and_go_reach_the_rows_where_nothing_says_that_they_exist() {
    change(LOOSE, "insert into public.parents values (9, 'new')").await;
    change(LOOSE, "delete from public.parents where id = 1").await;
    change(LOOSE, "truncate public.parents").await;
    let f = Fixture::new(LOOSE).await;
    f.sql(
        "insert into public.parents values (9, 'x') on conflict (id) do update set owner = 'y';
           insert into public.parents values (9, 'x') on conflict (id) do update set owner = 'y'",
    )
    .await;
    assert_eq!(f.value(4).await.as_deref(), Some("y"));
    f.sql("begin; delete from public.parents where id = 9; insert into public.parents values (9, 'z'); commit").await;
    assert_eq!(f.value(4).await.as_deref(), Some("z"));
    f.assert_no_drift("insert, upsert, replace").await;
}

#[tokio::test]
async fn a_change_that_does_not_touch_the_value_is_let_through_at_every_level() {
    let f = Fixture::new(OWNED).await;
    let writer = f.app("writer").await;
    for level in LEVELS {
        f.reset().await;
        writer
            .run(&format!("begin isolation level {level}; update public.parents set note = 'n', owner = owner; commit"))
            .await;
        // What the foreign key guarantees needs no trigger.
        writer.run(&format!("begin isolation level {level}; insert into public.parents values (8, 'h'); commit")).await;
        writer.run(&format!("begin isolation level {level}; delete from public.parents where id = 1; commit")).await;
        f.assert_no_drift(level).await;
    }
}

#[tokio::test]
async fn read_uncommitted_is_read_committed() {
    let f = Fixture::new(OWNED).await;
    f.sql("begin isolation level read uncommitted; update public.parents set owner = 'new' where id = 1; commit").await;
    assert_eq!(f.value(1).await.as_deref(), Some("new"));
}

#[tokio::test]
async fn replicas_and_subscriptions_writers_are_caught() {
    for case in [OWNED, LOOSE, CHAIN] {
        let f = Fixture::new(case).await;
        let change = match f.spec.name.as_str() {
            "chain" => "update public.accounts set name = 'new' where id = 1",
            _ => "update public.parents set owner = 'new' where id = 1",
        };
        f.sql(&format!(
            "set session_replication_role = replica; {change};
            insert into public.kids (id, parent_id, owner) values (10, 2, 'spoofed');
            update public.kids set owner = 'spoofed' where id = 2; reset session_replication_role"
        ))
        .await;
        assert_eq!(f.value(1).await.as_deref(), Some("new"));
        f.assert_no_drift("session_replication_role = replica").await;
    }
}

#[tokio::test]
async fn a_row_that_a_snapshot_cannot_see_is_not_taken_for_missing() {
    // The parent appears after the snapshot: nobody else will bring its value to the row.
    for level in &LEVELS[1..] {
        for write in [
            "insert into public.kids (id, parent_id) values (10, 9)",
            "update public.kids set parent_id = 9 where id = 2",
        ] {
            let f = Fixture::new(LOOSE).await;
            let mut writer = f.app("writer").await;
            writer.run(&format!("begin isolation level {level}; select 1 from public.kids")).await;
            f.sql("insert into public.parents values (9, 'new')").await;
            writer.run(write).await;
            writer.send("commit");
            assert_eq!(writer.finish_err().await, "0A000");
            f.assert_no_drift(level).await;
            // A reference that is NULL leads nowhere, now and later.
            writer
                .run(&format!("begin isolation level {level}; insert into public.kids (id) values (11); commit"))
                .await;
        }
    }
}

#[tokio::test]
async fn a_strict_snapshot_that_missed_a_change_without_effect_cannot_bring_the_old_value_back() {
    for level in &LEVELS[1..] {
        // Unfilled, and the source becomes NULL: the change has no row to update.
        let f = Fixture::new(OWNED).await;
        f.unfill().await;
        let mut writer = f.app("writer").await;
        writer.run(&format!("begin isolation level {level}; select 1 from public.kids")).await;
        f.sql("update public.parents set owner = null where id = 1").await;
        writer.send("update public.kids set body = 'y' where id = 1; commit");
        assert_eq!(writer.finish_err().await, "40001");
        writer.run("rollback").await;
        f.sweep(10).await;
        f.assert_no_drift("unfilled").await;

        // The kid's own value hides the parent's, until it is taken away in an older snapshot.
        let own = "coalesce(t.own, p.owner)";
        let job = LOOSE.job.replace("coalesce(p.owner, t.own)", own);
        let oracle = "coalesce(t.own, (select p.owner from public.parents p where p.id = t.parent_id))";
        let f = Fixture::new(Case { job: Box::leak(job.into_boxed_str()), oracle, ..LOOSE }).await;
        f.sql("update public.kids set own = 'b', parent_id = 2 where id = 1").await;
        let mut writer = f.app("writer").await;
        writer.run(&format!("begin isolation level {level}; select 1 from public.kids")).await;
        f.sql("update public.parents set owner = 'c' where id = 2").await;
        writer.send("update public.kids set own = null where id = 1; commit");
        assert_eq!(writer.finish_err().await, "40001");
        f.assert_no_drift("hidden").await;
    }
}

const TWO_REFERENCES: Case = Case {
    schema: "create table public.rates (tenant bigint, plan bigint, name text, primary key (tenant, plan));
        create table public.parents (id bigint primary key, plan bigint);
        create table public.kids (id bigint primary key, parent_id bigint not null references public.parents,
          tenant bigint, body text);
        insert into public.parents values (1, 1), (2, 2);
        insert into public.rates values (5, 1, 'a'), (5, 2, 'b');
        insert into public.kids values (1, 1, 5, 'x'), (2, 2, 5, 'x');",
    job: r#"name = "two"
        target.table = "public.kids"
        [[source]]
        alias = "p"
        table = "public.parents"
        on = { id = "t.parent_id" }
        [[source]]
        alias = "r"
        table = "public.rates"
        on = { tenant = "t.tenant", plan = "p.plan" }
        join = "left"
        [[columns]]
        name = "owner"
        value = "r.name""#,
    oracle: "(select r.name from public.parents p join public.rates r on r.plan = p.plan and r.tenant = t.tenant where p.id = t.parent_id)",
};

#[tokio::test]
async fn a_middle_row_whose_far_row_depends_on_the_target_too_holds_it_still() {
    let pairs = [
        ("update public.parents set plan = 2 where id = 1", "update public.rates set name = 'new' where plan = 2"),
        ("update public.parents set plan = 3 where id = 1", "insert into public.rates values (5, 3, 'new')"),
        ("update public.parents set plan = 2 where id = 1", "delete from public.rates where plan = 2"),
        ("update public.kids set tenant = 6 where id = 1", "insert into public.rates values (6, 1, 'new')"),
    ];
    let f = Fixture::new(TWO_REFERENCES).await;
    let (one, mut two) = (f.app("one").await, f.app("two").await);
    for (first, second) in pairs {
        for (first, second) in [(first, second), (second, first)] {
            f.reset().await;
            one.run(&format!("begin; {first}")).await;
            two.send(second);
            f.db.wait_blocked_or_finished(&two).await;
            one.run("commit").await;
            two.finish_ok().await;
            f.assert_no_drift(&format!("{first} against {second}")).await;
        }
    }
}

#[tokio::test]
async fn a_partitioned_source_whose_row_moves_to_another_partition_is_followed() {
    if !has_version(15, "foreign keys forbid rows to move between partitions") {
        return;
    }
    let schema = "create table public.parents (id bigint primary key, owner text) partition by range (id);
        create table public.parents_low partition of public.parents for values from (0) to (100);
        create table public.parents_high partition of public.parents for values from (100) to (200);
        create table public.kids (id bigint primary key, parent_id bigint not null
          references public.parents on update cascade, body text);
        insert into public.parents values (1, 'a'), (2, 'b'), (3, null);
        insert into public.kids values (1, 1, 'x'), (2, 2, 'x');";
    let f = Fixture::new(Case { schema, ..OWNED }).await;
    f.sql("update public.parents set owner = 'new' where id = 1").await;
    assert_eq!(f.value(1).await.as_deref(), Some("new"));
    f.sql("update public.parents set id = 101, owner = 'moved' where id = 1").await;
    f.assert_no_drift("a row that moved between partitions").await;
    f.sql(
        "update public.parents_high set owner = 'direct' where id = 101;
           set session_replication_role = replica; update public.parents set owner = 'replica' where id = 2",
    )
    .await;
    f.assert_no_drift("partitions written directly, and as a replica").await;
}

#[tokio::test]
async fn one_partition_can_be_a_target() {
    let schema = "create table public.parents (id bigint primary key, owner text);
        create table public.all_kids (id bigint, parent_id bigint not null references public.parents, body text, year int,
          primary key (id, year)) partition by list (year);
        create table public.kids partition of public.all_kids for values in (1);
        create table public.more partition of public.all_kids for values in (2);
        insert into public.parents values (1, 'a'), (2, 'b');
        insert into public.all_kids values (1, 1, 'x', 1), (2, 2, 'x', 1), (3, 1, 'x', 2);";
    // A partition has its parent's columns and no others, so the column must be there.
    let f =
        Fixture::new(Case { schema: leak(format!("{schema} alter table public.all_kids add owner text;")), ..OWNED })
            .await;
    f.sql("insert into public.all_kids values (4, 1, 'x', 1, 'spoofed'); update public.all_kids set year = 1 where id = 3;
           update public.all_kids set owner = null, parent_id = 3 - parent_id; update public.all_kids set year = 2 where id = 1;
           update public.parents set owner = 'new' where id = 1").await;
    f.assert_no_drift("a partition").await;
}

fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}
