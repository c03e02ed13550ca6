//! Constrain and flip: what is in the way, what is left over, and what readers see.

use backfilld::demo::cluster::SUPERUSER;
use backfilld::demo::sample::{APP_OWNER, AUTHENTICATOR};
use backfilld::phase::Status;

use crate::support::{Cli, JOB, JobDir, Ledger, Local, Template, TestDb, run_once, schema_dump, wait_until};

/// The shipped job, run up to the hold point before `phase`, and released.
async fn before(phase: &str, change: impl FnOnce(&JobDir)) -> (TestDb, Ledger, JobDir) {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::with(&format!("hold_before = [\"{phase}\"]"));
    change(&job);
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, &format!("hold point before {phase}"));
    let ledger = Ledger::new(&db).await;
    ledger.run(&format!("update backfilld.job set status = 'running', released = '{{{phase}}}'")).await;
    (db, ledger, job)
}

const INDEX: &str = "public.idx_messages_auth_user_id";

#[tokio::test]
async fn an_invalid_index_that_a_failed_build_left_is_dropped_and_built_again() {
    let (db, ledger, job) = before("constrain", |_| ()).await;
    ledger.run("create index idx_messages_auth_user_id on public.messages (auth_user_id)").await;
    ledger.run(&format!("update pg_index set indisvalid = false where indexrelid = '{INDEX}'::regclass")).await;
    let oid = ledger.number(&format!("select '{INDEX}'::regclass::oid")).await;
    assert_eq!(run_once(&db, job.spec()).await.expect("done"), Status::Done);
    assert_ne!(ledger.number(&format!("select '{INDEX}'::regclass::oid")).await, oid);
    assert!(ledger.is(&format!("select indisvalid from pg_index where indexrelid = '{INDEX}'::regclass")).await);
}

#[tokio::test]
async fn what_has_our_name_but_is_something_else_is_refused_and_left_alone() {
    for (create, says) in [
        ("create index idx_messages_auth_user_id on public.messages (created_at)", "the name is taken by CREATE INDEX"),
        ("create table public.idx_messages_auth_user_id ()", "the name is taken by a relation of kind r"),
        (
            "alter table public.messages add constraint messages_auth_user_id_fkey
               foreign key (auth_user_id) references auth.users (id) on delete restrict",
            "the name is taken by FOREIGN KEY (auth_user_id) REFERENCES auth.users(id) ON DELETE RESTRICT",
        ),
    ] {
        let (db, ledger, job) = before("constrain", |_| ()).await;
        ledger.run(create).await;
        let refused = run_once(&db, job.spec()).await.expect_err(create).to_string();
        assert!(refused.contains(says), "{refused}");
        Cli::new(&db).run(&["rollback", JOB, "--yes"]).await.expect(0, "");
        let still = if create.contains("constraint") {
            "select exists (select from pg_constraint where conname = 'messages_auth_user_id_fkey')".to_owned()
        } else {
            format!("select to_regclass('{INDEX}') is not null")
        };
        assert!(ledger.is(&still).await, "not ours to remove: {create}");
    }
}

#[tokio::test]
async fn constraints_that_are_there_already_are_completed_and_stay_after_a_rollback() {
    let (db, ledger, job) = before("constrain", |_| ()).await;
    ledger
        .run(
            "create index idx_messages_auth_user_id on public.messages (auth_user_id);
             alter table public.messages add constraint messages_auth_user_id_fkey foreign key (auth_user_id)
               references auth.users (id) on delete cascade not valid;
             alter table public.messages add constraint backfilld_messages_auth_user_id_nn0
               check (auth_user_id is not null) not valid",
        )
        .await;
    let index = ledger.number(&format!("select '{INDEX}'::regclass::oid")).await;
    assert_eq!(run_once(&db, job.spec()).await.expect("done"), Status::Done);
    assert_eq!(ledger.number(&format!("select '{INDEX}'::regclass::oid")).await, index);
    assert!(
        ledger
            .is("select bool_and(convalidated) and count(*) = 1 from pg_constraint
        where conname in ('messages_auth_user_id_fkey', 'backfilld_messages_auth_user_id_nn0')")
            .await
    );
    Cli::new(&db).run(&["rollback", JOB, "--yes"]).await.expect(0, "");
    assert!(ledger.is(&format!("select to_regclass('{INDEX}') is not null")).await);
    assert!(ledger.is("select exists (select from pg_constraint where conname = 'messages_auth_user_id_fkey')").await);
}

#[tokio::test]
async fn an_application_that_holds_the_table_is_named_and_waited_for_without_blocking_it() {
    let (db, ledger, job) = before("flip", |_| ()).await;
    let reader = db.session("reader", APP_OWNER).await;
    reader.run("set application_name = 'a report'; begin; select count(*) from public.messages").await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    wait_until("it says who is in the way", async || {
        let note = daemon.daemon.progress.now().note;
        note.contains("a report") && note.contains(&format!("pid {}", reader.pid()))
    })
    .await;
    db.client(APP_OWNER)
        .await
        .batch_execute(
            "set statement_timeout = '5s'; select from public.messages; update public.messages
        set metadata = '{}' where false",
        )
        .await
        .expect("the application goes on");
    reader.run("commit").await;
    assert_eq!(daemon.ended().await.expect("done"), Status::Done);
    assert_eq!(ledger.number("select count(*) from pg_policy where polname like 'Users can % own messages'").await, 4);
}

#[tokio::test]
async fn patience_ends_with_an_error_that_names_who_was_in_the_way_and_resume_tries_again() {
    let (db, ledger, job) = before("flip", |_| ()).await;
    let reader = db.session("reader", APP_OWNER).await;
    reader.run("set application_name = 'a report'; begin; select count(*) from public.messages").await;
    let cli = Cli::new(&db).env("BACKFILLD_DDL__PATIENCE", "2s");
    let ended = cli.run(&["run", "--once", job.path()]).await;
    ended.expect(1, "in the way now: pid").expect(1, "a report").expect(1, "backfilld resume");
    assert_eq!((ledger.status().await, ledger.phase().await), ("failed".into(), "flip".into()));
    reader.run("commit").await;
    cli.run(&["resume", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
}

#[tokio::test]
async fn an_operator_is_heard_while_ddl_waits_for_its_lock() {
    let (db, ledger, job) = before("flip", |_| ()).await;
    let reader = db.session("reader", APP_OWNER).await;
    reader.run("begin; select count(*) from public.messages").await;
    let mut daemon = Local::start(&db, job.spec(), false, &[]);
    wait_until("it waits", async || daemon.daemon.progress.now().note.contains("waiting to")).await;
    Cli::new(&db).run(&["pause", JOB, "--reason", "not today"]).await.expect(0, "");
    wait_until("it has heard", async || daemon.daemon.progress.now().phase == "paused").await;
    reader.run("commit").await;
    assert_eq!((ledger.status().await, ledger.reason().await), ("paused".into(), "not today".into()));
    assert_eq!(ledger.number("select count(*) from pg_policy where polname like 'Users can % own messages'").await, 0);
    Cli::new(&db).run(&["resume", JOB]).await.expect(0, "");
    ledger.wait_status("done").await;
    daemon.stop().await;
}

#[tokio::test]
async fn an_index_build_that_a_signal_or_an_operator_ends_is_built_again() {
    let (db, ledger, job) = before("constrain", |_| ()).await;
    let building = "select exists (select from pg_stat_activity where datname = current_database()
        and query ~ '^(create|drop) index concurrently' and wait_event_type = 'Lock')";
    // Index builds, and the removal of what is left of one, wait for every transaction that uses the table.
    let old = db.session("old", SUPERUSER).await;
    old.run("begin; update public.users set display_name = 'x' where false; select pg_current_xact_id()").await;
    old.run("lock table public.messages in row exclusive mode").await;

    let daemon = Cli::new(&db).start(&["run", job.path()]);
    wait_until("it builds", async || ledger.is(building).await).await;
    let standby = Cli::new(&db).env("BACKFILLD_INSTANCE", "there").start(&["run", job.path()]);
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
    daemon.signal("TERM");
    daemon.ended().await.expect(0, "stopped on request");
    wait_until("the standby builds", async || ledger.is(building).await).await;
    Cli::new(&db).run(&["pause", JOB]).await.expect(0, "");
    wait_until("the build is cancelled", async || !ledger.is(building).await).await;
    Cli::new(&db).run(&["resume", JOB]).await.expect(0, "");
    // What was compared before is compared again, which takes a moment without others.
    old.run("commit").await;
    ledger.wait_status("done").await;
    assert!(ledger.is(&format!("select indisvalid from pg_index where indexrelid = '{INDEX}'::regclass")).await);
    standby.signal("TERM");
    standby.ended().await.expect(0, "stopped on request");
}

#[tokio::test]
async fn a_flip_that_would_not_do_what_the_job_says_changes_nothing() {
    let cases = [
        ("create policy other on public.messages using (true)", "\"other\" is new"),
        (
            "alter policy \"Users can view messages from their conversations\" on public.messages using (false)",
            "\"Users can view messages from their conversations\" is another",
        ),
        (
            "drop function public.add_message(uuid, text, text, text, jsonb);
             create function public.add_message(p_conversation_id uuid, p_role text, p_body text,
               p_image_url text default null, p_metadata jsonb default '{}') returns uuid
             language sql as 'select null::uuid';
             alter function public.add_message(uuid, text, text, text, jsonb) owner to app_owner",
            "cannot change name of input parameter",
        ),
        (
            "alter function public.add_message(uuid, text, text, text, jsonb) set work_mem = '5MB'",
            "function public.add_message(uuid, text, text, text, jsonb) has changed since the job began",
        ),
    ];
    for (sql, says) in cases {
        let (db, ledger, job) = before("flip", |_| ()).await;
        ledger.run(sql).await;
        let dump = schema_dump(&db, &[]);
        let ended = Cli::new(&db).run(&["run", "--once", job.path()]).await;
        ended.expect(1, "");
        assert!(ledger.reason().await.contains(says), "{}", ledger.reason().await);
        assert_eq!(schema_dump(&db, &[]), dump);
    }
}

#[tokio::test]
async fn a_function_that_a_rollback_could_not_put_back_is_refused_before_the_flip() {
    let (db, ledger, job) = before("flip", |_| ()).await;
    // As if the old one had had a default less: PostgreSQL lets nobody take a default away.
    let kept = "where kind = 'function' and definition::text like '%p_image_url text DEFAULT NULL::text%'";
    assert_eq!(ledger.number(&format!("select count(*) from backfilld.snapshot {kept}")).await, 1);
    ledger
        .run(&format!(
            "update backfilld.snapshot set definition =
               replace(definition::text, 'p_image_url text DEFAULT NULL::text', 'p_image_url text')::jsonb {kept}"
        ))
        .await;
    let dump = schema_dump(&db, &[]);
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "could not put the old one back");
    assert_eq!(schema_dump(&db, &[]), dump);
    assert_eq!(ledger.status().await, "failed");
}

#[tokio::test]
async fn a_reader_sees_its_own_rows_before_during_and_after_the_flip() {
    let (db, ledger, job) = before("flip", |_| ()).await;
    let owner: String = ledger
        .client
        .query_one("select auth_user_id::text from public.messages group by 1 order by count(*) desc limit 1", &[])
        .await
        .expect("an owner")
        .get(0);
    let own = ledger.number(&format!("select count(*) from public.messages where auth_user_id = '{owner}'")).await;
    // The last write of the flip, after which only its commit comes, stays until the gate is open.
    ledger
        .run(
            "create table public.gate (is_open boolean); grant select on public.gate to public;
             create function public.gate() returns trigger language plpgsql as $$
             begin
               while new.kind = 'flip' and not exists (select from public.gate) loop perform pg_sleep(0.01); end loop;
               return null;
             end $$;
             create trigger gate after insert on backfilld.object for each row execute function public.gate()",
        )
        .await;
    let mut reader = db.session("reader", AUTHENTICATOR).await;
    let see = "select count(*) from public.messages";
    reader
        .run(&format!("set role authenticated; set request.jwt.claim.sub = '{owner}'; set statement_timeout = '20s'"))
        .await;
    assert_eq!(reader.client().query_one(see, &[]).await.expect("sees").get::<_, i64>(0), own);
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    wait_until("the flip waits at the gate", async || {
        ledger
            .is("select exists (select from pg_locks join pg_database d on d.oid = database and datname = current_database()
                                  where relation = 'public.messages'::regclass and granted
                                  and mode = 'AccessExclusiveLock')")
            .await
    })
    .await;
    reader.send(see);
    db.wait_blocked(&reader).await;
    ledger.run("insert into public.gate values (true)").await;
    let seen = reader.finish_ok().await;
    let seen = seen.iter().find_map(|m| match m {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    assert_eq!(seen, Some(own.to_string()), "the same rows under the new policies");
    assert_eq!(daemon.ended().await.expect("done"), Status::Done);
}

#[tokio::test]
async fn what_changed_while_the_flip_waited_for_its_lock_stops_it() {
    let (db, ledger, job) = before("flip", |_| ()).await;
    let reader = db.session("reader", APP_OWNER).await;
    reader.run("set application_name = 'a report'; begin; select count(*) from public.messages").await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    let note = async || daemon.daemon.progress.now().note;
    wait_until("it waits", async || note().await.contains("a report")).await;
    // Rows that were written in between are wrong, and everything looks as before.
    let trigger = "trigger zzz_backfilld_messages_auth_user_id_upd";
    ledger
        .run(&format!(
            "alter table public.messages disable {trigger}; alter table public.messages enable always {trigger}"
        ))
        .await;
    reader.run("commit").await;
    daemon.ended().await.expect_err("it stops");
    assert!(ledger.reason().await.contains("what was verified has changed since"), "{}", ledger.reason().await);
    assert_eq!(ledger.number("select count(*) from pg_policy where polname like 'Users can % own messages'").await, 0);
    Cli::new(&db).run(&["resume", JOB]).await.expect(0, "");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
}

/// Without a foreign key rows of a source can come and go by themselves, which takes triggers that are not there.
#[tokio::test]
async fn a_key_that_was_dropped_while_the_job_stood_still_is_noticed_by_the_same_daemon() {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::with("hold_before = [\"constrain\"]");
    let mut daemon = Local::start(&db, job.spec(), false, &[]);
    let ledger = Ledger::new(&db).await;
    wait_until("it is held", async || {
        ledger.is("select to_regclass('backfilld.job') is not null").await && ledger.status().await == "held"
    })
    .await;
    ledger.run("alter table public.messages drop constraint messages_conversation_id_fkey").await;
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
    ledger.wait_status("failed").await;
    assert!(ledger.reason().await.contains("sync"), "{}", ledger.reason().await);
    daemon.stop().await;
}
