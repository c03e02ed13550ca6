//! What cannot be shown or written is said once, and the backfill goes on.

use std::net::TcpListener;

use serde_json::Value;

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, wait_until};

#[tokio::test]
async fn a_port_in_use_is_one_warning_the_backfill_goes_on_and_the_page_comes_when_it_is_free() {
    let (db, job) = (TestDb::new(Template::Rows(200)).await, JobDir::shipped());
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound");
    let daemon = Cli::new(&db).env("BACKFILLD_HTTP__LISTEN", &address.to_string()).start(&["run", job.path()]);
    let ledger = Ledger::new(&db).await;
    ledger.wait_status("done").await;
    drop(taken);
    wait_until("it is served", async || {
        tokio::net::TcpStream::connect(address).await.is_ok() && ledger.status().await == "done"
    })
    .await;
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    ended.expect(0, "http listening");
    let about = format!("`http.listen`: cannot listen on {address}");
    assert_eq!(ended.stderr.matches(&about).count(), 1, "{ended:#?}");
    assert!(ended.stderr.contains("no status page, metrics and health until it is free"), "{ended:#?}");
}

#[tokio::test]
async fn files_that_cannot_be_written_are_one_error_that_names_them() {
    let db = TestDb::new(Template::Rows(200)).await;
    crate::support::run_once(&db, JobDir::shipped().spec()).await.expect("it runs");
    let cli = Cli::new(&db);
    // A file is no directory, for root either.
    let file = tempfile::NamedTempFile::new().expect("a file");
    let below = format!("{}/x", file.path().display());
    for args in [["report", JOB, "--output", &below], ["export", JOB, "--out", &below]] {
        let ended = cli.run(&args).await;
        ended.expect(2, &below);
        assert_eq!(ended.stderr.matches("error: ").count(), 1, "{ended:#?}");
    }
    cli.run(&["man", "--dir", &below]).await.expect(2, "--dir: cannot write pages to");
}

#[tokio::test]
async fn the_error_that_ends_a_run_is_json_where_json_is_asked_for() {
    let (db, job) = (TestDb::new(Template::Schema).await, JobDir::shipped());
    job.replace("table = \"public.messages\"", "table = \"public.nowhere\"");
    let args = ["run", "--once", "--log-format", "json", job.path()];
    for cli in [Cli::new(&db), Cli::new(&db).env("BACKFILLD_LEASE__TTL", "soon")] {
        let ended = cli.run(&args).await;
        ended.expect(2, "");
        let lines: Vec<Value> = ended.stderr.lines().map(|l| serde_json::from_str(l).expect(l)).collect();
        let last = lines.last().expect("a line");
        assert_eq!((last["level"].as_str(), last["exit_code"].as_u64()), (Some("ERROR"), Some(2)), "{ended:#?}");
        assert!(last["message"].as_str().is_some_and(|m| m.contains("nowhere") || m.contains("lease.ttl")), "{last}");
    }
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(2, "error: ");
}
