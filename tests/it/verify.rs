//! The proof as such: what it finds, where it goes on, what it leaves to be repaired.

use std::collections::BTreeMap;

use backfilld::plan::Facts;
use backfilld::verify::{Part, Proof};

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, has_version, wait_until};

/// The shipped job, held before anything enforcing; with a table of some hundred pages, and chunks of 128.
pub async fn held() -> (TestDb, Ledger, JobDir) {
    let db = TestDb::new(Template::Rows(1000)).await;
    let job = JobDir::with("hold_before = [\"constrain\"]");
    job.append("[verification]\nchunk_pages = 128");
    let ledger = Ledger::new(&db).await;
    ledger.run("alter table public.messages set (fillfactor = 10)").await;
    ledger.run("vacuum full public.messages").await;
    assert!(ledger.number("select pg_relation_size('public.messages') / 8192").await > 300, "several chunks");
    (db, ledger, job)
}

/// Writes as nobody should: the row's own triggers are off, and on again as they were.
pub async fn plant(ledger: &Ledger, sql: &str) {
    ledger
        .run(&format!(
            "begin; alter table public.messages disable trigger all; alter table public.conversations disable trigger all;
             {sql};
             alter table public.messages enable trigger all; alter table public.conversations enable trigger all;
             do $$ declare t record; begin
               for t in select tgname, tgrelid::regclass as tbl from pg_trigger where tgname like 'zzz_backfilld%'
               loop execute format('alter table %s enable always trigger %I', t.tbl, t.tgname); end loop;
             end $$; commit"
        ))
        .await;
}

async fn counts(db: &TestDb) -> BTreeMap<String, i64> {
    let printed = Cli::new(db).run(&["verify", JOB, "--json"]).await.stdout;
    let verdict: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
    serde_json::from_value(verdict["counts"].clone()).expect("counts")
}

#[tokio::test]
async fn a_verification_that_is_killed_goes_on_at_its_chunk_if_nothing_has_changed() {
    let (db, ledger, job) = held().await;
    let cli = Cli::new(&db);
    let killed = cli.clone().env("BACKFILLD_FAULT", "after-chunk:2").run(&["run", "--once", job.path()]).await;
    assert_eq!(killed.code, None, "{killed:#?}");
    let page = "select (walk ->> 'page')::int8 from backfilld.verification";
    assert_eq!(ledger.number(page).await, 384, "128 and 256 pages");
    wait_until("the dead daemon's sessions are gone", async || {
        ledger.is("select not exists (select from pg_stat_activity where application_name like 'backfilld/%' and datname = current_database())").await
    })
    .await;
    let more = cli.clone().env("BACKFILLD_FAULT", "after-chunk:1").run(&["run", "--once", job.path()]).await;
    assert_eq!(more.code, None, "{more:#?}");
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    let went_on = "select count(*) from backfilld.event where kind = 'verification goes on'";
    assert_eq!(ledger.number(went_on).await, 2);
    assert!(ledger.is("select passed and rows_checked = 1000 from backfilld.verdict").await, "each row once");
    assert_eq!(ledger.number("select count(*) from backfilld.verification").await, 0);
}

#[tokio::test]
async fn a_verification_begins_anew_when_a_trigger_was_touched_meanwhile() {
    let (db, ledger, job) = held().await;
    let cli = Cli::new(&db);
    cli.clone().env("BACKFILLD_FAULT", "after-chunk:2").run(&["run", "--once", job.path()]).await;
    // Behind the walk; one that went on there would not see it.
    let first = "update public.messages set auth_user_id = gen_random_uuid() where ctid = (select min(ctid) from public.messages)";
    plant(&ledger, first).await;
    cli.run(&["run", "--once", job.path()]).await.expect(1, "drift 1");
    assert_eq!(ledger.number("select rows_checked from backfilld.verdict").await, 1000);
}

#[tokio::test]
async fn a_walk_over_a_table_that_is_rewritten_begins_anew() {
    let (db, ledger, job) = held().await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    let (spec, client) = (job.spec(), db.client(backfilld::demo::sample::DAEMON).await);
    let facts = Facts::read(&client, &spec, false).await.expect("facts");
    let proof = Proof::new(&spec, &facts);
    let mut walk = proof.begin();
    proof.step(&client, &mut walk).await.expect("a chunk");
    let before = walk.rows_checked;
    assert!(before > 0 && before < 1000 && walk.part == Part::Target, "{walk:?}");
    // All rows are in the pages behind the walk then.
    ledger.run("alter table public.messages set (fillfactor = 100)").await;
    ledger.run("vacuum full public.messages").await;
    while walk.part != Part::Done {
        proof.step(&client, &mut walk).await.expect("a chunk");
    }
    assert_eq!(walk.rows_checked, 1000, "each row once");
}

#[tokio::test]
async fn single_rows_that_are_wrong_are_found_with_their_keys_and_a_right_table_raises_no_alarm() {
    let (db, ledger, job) = held().await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    let clean = counts(&db).await;
    assert!(clean.values().all(|n| *n == 0), "{clean:?}");
    ledger.run("create table public.good as select id, conversation_id, auth_user_id from public.messages").await;
    let last = "ctid = (select max(ctid) from public.messages)";
    // One row each, in the first, a middle and the last chunk.
    let places = [
        "ctid = (select min(ctid) from public.messages)",
        "ctid = (select min(ctid) from public.messages where ctid >= '(200,0)')",
        last,
    ];
    for place in places {
        let cases: [(&str, &str, &[&str]); 4] = [
            ("NULL", "auth_user_id = null", &["agree", "nulls", "unfilled"]),
            (
                "another owner",
                "auth_user_id = (select id from auth.users where id <> auth_user_id limit 1)",
                &["drift"],
            ),
            ("nobody", "auth_user_id = gen_random_uuid()", &["drift", "references:messages_auth_user_id_fkey"]),
            ("no source", "conversation_id = gen_random_uuid()", &["agree", "drift", "orphans"]),
        ];
        for (what, set, kinds) in cases {
            let row =
                ledger.client.query_one(&format!("select id::text from public.messages where {place}"), &[]).await;
            let id: String = row.expect("a row").get(0);
            plant(&ledger, &format!("update public.messages set {set} where id = '{id}'")).await;
            let found = counts(&db).await;
            for (kind, n) in &found {
                let expected = kinds.iter().any(|k| kind == k) as i64;
                // The agree path compares the sources, not the column.
                if !kind.starts_with("agree") {
                    assert_eq!(*n, expected, "{what} at {place}: {kind}");
                }
            }
            let shown = Cli::new(&db).run(&["verify", JOB]).await.expect(1, kinds[kinds.len() - 1]).stdout.clone();
            assert!(shown.contains(&id), "{shown}");
            plant(
                &ledger,
                "update public.messages m set auth_user_id = g.auth_user_id, conversation_id = g.conversation_id
                 from public.good g where g.id = m.id and (m.auth_user_id, m.conversation_id) is distinct from
                   (g.auth_user_id, g.conversation_id)",
            )
            .await;
        }
    }
    let clean = counts(&db).await;
    assert!(clean.values().all(|n| *n == 0), "{clean:?}");
}

#[tokio::test]
async fn rows_that_row_level_security_hides_are_an_error_and_never_a_clean_result() {
    if !has_version(15, "the daemon's login is a superuser there") {
        return;
    }
    let (db, ledger, job) = held().await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    ledger
        .run(
            "alter table public.messages force row level security; alter role backfilld nobypassrls;
             create policy nobody on public.messages as restrictive using (false)",
        )
        .await;
    let refused = Cli::new(&db).run(&["verify", JOB]).await;
    // Roles belong to the whole server.
    ledger.run("alter role backfilld bypassrls").await;
    refused.expect(1, "row-level security");
}

#[tokio::test]
async fn a_row_that_is_wrong_is_listed_in_the_ledger_and_failed_survives_a_restart() {
    let (db, ledger, job) = held().await;
    let cli = Cli::new(&db);
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    plant(&ledger, "update public.messages set auth_user_id = gen_random_uuid() where ctid < '(9,0)'").await;
    cli.run(&["cutover", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(1, "drift");
    let wrong = "select count(*) from backfilld.finding f join public.messages m on m.id::text = f.key[1]
                 where f.kind = 'drift' and f.origin = 'verify' and m.ctid < '(9,0)'";
    let n = ledger.number("select count(*) from public.messages where ctid < '(9,0)'").await;
    assert_eq!(ledger.number(wrong).await, n.min(20), "some of each kind");
    assert_eq!(
        ledger.number("select (counts ->> 'drift')::int8 from backfilld.verdict order by id desc limit 1").await,
        n
    );
    cli.run(&["run", "--once", job.path()]).await.expect(1, "drift");
    assert_eq!(ledger.status().await, "failed");
    assert_eq!(ledger.number("select count(*) from backfilld.verdict").await, 2, "it was not verified again");
}

#[tokio::test]
async fn a_repair_derives_wrong_rows_anew_and_leaves_what_has_no_source() {
    let (db, ledger, job) = held().await;
    let cli = Cli::new(&db);
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    plant(
        &ledger,
        "update public.messages set auth_user_id = gen_random_uuid() where ctid in (select ctid from public.messages order by ctid limit 250);
         update public.messages set auth_user_id = null where ctid in (select ctid from public.messages order by ctid desc limit 3)",
    )
    .await;
    assert_eq!(ledger.drift().await, 253);
    cli.run(&["verify", JOB]).await.expect(1, "--repair");
    assert_eq!(ledger.drift().await, 253, "nothing is repaired that nobody asked for");
    cli.run(&["verify", JOB, "--repair"]).await.expect(0, "repaired 253 rows, left 0");
    assert_eq!(ledger.drift().await, 0);
    plant(&ledger, "update public.messages set conversation_id = gen_random_uuid() where ctid = (select min(ctid) from public.messages)")
        .await;
    cli.run(&["verify", JOB, "--repair"]).await.expect(1, "repaired 0 rows, left 1").expect(1, "orphans 1");
    ledger.run("update backfilld.job set status = 'running', phase = 'backfill'").await;
    cli.run(&["verify", JOB, "--repair"]).await.expect(5, "its daemon works on the same rows");
}

#[tokio::test]
async fn a_repair_never_writes_the_value_of_an_old_snapshot() {
    let (db, ledger, job) = held().await;
    let cli = Cli::new(&db);
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    let first = "(select id from public.messages order by id limit 1)";
    plant(&ledger, &format!("update public.messages set auth_user_id = gen_random_uuid() where id = {first}")).await;
    // The conversation gets another owner, which propagates to its rows; not committed yet, so that the repair waits.
    let writer = db.admin().await;
    let other = "(select id from auth.users where id <> c.auth_user_id order by id limit 1)";
    let sql = format!(
        "begin; update public.conversations c set auth_user_id = {other}
           where id = (select conversation_id from public.messages where id = {first})"
    );
    writer.batch_execute(&sql).await.expect("a change of owner");
    let repair = cli.start(&["verify", JOB, "--repair"]);
    wait_until("the repair waits for the row", async || {
        ledger
            .is("select exists (select from pg_stat_activity where application_name = 'backfilld/repair' and wait_event_type = 'Lock')")
            .await
    })
    .await;
    writer.batch_execute("commit").await.expect("commit");
    let ended = repair.ended().await;
    assert!(ended.stderr.contains("repaired"), "{ended:#?}");
    assert_eq!(ledger.drift().await, 0);
}
