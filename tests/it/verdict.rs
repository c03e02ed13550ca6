//! On what a verdict holds, and what makes it void.

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb};

/// The shipped job, held before `point`.
async fn held(point: &str) -> (TestDb, Ledger, JobDir) {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::with(&format!("hold_before = [\"{point}\"]"));
    let ledger = Ledger::new(&db).await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    (db, ledger, job)
}

/// Goes on as a daemon does that was killed there: without an operator's command, which would verify anew.
async fn go_on(ledger: &Ledger, phase: &str) {
    ledger
        .run(&format!(
            "update backfilld.job set status = 'running', reason = '', released = array['{phase}'], phase = '{phase}'"
        ))
        .await;
}

#[tokio::test]
async fn a_verdict_expires_with_whatever_it_was_made_on_and_status_says_why() {
    let (db, ledger, _job) = held("constrain").await;
    let cli = Cli::new(&db);
    // What somebody does, what status says, and how it is put back; where there is no way back but a new proof: nothing.
    let cases = [
        (
            "alter table public.conversations alter auth_user_id set not null",
            "column auth_user_id of public.conversations has changed",
            Some("alter table public.conversations alter auth_user_id drop not null"),
        ),
        (
            "alter table public.messages drop constraint messages_conversation_id_fkey",
            "constraint messages_conversation_id_fkey of public.messages is gone",
            Some(
                "alter table public.messages add constraint messages_conversation_id_fkey foreign key (conversation_id)
                  references public.conversations (id) on delete cascade",
            ),
        ),
        (
            "create function public.late() returns trigger language plpgsql as 'begin return new; end';
             create trigger zzzz_late before update on public.messages for each row execute function public.late()",
            "trigger zzzz_late on public.messages is new",
            Some("drop trigger zzzz_late on public.messages; drop function public.late()"),
        ),
        (
            "create rule quiet as on delete to public.messages do also nothing",
            "rule quiet on public.messages is new",
            Some("drop rule quiet on public.messages"),
        ),
        (
            "alter policy \"Users can view messages from their conversations\" on public.messages using (true)",
            "policy Users can view messages from their conversations on public.messages has changed",
            None,
        ),
        (
            "create policy open on public.conversations using (true)",
            "policy open on public.conversations is new",
            Some("drop policy open on public.conversations"),
        ),
        (
            "alter table public.messages force row level security",
            "row level security of public.messages has changed",
            Some("alter table public.messages no force row level security"),
        ),
        (
            "revoke execute on function public.add_message(uuid, text, text, text, jsonb) from public;
             grant execute on function public.add_message(uuid, text, text, text, jsonb) to service_role",
            "function public.add_message(uuid, text, text, text, jsonb) has changed",
            None,
        ),
        (
            "create or replace function auth.uid() returns uuid language sql stable as 'select null::uuid'",
            "function auth.uid() has changed",
            None,
        ),
        (
            "create or replace function backfilld_sync.messages_auth_user_id_derive() returns trigger language plpgsql
             as 'begin return new; end'",
            "function backfilld_sync.messages_auth_user_id_derive() has changed",
            None,
        ),
        (
            // The same as before, but nobody knows what was written between.
            "alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_upd;
             alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_upd",
            "trigger zzz_backfilld_messages_auth_user_id_upd on public.messages has changed",
            None,
        ),
    ];
    // Changes that prove nothing wrong.
    ledger
        .run(
            "alter table public.messages add column unrelated int; create index on public.messages (unrelated);
             alter table public.messages alter content set statistics 50; analyze;
             update public.conversations set title = 'x' where id = (select id from public.conversations limit 1)",
        )
        .await;
    ledger.run("vacuum full public.messages").await;
    let shown = cli.run(&["status", JOB]).await.stdout;
    assert!(shown.contains("verdict  passed, made at"), "{shown}");
    for (sql, reason, back) in cases {
        ledger.run(sql).await;
        let shown = cli.run(&["status", JOB]).await.stdout;
        assert!(shown.contains("passed, but does not hold any more") && shown.contains(reason), "{reason}: {shown}");
        if let Some(back) = back {
            ledger.run(back).await;
            let shown = cli.run(&["status", JOB]).await.stdout;
            assert!(!shown.contains(reason), "{back}: {shown}");
        }
    }
}

#[tokio::test]
async fn a_verdict_that_expired_is_made_anew_before_anything_is_enforced() {
    let (db, ledger, job) = held("constrain").await;
    ledger
        .run(
            "alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_upd;
             update public.messages set auth_user_id = gen_random_uuid() where id = (select id from public.messages limit 1);
             alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_upd",
        )
        .await;
    go_on(&ledger, "constrain").await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "drift 1");
    assert!(ledger.is("select to_regclass('public.idx_messages_auth_user_id') is null").await);
    assert!(ledger.is("select exists (select from backfilld.event where kind = 'verdict expired')").await);
    // Failed is durable.
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "drift 1");
    assert_eq!(ledger.number("select count(*) from backfilld.verdict").await, 2, "a restart does not walk past it");
}

#[tokio::test]
async fn what_the_job_itself_does_to_the_schema_leaves_its_verdict_alone() {
    let (db, ledger, job) = held("flip").await;
    let cli = Cli::new(&db);
    let shown = cli.run(&["status", JOB]).await.stdout;
    assert!(shown.contains("verdict  passed, made at"), "after constrain: {shown}");
    go_on(&ledger, "flip").await;
    cli.run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!(ledger.number("select count(*) from backfilld.verdict").await, 1);
    let shown = cli.run(&["status", JOB]).await.stdout;
    assert!(shown.contains("verdict  passed, made at"), "after the flip: {shown}");
    ledger.run("drop policy \"Users can view own messages\" on public.messages").await;
    let shown = cli.run(&["status", JOB]).await.stdout;
    assert!(shown.contains("policy Users can view own messages on public.messages is gone"), "{shown}");
}

#[tokio::test]
async fn sync_triggers_that_are_missing_or_disabled_or_changed_fail_the_verification() {
    let cases = [
        ("drop trigger zzz_backfilld_messages_auth_user_id_ins on public.messages", "is missing"),
        ("alter table public.conversations disable trigger zzz_backfilld_messages_auth_user_id_s1_upd", "is disabled"),
        ("alter table public.messages enable trigger zzz_backfilld_messages_auth_user_id_upd", "is not ENABLE ALWAYS"),
        (
            "alter function backfilld_sync.messages_auth_user_id_settle() reset row_security",
            "function backfilld_sync.messages_auth_user_id_settle is another than the plan's",
        ),
    ];
    let (db, ledger, job) = held("constrain").await;
    let cli = Cli::new(&db);
    let mut broken = 0;
    for (sql, said) in cases {
        ledger.run(sql).await;
        broken += 1;
        let found = cli.run(&["verify", JOB]).await;
        assert!(found.expect(1, &format!("sync_triggers {broken}")).stdout.contains(said), "{said}: {found:#?}");
    }
    cli.run(&["cutover", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(1, "sync_triggers 4");
    let shown = cli.run(&["status", JOB]).await.stdout;
    assert!(shown.contains("sync_triggers: ") && shown.contains("is disabled"), "{shown}");
    assert_eq!(
        ledger.number("select count(*) from pg_constraint where conname = 'messages_auth_user_id_fkey'").await,
        0
    );
}
