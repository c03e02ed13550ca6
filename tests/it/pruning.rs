//! Old snapshots keep dead versions from being pruned: who has one is named, and waited for within reason.

use backfilld::backfill::horizon;
use backfilld::demo::sample::{APP_OWNER, DAEMON};
use backfilld::phase::Status;

use crate::killed::is_complete;
use crate::support::{Cli, JobDir, Ledger, Local, Session, Template, TestDb, wait_until};

/// Statements of a session that then is in nobody's way, but for its snapshot or transaction id.
const READS: &str = "begin isolation level repeatable read; select count(*) from public.users";
const WROTE: &str = "begin; select pg_current_xact_id()";

/// A batch's session is idle.
async fn waits(ledger: &Ledger) {
    let waits = "select count(*) > 0 from pg_stat_activity where datname = current_database()
                   and application_name like '%batch%' and state = 'idle'
                   and state_change < clock_timestamp() - interval '300 ms'";
    wait_until("it waits between batches", async || ledger.is(waits).await).await;
}

async fn is_waited_for(sql: &str) {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(6000)).await);
    let ledger = Ledger::new(&db).await;
    let holder = db.session("nightly report", APP_OWNER).await;
    holder.run(sql).await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    waits(&ledger).await;
    holder.run("commit").await;
    let ended = daemon.ended().await;
    ended.expect(0, &format!("because of session {} of app_owner", holder.pid()));
    assert!(ended.stderr.contains("the old snapshot is gone"), "{}", ended.stderr);
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn an_old_snapshot_is_named_and_waited_for() {
    is_waited_for(READS).await;
}

/// Its snapshot ended with its statement, but not its transaction id.
#[tokio::test]
async fn a_transaction_that_wrote_long_ago_is_named_and_waited_for() {
    is_waited_for(WROTE).await;
}

/// Or the rest behind it would be twenty times as long.
#[tokio::test]
async fn to_wait_for_an_old_snapshot_is_no_work() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(6000)).await);
    job.replace("pace = \"constant\"", "pace = \"constant\"\nduty = 0.05");
    job.replace("max_rows = 100", "max_rows = 1000");
    let ledger = Ledger::new(&db).await;
    let holder = db.session("nightly report", APP_OWNER).await;
    holder.run(READS).await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    let note = async || daemon.daemon.progress.now().note;
    wait_until("it says so", async || note().await.contains("keeps dead rows from being pruned")).await;
    let now = "(extract(epoch from clock_timestamp()) * 1000)::int8";
    let later = ledger.number(&format!("select {now} + 3000")).await;
    wait_until("it has waited", async || ledger.is(&format!("select {now} > {later}")).await).await;
    holder.run("commit").await;
    assert_eq!(daemon.ended().await.expect("it ends"), Status::Done);
    is_complete(&db, &ledger).await;
}

/// The server goes on pruning beside it.
#[tokio::test]
async fn a_vacuum_holds_nothing() {
    let db = TestDb::new(Template::Rows(200)).await;
    let ledger = Ledger::new(&db).await;
    ledger.run("create table public.other as select generate_series(1, 200000) as id").await;
    let mut vacuum: Session = db.session("vacuum", "postgres").await;
    vacuum.run("set vacuum_cost_delay = 100; set vacuum_cost_limit = 1").await;
    vacuum.send("vacuum public.other");
    let begun = format!("select count(*) = 1 from pg_stat_progress_vacuum where pid = {}", vacuum.pid());
    wait_until("it works", async || ledger.is(&begun).await).await;
    let client = db.client(DAEMON).await;
    let now: String = client.query_one("select pg_current_xact_id()::text", &[]).await.expect("an id").get(0);
    let snapshot = format!("select backend_xmin is not null from pg_stat_activity where pid = {}", vacuum.pid());
    assert!(ledger.is(&snapshot).await, "it has a snapshot");
    assert_eq!(horizon::holder(&client, &now).await.expect("it can be seen"), None);
    ledger.run(&format!("select pg_terminate_backend({})", vacuum.pid())).await;
    vacuum.finish().await.expect_err("terminated");
    ledger.run("drop table public.other").await;
}

#[tokio::test]
async fn a_snapshot_that_stays_is_not_waited_for_for_ever() {
    let (job, db) = (JobDir::heap(), TestDb::new(Template::Rows(6000)).await);
    job.replace("strategy = \"heap\"", "strategy = \"heap\"\nhorizon_wait = \"0s\"");
    job.replace("[target]", "hold_before = [\"constrain\"]\n[target]");
    let ledger = Ledger::new(&db).await;
    let reader = db.session("nightly report", APP_OWNER).await;
    reader.run("begin isolation level repeatable read; select count(*) from public.users").await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "constrain");
    let named = format!(
        "select detail ->> 'holder' like 'session {} of app_owner%' from backfilld.event where kind = 'horizon'",
        reader.pid()
    );
    assert!(ledger.is(&named).await);
    assert_eq!(ledger.unfilled().await, 0);
    reader.run("commit").await;
}
