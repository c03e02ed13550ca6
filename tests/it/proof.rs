//! What the verifier finds, and that nothing enforcing happens without its word.

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb};

/// The shipped job, verified, and held before anything enforcing.
async fn verified() -> (TestDb, Ledger, JobDir) {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::with("hold_before = [\"constrain\"]");
    // Without consent to source rows that have no value, so that they are counted.
    job.replace("source_may_lack_value = true\n", "");
    let ledger = Ledger::new(&db).await;
    ledger.run("alter table public.conversations alter auth_user_id set not null").await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point before constrain");
    assert!(ledger.is("select passed from backfilld.verdict order by id desc limit 1").await);
    (db, ledger, job)
}

async fn nothing_is_enforced(ledger: &Ledger) {
    assert!(
        ledger
            .is("select not attnotnull and not exists (select from pg_constraint where conname = 'messages_auth_user_id_fkey')
                   and to_regclass('public.idx_messages_auth_user_id') is null
                   and not exists (select from pg_policy where polname like 'Users can % own messages')
                 from pg_attribute where attrelid = 'public.messages'::regclass and attname = 'auth_user_id'")
            .await
    );
}

/// Writes as nobody should: with all triggers off.
async fn plant(ledger: &Ledger, sql: &str) {
    ledger
        .run(&format!(
            "begin; set local session_replication_role = replica; alter table public.messages disable trigger all;
             alter table public.conversations disable trigger all; alter table public.users disable trigger all; {sql};
             alter table public.messages enable trigger all; alter table public.conversations enable trigger all;
             alter table public.users enable trigger all;
             do $$ declare t record; begin
               for t in select tgname, tgrelid::regclass as tbl from pg_trigger where tgname like 'zzz_backfilld%'
               loop execute format('alter table %s enable always trigger %I', t.tbl, t.tgname); end loop;
             end $$; commit"
        ))
        .await;
}

const FIRST: &str = "(select id from public.messages order by id limit 1)";

#[tokio::test]
async fn whatever_is_wrong_with_the_data_after_a_hold_is_found_before_anything_is_enforced() {
    let stranger = "'00000000-0000-0000-0000-00000000dead'";
    let cases = [
        ("drift", format!("update public.messages set auth_user_id = gen_random_uuid() where id = {FIRST}")),
        ("orphans", format!("update public.messages set conversation_id = {stranger} where id = {FIRST}")),
        (
            "references:messages_auth_user_id_fkey",
            format!(
                "update public.conversations set auth_user_id = {stranger}
                   where id = (select conversation_id from public.messages where id = {FIRST});
                 update public.messages m set auth_user_id = c.auth_user_id from public.conversations c
                   where c.id = m.conversation_id and c.auth_user_id = {stranger}"
            ),
        ),
        (
            "agree:conversations.user_id -> users.auth_user_id",
            format!(
                "update public.conversations set user_id = (select id from public.users where id not in
                   (select user_id from public.conversations where id in (select conversation_id from public.messages
                    where id = {FIRST})) limit 1)
                 where id = (select conversation_id from public.messages where id = {FIRST})"
            ),
        ),
        (
            "unusable_sources",
            "alter table public.conversations alter auth_user_id drop not null;
             insert into public.conversations (user_id, auth_user_id) select id, null from public.users limit 1"
                .to_owned(),
        ),
    ];
    let (db, ledger, job) = verified().await;
    let cli = Cli::new(&db);
    ledger.run("create table public.good as table public.messages").await;
    for (kind, sql) in cases {
        ledger.run("create table public.good_conversations as table public.conversations").await;
        plant(&ledger, &sql).await;
        assert!(cli.run(&["verify", JOB]).await.expect(1, kind).stdout.contains(kind));
        cli.run(&[if ledger.status().await == "held" { "cutover" } else { "resume" }, JOB]).await.expect(0, "");
        cli.run(&["run", "--once", job.path()]).await.expect(1, kind);
        assert_eq!((ledger.status().await, ledger.phase().await), ("failed".into(), "verify".into()), "{kind}");
        assert!(ledger.reason().await.contains(kind), "{}", ledger.reason().await);
        nothing_is_enforced(&ledger).await;
        let shown = cli.run(&["status", JOB]).await.stdout;
        let key: String = ledger.client.query_one(&format!("select {FIRST}::text"), &[]).await.expect("key").get(0);
        assert!(
            shown.contains(kind) && (kind == "unusable_sources" || shown.contains("such as key")),
            "{key}: {shown}"
        );
        plant(
            &ledger,
            "truncate public.conversations cascade; insert into public.conversations table public.good_conversations;
             insert into public.messages table public.good; drop table public.good_conversations",
        )
        .await;
    }
    // Put right, it goes on, without being released again.
    cli.run(&["resume", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
}

#[tokio::test]
async fn rows_that_a_writer_without_triggers_left_unfilled_are_swept_up() {
    let (db, ledger, job) = verified().await;
    plant(
        &ledger,
        "update public.messages set auth_user_id = null where id in (select id from public.messages limit 7)",
    )
    .await;
    Cli::new(&db).run(&["verify", JOB]).await.expect(1, "nulls 7, unfilled 7");
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "sweeping again");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    assert_eq!(ledger.number("select sweep from backfilld.checkpoint").await, 2);
    assert_eq!(ledger.number("select rows_updated from backfilld.checkpoint").await, 307);
}

#[tokio::test]
async fn a_verdict_of_another_server_timeline_or_job_does_not_count() {
    for wrong in ["job_hash = 'another'", "system_identifier = '1'", "timeline = timeline + 1", "passed = false"] {
        let (db, ledger, job) = verified().await;
        plant(&ledger, &format!("update public.messages set auth_user_id = gen_random_uuid() where id = {FIRST}"))
            .await;
        // Straight into Constrain, as after a failover in the middle of it.
        ledger
            .run(&format!(
                "update backfilld.verdict set {wrong};
                 update backfilld.job set status = 'running', released = '{{constrain}}', phase = 'constrain'"
            ))
            .await;
        Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "drift 1");
        nothing_is_enforced(&ledger).await;
        assert_eq!(ledger.number("select count(*) from backfilld.verdict").await, 2, "{wrong}: verified again");
    }
}
