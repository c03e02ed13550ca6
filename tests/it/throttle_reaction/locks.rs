//! How long locks of batches keep others waiting.

use std::time::Instant;

use backfilld::demo::cluster::SUPERUSER;

use super::{ONE_AT_A_TIME, note};
use crate::support::{JOB, JobDir, Ledger, Session, wait_until};
use crate::throttle_servers::World;

/// Times of each.
const TRIALS: usize = 20;

/// How long this takes, in milliseconds.
async fn timed(session: &Session, sql: &str) -> f64 {
    let began = Instant::now();
    session.run(sql).await;
    began.elapsed().as_secs_f64() * 1000.0
}

/// The n-th row of the table, as one batch over all of it goes.
fn row(n: u32) -> String {
    format!("(select id from public.messages order by ctid offset {n} limit 1)")
}

async fn batch_holds(ledger: &Ledger, id: &str) {
    let free = format!("select exists (select from public.messages where id = '{id}' for update skip locked)");
    wait_until("a batch holds the row", async || !ledger.is(&free).await).await;
}

/// One batch takes seconds, and is made no smaller.
#[tokio::test]
#[ignore = "measures"]
async fn how_long_locks_of_batches_keep_others_waiting() {
    const ROWS: u32 = 100_000;
    let _alone = ONE_AT_A_TIME.lock().await;
    let world = World::start(u64::from(ROWS), &[]).await;
    let (ledger, job) = (&world.ledger, JobDir::shipped());
    job.replace(
        "initial_rows = 100\nmax_rows = 100\nmin_rows = 1\ntarget_duration = \"2s\"",
        "initial_rows = 100000\nmax_rows = 100000\nmin_rows = 100000\ntarget_duration = \"5s\"",
    );
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    world.cli().run(&["run", "--once", job.path()]).await.expect(5, "hold point");
    world.cli().run(&["cutover", JOB]).await.expect(0, "");
    let id = async |n: u32| -> String {
        let sql = format!("select id::text from public.messages where id = {}", row(n));
        ledger.client.query_one(&sql, &[]).await.expect("a row").get(0)
    };
    let (first, late) = (id(0).await, id(20_000).await);
    // So that no batch comes to its end.
    let last = world.session("last", SUPERUSER).await;
    last.run(&format!("begin; select from public.messages where id = '{}' for update", id(ROWS - 1).await)).await;
    let (app, holder) = (world.session("app", SUPERUSER).await, world.session("holder", SUPERUSER).await);
    // Rolled back, since the triggers fill what is written, and a batch leaves alone what is filled.
    let update = |id: &str| format!("update public.messages set role = role where id = '{id}'");
    let all = |id: &str| format!("begin; {}; rollback", update(id));
    let mut rows = [const { Vec::new() }; 5];
    rows[0].push(timed(&app, &all(&first)).await);
    for _ in 0..TRIALS {
        // A daemon of its own: one waits the longer the more batches in a row came to nothing.
        let daemon = world.cli().start(&["run", "--once", job.path()]);
        batch_holds(ledger, &first).await;
        rows[1].push(timed(&app, &all(&first)).await);
        batch_holds(ledger, &first).await;
        rows[2].push(timed(&app, "begin; lock table public.messages in share mode; commit").await);
        holder.run(&format!("begin; {}", update(&late))).await;
        let waits = format!(
            "select exists (select from pg_stat_activity where application_name like 'backfilld/%batch%'
               and {} = any (pg_blocking_pids(pid)))",
            holder.pid()
        );
        wait_until("a batch waits for the holder", async || ledger.is(&waits).await).await;
        rows[3].push(timed(&holder, &format!("{}; rollback", update(&late))).await);
        holder.run(&format!("begin; {}", update(&late))).await;
        wait_until("a batch waits for the holder", async || ledger.is(&waits).await).await;
        rows[4].push(timed(&holder, &format!("{}; rollback", update(&first))).await);
        daemon.signal("TERM");
        daemon.ended().await;
    }
    assert!(ledger.is("select exists (select from backfilld.event where kind = 'gave_way')").await);
    println!("| What the application does | Median of {TRIALS} | Longest |\n|---|---|---|");
    let names = [
        "updates a row while there is no batch, once",
        "wants a row that a batch holds",
        "wants to lock the table, which a batch writes",
        "holds a row that a batch waits for, writes it again and ends",
        "holds a row that a batch waits for, and wants one that the batch holds",
    ];
    for (name, took) in names.into_iter().zip(rows) {
        note(name, took);
    }
}
