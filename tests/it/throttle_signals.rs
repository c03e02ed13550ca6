//! Signals that the database gives of itself: each stops batches where its limit is below what is there, and lets them go
//! on when an operator raises the limit.

use backfilld::demo::cluster::SUPERUSER;
use backfilld::demo::sample::APP_OWNER;

use crate::support::{Cli, JOB, JobDir, Ledger, Local, Template, TestDb, wait_until};

/// Runs a job that `limit` stops before its first batch, and raises the limit.
async fn stops_and_goes_on(db: &TestDb, limit: &str, reason: &str, raised: &str) {
    let (job, ledger) = (JobDir::shipped(), Ledger::new(db).await);
    job.append(&format!("[throttle]\nevery = \"100ms\"\n{limit}"));
    let rows = ledger.number("select count(*) from public.messages").await;
    let daemon = Cli::new(db).start(&["run", "--once", job.path()]);
    let waits =
        format!("select exists (select from backfilld.job where status = 'running' and reason like '%{reason}%')");
    wait_until(reason, async || {
        ledger.is("select to_regclass('backfilld.job') is not null").await && ledger.is(&waits).await
    })
    .await;
    assert_eq!(ledger.unfilled().await, rows, "not one batch");
    Cli::new(db).run(&["tune", JOB, raised]).await.expect(0, "");
    wait_until("batches go on", async || ledger.unfilled().await == 0).await;
    // Whoever was active has to go: an index build would wait for them.
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
               where datname = current_database() and query like '%lock table public.gate'";
    ledger.run(end).await;
    daemon.ended().await.expect(0, "done");
    assert_eq!(ledger.drift().await, 0);
}

#[tokio::test]
async fn old_transaction_ids_stop_batches() {
    let db = TestDb::new(Template::Rows(600)).await;
    let age = "select age(datfrozenxid) from pg_database where datname = current_database()";
    let age = Ledger::new(&db).await.number(age).await;
    let (limit, reason) = (format!("xid_age = {}", age - 1), format!("xid_age is % at most {} transactions", age - 1));
    stops_and_goes_on(&db, &limit, &reason, "xid_age=2000000000").await;
}

#[tokio::test]
async fn old_multixacts_stop_batches() {
    let db = TestDb::new(Template::Rows(600)).await;
    let (one, other) = (db.session("one", APP_OWNER).await, db.session("other", APP_OWNER).await);
    // Two who hold one row's lock are a multixact.
    for _ in 0..3 {
        for session in [&one, &other] {
            session.run("begin; select from public.messages order by id limit 1 for key share").await;
        }
        one.run("commit").await;
        other.run("commit").await;
    }
    let age = "select mxid_age(datminmxid) from pg_database where datname = current_database()";
    let age = Ledger::new(&db).await.number(age).await;
    assert!(age > 1, "{age}");
    let limit = format!("multixact_age = {}", age - 1);
    let reason = format!("multixact_age is % at most {} multixacts", age - 1);
    stops_and_goes_on(&db, &limit, &reason, "multixact_age=2000000000").await;
}

#[tokio::test]
async fn dead_rows_of_the_target_stop_batches() {
    let db = TestDb::new(Template::Rows(600)).await;
    let ledger = Ledger::new(&db).await;
    ledger.run("alter table public.messages set (autovacuum_enabled = off)").await;
    ledger.run("analyze public.messages").await;
    // What is left of a deleted row is dead until a vacuum, whoever looks at the page meanwhile. A session that ends has
    // told its statistics.
    let delete = "delete from public.messages where id in (select id from public.messages order by id limit 150)";
    db.admin().await.batch_execute(delete).await.expect("rows go");
    let seen = "select n_live_tup = 450 and n_dead_tup = 150 from pg_stat_user_tables where relname = 'messages'";
    wait_until("the statistics have it", async || ledger.is(seen).await).await;
    stops_and_goes_on(&db, "dead_rows_percent = 30", "dead_rows is 33.33%, at most 30%", "dead_rows_percent=1000")
        .await;
}

#[tokio::test]
async fn active_sessions_stop_batches() {
    let db = TestDb::new(Template::Rows(600)).await;
    // Waiting for a lock, without a snapshot that an index build would wait for.
    let holder = db.session("holder", SUPERUSER).await;
    holder.run("create table public.gate ()").await;
    holder.run("begin; lock table public.gate").await;
    let mut active = Vec::new();
    for name in ["first", "second", "third"] {
        let mut session = db.session(name, SUPERUSER).await;
        session.send("begin; lock table public.gate");
        db.wait_blocked(&session).await;
        active.push(session);
    }
    // The fourth is the one that counts them. Other tests on this server have more, so they do not get fewer by themselves.
    let reason = "active_sessions is % at most 3 sessions";
    stops_and_goes_on(&db, "active_sessions = 3", reason, "active_sessions=900").await;
}

const GATE: &str =
    "[throttle]\nevery = \"100ms\"\n[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"";

async fn gate(ledger: &Ledger, body: &str) {
    ledger
        .run(&format!(
            "create or replace function public.gate() returns boolean language plpgsql as $$ begin {body}; end $$"
        ))
        .await;
}

/// Waits until the daemon itself says what it waits for.
async fn says(daemon: &Local, text: &str) {
    let progress = daemon.daemon.progress.clone();
    wait_until(text, async move || progress.now().note.contains(text)).await;
}

#[tokio::test]
async fn a_measurement_that_is_old_stops_batches() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    // Each of them is cancelled after two seconds, and all of them take longer than a measurement may be old.
    let more = |n: u32| format!("\n[[throttle.queries]]\nname = \"gate{n}\"\nsql = \"select public.gate()\"");
    job.append(&format!("{GATE}{}{}", more(2), more(3)));
    gate(&ledger, "return false").await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    says(&daemon, "query_gate: the query says no").await;
    gate(&ledger, "perform pg_sleep(600); return true").await;
    says(&daemon, "probe: nothing could be measured for").await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    gate(&ledger, "return true").await;
    assert_eq!(daemon.ended().await.expect("it ends"), backfilld::phase::Status::Done);
}

#[tokio::test]
async fn a_commit_that_does_not_come_back_stops_batches_before_it_is_given_up() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    job.append(GATE);
    gate(&ledger, "return false").await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    says(&daemon, "query_gate: the query says no").await;
    let commits = async |takes: &str| {
        let body = format!("begin perform {takes}; return null; end");
        let function = "create or replace function public.at_commit() returns trigger language plpgsql as";
        ledger.run(&format!("{function} $$ {body} $$")).await;
    };
    commits("pg_sleep(600)").await;
    ledger
        .run(
            "create constraint trigger at_commit after insert or update on backfilld.pulse
             deferrable initially deferred for each row execute function public.at_commit()",
        )
        .await;
    says(&daemon, "commit_latency").await;
    let note = daemon.daemon.progress.now().note.clone();
    assert!(note.contains("commit_latency is ") && note.contains("at most 0.50 s"), "{note}");
    gate(&ledger, "return true").await;
    says(&daemon, "commit_latency").await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    commits("pg_sleep(0)").await;
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
               where datname = current_database() and application_name like 'backfilld/%pulse%'";
    ledger.run(end).await;
    assert_eq!(daemon.ended().await.expect("it ends"), backfilld::phase::Status::Done);
}

#[tokio::test]
async fn a_measurement_that_cannot_be_made_stops_batches() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    job.append(GATE);
    gate(&ledger, "return false").await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    let waits_for = async |text: &str| {
        let sql = format!("select exists (select from backfilld.job where reason like '%{text}%')");
        wait_until(text, async || {
            ledger.is("select to_regclass('backfilld.job') is not null").await && ledger.is(&sql).await
        })
        .await;
    };
    waits_for("query_gate: the query says no").await;
    // Who is there may stay, and nobody else may come.
    let elsewhere = TestDb::new(Template::Empty).await;
    let admin = elsewhere.admin().await;
    let open = async |yes: bool| {
        let sql = format!("alter database {} with allow_connections {yes}", db.name());
        admin.batch_execute(&sql).await.expect("a superuser may");
    };
    open(false).await;
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
               where datname = current_database() and application_name like 'backfilld/%throttle%'";
    ledger.run(end).await;
    waits_for("probe: the signals cannot be measured").await;
    gate(&ledger, "return true").await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    open(true).await;
    daemon.ended().await.expect(0, "done");
    assert_eq!(ledger.unfilled().await, 0);
}
