//! Read-only HTTP: the status page and its JSON, `/metrics`, `/healthz`, `/readyz`. Nothing here changes anything, and
//! nothing lets a caller load the database: everything comes from memory but readiness, which is asked for at most once
//! per second, whatever the number of requests.

mod access;
mod health;
mod page;
mod process;
mod series;
mod summary;

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
use secrecy::SecretString;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::progress::Progress;
use access::{Access, Answer};
use health::Ready;
use series::Series;

pub use health::{Pulse, Readiness};
pub use summary::{Mood, Summary};

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
    progress: Progress,
    series: Arc<Series>,
    access: Access,
}

impl HttpState {
    /// `check` says whether the daemon can do its work, usually by a trivial query. It is called at most once per second
    /// and given two seconds. `progress` is what the status page shows.
    pub fn new<F, Fut>(metrics: PrometheusHandle, progress: Progress, check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Readiness> + Send + 'static,
    {
        Self {
            metrics,
            pulse: Pulse::new(),
            ready: Arc::new(Ready::new(check)),
            progress,
            series: Arc::default(),
            access: Access::new(None),
        }
    }

    /// Asks for this token, but for health.
    #[must_use]
    pub fn with_token(self, token: Option<&SecretString>) -> Self {
        Self { access: Access::new(token), ..self }
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
    let (series, progress) = (Arc::clone(&state.series), state.progress.clone());
    let job = state.progress.now().job;
    let served = job.clone();
    let access = state.access.clone().at(address);
    if access.is_open() {
        tracing::warn!(
            job,
            %address,
            "others reach this address and no http.token is set: the status page is refused; metrics and health are served"
        );
    }
    let app = router(HttpState { access, ..state });
    let task = tokio::spawn(async move {
        let server = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
        let grace_is_over = async {
            stop.cancelled().await;
            tokio::time::sleep(SHUTDOWN_GRACE).await;
        };
        tokio::select! {
            result = server => if let Err(e) = result {
                tracing::error!(job = served, error = %e, "http server ended");
            },
            () = grace_is_over => {}
            () = pulse.keep() => {}
            () = series.keep(&progress) => {}
        }
    });
    tracing::info!(job, %address, "http listening");
    Ok((address, task))
}

fn router(state: HttpState) -> Router {
    Router::new()
        .route("/", get(page::html))
        .route("/page.css", get(page::css))
        .route("/page.js", get(page::js))
        .route("/api/v1/status", get(page::status))
        .route("/metrics", get(render_metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(not_found)
        .layer(middleware::from_fn_with_state(state.clone(), guard))
        .with_state(state)
}

async fn render_metrics(State(state): State<HttpState>) -> Response {
    respond(StatusCode::OK, METRICS_TYPE, state.metrics.render() + &process::render())
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
    let body = json!({"error": "not found", "routes": ["/", "/api/v1/status", "/metrics", "/healthz", "/readyz"]});
    respond_json(StatusCode::NOT_FOUND, &body)
}

/// Only reading methods come in, from whoever may look; the security headers go out.
async fn guard(State(state): State<HttpState>, request: Request, next: Next) -> Response {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let mut response = if reads {
        match state.access.answer(request.uri().path(), request.headers()) {
            Answer::Yes => next.run(request).await,
            refusal => refused(refusal),
        }
    } else {
        let body = json!({"error": "only GET and HEAD are allowed; nothing can be changed over HTTP"});
        let mut response = respond_json(StatusCode::METHOD_NOT_ALLOWED, &body);
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        response
    };
    for (name, value) in SECURITY_HEADERS {
        // The page has a policy of its own, in which it may run.
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

fn refused(answer: Answer) -> Response {
    if answer == Answer::TokenWanted {
        let body = json!({"error": "expected the token of http.token: as bearer token, or as password in a browser"});
        let mut response = respond_json(StatusCode::UNAUTHORIZED, &body);
        let how = HeaderValue::from_static("Basic realm=\"backfilld\", charset=\"UTF-8\"");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, how);
        return response;
    }
    let body = json!({"error": "others reach this address and no http.token is set, so only /metrics, /healthz and \
        /readyz are served; set http.token_file, or listen on 127.0.0.1 and use a tunnel"});
    respond_json(StatusCode::FORBIDDEN, &body)
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
