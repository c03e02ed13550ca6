//! The watch after the flip: what it sees, that it clears, that it survives and ends.

use std::time::Duration;

use backfilld::job::spec::Watch;

use super::verify::plant;
use crate::support::{Cli, JOB, JobDir, Ledger, Local, Template, TestDb, wait_until};

/// The shipped job, flipped, under a watch that looks ten times a second, for a day.
async fn watched() -> (TestDb, Ledger, JobDir, Local) {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::shipped();
    job.append("[watch]\nfor = \"24h\"\nevery = \"100ms\"");
    let ledger = Ledger::new(&db).await;
    let daemon = Local::start(&db, job.spec(), false, &[]);
    wait_until("it watches", async || ledger.phase().await == "watch").await;
    looks(&ledger, 2).await;
    (db, ledger, job, daemon)
}

/// Waits for so many more looks.
async fn looks(ledger: &Ledger, n: i64) {
    let passes = "coalesce((select passes from backfilld.watch), 0)";
    let until = ledger.number(passes).await + n;
    wait_until("more looks", async || ledger.number(passes).await >= until).await;
}

async fn findings(ledger: &Ledger) -> String {
    ledger.client.query_one("select findings::text from backfilld.watch", &[]).await.expect("watch").get(0)
}

#[tokio::test]
async fn whatever_changes_after_the_flip_is_shown_and_clears_when_it_is_mended() {
    let (db, ledger, _job, mut daemon) = watched().await;
    assert_eq!((findings(&ledger).await.as_str(), ledger.reason().await.as_str()), ("{}", ""), "no alarm");
    let shown = Cli::new(&db).run(&["status", JOB]).await.stdout;
    assert!(shown.contains("\n  watch    since 20") && shown.contains("nothing has changed since the flip"), "{shown}");
    let json: serde_json::Value =
        serde_json::from_str(&Cli::new(&db).run(&["status", JOB, "--json"]).await.stdout).expect("JSON");
    let watch = &json[0]["watch"];
    assert!(watch["until"].as_str() > watch["since"].as_str() && watch["passes"].as_i64() > Some(1), "{watch}");
    assert_eq!((&watch["over"], &watch["findings"]), (&serde_json::json!(false), &serde_json::json!({})));
    let owner = "(auth_user_id = (select auth.uid()))";
    let cases = [
        (
            "alter policy \"Users can view own messages\" on public.messages using (true)".to_owned(),
            "policy_drift",
            format!("alter policy \"Users can view own messages\" on public.messages using {owner}"),
        ),
        (
            "create policy open on public.messages using (true)".to_owned(),
            "policy_drift",
            "drop policy open on public.messages".to_owned(),
        ),
        (
            "alter table public.messages disable row level security".to_owned(),
            "policy_drift",
            "alter table public.messages enable row level security".to_owned(),
        ),
        (
            "alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_ins".to_owned(),
            "sync_triggers",
            "alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_ins".to_owned(),
        ),
        (
            "alter function backfilld_sync.messages_auth_user_id_derive() reset row_security".to_owned(),
            "sync_triggers",
            "alter function backfilld_sync.messages_auth_user_id_derive() set row_security = off".to_owned(),
        ),
        (
            "update pg_index set indisvalid = false where indexrelid = 'public.idx_messages_auth_user_id'::regclass"
                .to_owned(),
            "indexes",
            "update pg_index set indisvalid = true where indexrelid = 'public.idx_messages_auth_user_id'::regclass"
                .to_owned(),
        ),
        (
            "alter table public.messages drop constraint messages_auth_user_id_fkey".to_owned(),
            "constraints",
            "alter table public.messages add constraint messages_auth_user_id_fkey foreign key (auth_user_id)
               references auth.users (id) on delete cascade"
                .to_owned(),
        ),
        (
            "alter table public.messages alter auth_user_id drop not null".to_owned(),
            "constraints",
            "alter table public.messages alter auth_user_id set not null".to_owned(),
        ),
        (
            "alter table public.messages drop constraint messages_conversation_id_fkey".to_owned(),
            "catalog",
            "alter table public.messages add constraint messages_conversation_id_fkey foreign key (conversation_id)
               references public.conversations (id) on delete cascade"
                .to_owned(),
        ),
    ];
    for (sql, kind, back) in cases {
        ledger.run(&sql).await;
        wait_until(&format!("{kind} is found: {sql}"), async || ledger.reason().await.contains(kind)).await;
        let shown = Cli::new(&db).run(&["status", JOB]).await.stdout;
        let line = format!("\n           {kind}: ");
        assert!(shown.contains(&line) && shown.contains("running"), "{shown}");
        ledger.run(&back).await;
        wait_until(&format!("{kind} is gone: {back}"), async || ledger.reason().await.is_empty()).await;
    }
    let first = "select id from public.messages order by id limit 1";
    let wrong = format!(
        "update public.messages set auth_user_id = (select id from auth.users where id <> auth_user_id limit 1) where id = ({first})"
    );
    plant(&ledger, &wrong).await;
    wait_until("drift is found", async || ledger.reason().await.contains("drift: 1 rows")).await;
    // Each look also measures whether it has to wait, which says nothing of what was found.
    ledger
        .run(
            "create table public.told (reason text);
             create function public.tell() returns trigger language plpgsql security definer set search_path = '' as $$
             begin insert into public.told values (new.reason); return new; end $$;
             create trigger tell after update on backfilld.job for each row execute function public.tell()",
        )
        .await;
    looks(&ledger, 3).await;
    assert!(ledger.is("select exists (select from public.told)").await);
    assert!(!ledger.is("select exists (select from public.told where reason not like '%drift: 1 rows%')").await);
    ledger.run("drop trigger tell on backfilld.job").await;
    let listed =
        format!("select exists (select from backfilld.finding where origin = 'watch' and key[1] = ({first})::text)");
    assert!(ledger.is(&listed).await);
    Cli::new(&db).run(&["verify", JOB, "--repair"]).await.expect(0, "repaired 1 rows");
    wait_until("drift is gone", async || ledger.reason().await.is_empty()).await;
    let left = "select exists (select from backfilld.finding where origin = 'watch')";
    wait_until("its keys are gone", async || !ledger.is(left).await).await;
    assert_eq!((ledger.phase().await, ledger.status().await), ("watch".into(), "running".into()));
    daemon.stop().await;
}

#[tokio::test]
async fn a_watch_counts_from_the_flip_over_restarts_and_ends_in_done_when_nothing_is_wrong() {
    let (db, ledger, job, mut daemon) = watched().await;
    daemon.stop().await;
    // A day ago, and nobody watched since.
    ledger.run("update backfilld.watch set since = since - interval '1 day'").await;
    ledger.run("create policy open on public.messages using (true)").await;
    let passes = ledger.number("select passes from backfilld.watch").await;
    let mut daemon = Local::start(&db, job.spec(), true, &[]);
    wait_until("it looked", async || ledger.reason().await.contains("policy_drift")).await;
    looks(&ledger, 2).await;
    assert_eq!(ledger.phase().await, "watch", "the time is over, but something is wrong");
    ledger.run("drop policy open on public.messages").await;
    assert_eq!(daemon.ended().await.expect("done"), backfilld::phase::Status::Done);
    assert!(ledger.number("select passes from backfilld.watch").await > passes);
    assert_eq!((ledger.status().await.as_str(), ledger.reason().await.as_str()), ("done", ""));
}

#[tokio::test]
async fn the_watch_can_change_while_the_job_runs_and_is_left_by_a_rollback() {
    let (db, ledger, job, mut daemon) = watched().await;
    daemon.stop().await;
    let mut spec = job.spec();
    spec.watch = Some(Watch { lasts: Duration::from_millis(1), ..Watch::default() });
    assert_eq!(spec.hash(), job.spec().hash());
    let mut daemon = Local::start(&db, spec, true, &[]);
    assert_eq!(daemon.ended().await.expect("done"), backfilld::phase::Status::Done);
    Cli::new(&db).run(&["rollback", JOB, "--yes"]).await.expect(0, "");
    assert_eq!(ledger.number("select count(*) from backfilld.watch").await, 0);
}
