//! Races between batches, writers and changing sources, each as one interleaving (hazards 7 to 12).

use crate::sync_fixture::{CHAIN, Case, Fixture, LOOSE, OWNED};

/// A batch waits for rows that the change has locked; what it read before the wait is old.
async fn batch_waits_for(dedicated: bool, changes: &[(&str, Option<&str>)]) {
    let f = Fixture::with(OWNED, dedicated).await;
    let changer = f.app("changer").await;
    let mut batch = f.batch("batch").await;
    for (change, expected) in changes {
        f.reset().await;
        f.unfill().await;
        batch.rewind();
        changer.run(&format!("begin; {change}")).await;
        assert!(batch.begin(100).await);
        let fill = batch.fill();
        batch.session.send(&fill);
        f.db.wait_blocked(&batch.session).await;
        changer.run("commit").await;
        batch.session.finish_ok().await;
        batch.finish().await;
        assert_eq!(f.value(1).await.as_deref(), *expected, "{change}");
        f.assert_no_drift(change).await;
    }
}

#[tokio::test]
async fn a_batch_that_waited_for_the_parents_change_does_not_write_the_old_value() {
    for dedicated in [true, false] {
        let changes = [
            ("update public.parents set owner = 'new' where id = 1", Some("new")),
            ("update public.parents set owner = null where id = 1", None),
        ];
        batch_waits_for(dedicated, &changes).await;
    }
}

#[tokio::test]
async fn a_batch_that_waited_for_a_row_that_was_re_parented_meanwhile_does_not_write_the_old_parents_value() {
    for dedicated in [true, false] {
        let changes = [
            ("update public.kids set parent_id = 2 where id = 1", Some("b")),
            // To a parent without owner: NULL is the value, not "not yet filled".
            ("update public.kids set parent_id = 3 where id = 1", None),
            ("delete from public.kids where id = 1", None),
            ("update public.kids set id = 0 where id = 1", None),
        ];
        batch_waits_for(dedicated, &changes).await;
    }
}

#[tokio::test]
async fn a_value_that_becomes_null_between_the_batchs_snapshot_and_its_row_lock_is_not_written() {
    // Row 1 keeps the batch waiting after its snapshot; row 2's value changes and commits without being waited for.
    let changes =
        ["update public.parents set owner = null where id = 2", "update public.kids set parent_id = 3 where id = 2"];
    for dedicated in [true, false] {
        let f = Fixture::with(OWNED, dedicated).await;
        let (holder, changer) = (f.app("holder").await, f.app("changer").await);
        let mut batch = f.batch("batch").await;
        for change in changes {
            f.reset().await;
            f.unfill().await;
            batch.rewind();
            holder.run("begin; select 1 from public.kids where id = 1 for update").await;
            assert!(batch.begin(100).await);
            let fill = batch.fill();
            batch.session.send(&fill);
            f.db.wait_blocked(&batch.session).await;
            changer.run(change).await;
            holder.run("commit").await;
            batch.session.finish_ok().await;
            batch.finish().await;
            assert_eq!(f.value(2).await, None, "{change}, dedicated {dedicated}");
            f.assert_no_drift(change).await;
        }
    }
}

#[tokio::test]
async fn a_batch_that_fills_before_the_source_changes_is_followed_by_the_change() {
    for change in ["'new'", "null"] {
        let f = Fixture::new(OWNED).await;
        f.unfill().await;
        let mut changer = f.app("changer").await;
        let mut batch = f.batch("batch").await;
        assert!(batch.begin(100).await);
        let fill = batch.fill();
        batch.session.run(&fill).await;
        changer.send(&format!("update public.parents set owner = {change} where id = 1"));
        f.db.wait_blocked(&changer).await;
        batch.finish().await;
        changer.finish_ok().await;
        f.assert_no_drift(change).await;
    }
}

/// Write skew: a row appears under a parent whose value changes at the same time. Whoever commits first, and whether the
/// deferred trigger runs at commit or at once.
async fn skew(case: Case, write: &str, change: &str) {
    let what = format!("{write} against {change}");
    let f = Fixture::new(case).await;
    let (mut writer, mut changer) = (f.app("writer").await, f.app("changer").await);
    writer.run(&format!("begin; {write}")).await;
    changer.run("begin").await;
    changer.send(change);
    f.db.wait_blocked_or_finished(&changer).await;
    // The writer's deferred trigger waits for the changer's row, or the changer waits for the writer's.
    writer.send("commit");
    f.db.wait_blocked_or_finished(&writer).await;
    if changer.is_finished() {
        changer.finish_ok().await;
        changer.run("commit").await;
        writer.finish_ok().await;
    } else {
        writer.finish_ok().await;
        changer.finish_ok().await;
        changer.run("commit").await;
    }
    f.assert_no_drift(&format!("{what}, writer first")).await;

    f.reset().await;
    changer.run(&format!("begin; {change}")).await;
    writer.send(&format!("begin; {write}"));
    f.db.wait_blocked_or_finished(&writer).await;
    changer.run("commit").await;
    writer.finish_ok().await;
    writer.run("commit").await;
    f.assert_no_drift(&format!("{what}, changer first")).await;

    f.reset().await;
    writer.run(&format!("begin; set constraints all immediate; {write}")).await;
    changer.send(change);
    f.db.wait_blocked(&changer).await;
    writer.run("commit").await;
    changer.finish_ok().await;
    f.assert_no_drift(&format!("{what}, constraints immediate")).await;
}

const INSERT: &str = "insert into public.kids (id, parent_id) values (10, 1)";
const MOVE: &str = "update public.kids set parent_id = 1 where id = 2";

#[tokio::test]
async fn a_row_that_comes_to_a_parent_while_its_value_changes_gets_the_new_value() {
    for change in
        ["update public.parents set owner = 'new' where id = 1", "update public.parents set owner = null where id = 1"]
    {
        skew(OWNED, INSERT, change).await;
        skew(OWNED, MOVE, change).await;
        skew(LOOSE, INSERT, change).await;
    }
}

#[tokio::test]
async fn a_row_whose_key_changes_after_it_came_is_still_settled() {
    let write = "insert into public.kids (id, parent_id) values (10, 1); update public.kids set id = 11 where id = 10";
    skew(OWNED, write, "update public.parents set owner = 'new' where id = 1").await;
}

#[tokio::test]
async fn a_row_that_comes_to_a_chain_while_either_hop_changes_gets_the_new_value() {
    for change in [
        "update public.accounts set name = 'new' where id = 1",
        "update public.parents set account_id = 2 where id = 1",
    ] {
        skew(CHAIN, INSERT, change).await;
        skew(CHAIN, MOVE, change).await;
    }
}

#[tokio::test]
async fn a_middle_row_that_is_pointed_elsewhere_while_the_far_row_changes_carries_the_new_value() {
    skew(
        CHAIN,
        "update public.parents set account_id = 2 where id = 1",
        "update public.accounts set name = 'new' where id = 2",
    )
    .await;
}

#[tokio::test]
async fn a_missing_source_row_that_appears_while_a_row_for_it_comes_is_seen() {
    for write in
        ["insert into public.kids (id, parent_id) values (10, 9)", "update public.kids set parent_id = 9 where id = 2"]
    {
        skew(LOOSE, write, "insert into public.parents values (9, 'new')").await;
        skew(LOOSE, write, "update public.parents set id = 9 where id = 3").await;
    }
}

#[tokio::test]
async fn a_bulk_load_locks_all_places_together_and_is_seen_all_the_same() {
    // As if many places had been locked before, on either side or on both.
    let bulk = "set local backfilld.places = '100';";
    let write = "insert into public.kids (id, parent_id) values (10, 9)";
    let change = "insert into public.parents values (9, 'new')";
    for (kids, parents) in [("", bulk), (bulk, ""), (bulk, bulk)] {
        let f = Fixture::new(LOOSE).await;
        let (mut writer, mut changer) = (f.app("writer").await, f.app("changer").await);
        for writer_first in [true, false] {
            f.reset().await;
            writer.run(&format!("begin; {kids} {write}")).await;
            changer.run(&format!("begin; {parents}")).await;
            let (first, first_sql, second, second_sql) = match writer_first {
                true => (&writer, "set constraints all immediate", &mut changer, change),
                false => (&changer, change, &mut writer, "set constraints all immediate"),
            };
            first.run(first_sql).await;
            second.send(second_sql);
            f.db.wait_blocked(second).await;
            first.run("commit").await;
            second.finish_ok().await;
            second.run("commit").await;
            f.assert_no_drift(&format!("{kids:?} {parents:?} {writer_first}")).await;
        }
    }
    let f = Fixture::new(LOOSE).await;
    // More than fits into this server's lock table.
    f.sql(
        "insert into public.kids (id, parent_id) select n, n from generate_series(100, 15000) n;
           insert into public.parents select n, 'o' from generate_series(100, 15000) n;
           delete from public.parents where id > 100; delete from public.kids where id > 200",
    )
    .await;
    f.assert_no_drift("bulk load").await;
}

#[tokio::test]
async fn a_source_row_that_vanishes_while_a_row_for_it_comes_is_seen() {
    for change in [
        "delete from public.parents where id = 1",
        "update public.parents set id = 99 where id = 1",
        "truncate public.parents",
    ] {
        skew(LOOSE, INSERT, change).await;
    }
}

#[tokio::test]
async fn a_source_row_that_appeared_during_the_wait_for_its_place_is_held_as_well() {
    let f = Fixture::new(LOOSE).await;
    let (mut writer, maker, mut changer) = (f.app("writer").await, f.app("maker").await, f.app("changer").await);
    maker.run("begin; insert into public.parents values (9, 'first')").await;
    writer.run("begin; insert into public.kids (id, parent_id) values (10, 9)").await;
    writer.send("set constraints all immediate");
    f.db.wait_blocked(&writer).await;
    maker.run("commit").await;
    writer.finish_ok().await;
    // The writer's transaction is still open: nobody may change what its row was derived from.
    changer.send("update public.parents set owner = 'second' where id = 9");
    f.db.wait_blocked(&changer).await;
    writer.run("commit").await;
    changer.finish_ok().await;
    assert_eq!(f.value(10).await.as_deref(), Some("second"));
    f.assert_no_drift("a place that was taken meanwhile").await;
}

#[tokio::test]
async fn a_constraint_trigger_that_ran_inside_a_rolled_back_savepoint_runs_again() {
    let f = Fixture::new(OWNED).await;
    let (writer, changer) = (f.app("writer").await, f.app("changer").await);
    writer.run("begin; insert into public.kids (id, parent_id) values (10, 1)").await;
    writer.run("savepoint s; set constraints all immediate; rollback to s; set constraints all deferred").await;
    changer.run("update public.parents set owner = 'new' where id = 1").await;
    writer.run("commit").await;
    f.assert_no_drift("savepoint").await;
}

const DEFERRED: Case = Case {
    schema: "create table public.parents (id bigint primary key, owner text not null, note text);
        create table public.kids (id bigint primary key, parent_id bigint not null
          references public.parents deferrable initially deferred, body text);
        insert into public.parents values (1, 'a');
        insert into public.kids values (1, 1, 'x');",
    ..OWNED
};

#[tokio::test]
async fn a_row_written_before_its_parent_in_one_transaction_has_the_value_at_commit() {
    let f = Fixture::new(DEFERRED).await;
    let writer = f.app("writer").await;
    writer.run("begin; insert into public.kids (id, parent_id) values (10, 9)").await;
    writer.run("insert into public.parents values (9, 'late'); commit").await;
    assert_eq!(f.value(10).await.as_deref(), Some("late"));
    f.assert_no_drift("deferred foreign key").await;
}

#[tokio::test]
async fn a_parent_that_is_deleted_and_inserted_again_in_one_transaction_brings_its_new_value() {
    let f = Fixture::new(DEFERRED).await;
    let writer = f.app("writer").await;
    writer
        .run("begin; delete from public.parents where id = 1; insert into public.parents values (1, 'again'); commit")
        .await;
    assert_eq!(f.value(1).await.as_deref(), Some("again"));
    f.assert_no_drift("replaced parent").await;
    // NO ACTION looks at the end of the statement, and one statement can do both.
    let schema = DEFERRED.schema.replace(" deferrable initially deferred", "");
    let f = Fixture::new(Case { schema: Box::leak(schema.into_boxed_str()), ..DEFERRED }).await;
    f.sql(
        "with d as (delete from public.parents where id = 1 returning id)
           insert into public.parents select id, 'again' from d",
    )
    .await;
    assert_eq!(f.value(1).await.as_deref(), Some("again"));
    f.assert_no_drift("replaced parent in one statement").await;
}

#[tokio::test]
async fn triggers_that_change_the_row_after_ours_are_corrected_at_commit() {
    let f = Fixture::new(OWNED).await;
    f.sql("create function public.later() returns trigger language plpgsql as $$ begin
             if new.body = 'move' then new.parent_id := 2; end if;
             if new.body = 'spoof' then new.owner := 'spoofed'; end if;
             return new; end $$;
           create trigger zzzz_later before insert or update on public.kids for each row execute function public.later();").await;
    let writer = f.app("writer").await;
    writer.run("insert into public.kids (id, parent_id, body) values (10, 1, 'move')").await;
    writer.run("update public.kids set body = 'move' where id = 1").await;
    assert_eq!((f.value(10).await.as_deref(), f.value(1).await.as_deref()), (Some("b"), Some("b")));
    f.assert_no_drift("a later trigger that re-parents").await;
}
