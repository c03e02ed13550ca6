//! Lanes that nobody asked for, on servers of their own: who else works on a server is for all its databases to see.

use std::sync::Arc;

use backfilld::demo::cluster::SUPERUSER;
use tokio_postgres::NoTls;

use crate::support::{JobDir, Ledger, wait_until};
use crate::throttle_servers::World;

/// Few rows on many pages: two lanes' worth.
const SPREAD: [&str; 2] = ["alter table public.messages set (fillfactor = 10)", "vacuum full public.messages"];

/// As many pages, a row on each, so that one round is enough.
const WIDE: [&str; 3] = [
    "alter table public.messages alter column content set storage plain",
    "begin; set local session_replication_role = replica; update public.messages set content = repeat('x', 4100); commit",
    "vacuum full public.messages",
];

/// Over a connection that counts as one of the daemon's.
async fn unnoticed(world: &World) -> Ledger {
    let url = world.cluster.url(SUPERUSER, "app") + "?application_name=backfilld/test";
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("it answers");
    tokio::spawn(connection);
    Ledger { client: Arc::new(client) }
}

fn job(pause: &str) -> JobDir {
    let job = JobDir::heap();
    job.replace("pace = \"constant\"", "pace = \"auto\"");
    job.replace("strategy = \"heap\"", &format!("strategy = \"heap\"\npause = \"{pause}\""));
    job
}

#[tokio::test]
async fn a_second_lane_works_while_nobody_else_does() {
    // The first lane must not be at its end before it is clear that nobody is there.
    let (job, world) = (job("80ms"), World::start(7000, &[]).await);
    let ledger = unnoticed(&world).await;
    for sql in SPREAD {
        ledger.run(sql).await;
    }
    let daemon = world.cli().start(&["run", "--once", job.path()]);
    wait_until("both lanes work", async || {
        ledger.is("select to_regclass('backfilld.checkpoint') is not null").await
            && ledger
                .is("select count(*) filter (where batches > 1 and not finished) = 2 from backfilld.checkpoint")
                .await
    })
    .await;
    daemon.ended().await.expect(0, "done");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

#[tokio::test]
async fn a_second_lane_waits_for_the_first_while_somebody_else_works() {
    let (job, world) = (job("0s"), World::start(2100, &[]).await);
    let ledger = &world.ledger;
    for sql in WIDE {
        ledger.run(sql).await;
    }
    // This test asks all the time, and so counts as an application.
    let daemon = world.cli().start(&["run", "--once", job.path()]);
    let begun = "select count(*) filter (where lane = 1 and batches > 0) > 0 from backfilld.checkpoint";
    wait_until("the second lane works", async || {
        ledger.is("select to_regclass('backfilld.checkpoint') is not null").await && ledger.is(begun).await
    })
    .await;
    assert!(ledger.is("select finished from backfilld.checkpoint where lane = 0").await, "both at once");
    drop(daemon);
}
