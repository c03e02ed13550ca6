//! The traffic while a migration goes on around it: it copes with a right one, and notices a wrong one.

use backfilld::demo::sample::{self, AUTH_ADMIN, AUTHENTICATOR};
use backfilld::demo::traffic::{Phase, Traffic, TrafficOptions, TrafficReport};
use tokio_util::sync::CancellationToken;

use crate::support::{Template, TestDb, wait_until};

const STEPS: &str = include_str!("stand_in.sql");
const ADD_MESSAGE: &str = include_str!("../../deploy/jobs/messages_auth_user_id/add_message.sql");

/// Requests between two steps: every kind of request happens, and every connection sees each state of the schema.
const BETWEEN: u64 = 600;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_traffic_copes_with_a_column_that_appears_becomes_not_null_and_decides_access() {
    let db = TestDb::new(Template::Rows(3000)).await;
    let report = migrate(&db, &format!("{STEPS}\n{ADD_MESSAGE}\ncommit;")).await;
    assert_eq!(report.errors.iter().map(|e| format!("{e:?}")).collect::<Vec<_>>(), Vec::<String>::new());
    assert!(report.foreign_inserts_refused > 50, "{report:?}");
    assert_eq!((report.foreign_inserts_accepted, report.foreign_rows_seen, report.own_rows_missed), (0, 0, 0));
    let oracle = report.check_oracle(&db.admin().await).await.expect("the oracle answers");
    assert!(oracle.is_clean(), "{oracle:?}");
    let nulls =
        db.admin().await.query_one("select count(*) from public.messages where auth_user_id is null", &[]).await;
    assert_eq!(nulls.expect("counts").get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_without_a_derived_owner_let_foreign_inserts_in_and_the_traffic_says_so() {
    let db = TestDb::new(Template::Rows(3000)).await;
    // Locked as strongly at once: two steps up would deadlock with whoever writes in between.
    let flip = "--------\nbegin; lock table public.messages in access exclusive mode;\
        alter table public.messages disable trigger zz_child;\
        alter table public.messages alter column auth_user_id drop not null; commit;";
    let report = migrate(&db, &format!("{STEPS}\n{ADD_MESSAGE}\ncommit;\n{flip}")).await;
    assert!(report.foreign_inserts_accepted > 0, "{report:?}");
    assert!(report.own_rows_missed + report.application_errors > 0, "saves that write NULL hide rows: {report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_turns_not_null_before_anything_fills_it_is_an_application_error() {
    let db = TestDb::new(Template::Rows(3000)).await;
    let report = migrate(
        &db,
        "begin; alter table public.messages add column auth_user_id uuid; set session_replication_role = replica; \
         update public.messages m set auth_user_id = c.auth_user_id from public.conversations c \
         where c.id = m.conversation_id; alter table public.messages alter column auth_user_id set not null; commit",
    )
    .await;
    assert!(report.errors.iter().any(|e| e.operation == "send" && e.code == "23502"), "{report:?}");
}

/// Runs the steps one after the other, with traffic before, between and after.
async fn migrate(db: &TestDb, steps: &str) -> TrafficReport {
    let admin = db.admin().await;
    sample::take_baseline(&admin).await.expect("baseline");
    let options = TrafficOptions {
        app_url: db.url(AUTHENTICATOR),
        auth_url: db.url(AUTH_ADMIN),
        workers: 6,
        requests_per_second: None,
        max_requests: None,
        seed: 3,
    };
    let traffic = Traffic::start(&options, &CancellationToken::new()).await.expect("starts");
    let wait_for_traffic = async || {
        let goal = traffic.requests() + BETWEEN;
        wait_until("the traffic goes on", async || traffic.requests() >= goal).await;
    };
    wait_for_traffic().await;
    traffic.set_phase(Phase::During);
    for step in steps.split("--------\n") {
        admin.batch_execute(step).await.unwrap_or_else(|e| panic!("{step}: {}", backfilld::Error::from(e)));
        wait_for_traffic().await;
    }
    traffic.stop().await.expect("stops")
}
