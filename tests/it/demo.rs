//! Sample data and traffic, without the product in between: what they must show before anything is changed.

use backfilld::demo::sample::{self, AUTH_ADMIN, AUTHENTICATOR};
use backfilld::demo::traffic::{Oracle, Phase, Traffic, TrafficOptions, TrafficReport};
use tokio_util::sync::CancellationToken;

use crate::support::{Template, TestDb, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_untouched_application_has_no_errors_and_loses_nothing() {
    let db = TestDb::new(Template::Rows(5000)).await;
    let admin = db.admin().await;
    sample::take_baseline(&admin).await.expect("baseline");
    let traffic = Traffic::start(&options(&db, 3000), &CancellationToken::new()).await.expect("starts");
    traffic.set_phase(Phase::During);
    let report = traffic.finish().await.expect("ends by itself");

    assert_eq!(report.errors.iter().map(|e| format!("{e:?}")).collect::<Vec<_>>(), Vec::<String>::new());
    assert_eq!((report.application_errors, report.requests), (0, 3000));
    assert!(report.foreign_inserts_refused > 50, "{report:?}");
    assert_eq!((report.foreign_inserts_accepted, report.foreign_rows_seen, report.own_rows_missed), (0, 0, 0));
    for operation in ["send", "list", "edit", "delete", "whole-row save", "copy", "upsert", "transfer", "delete user"] {
        assert!(report.operations.get(operation).is_some_and(|n| *n > 0), "no {operation} in {report:?}");
    }
    let during: Vec<_> = report.latency.iter().filter(|l| l.phase == Phase::During).collect();
    assert!(
        matches!(during[..], [l] if l.requests > 2000 && l.p50_ms <= l.p99_ms && l.p99_ms <= l.max_ms),
        "{report:?}"
    );
    assert_eq!(oracle(&db, &report).await, Oracle::default());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oracle_finds_each_kind_of_damage() {
    let db = TestDb::new(Template::Rows(2000)).await;
    let admin = db.admin().await;
    sample::take_baseline(&admin).await.expect("baseline");
    let traffic = Traffic::start(&options(&db, 300), &CancellationToken::new()).await.expect("starts");
    let report = traffic.finish().await.expect("ends by itself");
    assert_eq!(oracle(&db, &report).await, Oracle::default());

    let mut expected = Oracle::default();
    let mut damage = async |sql: &str, change: fn(&mut Oracle)| {
        // Triggers and foreign keys stay out of it: one kind of damage at a time.
        let sql = format!("set session_replication_role = replica; {sql}");
        db.admin().await.batch_execute(&sql).await.expect("a superuser may");
        change(&mut expected);
        assert_eq!(oracle(&db, &report).await, expected, "after {sql}");
    };
    let untouched = "select m.id from public.messages m join demo.baseline b using (id, updated_at) \
        where m.role <> 'system' order by m.id";
    let written = "select m.id from public.messages m where not exists (select from demo.baseline b where b.id = m.id)";
    damage(
        "insert into public.messages (id, conversation_id, role, content) select b.id, b.conversation_id, 'user', 'x' \
         from demo.baseline b where not exists (select from public.messages m where m.id = b.id) limit 1",
        |o| o.resurrected += 1,
    )
    .await;
    damage(&format!("delete from public.messages where id in ({untouched} limit 1)"), |o| o.lost += 1).await;
    damage(&format!("delete from public.messages where id in ({written} limit 1)"), |o| o.lost += 1).await;
    damage(&format!("update public.messages set content = content || '.' where id in ({written} limit 2)"), |o| {
        o.altered += 2;
    })
    .await;
    damage(&format!("update public.messages set role = 'system' where id in ({untouched} limit 3)"), |o| {
        o.altered += 3;
    })
    .await;
    damage(
        "insert into public.messages (conversation_id, role, content) select id, 'user', 'x' \
         from public.conversations limit 2",
        |o| o.unexpected += 2,
    )
    .await;
    // Messages of a conversation that changed hands may move; so take one that did not, by the traffic's account.
    let still = "select m.id from public.messages m join demo.baseline b using (id, updated_at) \
        join public.conversations c on c.id = m.conversation_id and c.updated_at < '2025-01-01' \
        where m.role <> 'system' order by m.id";
    damage(&format!("update public.messages set updated_at = now() where id in ({still} limit 4)"), |o| {
        o.touched += 4;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_fires_the_applications_triggers_is_noticed() {
    let db = TestDb::new(Template::Rows(2000)).await;
    let admin = db.admin().await;
    sample::take_baseline(&admin).await.expect("baseline");
    let traffic = Traffic::start(&options(&db, 0), &CancellationToken::new()).await.expect("starts");
    let batch = "update public.messages set metadata = metadata where id in (select id from public.messages limit 3)";
    admin.batch_execute(batch).await.expect("a superuser may");
    let report = traffic.finish().await.expect("ends by itself");
    assert_eq!(oracle(&db, &report).await, Oracle { touched: 3, stray_broadcasts: 3, ..Oracle::default() });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_connections_are_application_errors_and_leave_the_ledger_right() {
    let db = TestDb::new(Template::Rows(2000)).await;
    let admin = db.admin().await;
    sample::take_baseline(&admin).await.expect("baseline");
    let unbounded = TrafficOptions { max_requests: None, ..options(&db, 0) };
    let traffic = Traffic::start(&unbounded, &CancellationToken::new()).await.expect("starts");
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() \
        and application_name = 'demo-application' and query not like 'listen %'";
    for _ in 0..5 {
        let goal = traffic.requests() + 100;
        wait_until("the traffic goes on", async || traffic.requests() >= goal).await;
        admin.batch_execute(terminate).await.expect("a superuser may");
    }
    let report = traffic.stop().await.expect("stops");
    assert!(report.errors.iter().any(|e| e.code == "57P01" || e.code == "connection"), "{report:?}");
    assert_eq!(oracle(&db, &report).await, Oracle::default());
}

fn options(db: &TestDb, requests: u64) -> TrafficOptions {
    TrafficOptions {
        app_url: db.url(AUTHENTICATOR),
        auth_url: db.url(AUTH_ADMIN),
        workers: 6,
        requests_per_second: None,
        max_requests: Some(requests),
        seed: 7,
    }
}

async fn oracle(db: &TestDb, report: &TrafficReport) -> Oracle {
    report.check_oracle(&db.admin().await).await.expect("the oracle answers")
}
