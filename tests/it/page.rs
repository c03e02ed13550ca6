//! The status page in a real browser, in front of a real daemon.

use backfilld::demo::sample::DAEMON;
use serde_json::json;

use crate::support::{Browser, Cli, JOB, JobDir, Ledger, Process, Template, TestDb, free_port, wait_until};

/// A job that waits until its gate is open, then goes slowly, and stands before the flip.
async fn gated(db: &TestDb) -> (JobDir, Ledger) {
    let job = JobDir::with("hold_before = [\"flip\"]");
    job.replace("target_duration = \"2s\"", "target_duration = \"2s\"\npause = \"100ms\"");
    job.append("[throttle]\nevery = \"100ms\"\n[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"");
    let ledger = Ledger::new(db).await;
    ledger.run("create function public.gate() returns boolean language sql as 'select false'").await;
    (job, ledger)
}

fn start(db: &TestDb, job: &JobDir, port: u16, instance: &str) -> Process {
    let listen = format!("127.0.0.1:{port}");
    Cli::new(db).env("BACKFILLD_HTTP__LISTEN", &listen).env("BACKFILLD_INSTANCE", instance).start(&["run", job.path()])
}

async fn shows(browser: &Browser, id: &str, text: &str) {
    wait_until(&format!("{id} shows {text:?}"), async || browser.text(id).await.contains(text)).await;
}

#[tokio::test]
async fn the_page_tells_a_stranger_how_it_stands_while_it_changes_and_when_the_daemon_is_away() {
    let db = TestDb::new(Template::Rows(3000)).await;
    let (job, ledger) = gated(&db).await;
    let (cli, port, other) = (Cli::new(&db), free_port(), free_port());
    let daemon = start(&db, &job, port, "first");
    let browser = Browser::start().await;
    wait_until("it listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
    browser.open(&format!("http://127.0.0.1:{port}/")).await;
    browser.eval("window.sameDocument = true").await;

    // Why it waits, with value and limit.
    shows(&browser, "mood", "waiting").await;
    shows(&browser, "wait", "query_gate").await;
    shows(&browser, "headline", "the query says no").await;
    assert_eq!(browser.text("job").await, JOB);
    shows(&browser, "signals", "probe_latency").await;

    // It goes on, and the numbers change in the open page.
    ledger.run("create or replace function public.gate() returns boolean language sql as 'select true'").await;
    shows(&browser, "mood", "fine").await;
    shows(&browser, "wait", "nothing").await;
    let before = browser.text("rows").await;
    wait_until("the rows change", async || browser.text("rows").await != before).await;
    shows(&browser, "size", "p99").await;
    wait_until("a chart has a line", async || {
        browser.eval("document.querySelectorAll('#charts svg path.a').length > 0").await == json!(true)
    })
    .await;

    // What an operator writes is text.
    let evil = "<img src=x onerror=\"window.evil = 1\"> & lunch";
    cli.run(&["pause", JOB, "--reason", evil]).await.expect(0, "");
    shows(&browser, "headline", evil).await;
    shows(&browser, "command", &format!("backfilld resume {JOB}")).await;
    shows(&browser, "wait", "an operator").await;
    assert_eq!(browser.eval("[document.images.length, window.evil === undefined]").await, json!([0, true]));

    // On a phone, too, and in the dark.
    browser
        .tools("Emulation.setEmulatedMedia", json!({"features": [{"name": "prefers-color-scheme", "value": "dark"}]}))
        .await;
    assert_eq!(browser.eval("getComputedStyle(document.body).backgroundColor").await, json!("rgb(18, 23, 29)"));
    let phone = json!({"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": true});
    browser.tools("Emulation.setDeviceMetricsOverride", phone).await;
    wait_until("it is narrow", async || browser.eval("window.innerWidth").await == json!(360)).await;
    let wide = browser.eval("document.scrollingElement.scrollWidth").await;
    assert_eq!(wide, json!(360), "it scrolls sideways");
    browser.tools("Emulation.clearDeviceMetricsOverride", json!({})).await;
    assert_eq!(browser.complaints().await, Vec::<String>::new());

    // Killed: it says since when, keeps the picture, and comes back by itself.
    daemon.signal("KILL");
    daemon.ended().await;
    shows(&browser, "gone", "The daemon does not answer since").await;
    assert_eq!(browser.text("job").await, JOB);
    shows(&browser, "headline", evil).await;
    let daemon = start(&db, &job, port, "first");
    wait_until("it is back", async || browser.text("gone").await.is_empty()).await;
    shows(&browser, "events", "was running").await;
    cli.run(&["resume", JOB]).await.expect(0, "");
    shows(&browser, "mood", "held").await;
    shows(&browser, "command", &format!("backfilld cutover {JOB}")).await;
    shows(&browser, "proofs", "passed").await;
    assert_eq!(browser.eval("window.sameDocument").await, json!(true), "it was never loaded again");

    // The standby says who does the work.
    let standby = start(&db, &job, other, "second");
    wait_until("it listens", async || tokio::net::TcpStream::connect(("127.0.0.1", other)).await.is_ok()).await;
    browser.open(&format!("http://127.0.0.1:{other}/")).await;
    shows(&browser, "mood", "standby").await;
    shows(&browser, "headline", "first holds the lease").await;
    browser.open(&format!("http://127.0.0.1:{port}/")).await;
    cli.run(&["cutover", JOB]).await.expect(0, "");
    shows(&browser, "mood", "done").await;
    shows(&browser, "percent", "100 %").await;
    browser.complaints().await;
    for process in [standby, daemon] {
        process.signal("TERM");
        process.ended().await;
    }
}

/// Answers to fifty requests for the page's JSON, over one connection.
async fn fifty(port: u16) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    for i in 0..50 {
        let last = if i == 49 { "close" } else { "keep-alive" };
        let request = format!("GET /api/v1/status HTTP/1.1\r\nhost: localhost\r\nconnection: {last}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
    }
    let mut answers = String::new();
    stream.read_to_string(&mut answers).await.expect("answered");
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 50, "{answers}");
}

#[tokio::test]
async fn the_page_costs_the_database_no_query() {
    let (db, job) = (TestDb::new(Template::Rows(200)).await, JobDir::with("hold_before = [\"backfill\"]"));
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let cli = Cli::new(&db).env("BACKFILLD_HTTP__LISTEN", &listen).env("BACKFILLD_LEASE__TTL", "60s");
    let daemon = cli.start(&["run", job.path()]);
    let ledger = Ledger::new(&db).await;
    ledger.wait_status("held").await;
    // The daemon has queries of its own, about two a second. Between them there is a time for fifty requests in which no
    // session of it begins one; if a request cost a query, there would be none.
    let begun = format!(
        "select (extract(epoch from max(query_start)) * 1000000)::int8 from pg_stat_activity
                 where datname = current_database() and usename = '{DAEMON}'"
    );
    wait_until("fifty requests pass without a query", async || {
        let before = ledger.number(&begun).await;
        fifty(port).await;
        ledger.number(&begun).await == before
    })
    .await;
    daemon.signal("TERM");
    daemon.ended().await;
}
