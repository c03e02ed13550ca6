//! The way back, from everywhere, compared with how it was by `pg_dump`.

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, schema_dump, wait_until};

/// What a rollback has to bring back exactly.
const PARTICULARS: &str = "
    alter table public.messages enable always trigger messages_touch;
    alter table public.messages disable trigger messages_broadcast;
    alter table public.conversations enable replica trigger conversations_touch;
    revoke all on function public.add_message(uuid, text, text, text, jsonb) from public;
    grant execute on function public.add_message(uuid, text, text, text, jsonb) to authenticated with grant option;
    comment on function public.add_message(uuid, text, text, text, jsonb) is 'it''s the old one';
    comment on policy \"Users can view messages from their conversations\" on public.messages is 'old \"rule\"';
    comment on table public.messages is 'untouched'";

/// The shipped job, which consents to what the particulars need.
fn job() -> JobDir {
    job_with("")
}

fn job_with(lines: &str) -> JobDir {
    let job = JobDir::with(lines);
    job.replace("triggers = \"skip\"", "triggers = \"skip\"\nmay_fire = [\"messages_touch\"]");
    job
}

async fn particular() -> (TestDb, Ledger) {
    let db = TestDb::new(Template::Rows(200)).await;
    let ledger = Ledger::new(&db).await;
    ledger.run(PARTICULARS).await;
    (db, ledger)
}

/// The schema with nothing but the new column.
async fn with_column() -> String {
    let (db, ledger) = particular().await;
    ledger.run("alter table public.messages add column auth_user_id uuid").await;
    schema_dump(&db, &[])
}

/// Rolls back, first without and then with the column, and forgets the job; compares after each: `left` and `before`.
async fn back_to_nothing(db: &TestDb, ledger: &Ledger, before: &str, left: &str, what: &str) {
    let cli = Cli::new(db);
    cli.run(&["rollback", JOB, "--yes"]).await.expect(0, "");
    assert_eq!(ledger.reason().await, "everything is as it was", "{what}");
    assert_eq!(schema_dump(db, &[]), left, "{what}");
    cli.run(&["rollback", JOB, "--yes", "--drop-column"]).await.expect(0, "");
    assert_eq!(schema_dump(db, &[]), before, "{what}");
    cli.run(&["uninstall", JOB, "--yes"]).await.expect(0, "");
    assert_eq!(ledger.number("select count(*) from pg_namespace where nspname like 'backfilld%'").await, 0, "{what}");
}

#[tokio::test]
async fn a_rollback_from_every_phase_leaves_everything_as_it_was() {
    let points = ["before-ddl-commit", "after-ddl-commit", "after-commit:2"].map(str::to_owned);
    let phases = (1..=7).map(|n| format!("after-phase:{n}"));
    let with_column = with_column().await;
    for point in points.into_iter().chain(phases) {
        let (db, ledger) = particular().await;
        let before = schema_dump(&db, &[]);
        let job = job();
        let killed = Cli::new(&db).env("BACKFILLD_FAULT", &point).run(&["run", "--once", job.path()]).await;
        assert_eq!(killed.code, None, "{killed:#?}");
        let expanded = !matches!(point.as_str(), "before-ddl-commit" | "after-phase:1");
        let from = format!("{point} ({})", ledger.phase().await);
        back_to_nothing(&db, &ledger, &before, if expanded { &with_column } else { &before }, &from).await;
    }
}

#[tokio::test]
async fn a_rollback_from_every_status_leaves_everything_as_it_was() {
    let with_column = with_column().await;
    for status in ["done", "held", "paused", "failed"] {
        let (db, ledger) = particular().await;
        let before = schema_dump(&db, &[]);
        let job = job_with(if status == "done" { "" } else { "hold_before = [\"flip\"]" });
        let cli = Cli::new(&db);
        cli.run(&["run", "--once", job.path()]).await;
        match status {
            "paused" => ledger.run("update backfilld.job set status = 'running'").await,
            "failed" => {
                cli.run(&["cutover", JOB]).await.expect(0, "");
                let policy = "policy \"Users can view messages from their conversations\" on public.messages";
                let was: String = ledger
                    .client
                    .query_one(
                        "select pg_get_expr(polqual, polrelid) from pg_policy where polname like 'Users can view m%'",
                        &[],
                    )
                    .await
                    .expect("a policy")
                    .get(0);
                ledger.run(&format!("alter {policy} using (false)")).await;
                cli.run(&["run", "--once", job.path()]).await.expect(1, "is another");
                ledger.run(&format!("alter {policy} using {was}")).await;
            }
            _ => {}
        }
        if status == "paused" {
            cli.run(&["pause", JOB]).await.expect(0, "");
        }
        assert_eq!(ledger.status().await, status);
        back_to_nothing(&db, &ledger, &before, &with_column, status).await;
    }
}

#[tokio::test]
async fn a_running_daemon_performs_the_rollback_that_another_machine_asks_for() {
    let (db, ledger) = particular().await;
    let before = schema_dump(&db, &[]);
    let job = job();
    let daemon = Cli::new(&db).start(&["run", job.path()]);
    ledger.wait_status("done").await;
    let elsewhere = Cli::new(&db).env("BACKFILLD_INSTANCE", "elsewhere");
    elsewhere.run(&["rollback", JOB, "--yes", "--drop-column"]).await.expect(0, "");
    assert_eq!(schema_dump(&db, &[]), before);
    assert!(ledger.is("select instance = 'here' and epoch = 1 from backfilld.lease").await, "it kept its lease");
    // And forgetting the job does not make the daemon begin it anew.
    elsewhere.run(&["uninstall", JOB, "--yes"]).await.expect(0, "");
    daemon.ended().await.expect(5, "was uninstalled while this daemon ran");
    assert!(ledger.is("select to_regnamespace('backfilld') is null").await);
    assert_eq!(schema_dump(&db, &[]), before);
}

#[tokio::test]
async fn a_standby_leaves_when_its_job_is_uninstalled() {
    let (db, ledger) = particular().await;
    let job = job();
    let first = Cli::new(&db).start(&["run", job.path()]);
    ledger.wait_status("done").await;
    let second = Cli::new(&db).env("BACKFILLD_INSTANCE", "there").start(&["run", job.path()]);
    wait_until("a standby waits", async || {
        ledger
            .number(
                "select count(*) from pg_stat_activity where datname = current_database()
            and application_name like 'backfilld/%/heartbeat'",
            )
            .await
            == 2
    })
    .await;
    // Another job keeps our tables in place.
    ledger.run("insert into backfilld.job (name, spec, spec_hash, format_version) values ('other', '{}', '', 1)").await;
    Cli::new(&db).run(&["uninstall", JOB, "--yes"]).await.expect(0, "");
    first.ended().await.expect(5, "was uninstalled while this daemon ran");
    second.ended().await.expect(5, "was uninstalled while this daemon ran");
    assert_eq!(ledger.number("select count(*) from backfilld.job where name <> 'other'").await, 0);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0), "what the job did stays");
}

#[tokio::test]
async fn a_rollback_that_something_is_in_the_way_of_says_so_and_goes_on_later() {
    let (db, ledger) = particular().await;
    let before = schema_dump(&db, &[]);
    let cli = Cli::new(&db);
    cli.run(&["run", "--once", job().path()]).await.expect(0, "");
    ledger.run("create view public.theirs as select auth_user_id from public.messages").await;
    let refused = cli.run(&["rollback", JOB, "--yes", "--drop-column"]).await;
    refused.expect(1, "cannot drop column auth_user_id of table public.messages because other objects depend on it");
    assert_eq!(ledger.status().await, "rolling_back");
    assert!(ledger.reason().await.contains("2BP01"), "{}", ledger.reason().await);
    ledger.run("drop view public.theirs").await;
    cli.run(&["rollback", JOB, "--yes", "--drop-column"]).await.expect(0, "");
    assert_eq!(schema_dump(&db, &[]), before);
}

#[tokio::test]
async fn what_others_changed_meanwhile_is_left_alone_and_told() {
    let (db, ledger) = particular().await;
    let cli = Cli::new(&db);
    cli.run(&["run", "--once", job().path()]).await.expect(0, "");
    ledger
        .run("create policy theirs on public.messages using (false); drop trigger messages_touch on public.messages")
        .await;
    ledger.run("comment on column public.messages.auth_user_id is 'theirs'").await;
    cli.run(&["rollback", JOB, "--yes"]).await.expect(0, "");
    let comment = "select col_description(attrelid, attnum) = 'theirs' from pg_attribute
                   where attrelid = 'public.messages'::regclass and attname = 'auth_user_id'";
    assert!(ledger.is(comment).await);
    let told = cli.run(&["rollback", JOB, "--yes", "--drop-column"]).await;
    told.expect(0, "");
    assert!(told.stdout.contains("\"theirs\" is new"), "{told:#?}");
    assert!(told.stdout.contains("triggers on public.messages are others"), "{told:#?}");
    assert!(ledger.is("select exists (select from pg_policy where polname = 'theirs')").await);
}

#[tokio::test]
async fn the_exported_migration_makes_what_the_daemon_made_and_its_down_file_undoes_it() {
    let (by_daemon, _) = particular().await;
    let cli = Cli::new(&by_daemon);
    cli.run(&["run", "--once", job().path()]).await.expect(0, "");
    let dir = tempfile::tempdir().expect("a directory");
    cli.run(&["export", JOB, "--out", dir.path().to_str().expect("UTF-8")]).await.expect(0, "");
    let file = |kind: &str| std::fs::read_to_string(dir.path().join(format!("{JOB}.{kind}.sql"))).expect("written");

    let (fresh, ledger) = particular().await;
    let before = schema_dump(&fresh, &[]);
    ledger.run(&file("up")).await;
    let only = ["--table=public.messages"];
    assert_eq!(schema_dump(&fresh, &only), schema_dump(&by_daemon, &only));
    let functions = "select string_agg(pg_get_functiondef(oid), '' order by proname) from pg_proc
        where pronamespace in ('backfilld_sync'::regnamespace, 'public'::regnamespace)";
    let of =
        async |db: &TestDb| db.admin().await.query_one(functions, &[]).await.expect("functions").get::<_, String>(0);
    assert_eq!(of(&fresh).await, of(&by_daemon).await);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    ledger.run(&file("down")).await;
    assert_eq!(schema_dump(&fresh, &[]), before);
}

/// The triggers stop the application then, and who wants to be rid of them has no time to put it in order.
#[tokio::test]
async fn the_way_back_is_open_where_the_catalog_is_no_longer_as_the_job_says() {
    let column = "alter table public.conversations rename column auth_user_id to owner_uid";
    let target = "drop table public.messages";
    for (sql, told) in [(column, ""), (target, "table public.messages is gone")] {
        let (db, ledger) = particular().await;
        let cli = Cli::new(&db);
        cli.run(&["run", "--once", job().path()]).await.expect(0, "");
        ledger.run(sql).await;
        let ended = cli.run(&["rollback", JOB, "--yes", "--drop-column"]).await;
        ended.expect(0, "without the catalog");
        assert!(ended.stdout.contains(told), "{ended:#?}");
        assert_eq!(ledger.status().await, "rolled_back");
        let left = "select (select count(*) from pg_trigger where tgname like 'zzz_backfilld%')
                         + (select count(*) from pg_namespace where nspname = 'backfilld_sync')
                         + (select count(*) from pg_attribute where attname = 'auth_user_id'
                            and attrelid = to_regclass('public.messages'))
                         + (select count(*) from backfilld.object)";
        assert_eq!(ledger.number(left).await, 0, "{sql}");
        cli.run(&["uninstall", JOB, "--yes"]).await.expect(0, "");
    }
    // The old policies read it.
    let (db, ledger) = particular().await;
    let cli = Cli::new(&db);
    cli.run(&["run", "--once", job().path()]).await.expect(0, "");
    ledger.run("alter table public.conversations rename to chats").await;
    cli.run(&["rollback", JOB, "--yes"]).await.expect(1, "relation \"public.conversations\" does not exist");
    ledger.run("alter table public.chats rename to conversations").await;
    cli.run(&["rollback", JOB, "--yes"]).await.expect(0, "");
    assert_eq!(ledger.reason().await, "everything is as it was");
}
