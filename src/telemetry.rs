//! Logging: one event per thing that happened, to stderr. stdout is for data. The last events are kept in memory for the
//! status page, whatever level the log has. With the feature `otel`, spans become traces.

#[cfg(feature = "otel")]
mod otlp;

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, fmt, registry};

use crate::error::{Error, Result};
use crate::progress;
use crate::settings::{LogFormat, Settings, log_filter};
use crate::terminal::Above;

/// Starts logging for the process. `tty` says whether stderr is a terminal: `auto` then means text, in colour unless
/// NO_COLOR is set. `job`: the one that this process runs, whose spans are exported if the settings say where to.
///
/// # Errors
/// [`Kind::Input`](crate::Kind::Input) for a filter or an address that cannot be parsed, [`Kind::Internal`](crate::Kind::Internal) if
/// logging was started before.
pub fn init(settings: &Settings, tty: bool, job: Option<&str>) -> Result<()> {
    let log = &settings.log;
    let filter = log_filter(&log.level)?;
    JSON.store(log.format == LogFormat::Json, Ordering::Relaxed);
    let json = match log.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !tty,
    };
    let lines = fmt::layer().with_writer(Above::default);
    let lines = if json {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    } else {
        lines.with_ansi(tty && !no_color()).boxed()
    };
    let logging = registry()
        .with(lines.with_filter(filter.and(filter_fn(|m| m.target() != progress::SPANS))))
        .with(Recent.with_filter(filter_fn(is_news)));
    #[cfg(feature = "otel")]
    let logging = logging.with(job.map(|job| otlp::layer(settings, job)).transpose()?.flatten());
    #[cfg(not(feature = "otel"))]
    let _ = job;
    logging.try_init().map_err(|e| Error::internal("logging was started twice").with_source(e))
}

/// Sends what is still to be exported, for two seconds at most. The runtime has to be there.
pub fn flush() {
    #[cfg(feature = "otel")]
    otlp::flush();
}

/// JSON was asked for by name.
static JSON: AtomicBool = AtomicBool::new(false);

/// Whether the settings ask for JSON by name. Whoever left the choice to us reads a command's error as text.
pub fn is_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

/// The error that ends a command, as one more line of a log in JSON.
pub fn error_line(e: &Error) -> String {
    let mut line = serde_json::json!({
        "timestamp": jiff::Timestamp::now().to_string(),
        "level": "ERROR",
        "target": "backfilld",
        "message": e.line(),
        "exit_code": e.kind().exit_code(),
    });
    for (name, value) in [("hint", e.hint()), ("sqlstate", e.sqlstate())] {
        if let Some(value) = value {
            line[name] = value.into();
        }
    }
    line.to_string()
}

fn is_news(m: &Metadata<'_>) -> bool {
    m.is_event() && *m.level() <= Level::INFO && m.target().starts_with("backfilld") && m.target() != progress::REPORTS
}

/// Keeps the last events.
struct Recent;

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        progress::remember(progress::Event {
            at_ms: progress::now_ms(),
            level: event.metadata().level().as_str().to_lowercase(),
            message: fields.message,
            fields: fields.others,
        });
    }
}

/// Reads an event's message and fields.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.others.insert(field.name().to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.message = text,
            _ => self.put(field, text.into()),
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

/// <https://no-color.org>: set and not empty.
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_kept_with_its_fields_and_reports_are_not() {
        let subscriber = registry().with(Recent.with_filter(filter_fn(is_news)));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(job = "kept", rows = 3, share = 0.5, code = %"40P01", "it {}", "happened");
            tracing::info!(target: progress::REPORTS, job = "kept", "again");
            tracing::debug!(job = "kept", "a batch");
            tracing::warn!(target: "hyper", "not ours");
        });
        let kept: Vec<_> = progress::events().into_iter().filter(|e| e.message.contains("happened")).collect();
        let [event] = kept.as_slice() else { panic!("{kept:?}") };
        assert_eq!((event.message.as_str(), event.level.as_str()), ("it happened", "info"));
        let fields = serde_json::json!({"job": "kept", "rows": 3, "share": 0.5, "code": "40P01"});
        assert_eq!(Value::Object(event.fields.clone()), fields);
        assert!(progress::events().iter().all(|e| !["again", "a batch", "not ours"].contains(&e.message.as_str())));
    }

    #[test]
    fn the_last_error_is_a_line_with_what_a_person_would_be_told() {
        let e = Error::input("cannot read job").with_source(std::io::Error::other("gone")).with_hint("name\nit");
        let line: Value = serde_json::from_str(&error_line(&e.with_sqlstate("42P01"))).unwrap();
        let expected = ["cannot read job: gone (SQLSTATE 42P01)", "name\nit", "42P01", "ERROR"];
        assert_eq!(["message", "hint", "sqlstate", "level"].map(|k| line[k].as_str().unwrap()), expected);
        assert_eq!(line["exit_code"], 2);
    }

    #[test]
    fn a_wrong_filter_is_an_input_error_that_names_the_setting() {
        let mut settings = Settings::default();
        settings.log.level = "backfilld=loud".into();
        let e = init(&settings, false, None).expect_err("not a level");
        assert_eq!(e.kind(), crate::Kind::Input);
        assert!(e.to_string().contains("`log.level`"), "{e}");
    }
}
