//! The support code itself: databases per test, and sessions that wait for each other.

use backfilld::demo::sample::{APP_OWNER, AUTHENTICATOR, DAEMON};

use crate::support::{Template, TestDb};

#[tokio::test]
async fn a_session_that_waits_for_a_lock_is_seen_waiting_and_then_finishes() {
    let db = TestDb::new(Template::Rows(200)).await;
    let first = db.session("first", APP_OWNER).await;
    let mut second = db.session("second", DAEMON).await;
    first.run("begin; update public.conversations set title = 'first'").await;
    second.send("update public.conversations set title = 'second'");
    db.wait_blocked(&second).await;
    first.run("commit").await;
    second.finish_ok().await;

    first.run("begin; lock table public.messages").await;
    second.send("set lock_timeout = '50ms'; select count(*) from public.messages");
    assert_eq!(second.finish_err().await, "55P03");
}

#[tokio::test]
async fn every_test_has_a_database_of_its_own() {
    let (a, b) = (TestDb::new(Template::Schema).await, TestDb::new(Template::Schema).await);
    assert_ne!(a.name(), b.name());
    a.admin().await.batch_execute("drop table public.messages").await.expect("a superuser may");
    b.admin().await.batch_execute("select from public.messages").await.expect("the other one is untouched");
}

#[tokio::test]
async fn the_api_login_sees_rows_only_through_a_role_and_its_policies() {
    let db = TestDb::new(Template::Rows(200)).await;
    let api = db.client(AUTHENTICATOR).await;
    let denied = api.batch_execute("select from public.messages").await.expect_err("no rights of its own");
    assert_eq!(denied.code().map(|c| c.code()), Some("42501"));
    api.batch_execute("set role anon").await.expect("a member");
    let seen: i64 = api.query_one("select count(*) from public.messages", &[]).await.expect("allowed").get(0);
    assert_eq!(seen, 0);
    api.batch_execute("set role service_role").await.expect("a member");
    let seen: i64 = api.query_one("select count(*) from public.messages", &[]).await.expect("allowed").get(0);
    assert_eq!(seen, 200);
}
