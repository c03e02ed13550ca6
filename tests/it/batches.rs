//! Batches that fail: retried, made smaller, bisected into quarantine.

use backfilld::demo::sample::APP_OWNER;
use backfilld::phase::Status;

use crate::support::{Cli, JOB, JobDir, Ledger, Local, Session, Template, TestDb, run_once, wait_until};

/// The shipped job, stopped before its first batch.
async fn expanded(rows: u32, change: impl FnOnce(&JobDir)) -> (TestDb, Ledger, JobDir) {
    let db = TestDb::new(Template::Rows(rows)).await;
    let job = JobDir::with("hold_before = [\"backfill\"]");
    change(&job);
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point before backfill");
    let ledger = Ledger::new(&db).await;
    ledger.run("update backfilld.job set status = 'running', released = '{backfill}'").await;
    (db, ledger, job)
}

/// Where the retried code is told while the daemon waits.
async fn wait_note(daemon: &Local, text: &str) {
    wait_until(&format!("it says {text:?}"), async || daemon.daemon.progress.now().note.contains(text)).await;
}

async fn lock_one(db: &TestDb) -> Session {
    let app = db.session("app", APP_OWNER).await;
    app.run("begin; select from public.messages where id = (select id from public.messages order by id offset 42 limit 1) for update")
        .await;
    app
}

#[tokio::test]
async fn a_row_that_the_application_has_locked_is_waited_for_with_smaller_batches() {
    let (db, ledger, job) = expanded(300, |_| ()).await;
    let app = lock_one(&db).await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    wait_note(&daemon, "retrying after 55P03").await;
    // Everything before the row gets through, in batches that shrink to it.
    wait_until("what is before it is filled", async || {
        ledger.number("select count(auth_user_id) from public.messages").await == 42
    })
    .await;
    app.run("commit").await;
    assert_eq!(daemon.ended().await.expect("completes"), Status::Done);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    assert_eq!(ledger.number("select count(*) from backfilld.quarantine").await, 0);
}

#[tokio::test]
async fn deadlocks_serialization_failures_and_cancelled_statements_are_retried() {
    for code in ["40P01", "40001", "57014"] {
        let (db, ledger, job) = expanded(200, |job| job.replace("triggers = \"skip\"", "triggers = \"fire\"")).await;
        ledger
            .run(&format!(
                "create table public.broken ();
                 create function public.now_and_then() returns trigger language plpgsql as $$
                 begin
                   if to_regclass('public.broken') is not null then raise exception 'x' using errcode = '{code}'; end if;
                   return new;
                 end $$;
                 create trigger now_and_then before update on public.messages for each row
                   execute function public.now_and_then()"
            ))
            .await;
        let mut daemon = Local::start(&db, job.spec(), true, &[]);
        wait_note(&daemon, &format!("retrying after {code}")).await;
        ledger.run("drop table public.broken").await;
        assert_eq!(daemon.ended().await.expect("completes"), Status::Done, "{code}");
        assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    }
}

#[tokio::test]
async fn a_batch_that_takes_too_long_is_cut_until_it_fits() {
    let (db, ledger, job) = expanded(60, |job| {
        job.replace("triggers = \"skip\"", "triggers = \"fire\"");
        job.replace("target_duration = \"2s\"", "target_duration = \"100ms\"");
    })
    .await;
    // 200 ms is the timeout of a batch: 100 rows take a second, one takes ten milliseconds.
    ledger
        .run(
            "create function public.slow() returns trigger language plpgsql as
               'begin perform pg_sleep(0.01); return new; end';
             create trigger slow before update on public.messages for each row execute function public.slow()",
        )
        .await;
    assert_eq!(run_once(&db, job.spec()).await.expect("completes"), Status::Done);
    assert!(ledger.number("select batch_rows from backfilld.checkpoint").await < 60);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

#[tokio::test]
async fn rows_that_cannot_be_updated_go_to_quarantine_and_the_job_fails_until_they_are_corrected() {
    let (db, ledger, job) = expanded(300, |job| job.replace("triggers = \"skip\"", "triggers = \"fire\"")).await;
    ledger
        .run(
            "create table public.bad as select id from public.messages order by id offset 137 limit 2;
             grant select on public.bad to public;
             alter table public.messages disable trigger user;
             update public.messages set content = 'secret content' where id = (select min(id::text)::uuid from public.bad);
             alter table public.messages enable trigger user",
        )
        .await;
    // Ours are ENABLE ALWAYS, which `enable trigger user` has undone.
    ledger
        .run(
            "do $$ declare t record; begin
               for t in select tgname from pg_trigger where tgrelid = 'public.messages'::regclass and tgname like 'zzz%'
               loop execute format('alter table public.messages enable always trigger %I', t.tgname); end loop;
             end $$;
             alter table public.messages add constraint never check (content <> 'secret content') not valid;
             create function public.refuse() returns trigger language plpgsql as $$
             begin
               if new.id = (select max(id::text)::uuid from public.bad) then raise 'row % is bad', new.content; end if;
               return new;
             end $$;
             create trigger refuse before update on public.messages for each row execute function public.refuse()",
        )
        .await;
    let bad: Vec<String> = ledger
        .client
        .query("select id::text from public.bad order by 1", &[])
        .await
        .expect("ids")
        .iter()
        .map(|r| r.get(0))
        .collect();
    let cli = Cli::new(&db);
    let ended = cli.run(&["run", "--once", job.path()]).await;
    ended.expect(1, "quarantined 2");
    assert!(!ended.stderr.contains("secret content"), "{ended:#?}");
    let aside = ledger.client.query("select key[1], sqlstate, message from backfilld.quarantine order by 1", &[]).await;
    let aside: Vec<(String, String)> = aside.expect("quarantine").iter().map(|r| (r.get(0), r.get(1))).collect();
    assert_eq!(aside, [(bad[0].clone(), "23514".to_owned()), (bad[1].clone(), "P0001".to_owned())]);
    assert_eq!(ledger.number("select count(*) from backfilld.quarantine where message ~ 'secret'").await, 0);
    assert_eq!(ledger.unfilled().await, 2, "all others are filled");
    assert_eq!(ledger.number("select sweep from backfilld.checkpoint").await, 1, "another sweep would not help");
    assert_eq!((ledger.status().await, ledger.phase().await), ("failed".into(), "verify".into()));
    assert!(
        !ledger
            .is("select attnotnull from pg_attribute where attrelid = 'public.messages'::regclass
                        and attname = 'auth_user_id'")
            .await
    );

    cli.run(&["run", "--once", job.path()]).await.expect(1, "quarantined 2");
    let shown = cli.run(&["status", JOB]).await;
    assert!(shown.stdout.contains("2 rows in quarantine") && shown.stdout.contains(&bad[0]), "{shown:#?}");
    let verified = cli.run(&["verify", JOB]).await;
    assert_eq!(verified.expect(1, "quarantined 2").stdout.matches("FAIL").count(), 3, "{verified:#?}");

    ledger.run("drop trigger refuse on public.messages; alter table public.messages drop constraint never").await;
    cli.run(&["resume", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    assert_eq!(ledger.number("select count(*) from backfilld.quarantine").await, 0);
}

#[tokio::test]
async fn a_batch_in_heap_order_that_would_read_a_whole_source_is_refused_before_it_runs() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(3000)).await);
    let ledger = Ledger::new(&db).await;
    // A source of a page for each row, which is more than is read from end to end for each batch.
    ledger
        .run(
            "alter table public.conversations add column filler text not null default '';
             alter table public.conversations alter column filler set storage plain;
             alter table public.conversations disable trigger user;
             update public.conversations set filler = repeat('x', 6000);
             alter table public.conversations enable trigger user",
        )
        .await;
    let pages = "select pg_relation_size('public.conversations') / 8192";
    assert!(ledger.number(pages).await > 128);
    for setting in ["enable_indexscan = off", "enable_bitmapscan = off", "random_page_cost = 1e9"] {
        ledger.run(&format!("alter role backfilld in database {} set {setting}", db.name())).await;
    }
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "would read all of public.conversations");
    assert_eq!(ledger.unfilled().await, 3000, "nothing was written");
    ledger.run(&format!("alter role backfilld in database {} reset all", db.name())).await;
    Cli::new(&db).run(&["resume", JOB]).await.expect(0, "");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
}

#[tokio::test]
async fn a_batch_that_would_read_a_whole_table_is_refused_before_it_runs() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    // A login whose settings leave the planner no good way.
    for setting in ["enable_indexscan = off", "enable_bitmapscan = off", "random_page_cost = 1e9"] {
        ledger.run(&format!("alter role backfilld in database {} set {setting}", db.name())).await;
    }
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "would read all of public.messages");
    assert_eq!(ledger.unfilled().await, 600, "nothing was written");
    ledger.run(&format!("alter role backfilld in database {} reset all", db.name())).await;
    Cli::new(&db).run(&["resume", JOB]).await.expect(0, "");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
}

#[tokio::test]
async fn a_lock_met_outside_of_a_batch_is_waited_for() {
    for job in [JobDir::shipped(), JobDir::heap()] {
        job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
        let db = TestDb::new(Template::Rows(200)).await;
        let mut daemon = Local::start(&db, job.spec(), false, &[]);
        let ledger = Ledger::new(&db).await;
        wait_until("it is held", async || {
            ledger.is("select to_regclass('backfilld.job') is not null").await && ledger.status().await == "held"
        })
        .await;
        let app = db.session("app", APP_OWNER).await;
        app.run("begin; lock table public.messages in access exclusive mode").await;
        Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
        wait_note(&daemon, "retrying after 55P03").await;
        app.run("commit").await;
        ledger.wait_status("done").await;
        daemon.stop().await;
    }
}
