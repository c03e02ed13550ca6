//! Logging: one event per thing that happened, to stderr. stdout is for data.

use std::io;

use tracing_subscriber::fmt;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::error::{Error, Result};
use crate::settings::{LogFormat, LogSettings, log_filter};

/// Starts logging for the process. `tty` says whether stderr is a terminal: `auto` then means text, in colour unless
/// NO_COLOR is set.
///
/// # Errors
/// [`Kind::Input`](crate::Kind::Input) for a filter that cannot be parsed, [`Kind::Internal`](crate::Kind::Internal) if
/// logging was started before.
pub fn init(settings: &LogSettings, tty: bool) -> Result<()> {
    let filter = log_filter(&settings.level)?;
    let json = match settings.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !tty,
    };
    let builder = fmt::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = if json {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).finish().try_init()
    } else {
        builder.with_ansi(tty && !no_color()).finish().try_init()
    };
    started.map_err(|e| Error::internal("logging was started twice").with_source(e))
}

/// <https://no-color.org>: set and not empty.
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_an_input_error_that_names_the_setting() {
        let settings = LogSettings { level: "backfilld=loud".into(), ..LogSettings::default() };
        let e = init(&settings, false).expect_err("not a level");
        assert_eq!(e.kind(), crate::Kind::Input);
        assert!(e.to_string().contains("`log.level`"), "{e}");
    }
}
