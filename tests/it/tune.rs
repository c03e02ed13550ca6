//! What an operator changes in a running job: each key takes effect, ends when it should, and a role for it can do no more.

use backfilld::demo::sample::DAEMON;
use tokio_postgres::Client;

use crate::support::{Cli, JOB, JobDir, Ledger, Local, Template, TestDb, wait_until};

/// A job that rests for an hour after each batch.
fn resting() -> JobDir {
    let job = JobDir::shipped();
    job.append("pause = \"1h\"");
    job
}

async fn first_batch(ledger: &Ledger) {
    wait_until("a batch is through", async || {
        ledger.is("select to_regclass('backfilld.checkpoint') is not null").await
            && ledger.is("select coalesce(max(batches) >= 1, false) from backfilld.checkpoint").await
    })
    .await;
}

/// Until the daemon has taken a change up.
async fn in_force(ledger: &Ledger, change: &str) {
    let sql = format!(
        "select exists (select from backfilld.event, jsonb_array_elements_text(detail -> 'changes') c
           where kind = 'tuned' and c = '{change}')"
    );
    wait_until(change, async || ledger.is(&sql).await).await;
}

async fn waits_for(ledger: &Ledger, text: &str) {
    let sql = format!("select exists (select from backfilld.job where reason like '%{text}%')");
    wait_until(text, async || ledger.is(&sql).await).await;
}

#[tokio::test]
async fn every_key_takes_effect_while_the_job_runs_and_none_beyond_its_bounds() {
    let db = TestDb::new(Template::Rows(600)).await;
    let (cli, ledger, job) = (Cli::new(&db), Ledger::new(&db).await, resting());
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    first_batch(&ledger).await;
    for (bad, bounds) in [
        ("duty=0", "throttle.duty: expected 0.01 to 1, found \"0\""),
        ("batching.target_duration=900us", "expected 1ms to 5s"),
        ("lanes=9", "expected 1 to 8"),
        ("min_rows=101", "expected 1 to max_rows"),
        ("lag=1", "\"lag\" is no key that can be tuned; expected one of batching.target_duration"),
        ("queries=[]", "is no key that can be tuned"),
        ("duty", "expected KEY=VALUE"),
    ] {
        cli.run(&["tune", JOB, "throttle.every=100ms", bad]).await.expect(2, bounds);
    }
    cli.run(&["tune", JOB, "duty=1", "--until", "2001-01-01"]).await.expect(2, "is over");
    cli.run(&["tune", JOB, "duty=1", "--until", "soonish"]).await.expect(2, "expected a time such as 2h");
    cli.run(&["tune", "other", "duty=1"]).await.expect(5, "no job \"other\"");
    assert_eq!(ledger.number("select count(*) from backfilld.tuning").await, 0, "all or nothing");

    let changes = [
        ("batching.target_duration", "1s500ms"),
        ("batching.min_rows", "7"),
        ("batching.max_rows", "7"),
        ("batching.lanes", "2"),
        ("batching.horizon_wait", "5s"),
        ("throttle.duty", "0.9"),
        ("throttle.every", "100ms"),
        ("throttle.replica_lag", "9s"),
        ("throttle.replica_lag_mb", "999"),
        ("throttle.slot_retained_mb", "9999"),
        ("throttle.slot_safe_mb", "9"),
        ("throttle.wal_mb_per_second", "9000"),
        ("throttle.oldest_transaction", "20days"),
        ("throttle.dead_rows_percent", "2000000"),
        ("throttle.multixact_age", "2000000000"),
        ("throttle.commit_latency", "50s"),
        ("throttle.pace", "constant"),
        ("throttle.latency_budget", "9.5"),
        ("throttle.critical", "{xid_age=4000000000}"),
        ("throttle.lock_waiters", "90"),
        ("throttle.active_sessions", "900"),
        ("throttle.probe_latency", "9s"),
        ("throttle.give_way_after", "90ms"),
        ("throttle.ignore", "[\"slot_safe\"]"),
    ];
    let said: Vec<String> = changes.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let args: Vec<&str> = ["tune", JOB].into_iter().chain(said.iter().map(String::as_str)).collect();
    cli.run(&args).await.expect(0, "");
    in_force(&ledger, "batching.max_rows: was 100, is 7").await;
    let taken = "select count(*) from backfilld.event, jsonb_array_elements(detail -> 'changes') where kind = 'tuned'";
    // The tests' jobs have a constant pace already.
    assert_eq!(ledger.number(taken).await, changes.len() as i64 - 1);

    // A login that may not see other sessions has to wait where they shall be counted.
    cli.run(&["tune", JOB, "--reset", "active_sessions", "--reset", "oldest_transaction", "--reset", "critical"])
        .await
        .expect(0, "");
    // The rest of an hour ends at once, and the next batch has the other size.
    let batches = ledger.number("select batches from backfilld.checkpoint").await;
    cli.run(&["tune", JOB, "pause=100ms"]).await.expect(0, "");
    wait_until("batches go on", async || {
        ledger.number("select batches from backfilld.checkpoint").await >= batches + 2
    })
    .await;
    assert_eq!(ledger.number("select batch_rows from backfilld.checkpoint").await, 7);
    // Limits make batches wait at once, and let them go on.
    for (change, why) in [
        ("xid_age=1", "xid_age is"),
        ("replicas=[\"eu-1\"]", "replica eu-1 is not streaming"),
        (
            "windows=[{from = \"00:00\", to = \"00:01\", days = [\"mon\"], utc_offset = \"+13:00\"}]",
            "window: batches may run",
        ),
    ] {
        let key = change.split('=').next().expect("a key");
        cli.run(&["tune", JOB, change]).await.expect(0, "");
        waits_for(&ledger, why).await;
        cli.run(&["tune", JOB, "--reset", key]).await.expect(0, "");
        wait_until("it goes on", async || ledger.reason().await.is_empty()).await;
    }
    let shown = cli.run(&["tune", JOB]).await.stdout;
    assert!(
        shown.contains("throttle.duty               0.9        1.0        0.01 to 1\n  tuned by backfilld"),
        "{shown}"
    );
    assert!(shown.lines().all(|l| l.chars().count() <= 80 || l.contains("tuned by")), "{shown}");
    cli.run(&["tune", JOB, "--reset", "all"]).await.expect(0, "");
    in_force(&ledger, "batching.pause: was 100ms, is 1h").await;
    assert_eq!(ledger.number("select count(*) from backfilld.tuning").await, 0);
    cli.run(&["tune", JOB, "pause=0s"]).await.expect(0, "");
    assert_eq!(daemon.ended().await.expect("it ends"), backfilld::phase::Status::Done);
    cli.run(&["tune", JOB, "pause=0s"]).await.expect(5, "there is nothing left to tune");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

#[tokio::test]
async fn how_far_a_sweep_is_can_be_seen_from_the_daemon_and_from_anywhere() {
    let db = TestDb::new(Template::Rows(600)).await;
    let (cli, ledger, job) = (Cli::new(&db), Ledger::new(&db).await, resting());
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    first_batch(&ledger).await;
    let walked = ledger.number("select rows_scanned from backfilld.checkpoint").await;
    let estimate = ledger.number("select rows_estimate from backfilld.checkpoint").await;
    let ratio = walked as f64 / estimate as f64;
    assert!(0.0 < ratio && ratio < 0.9, "{walked} of {estimate}");
    wait_until("the daemon tells it", async || (daemon.daemon.progress.now().ratio - ratio).abs() < 1e-9).await;
    let shown: serde_json::Value =
        serde_json::from_str(&cli.run(&["status", JOB, "--json"]).await.stdout).expect("JSON");
    assert!((shown[0]["progress_ratio"].as_f64().expect("a ratio") - ratio).abs() < 1e-9, "{shown}");
    assert_eq!(daemon.daemon.progress.now().eta, None, "one batch is no speed");
    ledger
        .run("update backfilld.checkpoint set started_at = started_at - interval '1 hour', rows_estimate = 60000")
        .await;
    ledger.run("update backfilld.event set at = at - interval '1 hour'").await;
    let text = cli.run(&["status", JOB]).await.stdout;
    assert!(text.contains("% of the sweep, about ") && text.contains(" d ") && text.contains(" left"), "{text}");
    daemon.stop().await;
}

#[tokio::test]
async fn tuning_outlives_a_restart_and_ends_by_the_servers_clock() {
    let db = TestDb::new(Template::Rows(600)).await;
    let (cli, ledger, job) = (Cli::new(&db), Ledger::new(&db).await, resting());
    let mut daemon = Local::start(&db, job.spec(), false, &[]);
    first_batch(&ledger).await;
    cli.run(&["tune", JOB, "max_rows=50", "every=100ms"]).await.expect(0, "");
    in_force(&ledger, "batching.max_rows: was 100, is 50").await;
    daemon.stop().await;
    ledger.run("delete from backfilld.event").await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    in_force(&ledger, "batching.max_rows: was 100, is 50").await;

    // An operator's stop holds although nothing else waits, says why, and is over by itself.
    cli.run(&["throttle", JOB, "--for", "2s", "--reason", "big import"]).await.expect(0, "");
    cli.run(&["tune", JOB, "pause=0s"]).await.expect(0, "");
    waits_for(&ledger, "operator: big import").await;
    in_force(&ledger, "batches are no longer stopped by an operator").await;
    assert!(!ledger.is("select coalesce(min(until) > clock_timestamp(), false) from backfilld.tuning").await);
    assert_eq!(daemon.ended().await.expect("it ends"), backfilld::phase::Status::Done);
    let history = cli.run(&["status", JOB, "--history", "50"]).await.stdout;
    for part in ["throttle by backfilld", "big import", "tune by backfilld", "batching.max_rows: was 100, is 50", "@"] {
        assert!(history.contains(part), "{part}: {history}");
    }
}

#[tokio::test]
async fn an_operators_stop_can_be_taken_back_and_has_its_bounds() {
    let db = TestDb::new(Template::Rows(600)).await;
    let (cli, ledger) = (Cli::new(&db), Ledger::new(&db).await);
    let job = JobDir::with("hold_before = [\"backfill\"]");
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    cli.run(&["throttle", JOB]).await.expect(2, "--for");
    cli.run(&["throttle", JOB, "--for", "8days"]).await.expect(2, "expected 1s to 7days");
    cli.run(&["throttle", JOB, "--for", "1h"]).await.expect(0, "");
    cli.run(&["cutover", JOB]).await.expect(0, "");
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    waits_for(&ledger, "operator: stopped for a while").await;
    assert_eq!(ledger.unfilled().await, 600, "not one batch");
    cli.run(&["throttle", JOB, "--off"]).await.expect(0, "");
    assert_eq!(daemon.ended().await.expect("it ends"), backfilld::phase::Status::Done);
}

/// A login of its own with an operator's rights. Gives its URL.
async fn operator(db: &TestDb, ledger: &Ledger, name: &str) -> String {
    let url = db.url(name);
    let password = url.split(':').nth(2).and_then(|s| s.split('@').next()).expect("a password").to_owned();
    let _ = ledger.client.batch_execute(&format!("create role {name} login")).await;
    ledger.run(&format!("alter role {name} password '{password}'")).await;
    let grants = Cli::new(db).run(&["grants", name]).await;
    let daemon = db.client(DAEMON).await;
    daemon.batch_execute(&grants.stdout).await.expect("the daemon may grant what is its own");
    url
}

async fn refused(client: &Client, sql: &str) {
    let e = backfilld::Error::from(client.batch_execute(sql).await.expect_err(sql));
    assert_eq!(e.sqlstate(), Some("42501"), "{sql}: {e}");
}

#[tokio::test]
async fn an_operator_role_can_watch_and_control_and_do_nothing_else() {
    let db = TestDb::new(Template::Rows(600)).await;
    let (cli, ledger) = (Cli::new(&db), Ledger::new(&db).await);
    let job = JobDir::with("hold_before = [\"backfill\", \"flip\"]");
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    let url = operator(&db, &ledger, "tune_operator").await;
    let (oncall, me) = (Cli::at(&url), db.client("tune_operator").await);

    // By hand it can do what the commands do.
    refused(&me, "update backfilld.job set status = 'running'").await;
    refused(&me, "update backfilld.job set released = array['flip']").await;
    oncall.run(&["status", JOB, "--history", "5"]).await.expect(0, "");
    oncall.run(&["cutover", JOB]).await.expect(0, "");
    oncall.run(&["tune", JOB, "duty=0.5", "--until", "1h"]).await.expect(0, "");
    oncall.run(&["tune", JOB, "--reset", "duty"]).await.expect(0, "");
    oncall.run(&["throttle", JOB, "--for", "1h"]).await.expect(0, "");
    oncall.run(&["throttle", JOB, "--off"]).await.expect(0, "");
    oncall.run(&["pause", JOB]).await.expect(0, "");
    oncall.run(&["resume", JOB]).await.expect(0, "");
    oncall.run(&["rollback", JOB, "--yes"]).await.expect(1, "");
    assert_eq!(ledger.status().await, "running");
    let by = "select count(distinct kind) from backfilld.event where actor = 'tune_operator'";
    assert_eq!(ledger.number(by).await, 5);

    for sql in [
        "update backfilld.job set status = 'done'",
        "update backfilld.job set status = 'rolling_back'",
        "update backfilld.job set phase = 'flip'",
        "update backfilld.job set released = array['flip']",
        "update backfilld.job set drop_column = true",
        "update backfilld.job set spec = '{}'",
        "delete from backfilld.job",
        "insert into backfilld.verdict (job, passed, rows_checked, counts, job_hash, system_identifier, timeline, duration_ms)
           select name, true, 0, '{}', spec_hash, '', 1, 1 from backfilld.job",
        "update backfilld.verdict set passed = true",
        "update backfilld.lease set epoch = 9",
        "delete from backfilld.snapshot",
        "update backfilld.event set actor = 'somebody'",
        "insert into backfilld.event (job, kind, actor) values ('x', 'tune', 'somebody')",
        "delete from backfilld.event",
        "insert into backfilld.tuning (job, key, value, set_by) values ('messages_auth_user_id', 'x', '1', 'somebody')",
        "update backfilld.checkpoint set rows_updated = 0",
        "create table backfilld.mine ()",
        "create function backfilld.mine() returns int language sql as 'select 1'",
        "select * from public.messages",
        "select * from public.conversations",
        "drop trigger guard on backfilld.job",
    ] {
        refused(&me, sql).await;
    }
    // Failed in an enforcing phase, a job goes on with the proof, not with that phase.
    ledger.run("update backfilld.job set phase = 'flip', status = 'failed'").await;
    refused(&me, "update backfilld.job set status = 'running'").await;
    oncall.run(&["resume", JOB]).await.expect(0, "");
    assert_eq!((ledger.status().await, ledger.phase().await), ("running".into(), "verify".into()));
    // Nonsense that it writes past the command is left out.
    me.batch_execute(
        "insert into backfilld.tuning (job, key, value) values ('messages_auth_user_id', 'throttle.duty', '7')",
    )
    .await
    .expect("it may");
    ledger.run("update backfilld.job set phase = 'backfill'").await;
    cli.run(&["run", "--once", job.path()])
        .await
        .expect(5, "hold point before flip")
        .expect(5, "a tuned value is left out: throttle.duty");
    assert_eq!(ledger.unfilled().await, 0);
}
