//! What an operator says to a job, from any machine, and what a changed job file does.

use crate::support::{Cli, JOB, JobDir, Ledger, Local, Template, TestDb, wait_until};

#[tokio::test]
async fn a_running_daemon_hears_pause_resume_and_cutover_and_stops_at_each_hold_point() {
    let db = TestDb::new(Template::Rows(300)).await;
    let (cli, ledger) = (Cli::new(&db), Ledger::new(&db).await);
    let job = JobDir::with("hold_before = [\"backfill\", \"constrain\", \"flip\"]");
    job.append("pause = \"1h\"");
    let mut daemon = Local::start(&db, job.spec(), false, &[]);
    ledger.wait_status("held").await;
    assert_eq!(ledger.phase().await, "backfill");
    cli.run(&["resume", JOB]).await.expect(5, "stands at a hold point").expect(5, "backfilld cutover");
    cli.run(&["pause", JOB]).await.expect(5, "only a running job can be paused");
    cli.run(&["uninstall", JOB, "--yes"]).await.expect(5, "backfilld rollback");
    cli.run(&["cutover", JOB]).await.expect(0, "");
    wait_until("a batch is through, and a long pause begins", async || {
        ledger.is("select coalesce(max(batches) = 1, false) from backfilld.checkpoint").await
    })
    .await;
    cli.run(&["cutover", JOB]).await.expect(5, "stands at no hold point");
    cli.run(&["pause", JOB, "--reason", "lunch"]).await.expect(0, "");
    daemon.stop().await;
    assert_eq!((ledger.status().await, ledger.reason().await), ("paused".into(), "lunch".into()));

    // What may change while the job runs is taken over by the next run.
    job.replace("pause = \"1h\"", "");
    job.replace("initial_rows = 100", "initial_rows = 50");
    let mut daemon = Local::start(&db, job.spec(), false, &[]);
    wait_until("it waits", async || daemon.daemon.progress.now().note == "lunch").await;
    assert_eq!(ledger.number("select batches from backfilld.checkpoint").await, 1, "a paused job stays where it is");
    assert_eq!(ledger.number("select spec -> 'batching' -> 'initial_rows' from backfilld.job").await, 50);
    cli.run(&["pause", JOB]).await.expect(0, "");
    cli.run(&["resume", JOB]).await.expect(0, "");
    for phase in ["constrain", "flip"] {
        wait_until("the hold point", async || ledger.status().await == "held" && ledger.phase().await == phase).await;
        assert!(cli.run(&["status", JOB]).await.stdout.contains(&format!("hold point before {phase}")));
        assert!(cli.run(&["cutover", JOB]).await.expect(0, "").stdout.contains(&format!("verify and then {phase}")));
    }
    ledger.wait_status("done").await;
    assert_eq!(
        ledger.number("select count(*) from backfilld.verdict where passed").await,
        3,
        "a proof after each hold"
    );
    cli.run(&["pause", JOB]).await.expect(5, "job messages_auth_user_id is done");
    cli.run(&["resume", JOB]).await.expect(5, "is done");
    daemon.stop().await;
}

#[tokio::test]
async fn a_job_that_changed_half_way_is_refused_with_the_differences() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (cli, ledger) = (Cli::new(&db), Ledger::new(&db).await);
    let job = JobDir::with("hold_before = [\"flip\"]");
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point before flip");
    let was = job.spec();
    job.replace("on_delete = \"cascade\"", "on_delete = \"restrict\"");
    let refused = cli.run(&["run", "--once", job.path()]).await;
    refused.expect(5, "foreign_keys[0].on_delete: was \"cascade\", is \"restrict\"").expect(5, "put the file back");
    job.replace("on_delete = \"restrict\"", "on_delete = \"cascade\"");
    job.edit("add_message.sql", |text| {
        text + "\nrevoke all on function public.add_message(uuid, text, text, text, jsonb) from public;"
    });
    cli.run(&["run", "--once", job.path()]).await.expect(5, "functions[0].statements: was ");
    assert_eq!(ledger.status().await, "held");
    let kept: serde_json::Value =
        ledger.client.query_one("select spec from backfilld.job", &[]).await.expect("a job").get(0);
    assert_eq!(kept, serde_json::to_value(&was).expect("JSON"), "a refused file is not taken over");
}

#[tokio::test]
async fn a_job_that_was_rolled_back_runs_again_only_after_it_was_forgotten() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (cli, job) = (Cli::new(&db), JobDir::shipped());
    cli.run(&["run", "--once", job.path()]).await.expect(0, "");
    cli.run(&["rollback", JOB]).await.expect(2, "say --yes");
    cli.run(&["rollback", JOB, "--yes"]).await.expect(0, "");
    assert!(cli.run(&["rollback", JOB, "--yes"]).await.expect(0, "").stdout.contains("is rolled back already"));
    cli.run(&["run", "--once", job.path()]).await.expect(5, "was rolled back").expect(5, "backfilld uninstall");
    cli.run(&["resume", JOB]).await.expect(5, "is rolled_back");
    cli.run(&["uninstall", JOB]).await.expect(2, "say --yes");
    cli.run(&["uninstall", JOB, "--yes"]).await.expect(0, "");
    cli.run(&["rollback", JOB, "--yes"]).await.expect(5, "there is no backfilld job in this database");
}

#[tokio::test]
async fn commands_without_their_job_say_so_and_leave_nothing_behind() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (cli, job) = (Cli::new(&db), JobDir::with("hold_before = [\"backfill\"]"));
    for command in ["status", "pause", "resume", "cutover", "verify", "export"] {
        cli.run(&[command, JOB]).await.expect(5, "there is no backfilld job in this database");
    }
    assert!(Ledger::new(&db).await.is("select to_regnamespace('backfilld') is null").await);
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    for args in [&["status", "other"][..], &["pause", "other"], &["uninstall", "other", "--yes"]] {
        cli.run(args).await.expect(5, "no job \"other\" in this database").expect(5, "known: messages_auth_user_id");
    }
    cli.run(&["frobnicate"]).await.expect(2, "unrecognized subcommand");
}

#[tokio::test]
async fn a_lost_connection_is_no_end_of_a_job() {
    let db = TestDb::new(Template::Rows(300)).await;
    let ledger = Ledger::new(&db).await;
    let job = JobDir::shipped();
    job.append("pause = \"50ms\"");
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    for batches in 1..=2 {
        wait_until("a batch is through", async || {
            ledger.is("select to_regclass('backfilld.checkpoint') is not null").await
                && ledger
                    .is(&format!("select coalesce(max(batches) >= {batches}, false) from backfilld.checkpoint"))
                    .await
        })
        .await;
        ledger
            .run(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()
                   and application_name like 'backfilld/%'",
            )
            .await;
    }
    assert_eq!(daemon.ended().await.expect("it connects again"), backfilld::phase::Status::Done);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    assert_eq!(ledger.number("select rows_updated from backfilld.checkpoint").await, 300);
}
