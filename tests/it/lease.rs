//! Who may work: lease, takeover, zombies, signals.

use std::time::Duration;

use backfilld::ledger::lease::{self, Acquired, Lease};
use backfilld::phase::Status;
use uuid::Uuid;

use crate::support::{Cli, JOB, JobDir, Ledger, Local, Session, Template, TestDb, wait_until};

const TTL: Duration = Duration::from_secs(3);

/// A job that stands before its first batch, with its ledger.
async fn held(db: &TestDb) -> (JobDir, Ledger) {
    let job = JobDir::with("hold_before = [\"backfill\"]");
    Cli::new(db).run(&["run", "--once", job.path()]).await.expect(5, "hold point before backfill");
    (job, Ledger::new(db).await)
}

/// An application's transaction that has locked the row with this number, so that a batch waits.
async fn lock_row(db: &TestDb, number: u32) -> Session {
    let app = db.session("app", backfilld::demo::sample::APP_OWNER).await;
    let row = format!("select id from public.messages order by id offset {number} limit 1");
    app.run(&format!("begin; select from public.messages where id = ({row}) for update")).await;
    app
}

async fn take(ledger: &Ledger, instance: &str) -> Acquired {
    lease::acquire(&*ledger.client, JOB, instance, Uuid::new_v4(), TTL).await.expect("the lease answers")
}

fn ours(acquired: Acquired) -> Lease {
    match acquired {
        Acquired::Yes(lease) => lease,
        held @ Acquired::HeldBy { .. } => panic!("{held:?}"),
    }
}

#[tokio::test]
async fn a_lease_is_given_back_at_once_when_a_daemon_ends() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (_job, ledger) = held(&db).await;
    assert!(ledger.is("select expires_at <= clock_timestamp() from backfilld.lease").await);
    let lease = ours(take(&ledger, "another").await);
    assert_eq!(lease.epoch, 2);
    assert!(matches!(take(&ledger, "third").await, Acquired::HeldBy { instance, .. } if instance == "another"));
}

#[tokio::test]
async fn the_same_instance_comes_back_at_once_when_its_backends_are_gone_and_not_before() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (_job, ledger) = held(&db).await;
    let lease = ours(take(&ledger, "one").await);
    let worker = db.admin().await;
    let name = format!("backfilld/{}", lease.purpose("batch"));
    worker.execute("select set_config('application_name', $1, false)", &[&name]).await.expect("set");
    assert!(matches!(take(&ledger, "one").await, Acquired::HeldBy { .. }), "somebody still works under it");
    drop(worker);
    wait_until("the old backend is gone", async || {
        ledger.is(&format!("select not exists (select from pg_stat_activity where application_name = '{name}')")).await
    })
    .await;
    assert_eq!(ours(take(&ledger, "one").await).epoch, lease.epoch + 1);
}

#[tokio::test]
async fn heartbeats_pass_a_batch_in_flight_and_a_takeover_waits_for_it() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (_job, ledger) = held(&db).await;
    let lease = ours(take(&ledger, "old").await);
    let mut batch = db.admin().await;
    let batch = batch.transaction().await.expect("begin");
    lease::fence(&batch, &lease).await.expect("it is ours");
    lease::renew(&*ledger.client, &lease, TTL).await.expect("does not wait for the batch");
    ledger.run("update backfilld.lease set expires_at = clock_timestamp()").await;

    let mut next = db.session("next", backfilld::demo::cluster::SUPERUSER).await;
    next.send("update backfilld.lease set epoch = epoch + 1, holder = gen_random_uuid()");
    db.wait_blocked(&next).await;
    batch.commit().await.expect("it was ours to the end");
    next.finish_ok().await;

    let mut zombie = db.admin().await;
    let zombie = zombie.transaction().await.expect("begin");
    let refused = lease::fence(&zombie, &lease).await.expect_err("the lease is another's");
    assert_eq!(refused.kind(), backfilld::Kind::LeaseLost);
    let refused = lease::renew(&*ledger.client, &lease, TTL).await.expect_err("the lease is another's");
    assert_eq!(refused.kind(), backfilld::Kind::LeaseLost);
}

#[tokio::test]
async fn a_takeover_ends_the_backends_that_still_work_under_the_old_lease() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (_job, ledger) = held(&db).await;
    let lease = ours(take(&ledger, "old").await);
    let mut zombie = db.admin().await;
    let name = format!("backfilld/{}", lease.purpose("batch"));
    zombie.execute("select set_config('application_name', $1, false)", &[&name]).await.expect("set");
    let tx = zombie.transaction().await.expect("begin");
    lease::fence(&tx, &lease).await.expect("it is ours");
    tx.execute("update public.messages set auth_user_id = null", &[]).await.expect("runs");
    ledger.run("update backfilld.lease set expires_at = clock_timestamp()").await;
    ours(take(&ledger, "new").await);
    assert!(tx.commit().await.is_err(), "its connection is gone");
}

#[tokio::test]
async fn a_daemon_that_lost_its_lease_does_not_commit_and_waits_as_standby() {
    let db = TestDb::new(Template::Rows(600)).await;
    let (job, ledger) = held(&db).await;
    let app = lock_row(&db, 0).await;
    ledger.run("update backfilld.job set status = 'running', released = '{backfill}'").await;
    // Heartbeats so far apart that it is the fence of a batch that notices.
    let mut daemon = Local::start(&db, job.spec(), true, &[("lease.ttl", "10m")]);
    wait_until("it is at its first batch", async || ledger.is("select count(*) > 0 from backfilld.checkpoint").await)
        .await;
    ledger
        .run(
            "update backfilld.lease set epoch = epoch + 1, holder = gen_random_uuid(), instance = 'there',
               expires_at = clock_timestamp() + interval '1 hour'",
        )
        .await;
    app.run("commit").await;
    wait_until("it waits as standby", async || daemon.daemon.progress.now().phase == "standby").await;
    assert_eq!(ledger.number("select count(auth_user_id) from public.messages").await, 0);
    assert_eq!(ledger.number("select count(*) from backfilld.lease where instance = 'there'").await, 1);
    ledger.run("update backfilld.lease set expires_at = clock_timestamp()").await;
    assert_eq!(daemon.ended().await.expect("it takes over"), Status::Done);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

#[tokio::test]
async fn a_daemon_whose_heartbeats_fail_stops_before_its_lease_can_be_taken() {
    let db = TestDb::new(Template::Rows(600)).await;
    let ledger = Ledger::new(&db).await;
    let job = JobDir::with("hold_before = [\"backfill\"]");
    let mut daemon = Local::start(&db, job.spec(), false, &[]);
    ledger.wait_status("held").await;
    // Nobody can renew while this transaction has the row. As long as it is in doubt, nothing of the job moves.
    let blocker = db.session("blocker", backfilld::demo::cluster::SUPERUSER).await;
    blocker.run("begin; select from backfilld.lease for update").await;
    wait_until("it has given up", async || {
        let now = daemon.daemon.progress.now();
        now.phase == "standby" || ledger.is("select expires_at < clock_timestamp() from backfilld.lease").await
    })
    .await;
    blocker.run("commit").await;
    wait_until("it has taken a new lease", async || ledger.is("select epoch > 1 from backfilld.lease").await).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_standby_takes_over_when_the_holder_leaves_and_when_it_is_killed() {
    let db = TestDb::new(Template::Rows(600)).await;
    let ledger = Ledger::new(&db).await;
    let job = JobDir::with("hold_before = [\"backfill\"]");
    let (here, there) = (Cli::new(&db), Cli::new(&db).env("BACKFILLD_INSTANCE", "there"));
    let holder = "select count(*) from backfilld.lease where expires_at > clock_timestamp() and instance = ";

    let first = here.start(&["run", job.path()]);
    ledger.wait_status("held").await;
    let second = there.start(&["run", job.path()]);
    let waiting = "select count(*) from pg_stat_activity where datname = current_database()
        and application_name like 'backfilld/%/heartbeat'";
    wait_until("both are there", async || ledger.number(waiting).await == 2).await;
    assert_eq!(ledger.number(&format!("{holder} 'here'")).await, 1);
    assert!(
        ledger
            .is("select bool_and(xact_start is null) from pg_stat_activity where datname = current_database()
                 and application_name like 'backfilld/%/heartbeat' and state <> 'active'")
            .await,
        "a standby holds no transaction"
    );
    first.signal("TERM");
    first.ended().await.expect(0, "stopped on request");
    wait_until("the standby has it", async || ledger.number(&format!("{holder} 'there'")).await == 1).await;

    let third = here.start(&["run", job.path()]);
    wait_until("both are there", async || ledger.number(waiting).await == 2).await;
    second.signal("KILL");
    second.ended().await;
    wait_until("the standby has it", async || ledger.number(&format!("{holder} 'here'")).await == 1).await;
    third.signal("INT");
    third.ended().await.expect(0, "stopped on request");
}

#[tokio::test]
async fn a_signal_ends_the_daemon_after_the_batch_in_flight_and_the_next_run_resumes_there() {
    for signal in ["TERM", "INT"] {
        let db = TestDb::new(Template::Rows(600)).await;
        let (job, ledger) = held(&db).await;
        // In the third batch: two are committed, one is in flight.
        let app = lock_row(&db, 250).await;
        Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
        let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
        wait_until("two batches are through", async || {
            ledger.is("select coalesce(max(rows_scanned) >= 200, false) from backfilld.checkpoint").await
        })
        .await;
        daemon.signal(signal);
        daemon.ended().await.expect(0, "goes on at its checkpoint with the next run");
        assert!(ledger.is("select expires_at <= clock_timestamp() from backfilld.lease").await, "the lease is free");
        let filled = ledger.number("select count(auth_user_id) from public.messages").await;
        assert_eq!(filled, ledger.number("select rows_updated from backfilld.checkpoint").await);
        assert!((200..=250).contains(&filled), "{filled}");
        app.run("rollback").await;
        let again = Cli::new(&db).run(&["run", "--once", job.path()]).await;
        again.expect(0, "resuming from the checkpoint");
        assert_eq!(ledger.number("select rows_updated from backfilld.checkpoint").await, 600);
    }
}

#[tokio::test]
async fn a_second_signal_ends_the_daemon_at_once() {
    let db = TestDb::new(Template::Rows(200)).await;
    let job = JobDir::shipped();
    // Expand waits for its lock; nothing of it can be seen to end.
    let app = db.session("app", backfilld::demo::sample::APP_OWNER).await;
    app.run("begin; lock table public.messages in access share mode").await;
    let ledger = Ledger::new(&db).await;
    let daemon = Cli::new(&db).start(&["run", job.path()]);
    wait_until("it expands", async || ledger.phase().await == "expand").await;
    let pid = daemon.pid().to_string();
    let twice = format!("kill -s TERM {pid}; kill -s INT {pid}");
    std::process::Command::new("sh").args(["-c", &twice]).status().expect("kill");
    let ended = daemon.ended().await;
    assert!(matches!(ended.code, Some(0 | 130)), "{ended:#?}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_does_not_keep_a_daemon_from_leaving() {
    // It accepts and never says a word.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("postgresql://nobody@{}/none", silent.local_addr().expect("bound"));
    let job = JobDir::shipped();
    let daemon = Cli::at(&url).env("BACKFILLD_DATABASE__CONNECT_TIMEOUT", "5m").start(&["run", job.path()]);
    let _connection = silent.accept().await.expect("it connects");
    daemon.signal("TERM");
    daemon.ended().await.expect(0, "stopped on request");
}
