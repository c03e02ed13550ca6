//! Traces of a run, as an OpenTelemetry collector gets them. Built with `--features otel` only.

#[allow(dead_code, unused_imports, reason = "helpers of the other tests")]
mod support;

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use serde_json::Value;

use support::{Cli, JOB, JobDir, Ledger, Template, TestDb};

#[derive(Clone, Default)]
struct Collector {
    got: Arc<Mutex<Vec<u8>>>,
}

impl Collector {
    async fn start() -> (Self, String) {
        let collector = Self::default();
        let app = Router::new().route("/v1/traces", post(take)).with_state(collector.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        (collector, url)
    }

    /// How often the bytes are in what came.
    fn count(&self, what: &[u8]) -> usize {
        self.got.lock().expect("not poisoned").windows(what.len()).filter(|w| *w == what).count()
    }
}

async fn take(State(to): State<Collector>, headers: HeaderMap, body: Bytes) -> StatusCode {
    if headers.get("content-type").is_none_or(|t| t != "application/x-protobuf") {
        return StatusCode::UNSUPPORTED_MEDIA_TYPE;
    }
    to.got.lock().expect("not poisoned").extend_from_slice(&body);
    StatusCode::OK
}

/// A text as protobuf has it in field `number`.
fn field(number: u8, text: &str) -> Vec<u8> {
    let mut out = vec![number << 3 | 2, u8::try_from(text.len()).expect("short")];
    out.extend_from_slice(text.as_bytes());
    out
}

fn log(stderr: &str) -> Vec<Value> {
    stderr.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("not JSON ({e}): {l}"))).collect()
}

fn warnings(stderr: &str) -> Vec<String> {
    let about = |l: &Value| l["level"] == "WARN" && l["message"].as_str().is_some_and(|m| m.contains("traces"));
    log(stderr).iter().filter(|l| about(l)).map(|l| format!("{} {}", l["job"], l["message"])).collect()
}

#[tokio::test]
async fn a_collector_gets_a_span_for_the_job_each_phase_and_each_batch() {
    let db = TestDb::new(Template::Rows(500)).await;
    let (collector, url) = Collector::start().await;
    let ended = Cli::new(&db)
        .env("BACKFILLD_TELEMETRY__OTLP_ENDPOINT", &url)
        .env("BACKFILLD_HTTP__LISTEN", "off")
        .run(&["run", "--once", "--log-format", "json", "--log-level", "debug", JobDir::shipped().path()])
        .await;
    ended.expect(0, "the job is done");
    // Field 5 of a span is its name; field 1 of a value is its text.
    assert_eq!(collector.count(&field(5, "job")), 1);
    assert_eq!(collector.count(&field(5, "phase")), 7, "preflight to watch");
    let batches = Ledger::new(&db).await.number("select sum(batches)::int8 from backfilld.checkpoint").await;
    assert!(batches >= 5, "{batches}");
    let spans = collector.count(&field(5, "batch"));
    assert!(spans >= usize::try_from(batches).expect("some"), "{spans} spans for {batches} batches");
    assert!(collector.count(&field(1, JOB)) >= spans + 8, "each names the job");
    assert_eq!(warnings(&ended.stderr), Vec::<String>::new());
    // What only traces have is not in the log.
    let spans: Vec<Value> = log(&ended.stderr).iter().map(|l| l["span"]["name"].clone()).collect();
    assert!(spans.iter().all(|s| s.is_null() || s == "phase"), "{spans:?}");
    assert!(
        log(&ended.stderr).iter().any(|l| l["message"] == "batch" && l["span"]["name"] == "phase"),
        "a batch's line"
    );
}

#[tokio::test]
async fn a_collector_that_is_away_or_silent_is_one_warning_and_the_job_is_done() {
    let db = TestDb::new(Template::Rows(500)).await;
    // Accepts connections, and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent_url = format!("http://{}", silent.local_addr().expect("an address"));
    let cli = Cli::new(&db).env("BACKFILLD_HTTP__LISTEN", "off").env("OTEL_BSP_SCHEDULE_DELAY", "50");
    let job = JobDir::with("hold_before = [\"flip\"]");
    let args = ["run", "--log-format", "json", job.path()];
    let away = cli.env("BACKFILLD_TELEMETRY__OTLP_ENDPOINT", "http://127.0.0.1:1");
    let daemon = away.start(&args);
    let ledger = Ledger::new(&db).await;
    ledger.wait_status("held").await;
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    ended.expect(0, "stopped on request");
    let told = warnings(&ended.stderr);
    assert!(told.len() == 1 && told[0].contains(JOB) && told[0].contains("cannot be reached"), "{told:?}");

    let daemon = away.env("BACKFILLD_TELEMETRY__OTLP_ENDPOINT", &silent_url).start(&args);
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
    ledger.wait_status("done").await;
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    ended.expect(0, "stopped on request");
    assert!(warnings(&ended.stderr).len() <= 1, "{ended:#?}");
    drop(silent);
}

#[tokio::test]
async fn an_address_that_cannot_be_one_is_refused_with_its_key() {
    let db = TestDb::new(Template::Schema).await;
    for url in ["collector:4318", "http://", "http://user:secret@collector:4318"] {
        let cli = Cli::new(&db).env("BACKFILLD_TELEMETRY__OTLP_ENDPOINT", url);
        let ended = cli.run(&["run", "--once", JobDir::shipped().path()]).await;
        ended.expect(2, "`telemetry.otlp_endpoint`: expected http://");
    }
}
