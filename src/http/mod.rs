//! Read-only HTTP: `/metrics`, `/healthz`, `/readyz`. Nothing here changes anything, and nothing lets a caller load the
//! database: readiness is asked for at most once per second, whatever the number of requests.

mod health;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use health::Ready;

pub use health::{Pulse, Readiness};

/// The exposition format of Prometheus that we render.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Open requests get this long at shutdown; scrapes take milliseconds.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Sent with every response: nothing here is to be cached, sniffed, framed or run.
const SECURITY_HEADERS: [(HeaderName, &str); 6] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// What the endpoints answer from.
#[derive(Clone)]
pub struct HttpState {
    metrics: PrometheusHandle,
    pulse: Pulse,
    ready: Arc<Ready>,
}

impl HttpState {
    /// `check` says whether the daemon can do its work, usually by a trivial query. It is called at most once per second
    /// and given two seconds.
    pub fn new<F, Fut>(metrics: PrometheusHandle, check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Readiness> + Send + 'static,
    {
        Self { metrics, pulse: Pulse::new(), ready: Arc::new(Ready::new(check)) }
    }

    /// With a pulse that others look at as well.
    #[must_use]
    pub fn with_pulse(self, pulse: Pulse) -> Self {
        Self { pulse, ..self }
    }
}

/// Listens on `listen` and serves until `stop` is cancelled; open requests then have one second. Returns the address
/// (the port is the system's choice where `listen` has port 0) and the server's task.
///
/// # Errors
/// [`Kind::Input`](crate::Kind::Input) naming `http.listen` if the address cannot be listened on.
pub async fn serve(
    listen: SocketAddr,
    state: HttpState,
    stop: CancellationToken,
) -> Result<(SocketAddr, JoinHandle<()>)> {
    let listener = TcpListener::bind(listen).await.map_err(|e| {
        let hint = match e.kind() {
            std::io::ErrorKind::AddrInUse => "another backfilld may be running; choose another port, or off",
            std::io::ErrorKind::PermissionDenied => "ports below 1024 need privileges; choose a higher one",
            std::io::ErrorKind::AddrNotAvailable => "this machine does not have that address",
            _ => "choose another address, or off",
        };
        Error::input(format!("`http.listen`: cannot listen on {listen}")).with_source(e).with_hint(hint)
    })?;
    let address = listener.local_addr().map_err(|e| Error::internal("no local address").with_source(e))?;
    let pulse = state.pulse.clone();
    let app = router(state);
    let task = tokio::spawn(async move {
        let server = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
        let grace_is_over = async {
            stop.cancelled().await;
            tokio::time::sleep(SHUTDOWN_GRACE).await;
        };
        tokio::select! {
            result = server => if let Err(e) = result {
                tracing::error!(error = %e, "http server ended");
            },
            () = grace_is_over => {}
            () = pulse.keep() => {}
        }
    });
    tracing::info!(%address, "http listening");
    Ok((address, task))
}

fn router(state: HttpState) -> Router {
    Router::new()
        .route("/metrics", get(render_metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(not_found)
        .layer(middleware::from_fn(guard))
        .with_state(state)
}

async fn render_metrics(State(state): State<HttpState>) -> Response {
    respond(StatusCode::OK, METRICS_TYPE, state.metrics.render())
}

/// Whether the event loop turns.
async fn healthz(State(state): State<HttpState>) -> Response {
    match state.pulse.stale() {
        None => respond(StatusCode::OK, "text/plain; charset=utf-8", "ok".into()),
        Some(age) => {
            let text = format!("the event loop has not turned for {} ms", age.as_millis());
            respond(StatusCode::SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", text)
        }
    }
}

/// Whether work can be done.
async fn readyz(State(state): State<HttpState>) -> Response {
    let readiness = state.ready.get().await;
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    respond_json(status, &json!(readiness))
}

async fn not_found() -> Response {
    let body = json!({"error": "not found", "routes": ["/metrics", "/healthz", "/readyz"]});
    respond_json(StatusCode::NOT_FOUND, &body)
}

/// Only reading methods come in; the security headers go out.
async fn guard(request: Request, next: Next) -> Response {
    let mut response = if matches!(*request.method(), Method::GET | Method::HEAD) {
        next.run(request).await
    } else {
        let body = json!({"error": "only GET and HEAD are allowed; nothing can be changed over HTTP"});
        let mut response = respond_json(StatusCode::METHOD_NOT_ALLOWED, &body);
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        response
    };
    for (name, value) in SECURITY_HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

fn respond_json(status: StatusCode, body: &serde_json::Value) -> Response {
    respond(status, "application/json", body.to_string())
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests;
