//! The throttle: each cause stops the batches, says why, and lets them go on by itself.

use backfilld::demo::sample::APP_OWNER;

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, wait_until};

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

const GATE: &str = "[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"";

#[tokio::test]
async fn an_operators_query_stops_batches_and_lets_them_go_on() {
    let (job, db) = (job(GATE), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    gate(&ledger, "return false").await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, "query_gate: the query says no").await;
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
    let (job, db) = (job(GATE), TestDb::new(Template::Rows(600)).await);
    let ledger = Ledger::new(&db).await;
    // With one that fails from the start, preflight would not let the job begin.
    gate(&ledger, "return false").await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits_for(&ledger, "query_gate: the query says no").await;
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
    let hours = "select to_char((clock_timestamp() at time zone 'UTC') + interval '2 hours', 'HH24:MI')";
    let at: String = db.admin().await.query_one(hours, &[]).await.expect("a time").get(0);
    let to = if at.ends_with("59") { "00" } else { "59" };
    let closed = format!("from = \"{at}\"\nto = \"{}:{to}\"", &at[..2]);
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
    // Expand has to be over: the holder's table lock would be in its way.
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
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

#[tokio::test]
async fn a_throttle_that_cannot_be_is_refused_with_its_key() {
    let db = TestDb::new(Template::Rows(600)).await;
    for (text, said) in [
        ("duty = 0", "throttle.duty"),
        ("lag = 3", "unknown field `lag`"),
        ("ignore = [\"cpu\"]", "unknown signal \"cpu\""),
        ("[[throttle.windows]]\nfrom = \"01:00\"\nto = \"01:00\"", "never opens"),
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
    ] {
        let job = job(&format!("[[throttle.queries]]\nname = \"q\"\nsql = \"{sql}\"\n{max}"));
        let ended = Cli::new(&db).run(&["check", job.path()]).await;
        // The table wraps its lines.
        let told = ended.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(ended.code != Some(0) && told.contains(said), "{sql}: {ended:#?}");
    }
}
