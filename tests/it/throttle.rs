//! The throttle: each cause stops the batches, says why, and lets them go on by itself.

use backfilld::demo::sample::APP_OWNER;

use crate::support::{Cli, JOB, JobDir, Ledger, Process, Template, TestDb, wait_until};

fn job(throttle: &str) -> JobDir {
    let job = JobDir::shipped();
    job.append(&format!("[throttle]\nevery = \"100ms\"\n{throttle}"));
    job
}

/// Until the job's reason, as `status` shows it, has `text`.
async fn waits_for(ledger: &Ledger, text: &str) {
    let sql = format!("select exists (select from backfilld.job where status = 'running' and reason like '%{text}%')");
    wait_until(text, async || {
        let there = ledger.is("select to_regclass('backfilld.job') is not null").await;
        there && ledger.is(&sql).await
    })
    .await;
}

/// A function that the throttle asks, with this body.
async fn gate(ledger: &Ledger, body: &str) {
    ledger
        .run(&format!(
            "create or replace function public.gate() returns boolean language plpgsql as $$ begin {body}; end $$"
        ))
        .await;
}

/// A daemon that has done nothing yet, since the gate is closed.
async fn stopped() -> (JobDir, TestDb, Ledger, Process) {
    let (job, db) = (job(GATE), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    gate(&ledger, "return false").await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, "query_gate: the query says no").await;
    (job, db, ledger, daemon)
}

const GATE: &str = "[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"";

#[tokio::test]
async fn an_operators_query_stops_batches_and_lets_them_go_on() {
    let (_job, db, ledger, daemon) = stopped().await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    Cli::new(&db).run(&["status", JOB]).await.expect(0, "");
    let shown = Cli::new(&db).run(&["status", JOB]).await.stdout;
    assert!(shown.contains("query_gate"), "{shown}");
    gate(&ledger, "return true").await;
    daemon.ended().await.expect(0, "batches go on");
    assert_eq!(ledger.unfilled().await, 0);
}

#[tokio::test]
async fn a_query_that_fails_hangs_or_writes_stops_batches() {
    // With one that fails from the start, preflight would not let the job begin.
    let (_job, _db, ledger, daemon) = stopped().await;
    for (body, said) in [
        ("raise exception 'no such thing'", "no such thing"),
        ("perform pg_sleep(60); return true", "statement timeout"),
        ("create table public.x (); return true", "read-only transaction"),
        ("return null", "found NULL"),
    ] {
        gate(&ledger, body).await;
        waits_for(&ledger, &format!("query_gate: it cannot be read: %{said}")).await;
    }
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    assert!(!ledger.is("select to_regclass('public.x') is not null").await);
    gate(&ledger, "return true").await;
    daemon.ended().await.expect(0, "");
}

#[tokio::test]
async fn a_replica_that_should_be_there_and_is_not_stops_batches_and_a_pause_ends_the_wait() {
    let (job, db) = (job("replicas = [\"eu-1\"]"), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    let daemon = Cli::new(&db).start(&["run", job.path()]);
    waits_for(&ledger, "replica eu-1 is not streaming").await;
    Cli::new(&db).run(&["pause", JOB]).await.expect(0, "");
    ledger.wait_status("paused").await;
    assert_eq!(ledger.unfilled().await, 600);
    daemon.signal("TERM");
    daemon.ended().await;
}

#[tokio::test]
async fn batches_run_in_their_windows_only() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    let hours = "select to_char(t, 'HH24:MI'), to_char(t + interval '1 hour', 'HH24:MI')
        from (select clock_timestamp() at time zone 'UTC' + interval '2 hours' as t) s";
    let row = db.admin().await.query_one(hours, &[]).await.expect("a time");
    let closed = format!("from = \"{}\"\nto = \"{}\"", row.get::<_, &str>(0), row.get::<_, &str>(1));
    job.append(&format!("[throttle]\n[[throttle.windows]]\n{closed}"));
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, "window: batches may run").await;
    assert_eq!(ledger.unfilled().await, 600);
    daemon.signal("TERM");
    daemon.ended().await;
}

#[tokio::test]
async fn a_slot_that_retains_too_much_stops_batches_until_it_is_gone() {
    let (job, db) = (job("slot_retained_mb = 24"), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    let slot = format!("unread_{}", db.name().replace('-', "_"));
    ledger.run(&format!("select pg_create_physical_replication_slot('{slot}', true)")).await;
    ledger
        .run("create table public.wal as select repeat(md5(n::text), 30) as t from generate_series(1, 40000) n")
        .await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, "slot_retained is").await;
    assert_eq!(ledger.unfilled().await, 600);
    ledger.run(&format!("select pg_drop_replication_slot('{slot}')")).await;
    daemon.ended().await.expect(0, "done");
}

#[tokio::test]
async fn a_batch_that_keeps_the_application_waiting_is_cancelled() {
    let (job, db) = (job("give_way_after = \"20ms\""), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    expanded(&db, &job).await;
    let holder = db.session("holder", APP_OWNER).await;
    let mut waiter = db.session("waiter", APP_OWNER).await;
    // The batch gets some rows and then waits for this one; meanwhile somebody wants all the others.
    let last = "(select id from public.messages order by id offset 90 limit 1)";
    holder.run(&format!("begin; select 1 from public.messages where id = {last} for update")).await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    let waits = format!(
        "select exists (select from pg_stat_activity where application_name like '%batch%'
           and {} = any (pg_blocking_pids(pid)))",
        holder.pid()
    );
    wait_until("a batch was cancelled", async || {
        if ledger.is(&waits).await {
            waiter.send(&format!("update public.messages set role = role where id <> {last}"));
            waiter.finish_ok().await;
        }
        ledger.is("select to_regclass('backfilld.event') is not null").await
            && ledger.is("select exists (select from backfilld.event where kind = 'gave_way')").await
    })
    .await;
    holder.run("commit").await;
    daemon.ended().await.expect(0, "done");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

/// When the next batch keeps somebody waiting it is too late to find out.
#[tokio::test]
async fn a_lost_connection_that_looks_for_waiting_sessions_is_replaced_while_there_is_no_batch() {
    let (_job, _db, ledger, daemon) = stopped().await;
    let watcher = "from pg_stat_activity where datname = current_database()
        and application_name like 'backfilld/%' and application_name like '%locks%'";
    let there = format!("select exists (select {watcher})");
    wait_until("somebody looks for waiting sessions", async || ledger.is(&there).await).await;
    ledger.run(&format!("create table public.lost as select pid {watcher}")).await;
    ledger.run("select pg_terminate_backend(pid) from public.lost").await;
    let again = format!("select exists (select {watcher} and pid not in (select pid from public.lost))");
    wait_until("somebody looks again", async || ledger.is(&again).await).await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    gate(&ledger, "return true").await;
    daemon.ended().await.expect(0, "batches go on");
}

#[tokio::test]
async fn beyond_a_critical_limit_the_job_is_paused_until_an_operator_resumes_it() {
    let depth = "[throttle.critical]\nquery_depth = 10\n\
                 [[throttle.queries]]\nname = \"depth\"\nsql = \"select public.depth()\"\nmax = 5";
    let (job, db) = (job(depth), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    let set = async |n: i32| {
        let sql = format!("create or replace function public.depth() returns int language sql as 'select {n}'");
        ledger.run(&sql).await;
    };
    set(7).await;
    let daemon = Cli::new(&db).start(&["run", job.path()]);
    waits_for(&ledger, "query_depth is 7, at most 5 wanted").await;
    set(11).await;
    ledger.wait_status("paused").await;
    assert!(ledger.reason().await.starts_with("critical: query_depth is 11"), "{}", ledger.reason().await);
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    // Below the limit it does not go on by itself, and neither does its successor.
    set(0).await;
    daemon.signal("TERM");
    daemon.ended().await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    let taken = "select exists (select from backfilld.lease where expires_at > clock_timestamp())";
    wait_until("the successor is there", async || ledger.is(taken).await).await;
    assert_eq!((ledger.status().await, ledger.unfilled().await), ("paused".to_owned(), 600));
    Cli::new(&db).run(&["resume", JOB]).await.expect(0, "");
    daemon.ended().await.expect(0, "done");
    assert_eq!(ledger.unfilled().await, 0);
    assert_eq!(ledger.number("select count(*) from backfilld.event where kind = 'critical'").await, 1);
}

#[tokio::test]
async fn an_endpoint_is_asked_and_every_reason_is_told_at_once() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/check", listener.local_addr().expect("an address"));
    let fine = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let answers = fine.clone();
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            let status = if answers.load(std::sync::atomic::Ordering::Relaxed) { "200 OK" } else { "429 Too Many" };
            let _ = stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
        }
    });
    let endpoint = format!("{GATE}\n[[throttle.http]]\nname = \"freno\"\nurl = \"{url}\"");
    let (job, db) = (job(&endpoint), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    gate(&ledger, "return false").await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, "query_gate: the query says no; http_freno: it answers 429").await;
    gate(&ledger, "return true").await;
    waits_for(&ledger, "waiting: http_freno: it answers 429").await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    fine.store(true, std::sync::atomic::Ordering::Relaxed);
    daemon.ended().await.expect(0, "done");
    server.abort();
    // Nobody listens there any more.
    let _ = server.await;
    let ended = Cli::new(&db).run(&["check", job.path()]).await;
    let told = ended.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(ended.code != Some(0) && told.contains("throttle endpoint freno: cannot connect"), "{ended:#?}");
}

/// The job held before its first batch, so that a lock on the table is not in the way of Expand.
async fn expanded(db: &TestDb, job: &JobDir) {
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    Cli::new(db).run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    Cli::new(db).run(&["cutover", JOB]).await.expect(0, "");
}

#[tokio::test]
async fn an_old_transaction_stops_batches_until_it_ends() {
    let (job, db) = (job("oldest_transaction = \"1s\""), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    expanded(&db, &job).await;
    let report = db.session("report", APP_OWNER).await;
    report.run("begin isolation level repeatable read; select 1").await;
    let old = format!(
        "select xact_start < clock_timestamp() - interval '1 s' from pg_stat_activity where pid = {}",
        report.pid()
    );
    wait_until("it is old enough", async || ledger.is(&old).await).await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, &format!("oldest_transaction is%pid {} of {APP_OWNER}", report.pid())).await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    report.run("commit").await;
    daemon.ended().await.expect(0, "done");
}

#[tokio::test]
async fn a_vacuum_against_wraparound_on_the_target_stops_batches() {
    let (job, db) = (job(""), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    expanded(&db, &job).await;
    // The least that the server allows. Each exception block takes a transaction id.
    ledger
        .run(
            "alter table public.messages set (autovacuum_freeze_max_age = 100000, autovacuum_enabled = off);
             create temp table burn (n int);
             do $$ begin for n in 1..100100 loop
               begin insert into burn values (n); exception when others then null; end;
             end loop; end $$",
        )
        .await;
    // As a vacuum does; a real one of 600 rows would be over too soon.
    let vacuum = db.session("vacuum", APP_OWNER).await;
    vacuum.run("begin; lock table public.messages in share update exclusive mode").await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, "wraparound_vacuum: a vacuum against wraparound is at work on public.messages").await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    vacuum.run("commit").await;
    daemon.ended().await.expect(0, "done");
}

#[tokio::test]
async fn a_throttle_that_cannot_be_is_refused_with_its_key() {
    let db = TestDb::new(Template::Rows(600)).await;
    for (text, said) in [
        ("duty = 0", "throttle.duty"),
        ("lag = 3", "unknown field `lag`"),
        ("ignore = [\"cpu\"]", "unknown signal \"cpu\""),
        ("[[throttle.windows]]\nfrom = \"01:00\"\nto = \"01:00\"", "never opens"),
        ("[[throttle.windows]]\nfrom = \"01:00\"\nto = \"02:00\"\ntime_zone = \"Mars/Base\"", "Mars/Base"),
        ("[throttle.critical]\nlag = 3", "unknown signal \"lag\""),
        ("[throttle.critical]\nreplica_lag = 3", "expected a limit above 5 s"),
        ("[[throttle.http]]\nname = \"a\"\nurl = \"https://x/\"", "throttle.http[0].url"),
        ("pace = \"fast\"", "pace"),
    ] {
        Cli::new(&db).run(&["check", job(text).path()]).await.expect(2, said);
    }
    for (sql, max, said) in [
        ("select 'text'", "", "expected a number or a boolean, found"),
        ("select 1", "", "say with max"),
        ("select n from generate_series(1, 2) n", "max = 3", "found several"),
        ("select null::int", "max = 3", "found NULL"),
        ("select true", "max = 3", "which has no max"),
        ("select no from where", "max = 3", "syntax error"),
        ("select 1 from pg_sleep(60)", "max = 3", "no result within 2 s"),
    ] {
        let job = job(&format!("[[throttle.queries]]\nname = \"q\"\nsql = \"{sql}\"\n{max}"));
        let ended = Cli::new(&db).run(&["check", job.path()]).await;
        // The table wraps its lines.
        let told = ended.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(ended.code != Some(0) && told.contains(said), "{sql}: {ended:#?}");
    }
}
