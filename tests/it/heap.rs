//! The walk in heap order: every row once, whatever happens to the table meanwhile.

use crate::killed::{ROWS, checkpoint_is_right, is_complete, run_through};
use backfilld::backfill::wal;
use backfilld::demo::sample::{APP_OWNER, DAEMON};
use backfilld::job::spec::WalCompression;
use backfilld::phase::Status;
use backfilld::plan::{Facts, heap_sql, rounds};

use crate::support::{Cli, JOB, JobDir, Ledger, Local, Template, TestDb, has_version, wait_until};

/// A daemon that was killed after its first batches, in the middle of the rounds of its only window.
async fn killed_half_way(template: Template) -> (JobDir, TestDb, Ledger) {
    let (job, db) = (JobDir::heap(), TestDb::new(template).await);
    let ledger = Ledger::new(&db).await;
    let ended = Cli::new(&db).env("BACKFILLD_FAULT", "after-commit:3").run(&["run", "--once", job.path()]).await;
    assert_eq!(ended.code, None, "{ended:#?}");
    assert!(ledger.unfilled().await > 0);
    assert!(ledger.is("select heap_round > 0 and heap_rounds > 1 from backfilld.checkpoint").await);
    (job, db, ledger)
}

pub async fn sweeps(ledger: &Ledger) -> i64 {
    ledger.number("select count(*) from backfilld.event where kind = 'heap_sweep'").await
}

#[tokio::test]
async fn a_walk_killed_after_every_single_batch_finishes_without_rework() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(ROWS)).await);
    let ledger = Ledger::new(&db).await;
    let mut look = async || checkpoint_is_right(&ledger).await;
    let killed = run_through(&db, &["run", "--once", job.path()], "after-commit:1", &mut look).await;
    assert!(killed >= 16, "one batch per round at least, {killed} seen");
    assert_eq!(sweeps(&ledger).await, 1);
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn a_batch_killed_before_its_commit_is_done_again() {
    let (job, db, ledger) = killed_half_way(Template::Rows(ROWS)).await;
    let before = ledger.number("select count(auth_user_id) from public.messages").await;
    let ended = Cli::new(&db).env("BACKFILLD_FAULT", "before-commit:1").run(&["run", "--once", job.path()]).await;
    assert_eq!(ended.code, None, "{ended:#?}");
    assert_eq!(ledger.number("select count(auth_user_id) from public.messages").await, before);
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!(sweeps(&ledger).await, 1, "it went on where it stood");
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn a_table_that_is_rewritten_half_way_is_walked_anew() {
    let (job, db, ledger) = killed_half_way(Template::Rows(ROWS)).await;
    ledger.run("vacuum full public.messages").await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "the table was rewritten");
    assert_eq!(sweeps(&ledger).await, 2);
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn a_table_that_is_emptied_grows_or_shrinks_half_way_is_no_problem() {
    let (job, db, ledger) = killed_half_way(Template::Rows(ROWS)).await;
    ledger.run("delete from public.messages where ctid >= '(4,0)'").await;
    ledger.run("vacuum public.messages").await;
    ledger
        .run(
            "insert into public.messages (conversation_id, role, content)
             select id, 'user', repeat('x', 500) from public.conversations, generate_series(1, 5)",
        )
        .await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));

    let (job, db, ledger) = killed_half_way(Template::Rows(ROWS)).await;
    ledger.run("truncate public.messages").await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!(ledger.status().await, "done");
}

#[tokio::test]
async fn rows_that_cannot_be_updated_are_put_aside_one_by_one() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(ROWS)).await);
    let ledger = Ledger::new(&db).await;
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    ledger
        .run(
            "alter table public.messages add constraint odd
             check (auth_user_id is null or content not like 'Message 7%') not valid",
        )
        .await;
    let bad = ledger.number("select count(*) from public.messages where content like 'Message 7%'").await;
    assert!(bad > 1);
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "quarantined");
    assert_eq!(ledger.unfilled().await, bad);
    let aside = "select count(*) from backfilld.quarantine q join public.messages m on m.id::text = q.key[1]
                 where q.sqlstate = '23514' and m.content like 'Message 7%'";
    assert_eq!(ledger.number(aside).await, bad);
    checkpoint_is_right(&ledger).await;
    ledger.run("alter table public.messages drop constraint odd").await;
    Cli::new(&db).run(&["resume", JOB]).await.expect(0, "");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

#[tokio::test]
async fn most_updates_find_room_on_their_page() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(5_000)).await);
    // Between two rounds over a page the snapshots of others have to end, those of our own measurements among them; on a
    // busy machine, and on a table this small, that takes longer than three batches.
    job.replace("strategy = \"heap\"", "strategy = \"heap\"\npause = \"25ms\"");
    let ledger = Ledger::new(&db).await;
    ledger.run("vacuum analyze public.messages").await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    let stat = "from pg_stat_user_tables where relid = 'public.messages'::regclass";
    wait_until("the statistics are in", async || ledger.is(&format!("select n_tup_upd >= 5000 {stat}")).await).await;
    let hot = ledger.number(&format!("select 100 * n_tup_hot_upd / n_tup_upd {stat}")).await;
    assert!(hot >= 70, "{hot}% of the updates were HOT");
}

/// The rows that move leave places, which only a vacuum makes known to the rows that move later.
#[tokio::test]
async fn a_growth_budget_is_kept_by_vacuuming_beside_the_batches() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(5_000)).await);
    job.replace("strategy = \"heap\"", "strategy = \"heap\"\npause = \"100ms\"\ngrowth_percent = 1");
    let ledger = Ledger::new(&db).await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    let vacuumed = "from backfilld.event where kind = 'vacuum'";
    assert!(ledger.number(&format!("select count(*) {vacuumed} and (detail ->> 'ended')::bool")).await > 0);
    assert!(ledger.is(&format!("select bool_and((detail ->> 'grown_pages')::int > 0) {vacuumed}")).await);
    assert!(ledger.is("select not exists (select from public.messages where auth_user_id is null)").await);
    let counted = "select vacuum_count > 0 from pg_stat_user_tables where relid = 'public.messages'::regclass";
    wait_until("the statistics are in", async || ledger.is(counted).await).await;
}

/// Five rows to a page: whatever the first round takes has to move, so it must not be two of them.
#[tokio::test]
async fn wide_rows_are_taken_one_by_one() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(2_000)).await);
    job.replace("strategy = \"heap\"", "strategy = \"heap\"\npause = \"25ms\"");
    let ledger = Ledger::new(&db).await;
    ledger
        .run(
            "alter table public.messages alter column content set storage external, disable trigger user;
             update public.messages m
             set content = (select string_agg(md5(m.id::text || n), '') from generate_series(1, 42) n);
             alter table public.messages enable trigger user",
        )
        .await;
    // An ANALYZE of another table by autovacuum would keep the versions of before.
    wait_until("only live rows are there", async || {
        ledger.run("vacuum full analyze public.messages").await;
        ledger.is("select reltuples > 4.9 * relpages from pg_class where oid = 'public.messages'::regclass").await
    })
    .await;
    let stat = "from pg_stat_user_tables where relid = 'public.messages'::regclass";
    let so_far = async |what: &str| ledger.number(&format!("select {what} {stat}")).await;
    wait_until("the statistics are in", async || so_far("n_tup_upd").await >= 2_000).await;
    let before = (so_far("n_tup_upd").await, so_far("n_tup_hot_upd").await);
    let plan = Cli::new(&db).run(&["plan", job.path()]).await;
    assert!(plan.stdout.contains("in 6 committed rounds to begin with, at about 5 rows to a page"), "{}", plan.stdout);
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    wait_until("the statistics are in", async || so_far("n_tup_upd").await >= before.0 + 2_000).await;
    let hot = 100 * (so_far("n_tup_hot_upd").await - before.1) / (so_far("n_tup_upd").await - before.0);
    assert!(hot >= 70, "{hot}% of the updates were HOT");
}

/// Where NULL is a legal value, a batch can write the value of a source that becomes NULL before the row is locked. What
/// that leaves is planted here: only the daemon's login can write it.
#[tokio::test]
async fn a_value_whose_source_became_null_meanwhile_is_taken_back_before_the_flip() {
    if !has_version(15, "the daemon's login is a superuser there") {
        return;
    }
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(ROWS)).await);
    let ledger = Ledger::new(&db).await;
    let dedicated = || Cli::new(&db).env("BACKFILLD_DATABASE__DEDICATED_LOGIN", "true");
    job.replace("not_null = true", "not_null = false");
    job.edit("job.toml", |text| {
        let (head, tail) = text.split_once("[[agree]]").expect("the shipped job has it");
        let (_, tail) = tail.split_once("[side_effects]").expect("the shipped job has it");
        format!("{head}[side_effects]{tail}")
    });
    let chosen = "(select conversation_id from public.messages order by id limit 1)";
    ledger.run(&format!("update public.conversations set auth_user_id = null where id = {chosen}")).await;
    let ended = dedicated().env("BACKFILLD_FAULT", "after-phase:3").run(&["run", "--once", job.path()]).await;
    assert_eq!(ended.code, None, "{ended:#?}");
    assert_eq!(ledger.phase().await, "verify");
    let planted = db
        .client(backfilld::demo::sample::DAEMON)
        .await
        .execute(
            &format!(
                "update public.messages set auth_user_id = (select id from auth.users limit 1)
                 where conversation_id = {chosen}"
            ),
            &[],
        )
        .await
        .expect("exempt from the trigger");
    assert_eq!((planted as i64, planted > 0), (ledger.drift().await, true));
    // The proof before it only reads, so a limit for writes does not stop that.
    Cli::new(&db).run(&["tune", JOB, "xid_age=1"]).await.expect(0, "");
    let mut daemon = Local::start(&db, job.spec(), true, &[("database.dedicated_login", "true")]);
    let note = async || daemon.daemon.progress.now().note;
    wait_until("it waits like a batch", async || note().await.contains("waiting: xid_age")).await;
    assert_eq!(ledger.drift().await, planted as i64);
    Cli::new(&db).run(&["tune", JOB, "--reset", "xid_age"]).await.expect(0, "");
    assert_eq!(daemon.ended().await.expect("it ends"), Status::Done);
    assert_eq!(ledger.drift().await, 0);
    let settled =
        ledger.number("select sum((detail ->> 'rows')::int8)::int8 from backfilld.event where kind = 'settled'");
    assert_eq!(settled.await, planted as i64);
}

#[tokio::test]
async fn several_lanes_killed_again_and_again_fill_every_row_once() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(6000)).await);
    job.replace("strategy = \"heap\"", "strategy = \"heap\"\nlanes = 3");
    let ledger = Ledger::new(&db).await;
    let mut look = async || checkpoint_is_right(&ledger).await;
    let killed = run_through(&db, &["run", "--once", job.path()], "after-commit:15", &mut look).await;
    assert!(killed >= 3, "{killed}");
    assert!(ledger.is("select count(*) > 1 from backfilld.checkpoint").await);
    assert_eq!(sweeps(&ledger).await, 1);
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn several_lanes_begin_anew_together_when_the_table_is_rewritten() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(6000)).await);
    job.replace("strategy = \"heap\"", "strategy = \"heap\"\nlanes = 2\npause = \"20ms\"");
    let ledger = Ledger::new(&db).await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    wait_until("both lanes work", async || {
        ledger.is("select to_regclass('backfilld.checkpoint') is not null").await
            && ledger.is("select count(*) filter (where batches > 1) = 2 from backfilld.checkpoint").await
    })
    .await;
    ledger.run("vacuum full public.messages").await;
    daemon.ended().await.expect(0, "the table was rewritten");
    assert_eq!(sweeps(&ledger).await, 2);
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn another_sweep_walks_the_ranges_of_all_lanes() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(3000)).await);
    job.replace("strategy = \"heap\"", "strategy = \"heap\"\nlanes = 3");
    let ledger = Ledger::new(&db).await;
    let ended = Cli::new(&db).env("BACKFILLD_FAULT", "after-phase:3").run(&["run", "--once", job.path()]).await;
    assert_eq!((ended.code, ledger.phase().await), (None, "verify".into()), "{ended:#?}");
    // A writer that our triggers did not see, as they were disabled for a moment: rows of each range are empty again.
    ledger
        .run(
            "begin; alter table public.messages disable trigger user;
             update public.messages set auth_user_id = null where md5(id::text) < '2';
             alter table public.messages enable trigger user; commit;
             do $$ declare t name; begin
               for t in select tgname from pg_trigger
                        where tgrelid = 'public.messages'::regclass and tgname like 'zzz_backfilld%' loop
                 execute format('alter table public.messages enable always trigger %I', t);
               end loop; end $$",
        )
        .await;
    assert!(ledger.unfilled().await > 100);
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "sweeping again");
    assert_eq!(ledger.number("select max(sweep) from backfilld.checkpoint").await, 2);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

/// A trigger that changes an indexed column: no update is HOT, but the rounds keep the table from growing.
#[tokio::test]
async fn where_no_update_can_be_hot_rows_stay_on_their_pages_all_the_same() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(45_000)).await);
    let ledger = Ledger::new(&db).await;
    job.replace("triggers = \"skip\"", "triggers = \"fire\"");
    job.replace("[target]", "hold_before = [\"constrain\"]\n[target]");
    job.replace("max_rows = 100", "max_rows = 10000");
    ledger.run("create index on public.messages (updated_at)").await;
    ledger.run("vacuum analyze public.messages").await;
    let pages = "select pg_relation_size('public.messages') / 8192";
    let before = ledger.number(pages).await;
    let ended = Cli::new(&db).run(&["run", "--once", job.path()]).await;
    ended.expect(5, "each row gets an entry in every index");
    assert_eq!(ledger.number("select count(*) from backfilld.event where kind = 'not_hot'").await, 1);
    // In one round it doubles.
    let grown = 100 * (ledger.number(pages).await - before) / before;
    assert!(grown < 35, "{grown}%");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

/// On a page there can be 291 line pointers, more than fit into the byte that the slice looks at.
#[tokio::test]
async fn every_line_pointer_is_in_one_round_also_beyond_255() {
    let db = TestDb::new(Template::Empty).await;
    let client = db.admin().await;
    // Pages of 226 rows. Without vacuum, line pointers of deleted rows are not used again, but their room is.
    for sql in [
        "create table narrow with (autovacuum_enabled = off) as select n from generate_series(1, 3000) n",
        "delete from narrow where n % 2 = 0",
    ] {
        client.batch_execute(sql).await.expect("a table");
    }
    let number = async |sql: &str| -> i64 { client.query_one(sql, &[]).await.expect("a number").get(0) };
    wait_until("there are more than 255 on a page", async || {
        client.batch_execute("update narrow set n = -n where n % 5 = 0").await.expect("an update");
        number("select max((ctid::text::point)[1])::int8 from narrow").await > 255
    })
    .await;
    for rounds in [1, 2, 5, 7, rounds::MAX_ROUNDS as i32] {
        let mut seen = Vec::new();
        for round in 0..rounds {
            let sql = format!("select ctid::text from narrow t where {}", heap_sql::SLICE);
            let rows = client.query(&sql, &[&"(0,0)", &"(1000,0)", &rounds, &round]).await.expect("rows");
            assert!(rounds == 1 || rows.len() < 3000);
            seen.extend(rows.iter().map(|r| r.get::<_, String>(0)));
        }
        seen.sort();
        let before = seen.len();
        seen.dedup();
        assert_eq!((seen.len() as i64, before), (number("select count(*) from narrow").await, seen.len()));
    }
}

#[tokio::test]
async fn wal_of_batches_is_compressed_where_the_login_may() {
    let db = TestDb::new(Template::Schema).await;
    // Before 15 it cannot be granted, and a server may be built without the method.
    let possible = "select coalesce('lz4' = any(enumvals), false) from pg_settings where name = 'wal_compression'";
    let possible = Ledger::new(&db).await.is(possible).await;
    let (ours, other) = (db.client(DAEMON).await, db.client(APP_OWNER).await);
    let now = async |client: &tokio_postgres::Client| -> String {
        client.query_one("show wal_compression", &[]).await.expect("a setting").get(0)
    };
    for client in [&ours, &other] {
        wal::compress(client, "job", WalCompression::Auto).await.expect("never an error");
    }
    if possible {
        assert_ne!(now(&ours).await, "off");
    }
    assert_eq!(now(&other).await, "off");
    let refused = wal::compress(&other, "job", WalCompression::Pglz).await.expect_err("no right");
    assert!(refused.render().contains("grant set on parameter wal_compression"), "{}", refused.render());
}

/// `begin` can be cancelled, and what was sent behind it runs all the same.
#[tokio::test]
async fn a_batch_outside_of_a_transaction_fills_nothing() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(200)).await);
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point before backfill");
    let client = db.client(DAEMON).await;
    let facts = Facts::read(&client, &job.spec(), false).await.expect("facts");
    let fill = client.prepare(&heap_sql::fill(&facts.shape)).await.expect("it can be prepared");
    let fill = async || client.execute(&fill, &[&"(0,0)", &"(1000,0)", &1i32, &0i32]).await.expect("it runs");
    assert_eq!(fill().await, 0);
    client.batch_execute("begin").await.expect("begin");
    assert_eq!(fill().await, 0, "without the fence");
    client.batch_execute("select from backfilld.job for key share").await.expect("a lock as the fence's");
    assert_eq!(
        fill().await,
        200 - Ledger::new(&db).await.number("select count(auth_user_id) from public.messages").await as u64
    );
    client.batch_execute("rollback").await.expect("rollback");
}
