//! The shipped job from its beginning to its end.

use backfilld::phase::Status;

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, run_once};

#[tokio::test]
async fn the_shipped_job_fills_verifies_constrains_and_flips() {
    let db = TestDb::new(Template::Rows(1000)).await;
    let ledger = Ledger::new(&db).await;
    let fingerprint = "select sum(hashtextextended(id::text || updated_at::text || content, 0)::numeric % 1000000007)
        from public.messages";
    let before = ledger.number(fingerprint).await;
    ledger
        .run(
            "create table public.broadcasts (op text);
             create or replace function public.broadcast_message() returns trigger language plpgsql as
               'begin insert into public.broadcasts values (tg_op); return null; end'",
        )
        .await;
    assert_eq!(run_once(&db, JobDir::shipped().spec()).await.expect("runs"), Status::Done);

    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    assert_eq!(ledger.number("select rows_updated from backfilld.checkpoint").await, 1000);
    assert_eq!(ledger.number(fingerprint).await, before, "nothing but the column has changed");
    for (what, sql) in [
        ("no broadcast", "select count(*) = 0 from public.broadcasts"),
        (
            "NOT NULL",
            "select attnotnull from pg_attribute where attrelid = 'public.messages'::regclass
                      and attname = 'auth_user_id'",
        ),
        (
            "a valid foreign key that cascades",
            "select convalidated and confdeltype = 'c' from pg_constraint
                      where conname = 'messages_auth_user_id_fkey'",
        ),
        (
            "a valid index",
            "select indisvalid from pg_index where indexrelid = 'public.idx_messages_auth_user_id'::regclass",
        ),
        ("no helper check left", "select count(*) = 0 from pg_constraint where conname like 'backfilld%'"),
        ("statistics", "select null_frac = 0 from pg_stats where tablename = 'messages' and attname = 'auth_user_id'"),
        ("a passing verdict", "select passed from backfilld.verdict order by id desc limit 1"),
        (
            "the new function",
            "select pg_get_functiondef('public.add_message'::regproc) like '%belongs to another user%'",
        ),
    ] {
        assert!(ledger.is(sql).await, "{what}");
    }
    let policies =
        "select string_agg(polname || ' ' || polcmd::text || ' ' || polroles::regrole[]::text, ', ' order by polname)
        from pg_policy where polrelid = 'public.messages'::regclass";
    let policies: String = ledger.client.query_one(policies, &[]).await.expect("policies").get(0);
    assert_eq!(
        policies,
        "Users can delete own messages d {authenticated}, Users can insert own messages a {authenticated}, \
         Users can update own messages w {authenticated}, Users can view own messages r {authenticated}"
    );
}

#[tokio::test]
async fn a_job_that_is_done_is_done_again_at_once() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (cli, job) = (Cli::new(&db), JobDir::shipped());
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    let ledger = Ledger::new(&db).await;
    let epoch = ledger.number("select epoch from backfilld.lease").await;
    cli.run(&["run", "--once", job.path()]).await.expect(0, "done already");
    assert_eq!(ledger.number("select epoch from backfilld.lease").await, epoch, "it took no lease");
    let shown = cli.run(&["status", JOB, "--json"]).await;
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).expect("JSON");
    assert_eq!((shown[0]["status"].as_str(), shown[0]["rows_updated"].as_i64()), (Some("done"), Some(200)));
}
