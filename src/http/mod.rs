//! Read-only HTTP: the status page and its JSON, `/metrics`, `/healthz`, `/readyz`. Nothing here changes anything, and
//! nothing lets a caller load the database: everything comes from memory but readiness, which is asked for at most once
//! per second, whatever the number of requests.

mod access;
mod health;
mod page;
mod process;
mod series;
mod summary;
mod tls;

use std::future::Future;
use std::io;
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
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::progress::Progress;
use access::{Access, Answer};
use health::Ready;
use series::Series;
use tls::TlsListener;

pub use health::{Pulse, Readiness};
pub use summary::{Mood, Summary};
pub use tls::TlsFiles;

/// The exposition format of Prometheus that we render.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Open requests get this long at shutdown; scrapes take milliseconds.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// A port that is in use is tried again so often: it costs nothing, and who has freed it wants to see something.
const TRY_AGAIN: Duration = Duration::from_secs(2);

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
    tls: Option<TlsFiles>,
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
            tls: None,
        }
    }

    /// Speaks TLS.
    #[must_use]
    pub fn with_tls(self, tls: Option<TlsFiles>) -> Self {
        Self { tls, ..self }
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
/// [`Kind::Input`](crate::Kind::Input) naming `http.listen` if the address cannot be listened on, or the file that TLS
/// cannot be had with.
pub async fn serve(
    listen: SocketAddr,
    state: HttpState,
    stop: CancellationToken,
) -> Result<(SocketAddr, JoinHandle<()>)> {
    let acceptor = state.tls.as_ref().map(tls::acceptor).transpose()?;
    let listener = TcpListener::bind(listen).await.map_err(|e| cannot_listen(listen, e))?;
    serve_on(listener, acceptor, state, stop)
}

/// As [`serve`], but a port that somebody else uses is waited for, with one warning: who cannot be watched still works.
///
/// # Errors
/// As [`serve`].
pub async fn serve_when_free(listen: SocketAddr, state: HttpState, stop: CancellationToken) -> Result<JoinHandle<()>> {
    let acceptor = state.tls.as_ref().map(tls::acceptor).transpose()?;
    let in_use = match TcpListener::bind(listen).await {
        Ok(listener) => return Ok(serve_on(listener, acceptor, state, stop)?.1),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => cannot_listen(listen, e),
        Err(e) => return Err(cannot_listen(listen, e)),
    };
    let job = state.progress.now().job;
    tracing::warn!(job, "{}; no status page, metrics and health until it is free", in_use.line());
    Ok(tokio::spawn(async move {
        let listener = loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(TRY_AGAIN) => {}
            }
            if let Ok(listener) = TcpListener::bind(listen).await {
                break listener;
            }
        };
        match serve_on(listener, acceptor, state, stop) {
            Ok((_, task)) => drop(task.await),
            Err(e) => tracing::error!(job, "{}", e.line()),
        }
    }))
}

fn cannot_listen(listen: SocketAddr, e: io::Error) -> Error {
    let hint = match e.kind() {
        io::ErrorKind::AddrInUse => "another backfilld may be running; choose another port, or off",
        io::ErrorKind::PermissionDenied => "ports below 1024 need privileges; choose a higher one",
        io::ErrorKind::AddrNotAvailable => "this machine does not have that address",
        _ => "choose another address, or off",
    };
    Error::input(format!("`http.listen`: cannot listen on {listen}")).with_source(e).with_hint(hint)
}

fn serve_on(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    state: HttpState,
    stop: CancellationToken,
) -> Result<(SocketAddr, JoinHandle<()>)> {
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
    let scheme = if acceptor.is_some() { "https" } else { "http" };
    let task = tokio::spawn(async move {
        let server = answer(listener, acceptor, app, stop.clone());
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
    tracing::info!(job, %address, scheme, "http listening");
    Ok((address, task))
}

async fn answer(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    app: Router,
    stop: CancellationToken,
) -> io::Result<()> {
    match acceptor {
        None => axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await,
        Some(acceptor) => {
            let listener = TlsListener::new(listener, acceptor);
            axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await
        }
    }
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
