//! Batches beside an application: one transaction of several short pieces, so that others seldom have to wait for a core.

use backfilld::demo::sample::APP_OWNER;

use crate::heap::sweeps;
use crate::killed::{ROWS, checkpoint_is_right, is_complete};
use crate::support::{Cli, JobDir, Ledger, Template, TestDb, wait_until};

/// A job at a pace that goes by who else works, which is this test: it asks all the time.
fn job() -> JobDir {
    let job = JobDir::heap();
    job.replace("pace = \"constant\"", "pace = \"auto\"");
    job.replace("triggers = \"skip\"", "triggers = \"fire\"");
    job
}

/// Notes each UPDATE of the table and its transaction; a sequence keeps those of a transaction that was rolled back.
async fn note_updates(ledger: &Ledger) {
    for sql in [
        "create table public.said (xid xid8, rows bigint)",
        "create sequence public.begun",
        "create function public.say() returns trigger language plpgsql security definer set search_path = pg_catalog as
           $$begin
             perform nextval('public.begun');
             insert into public.said select pg_current_xact_id(), count(*) from filled;
             return null;
           end$$",
        &format!("alter function public.say() owner to {APP_OWNER}"),
        &format!("alter table public.said owner to {APP_OWNER}"),
        &format!("alter sequence public.begun owner to {APP_OWNER}"),
        "create trigger say after update on public.messages referencing new table as filled
           for each statement execute function public.say()",
    ] {
        ledger.run(sql).await;
    }
}

async fn no_more_notes(ledger: &Ledger) {
    ledger.run("drop trigger say on public.messages; drop function public.say(); drop table public.said").await;
    ledger.run("drop sequence public.begun").await;
}

#[tokio::test]
async fn beside_others_a_batch_is_one_transaction_of_several_pieces() {
    let (job, db) = (job(), TestDb::new(Template::Rows(ROWS)).await);
    let ledger = Ledger::new(&db).await;
    note_updates(&ledger).await;
    let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
    let begun = "select to_regclass('backfilld.job') is not null";
    wait_until("it is done", async || ledger.is(begun).await && ledger.status().await == "done").await;
    daemon.ended().await.expect(0, "done");
    let most = "select max(n) from (select count(*) as n from public.said group by xid) as s";
    let pieces = ledger.number(most).await;
    assert!((2..=4).contains(&pieces), "{pieces} updates in a transaction");
    assert_eq!(sweeps(&ledger).await, 1, "one sweep filled all");
    assert_eq!(ledger.number("select sum(rows)::int8 from public.said").await, i64::from(ROWS), "each row once");
    no_more_notes(&ledger).await;
    is_complete(&db, &ledger).await;
}

#[tokio::test]
async fn a_batch_killed_between_two_pieces_is_done_again_as_a_whole() {
    let (job, db) = (job(), TestDb::new(Template::Rows(ROWS)).await);
    let ledger = Ledger::new(&db).await;
    note_updates(&ledger).await;
    let daemon = Cli::new(&db).env("BACKFILLD_FAULT", "between-pieces:2").start(&["run", "--once", job.path()]);
    let begun = "select to_regclass('backfilld.job') is not null";
    // To ask is to be somebody else.
    let killed = async || {
        let gone = "select count(*) = 0 from pg_stat_activity where application_name like 'backfilld/%/batch'
                    and datname = current_database()";
        ledger.is(begun).await && ledger.is("select is_called from public.begun").await && ledger.is(gone).await
    };
    wait_until("it is killed", killed).await;
    assert_eq!(daemon.ended().await.code, None);
    checkpoint_is_right(&ledger).await;
    let lost = "select (select last_value from public.begun) > (select count(*) from public.said)";
    assert!(ledger.is(lost).await, "what the killed transaction did is undone");
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    assert_eq!((sweeps(&ledger).await, ledger.unfilled().await), (1, 0), "it went on where it stood");
    assert_eq!(ledger.number("select sum(rows)::int8 from public.said").await, i64::from(ROWS), "each row once");
    no_more_notes(&ledger).await;
    is_complete(&db, &ledger).await;
}

/// How others fare without batches is what they are compared with.
#[tokio::test]
async fn beside_others_batches_keep_still_for_some_of_the_small_transactions() {
    let (job, db) = (job(), TestDb::new(Template::Rows(ROWS)).await);
    job.append("[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"");
    let ledger = Ledger::new(&db).await;
    ledger.run("create function public.gate() returns boolean language sql as 'select false'").await;
    let cli = Cli::new(&db).env("BACKFILLD_LOG__LEVEL", "backfilld::throttle::pulse=trace,info");
    let daemon = cli.start(&["run", "--once", job.path()]);
    wait_until("it has begun", async || ledger.is("select to_regclass('backfilld.pulse') is not null").await).await;
    for sql in [
        "create sequence public.felt",
        "create function public.feel() returns trigger language plpgsql security definer set search_path = pg_catalog as
           $$begin perform nextval('public.felt'); return null; end$$",
        "create trigger feel after insert or update on backfilld.pulse execute function public.feel()",
    ] {
        ledger.run(sql).await;
    }
    // To ask is to be somebody else. One of two finds them still.
    wait_until("there were twenty", async || ledger.is("select last_value >= 20 from public.felt").await).await;
    ledger.run("drop trigger feel on backfilld.pulse; drop function public.feel(); drop sequence public.felt").await;
    ledger.run("create or replace function public.gate() returns boolean language sql as 'select true'").await;
    let ended = daemon.ended().await;
    ended.expect(0, "done").expect(0, "\"without\":true").expect(0, "\"without\":false");
    ledger.run("drop function public.gate()").await;
    is_complete(&db, &ledger).await;
}
