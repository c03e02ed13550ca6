//! The status page, and the JSON that it asks for. Both come from memory: looking costs the database nothing.

use axum::extract::{RawQuery, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use super::summary::Summary;
use super::{HttpState, respond, respond_json};
use crate::progress;

/// Scripts and styles are files of their own, so that nothing inline has to be allowed; `data:` is for the empty icon.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) async fn html() -> Response {
    file("text/html; charset=utf-8", include_str!("page/index.html"))
}

pub(super) async fn css() -> Response {
    file("text/css; charset=utf-8", include_str!("page/page.css"))
}

pub(super) async fn js() -> Response {
    file("text/javascript; charset=utf-8", include_str!("page/page.js"))
}

fn file(content_type: &'static str, text: &str) -> Response {
    let mut response = respond(StatusCode::OK, content_type, text.into());
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    response
}

/// `since`: points of the series up to this moment are left out, Unix time in milliseconds.
pub(super) async fn status(State(state): State<HttpState>, RawQuery(query): RawQuery) -> Response {
    let since = match query.as_deref().unwrap_or_default() {
        "" => Some(0),
        query => query.strip_prefix("since=").and_then(|ms| ms.parse().ok()),
    };
    match since {
        Some(since) => respond_json(StatusCode::OK, &document(&state, since)),
        None => respond_json(StatusCode::BAD_REQUEST, &json!({"error": "expected ?since=<Unix time in milliseconds>"})),
    }
}

/// The snapshot's fields, and what is beside them. docs/status-page.md says what they mean.
fn document(state: &HttpState, since_ms: u64) -> Value {
    let now = state.progress.now();
    let summary = Summary::of(&now);
    let mut out = json!(now);
    let more = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now_ms": progress::now_ms(),
        "summary": summary,
        "events": progress::events(),
        "series": state.series.since(since_ms),
    });
    if let (Value::Object(out), Value::Object(more)) = (&mut out, more) {
        out.extend(more);
    }
    out
}
