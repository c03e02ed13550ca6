use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

async fn start(ready: Readiness) -> (SocketAddr, CancellationToken, JoinHandle<()>) {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || metrics::counter!("some_total").increment(3));
    let state = HttpState::new(recorder.handle(), Progress::default(), move || std::future::ready(ready.clone()));
    let stop = CancellationToken::new();
    let (address, task) = serve("127.0.0.1:0".parse().unwrap(), state, stop.clone()).await.unwrap();
    (address, stop, task)
}

/// The raw response, headers in lower case.
async fn request(address: SocketAddr, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let text = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_endpoints_answer_with_security_headers() {
    let (address, _stop, _task) = start(Readiness::yes()).await;
    let metrics = request(address, "GET", "/metrics").await;
    assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("some_total 3"), "{metrics}");
    assert!(metrics.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{metrics}");
    let health = request(address, "GET", "/healthz").await;
    assert!(health.starts_with("HTTP/1.1 200") && health.ends_with("ok"), "{health}");
    let ready = request(address, "GET", "/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 200") && ready.ends_with(r#"{"ready":true,"reason":"ok"}"#), "{ready}");
    for answer in [metrics, health, ready, request(address, "GET", "/none").await, request(address, "PUT", "/").await] {
        for (name, value) in SECURITY_HEADERS {
            assert!(answer.contains(&format!("{name}: {value}")), "{name}: {answer}");
        }
    }
}

#[tokio::test]
async fn nothing_can_be_changed_and_unknown_paths_list_the_routes() {
    let (address, _stop, _task) = start(Readiness::yes()).await;
    for path in ["/metrics", "/readyz", "/anything"] {
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let answer = request(address, method, path).await;
            assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET, HEAD"), "{answer}");
        }
    }
    let answer = request(address, "GET", "/none").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("\"/healthz\""), "{answer}");
    let answer = request(address, "HEAD", "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn the_page_runs_only_its_own_files_and_its_json_comes_from_memory() {
    let (address, _stop, _task) = start(Readiness::no("there is no database at all")).await;
    for path in ["/", "/page.css", "/page.js"] {
        let answer = request(address, "GET", path).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("content-security-policy: default-src 'none'; script-src 'self'; style-src 'self';"));
        assert!(!answer.contains("http://") || path == "/page.js", "nothing from elsewhere: {answer}");
    }
    let answer = request(address, "GET", "/api/v1/status?since=5").await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-type: application/json"), "{head}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    for field in ["job", "summary", "series", "events", "timeline", "signals", "lease"] {
        assert!(!body[field].is_null(), "{field}: {body}");
    }
    assert!(request(address, "GET", "/api/v1/status?since=x").await.starts_with("HTTP/1.1 400"));
}

#[tokio::test]
async fn a_token_keeps_page_and_metrics_from_whoever_does_not_have_it() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let ready = || std::future::ready(Readiness::yes());
    let state = HttpState::new(recorder.handle(), Progress::default(), ready).with_token(Some(&"sesame".into()));
    let (address, _task) = serve("127.0.0.1:0".parse().unwrap(), state, CancellationToken::new()).await.unwrap();
    for path in ["/", "/api/v1/status", "/metrics", "/none"] {
        let answer = request(address, "GET", path).await;
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("www-authenticate: Basic"), "{answer}");
        let with = request(address, "GET", &format!("{path} HTTP/1.1\r\nauthorization: Bearer sesame\r\nx: x")).await;
        assert!(!with.starts_with("HTTP/1.1 401"), "{with}");
    }
    assert!(request(address, "GET", "/healthz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn not_ready_is_503_with_the_reason() {
    let (address, _stop, _task) = start(Readiness::no("the database refuses connections")).await;
    let answer = request(address, "GET", "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("the database refuses connections"), "{answer}");
    assert!(request(address, "GET", "/healthz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_port_in_use_is_one_clear_error() {
    let (address, _stop, _task) = start(Readiness::yes()).await;
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let state = HttpState::new(recorder.handle(), Progress::default(), || std::future::ready(Readiness::yes()));
    let e = serve(address, state, CancellationToken::new()).await.unwrap_err();
    assert_eq!(e.kind(), crate::Kind::Input);
    assert!(e.render().contains("`http.listen`") && e.render().contains("another port"), "{}", e.render());
}

#[tokio::test]
async fn the_server_stops_although_a_client_holds_its_connection() {
    let (address, stop, task) = start(Readiness::yes()).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    stop.cancel();
    tokio::time::timeout(SHUTDOWN_GRACE * 3, task).await.unwrap().unwrap();
}
