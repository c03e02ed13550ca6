//! Rows that cannot be updated, and what an operator does about them.

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, schema_dump};

/// The shipped job, failed since three rows cannot be updated: a check, a trigger, and a trigger that poses as a check.
async fn failed(change: impl Fn(&JobDir)) -> (TestDb, Ledger, JobDir, Vec<String>) {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::shipped();
    change(&job);
    let ledger = Ledger::new(&db).await;
    ledger
        .run(
            "create table public.bad as select id, row_number() over (order by id) as n from public.messages order by id limit 3;
             grant select on public.bad to public;
             update public.messages set content = 'secret content' where id in (select id from public.bad);
             create function public.refuse() returns trigger language plpgsql as $$
               declare k int := (select n from public.bad where id = new.id);
               begin
                 if k = 1 then raise 'no: %', new.content; end if;
                 if k = 2 then raise '% is refused', new.content using errcode = 'check_violation'; end if;
                 return new;
               end $$;
             create trigger refuse before update on public.messages for each row execute function public.refuse();
             alter table public.messages enable always trigger refuse;",
        )
        .await;
    let third: String =
        ledger.client.query_one("select id::text from public.bad where n = 3", &[]).await.expect("id").get(0);
    let check = format!("alter table public.messages add constraint never check (id <> '{third}') not valid");
    ledger.run(&check).await;
    job.replace("triggers = \"skip\"", "triggers = \"skip\"\nmay_fire = [\"refuse\"]");
    let bad = ledger.client.query("select id::text from public.bad order by n", &[]).await.expect("ids");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(1, "quarantined 3");
    (db, ledger, job, bad.iter().map(|r| r.get(0)).collect())
}

#[tokio::test]
async fn rows_in_quarantine_are_listed_without_their_content_and_tried_again_one_by_one() {
    let (db, ledger, job, bad) = failed(|_| {}).await;
    let cli = Cli::new(&db);
    let listed = cli.run(&["quarantine", "list", JOB]).await.expect(0, "").stdout.clone();
    for (key, what) in bad.iter().zip(["P0001 a trigger", "23514 violates check constraint,", "constraint \"never\""]) {
        assert!(listed.contains(key) && listed.contains(what), "{what}: {listed}");
    }
    let shown = cli.run(&["status", JOB]).await.stdout;
    assert!(shown.contains("3 rows in quarantine") && bad.iter().all(|k| shown.contains(k)), "{shown}");
    let json = cli.run(&["status", JOB, "--json", "--history", "100"]).await.stdout;
    let ledger_text: String = ledger
        .client
        .query_one("select string_agg(t::text, ' ') from (select q::text from backfilld.quarantine q union all select e::text from backfilld.event e union all select j::text from backfilld.job j) t", &[])
        .await
        .expect("ledger")
        .get(0);
    for text in [&listed, &shown, &json, &ledger_text] {
        assert!(!text.contains("secret"), "{text}");
    }
    // Nothing has changed: all three are refused again. One is mended: it alone is tried.
    cli.run(&["quarantine", "retry", JOB]).await.expect(1, "3 of 3 rows still cannot be updated");
    ledger.run("alter table public.messages drop constraint never").await;
    let done = cli.run(&["quarantine", "retry", JOB, "--key", &bad[2]]).await;
    assert!(done.expect(0, "").stdout.contains(": filled"), "{done:#?}");
    assert_eq!(ledger.number("select count(*) from backfilld.quarantine").await, 2);
    assert_eq!(ledger.unfilled().await, 2);
    ledger
        .run(&format!("delete from public.messages where id = '{}'; drop trigger refuse on public.messages", bad[1]))
        .await;
    let done = cli.run(&["quarantine", "retry", JOB]).await.expect(0, "").stdout.clone();
    assert!(done.contains("the row is gone") && done.contains("filled"), "{done}");
    cli.run(&["quarantine", "retry", JOB, "--key", &bad[1]]).await.expect(2, "no such row in quarantine");
    let sweep = "select sweep from backfilld.checkpoint";
    cli.run(&["resume", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!(ledger.number(sweep).await, 1, "without another walk over the table");
    assert!(!schema_dump(&db, &[]).contains("secret"));
}

#[tokio::test]
async fn a_row_without_value_cannot_be_accepted_where_not_null_is_wanted() {
    let (db, ledger, _job, bad) = failed(|_| {}).await;
    let cli = Cli::new(&db);
    cli.run(&["quarantine", "accept", JOB, "--key", &bad[0]]).await.expect(2, "--why");
    let refused = cli.run(&["quarantine", "accept", JOB, "--all", "--why", "old"]).await;
    refused.expect(5, "shall be NOT NULL").expect(5, &bad[0]);
    assert_eq!(ledger.number("select count(*) from backfilld.quarantine where accepted_at is null").await, 3);
}

#[tokio::test]
async fn accepted_rows_no_longer_block_the_flip_of_a_nullable_column() {
    let (db, ledger, job, bad) = failed(|job| {
        job.replace("not_null = true", "not_null = false");
        job.edit("job.toml", |text| {
            let from = text.find("[[agree]]").expect("a path");
            let to = text.find("# What the application's own UPDATE").expect("what follows");
            format!("{}{}", &text[..from], &text[to..])
        });
    })
    .await;
    let cli = Cli::new(&db);
    cli.run(&["quarantine", "accept", JOB, "--key", &bad[0], "--key", &bad[1], "--why", "ticket 7"])
        .await
        .expect(0, "");
    cli.run(&["verify", JOB]).await.expect(1, "quarantined 1, unfilled 1");
    cli.run(&["quarantine", "accept", JOB, "--all", "--why", "ticket 8"]).await.expect(0, "");
    let listed = cli.run(&["quarantine", "list", JOB]).await.stdout;
    assert!(listed.contains("accepted by backfilld at ") && listed.contains("ticket 7"), "{listed}");
    cli.run(&["resume", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!(ledger.unfilled().await, 3);
}

/// The server's message quotes the value, and goes to those who may not see it: the ledger, the log, a webhook.
#[tokio::test]
async fn a_value_that_cannot_be_converted_is_nowhere_told_and_can_be_accepted() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(300)).await);
    let ledger = Ledger::new(&db).await;
    let chosen = "(select conversation_id from public.messages order by id limit 1)";
    let value = "(case c.title when 'credit card' then c.title else c.auth_user_id::text end)::uuid";
    job.replace("value = \"c.auth_user_id\"", &format!("value = \"{value}\""));
    job.replace("not_null = true", "not_null = false");
    job.edit("job.toml", |text| {
        let from = text.find("[[agree]]").expect("a path");
        let to = text.find("# What the application's own UPDATE").expect("what follows");
        format!("{}{}", &text[..from], &text[to..])
    });
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    let cli = Cli::new(&db).env("BACKFILLD_LOG__LEVEL", "debug");
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point before backfill");
    ledger.run(&format!("update public.conversations set title = 'credit card' where id = {chosen}")).await;
    cli.run(&["cutover", JOB]).await.expect(0, "");
    let failed = cli.run(&["run", "--once", job.path()]).await;
    failed.expect(1, "SQLSTATE 22P02");
    assert!(!failed.stderr.contains("credit card"), "{failed:#?}");
    let everywhere = "select (select string_agg(j.reason || j.hint, '') from backfilld.job j) || (select string_agg(e::text, '') from backfilld.event e)
                        || (select string_agg(q::text, '') from backfilld.quarantine q)";
    let told: String = ledger.client.query_one(everywhere, &[]).await.expect("the ledger").get(0);
    assert!(told.contains("22P02") && !told.contains("credit card"), "{told}");
    cli.run(&["quarantine", "accept", JOB, "--all", "--why", "ticket 9"]).await.expect(0, "");
    cli.run(&["verify", JOB]).await.expect(0, "");
}
