//! The live view, on a real terminal.

use crate::support::{Cli, JOB, JobDir, Ledger, Template, Terminal, TestDb, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_backfilld");

/// A job that waits until its gate is open.
async fn gated(db: &TestDb) -> (JobDir, Ledger) {
    let job = JobDir::shipped();
    job.append("[throttle]\nevery = \"100ms\"\n[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"");
    let ledger = Ledger::new(db).await;
    ledger.run("create function public.gate() returns boolean language sql as 'select false'").await;
    (job, ledger)
}

const OPEN: &str = "create or replace function public.gate() returns boolean language sql as 'select true'";

#[tokio::test]
async fn status_watch_lives_through_a_lost_connection_and_leaves_the_terminal_as_it_was() {
    let db = TestDb::new(Template::Rows(500)).await;
    let (job, ledger) = gated(&db).await;
    // A login of its own, which can be locked out.
    let watcher = format!("watcher_{}", db.name());
    ledger.run(&format!("create role {watcher} login password 'x'; grant backfilld, pg_monitor to {watcher}")).await;
    let url = db.url(backfilld::demo::sample::DAEMON);
    let (_, place) = url.split_once('@').expect("a place");
    let cli = Cli::at(&format!("postgresql://{watcher}:x@{place}"));
    let daemon = Cli::new(&db).start(&["run", job.path()]);
    ledger.wait_status("running").await;
    let Some(terminal) = Terminal::start(80, &cli.environment(), &format!("{BINARY} status --watch {JOB}")) else {
        daemon.signal("TERM");
        daemon.ended().await;
        return ledger.run(&format!("drop role {watcher}")).await;
    };
    let screen = terminal.shows(&["waiting", "query_gate", "▸ backfill", "daemon   here"]).await;
    assert!(screen.starts_with(JOB) && !screen.contains("before"), "{screen}");
    assert!(terminal.screen(true).contains("\x1b["), "it has colors");

    terminal.resize(40);
    let screen = terminal.shows(&["phase 3 of 7", "query_gate"]).await;
    assert!(screen.lines().all(|l| l.chars().count() <= 40), "{screen}");
    terminal.resize(80);
    terminal.shows(&["▸ backfill"]).await;

    ledger.run(&format!("alter role {watcher} nologin")).await;
    let sessions = format!("select pg_terminate_backend(pid) from pg_stat_activity where usename = '{watcher}'");
    ledger.run(&sessions).await;
    terminal.shows(&[JOB, "no answer from the database, trying again", "▸ backfill"]).await;
    ledger.run(&format!("alter role {watcher} login")).await;
    terminal.shows(&["waiting", "query_gate"]).await;

    ledger.run(OPEN).await;
    let screen = terminal.shows(&["the column is filled, proven and in use", "✓ watch"]).await;
    assert!(screen.contains("rows     500 of about"), "{screen}");
    assert_eq!((terminal.variable("alternate_on"), terminal.variable("cursor_flag")), ("1".into(), "0".into()));
    terminal.press("C-c");
    let screen = terminal.shows(&["before", "code 0"]).await;
    assert!(!screen.contains(JOB), "{screen}");
    assert_eq!((terminal.variable("alternate_on"), terminal.variable("cursor_flag")), ("0".into(), "1".into()));
    daemon.signal("TERM");
    daemon.ended().await;
    ledger.run(&format!("drop role {watcher}")).await;
}

#[tokio::test]
async fn run_shows_a_view_under_its_log_without_colors_where_none_are_wanted() {
    let db = TestDb::new(Template::Rows(500)).await;
    let (job, ledger) = gated(&db).await;
    let cli = Cli::new(&db).env("NO_COLOR", "1");
    let line = format!("{BINARY} run --once {}", job.path());
    let Some(terminal) = Terminal::start(80, &cli.environment(), &line) else { return };
    let screen = terminal.shows(&["batches wait: query_gate", "batches wait, and go on by themselves"]).await;
    let (log, view) = (screen.find("WARN"), screen.find("▸ backfill"));
    assert!(log.is_some() && log < view, "{screen}");
    assert_eq!(screen.matches("▸ backfill").count(), 1, "drawn in place: {screen}");
    terminal.resize(60);
    terminal.shows(&["phase 3 of 7", "query_gate"]).await;
    assert!(!terminal.screen(true).contains("\x1b["), "{:?}", terminal.screen(true));
    ledger.run(OPEN).await;
    let screen = terminal.shows(&[&format!("{JOB} done"), "code 0"]).await;
    assert!(!screen.contains("✓ expand") && !screen.contains("phase 3 of 7"), "the view is gone: {screen}");
    assert_eq!(ledger.status().await, "done");
}

#[tokio::test]
async fn without_a_terminal_watching_is_lines_without_escape_sequences() {
    let db = TestDb::new(Template::Rows(200)).await;
    let (job, ledger) = gated(&db).await;
    let cli = Cli::new(&db);
    let daemon = cli.start(&["run", job.path()]);
    crate::support::wait_until("it waits", async || ledger.reason().await.contains("query_gate")).await;
    let watch = cli.start(&["status", JOB, "--watch"]);
    let reading =
        "select exists (select from pg_stat_activity where application_name like '%status%' and state = 'idle')";
    crate::support::wait_until("it has read", async || ledger.is(reading).await).await;
    ledger.run(OPEN).await;
    ledger.wait_status("done").await;
    daemon.signal("TERM");
    daemon.ended().await;
    watch.signal("INT");
    let ended = watch.ended().await;
    ended.expect(0, "");
    let first = ended.stdout.lines().next().unwrap_or_default();
    assert!(first.contains(&format!("Z {JOB} backfill: waiting, ")) && first.contains("query_gate"), "{ended:#?}");
    assert!(!ended.stdout.contains('\x1b'), "{ended:#?}");
}

#[tokio::test]
async fn a_terminal_that_is_closed_stops_a_daemon_in_order_unless_nohup_says_otherwise() {
    let db = TestDb::new(Template::Rows(500)).await;
    let job = JobDir::with("hold_before = [\"flip\"]");
    let ledger = Ledger::new(&db).await;
    let cli = Cli::new(&db).env("BACKFILLD_HTTP__LISTEN", "off");
    let daemon = cli.start(&["run", job.path()]);
    ledger.wait_status("held").await;
    daemon.signal("HUP");
    daemon.ended().await.expect(0, "stopped on request");

    let daemon = cli.under_nohup().start(&["run", job.path()]);
    let held = "select exists (select from backfilld.lease where expires_at > now())";
    wait_until("it has the lease", async || ledger.is(held).await).await;
    daemon.signal("HUP");
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
    ledger.wait_status("done").await;
    daemon.signal("TERM");
    daemon.ended().await.expect(0, "stopped on request");
}

#[tokio::test]
async fn a_demo_whose_terminal_is_closed_leaves_no_server() {
    let demo = format!("{BINARY} demo --rows 1000 --keep");
    let Some(terminal) = Terminal::start(80, &[("BACKFILLD_HTTP__LISTEN", "off")], &demo) else { return };
    let screen = terminal.shows(&["demo: application alone"]).await;
    let (_, place) = screen.split_once("on 127.0.0.1:").expect("the server's port");
    let port: String = place.chars().take_while(char::is_ascii_digit).collect();
    let place = ("127.0.0.1", port.parse().expect("a port"));
    assert!(tokio::net::TcpStream::connect(place).await.is_ok(), "it runs: {screen}");
    drop(terminal);
    wait_until("its server is gone", async || tokio::net::TcpStream::connect(place).await.is_err()).await;
}
