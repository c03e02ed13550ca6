//! `kill -9` at every point that matters, then again, until it is done.

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, schema_dump};

pub const ROWS: u32 = 600;

/// Runs the job again and again, killed each time at `point`, until a run gets through. Gives how often it was killed.
pub async fn run_through(db: &TestDb, args: &[&str], point: &str, look: &mut impl AsyncFnMut()) -> u32 {
    for killed in 0..40 {
        // What is done again after it was killed (ANALYZE) would be killed for ever: every other time, one later.
        let point = if killed % 2 == 1 && !point.contains(':') { format!("{point}:2") } else { point.to_owned() };
        let ended = Cli::new(db).env("BACKFILLD_FAULT", &point).run(args).await;
        if ended.code == Some(0) {
            return killed;
        }
        assert_eq!(ended.code, None, "{ended:#?}");
        look().await;
    }
    panic!("no progress with {point}");
}

/// Nothing but the batches writes, so what the checkpoint counts is what is there.
pub async fn checkpoint_is_right(ledger: &Ledger) {
    if ledger.is("select to_regclass('backfilld.checkpoint') is null").await {
        return;
    }
    let column = "select exists (select from pg_attribute where attrelid = 'public.messages'::regclass
                  and attname = 'auth_user_id' and not attisdropped)";
    if ledger.is(column).await {
        // One snapshot: what a killed daemon sent last may be committed between two.
        let both = "select (select count(auth_user_id) from public.messages),
                           (select coalesce(sum(rows_updated), 0)::int8 from backfilld.checkpoint)";
        let row = ledger.client.query_one(both, &[]).await.expect("readable");
        assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(1), "rows filled against rows counted");
    }
}

pub async fn is_complete(db: &TestDb, ledger: &Ledger) {
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    assert_eq!(ledger.status().await, "done");
    checkpoint_is_right(ledger).await;
    assert_eq!(ledger.number("select count(*) from pg_policy where polrelid = 'public.messages'::regclass").await, 4);
    let whole = TestDb::new(Template::Rows(ROWS)).await;
    Cli::new(&whole).run(&["run", "--once", JobDir::shipped().path()]).await.expect(0, "done");
    let only = ["--table=public.messages"];
    assert_eq!(schema_dump(db, &only), schema_dump(&whole, &only), "as if nobody had killed it");
}

#[tokio::test]
async fn a_batch_killed_before_its_commit_is_done_again_and_one_after_it_is_not() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(ROWS)).await);
    let ledger = Ledger::new(&db).await;
    let args = ["run", "--once", job.path()];
    for (point, filled, batches) in
        [("before-checkpoint:2", 100, 1), ("before-commit:3", 300, 3), ("after-commit:1", 400, 4)]
    {
        let ended = Cli::new(&db).env("BACKFILLD_FAULT", point).run(&args).await;
        assert_eq!(ended.code, None, "{point}: {ended:#?}");
        assert_eq!(ledger.number("select count(auth_user_id) from public.messages").await, filled, "{point}");
        assert_eq!(ledger.number("select batches from backfilld.checkpoint").await, batches, "{point}");
        checkpoint_is_right(&ledger).await;
    }
    Cli::new(&db).run(&args).await.expect(0, "resuming from the checkpoint");
    // The last one ends the sweep.
    assert_eq!(ledger.number("select batches from backfilld.checkpoint").await, i64::from(ROWS / 100) + 1);
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn a_daemon_killed_after_every_single_batch_finishes_without_rework() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(ROWS)).await);
    let ledger = Ledger::new(&db).await;
    let mut look = async || checkpoint_is_right(&ledger).await;
    let killed = run_through(&db, &["run", "--once", job.path()], "after-commit:1", &mut look).await;
    assert!(killed >= ROWS / 100, "killed {killed} times");
    assert_eq!(ledger.number("select rows_scanned from backfilld.checkpoint").await, i64::from(ROWS), "each row once");
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn a_daemon_killed_before_and_after_every_ddl_commit_finishes() {
    let job = JobDir::shipped();
    for (point, times) in [("after-ddl-commit", 5), ("before-ddl-commit:2", 7), ("after-concurrently", 1)] {
        let db = TestDb::new(Template::Rows(ROWS)).await;
        let ledger = Ledger::new(&db).await;
        let mut look = async || checkpoint_is_right(&ledger).await;
        let killed = run_through(&db, &["run", "--once", job.path()], point, &mut look).await;
        assert!(killed >= times, "{point}: killed {killed} times");
        is_complete(&db, &ledger).await;
    }
}

#[tokio::test]
async fn a_daemon_killed_at_every_change_of_phase_finishes() {
    let job = JobDir::shipped();
    for (point, times) in [("after-phase:1", 7), ("before-phase:2", 6)] {
        let db = TestDb::new(Template::Rows(ROWS)).await;
        let ledger = Ledger::new(&db).await;
        let mut look = async || checkpoint_is_right(&ledger).await;
        let killed = run_through(&db, &["run", "--once", job.path()], point, &mut look).await;
        assert_eq!(killed, times, "{point}");
        is_complete(&db, &ledger).await;
    }
}

#[tokio::test]
async fn a_rollback_killed_at_every_commit_goes_on_and_leaves_the_schema_as_it_was() {
    let job = JobDir::shipped();
    for (point, times) in [("after-ddl-commit", 4), ("before-ddl-commit:2", 5), ("after-concurrently", 1)] {
        let db = TestDb::new(Template::Rows(ROWS)).await;
        let before = schema_dump(&db, &[]);
        Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
        let args = ["rollback", JOB, "--yes", "--drop-column"];
        let killed = run_through(&db, &args, point, &mut async || ()).await;
        assert!(killed >= times, "{point}: killed {killed} times");
        assert_eq!(Ledger::new(&db).await.status().await, "rolled_back");
        assert_eq!(schema_dump(&db, &[]), before, "{point}");
    }
}
