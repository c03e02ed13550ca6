//! What others are told: a program and a webhook get each event, in order, and cannot hold up the backfill.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;

use crate::support::{Cli, JobDir, Ledger, Template, TestDb, wait_until};

#[derive(Clone, Default)]
struct Receiver {
    got: Arc<Mutex<Vec<(String, serde_json::Value)>>>,
    /// Answers 503 this many times first.
    busy: Arc<Mutex<u32>>,
}

impl Receiver {
    async fn start(busy: u32) -> (Self, String) {
        let receiver = Self { busy: Arc::new(Mutex::new(busy)), ..Self::default() };
        let app = Router::new().route("/hook", post(take)).with_state(receiver.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/hook?token=hidden", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        (receiver, url)
    }

    fn events(&self) -> Vec<String> {
        let got = self.got.lock().expect("not poisoned");
        got.iter().map(|(_, e)| e["event"].as_str().expect("text").to_owned()).collect()
    }
}

async fn take(State(to): State<Receiver>, headers: HeaderMap, body: String) -> StatusCode {
    {
        let mut busy = to.busy.lock().expect("not poisoned");
        if *busy > 0 {
            *busy -= 1;
            return StatusCode::SERVICE_UNAVAILABLE;
        }
    }
    let secret = headers.get("authorization").map(|v| v.to_str().expect("ASCII").to_owned()).unwrap_or_default();
    to.got.lock().expect("not poisoned").push((secret, serde_json::from_str(&body).expect("JSON")));
    StatusCode::NO_CONTENT
}

fn script(dir: &JobDir, text: &str) -> String {
    let path = std::path::Path::new(dir.path()).join("hook");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("writable");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
    path.to_str().expect("UTF-8").to_owned()
}

#[tokio::test]
async fn a_program_and_a_webhook_are_told_what_happens_in_order_and_without_secrets() {
    let db = TestDb::new(Template::Rows(300)).await;
    let (receiver, url) = Receiver::start(2).await;
    let job = JobDir::with("hold_before = [\"flip\"]");
    let hook = script(
        &job,
        "echo \"$BACKFILLD_EVENT $BACKFILLD_JOB $BACKFILLD_PHASE $BACKFILLD_STATUS ${BACKFILLD_DATABASE__URL:-no-url}: \
         $BACKFILLD_REASON\" >> \"$(dirname \"$0\")/told\"; head -c 100000 /dev/zero | tr '\\0' x",
    );
    let cli = Cli::new(&db)
        .env("BACKFILLD_HOOKS__COMMAND", &hook)
        .env("BACKFILLD_HOOKS__WEBHOOK", &url)
        .env("BACKFILLD_HOOKS__WEBHOOK_SECRET", "s3cret-of-ours");
    let ended = cli.run(&["run", "--once", job.path()]).await;
    ended.expect(5, "hold point before flip");
    let told = std::fs::read_to_string(std::path::Path::new(job.path()).join("told")).expect("it ran");
    assert!(told.contains("phase messages_auth_user_id") && told.contains("no-url: backfill is complete"), "{told}");
    assert!(told.trim_end().ends_with("held messages_auth_user_id flip held no-url: hold point before flip"), "{told}");
    let events = receiver.events();
    assert_eq!(events.last().map(String::as_str), Some("held"), "{events:?}");
    assert!(events.iter().filter(|e| *e == "phase").count() >= 4, "{events:?}");
    assert_eq!(told.lines().count(), events.len(), "both are told the same");
    assert!(receiver.got.lock().expect("not poisoned").iter().all(|(s, _)| s == "Bearer s3cret-of-ours"));
    for secret in ["s3cret-of-ours", "token=hidden"] {
        assert!(!ended.stderr.contains(secret) && !ended.stdout.contains(secret), "{ended:#?}");
    }
    assert!(ended.stderr.len() < 60_000, "output is cut: {}", ended.stderr.len());
}

#[tokio::test]
async fn a_program_that_hangs_and_a_webhook_that_is_away_hold_nothing_up() {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::shipped();
    let hook = script(&job, "echo $$ >> \"$(dirname \"$0\")/pids\"; exec sleep 600");
    let cli = Cli::new(&db)
        .env("BACKFILLD_HOOKS__COMMAND", &hook)
        .env("BACKFILLD_HOOKS__TIMEOUT", "1s")
        .env("BACKFILLD_HOOKS__WEBHOOK", "http://127.0.0.1:1/");
    let daemon = cli.start(&["run", "--once", job.path()]);
    let ledger = Ledger::new(&db).await;
    ledger.wait_status("done").await;
    assert_eq!(ledger.unfilled().await, 0);
    let pids = std::path::Path::new(job.path()).join("pids");
    wait_until("a hook was started", async || pids.exists()).await;
    daemon.ended().await.expect(0, "it was not done within 1 s");
    for pid in std::fs::read_to_string(&pids).expect("readable").lines() {
        wait_until("it is gone", async || !std::path::Path::new("/proc").join(pid).exists()).await;
    }
}

#[tokio::test]
async fn a_long_wait_is_told_once() {
    let db = TestDb::new(Template::Rows(300)).await;
    let (receiver, url) = Receiver::start(0).await;
    let job = JobDir::shipped();
    job.append("[throttle]\nevery = \"100ms\"\nreplicas = [\"eu-1\"]");
    let cli = Cli::new(&db).env("BACKFILLD_HOOKS__WEBHOOK", &url).env("BACKFILLD_HOOKS__THROTTLED_AFTER", "1s");
    let daemon = cli.start(&["run", job.path()]);
    wait_until("it is told", async || receiver.events().contains(&"throttled".to_owned())).await;
    daemon.signal("TERM");
    daemon.ended().await;
    let events = receiver.events();
    assert_eq!(events.iter().filter(|e| *e == "throttled").count(), 1, "{events:?}");
    let got = receiver.got.lock().expect("not poisoned");
    let told = got.iter().find(|(_, e)| e["event"] == "throttled").map(|(_, e)| e["reason"].to_string());
    assert!(told.is_some_and(|r| r.contains("replica eu-1 is not streaming")), "{got:?}");
}

#[tokio::test]
async fn hooks_that_cannot_be_are_refused_at_the_start() {
    let db = TestDb::new(Template::Rows(300)).await;
    let job = JobDir::shipped();
    for (key, value, said) in [
        ("COMMAND", "relative/path", "`hooks.command`: expected an absolute path"),
        ("COMMAND", "/no/such/program", "`hooks.command`: cannot run /no/such/program"),
        ("TIMEOUT", "1h", "`hooks.timeout`"),
        ("WEBHOOK", "ftp://x/", "`hooks.webhook`: expected http://"),
        ("WEBHOOK", "http://u:p@x/", "`hooks.webhook`: expected http://"),
        ("WEBHOOK_SECRET", "x", "`hooks.webhook_secret`: expected nothing, as there is no `hooks.webhook`"),
    ] {
        let ended = Cli::new(&db).env(&format!("BACKFILLD_HOOKS__{key}"), value).run(&["run", job.path()]).await;
        ended.expect(2, said);
    }
}
