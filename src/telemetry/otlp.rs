//! Traces for an OpenTelemetry collector: OTLP over HTTP, as protobuf.
//!
//! Spans that have ended wait in a queue, from which a thread of its own takes them every few seconds. Whoever ends a span
//! waits for nothing: while nobody takes them, those that do not fit into the queue are dropped.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, RetryPolicy, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Handle;
use tracing::{Level, Metadata, Subscriber, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

use crate::error::{Error, Result};
use crate::post::Receiver;
use crate::progress;
use crate::settings::Settings;

/// Longest time for one post, connecting included: the spans of that time fit into the queue.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the last spans.
const FLUSH: Duration = Duration::from_secs(2);
/// A collector that is away is told once in this time.
const WARN_EVERY: Duration = Duration::from_secs(10 * 60);

static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

/// Makes spans of ours into traces, if the settings name a collector.
///
/// # Errors
/// Input errors that name the key.
pub(super) fn layer<S>(settings: &Settings, job: &str) -> Result<Option<impl Layer<S> + use<S>>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    const KEY: &str = "telemetry.otlp_endpoint";
    let Some(endpoint) = &settings.telemetry.otlp_endpoint else { return Ok(None) };
    let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
    let client = Client {
        receiver: Receiver::new(KEY, "collector", &url)?,
        runtime: Handle::current(),
        job: job.to_owned(),
        warned: Mutex::new(None),
    };
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(url)
        .with_protocol(Protocol::HttpBinary)
        // The next spans are the next attempt.
        .with_retry_policy(RetryPolicy::disabled())
        .build()
        .map_err(|e| Error::input(format!("`{KEY}`: traces cannot be exported")).with_source(e))?;
    let resource = Resource::builder()
        .with_service_name("backfilld")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", settings.instance.clone()))
        .build();
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    let tracer = provider.tracer("backfilld");
    let _ = PROVIDER.set(provider);
    let layer = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false);
    Ok(Some(layer.with_filter(filter_fn(is_traced))))
}

/// Sends what waits, for a bounded time.
pub(super) fn flush() {
    if let Some(provider) = PROVIDER.get() {
        // What could not be sent was told by the client.
        let _ = provider.shutdown_with_timeout(FLUSH);
    }
}

/// Our spans, and what happened in them.
fn is_traced(m: &Metadata<'_>) -> bool {
    m.target().starts_with("backfilld")
        && (m.is_span() || (*m.level() <= Level::INFO && m.target() != progress::REPORTS))
}

/// Posts in the daemon's runtime, as the thread that exports has none.
struct Client {
    receiver: Receiver,
    runtime: Handle,
    job: String,
    warned: Mutex<Option<Instant>>,
}

impl HttpClient for Client {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = std::result::Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let receiver = self.receiver.clone();
            let (head, body) = request.into_parts();
            let posted = self.runtime.spawn(async move {
                match tokio::time::timeout(TIMEOUT, receiver.post(head.headers, body)).await {
                    Ok(Ok(status)) if status.is_success() => Ok(status),
                    Ok(Ok(status)) => Err(Error::failed(format!("the collector answers {}", status.as_u16()))),
                    Ok(Err(e)) => Err(e),
                    Err(_) => Err(Error::failed(format!("no answer within {} s", TIMEOUT.as_secs()))),
                }
            });
            // An error to join is the end of the process.
            let status = posted.await?.inspect_err(|e| self.tell(e))?;
            Ok(Response::builder().status(status).body(Bytes::new())?)
        })
    }
}

impl Client {
    fn tell(&self, e: &Error) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            warn!(job = self.job, "traces are not exported, and the job goes on without: {}", e.line());
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}
