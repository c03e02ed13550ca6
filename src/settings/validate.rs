//! The rules that the types cannot say. Each names the full path of its key.

use std::net::SocketAddr;
use std::time::Duration;

use secrecy::ExposeSecret as _;

use super::{HttpSettings, Settings, conninfo};
use crate::error::{Error, Result};

/// Longest instance name in bytes: it is part of `application_name`, which the server cuts at 63.
const MAX_INSTANCE_BYTES: usize = 63;

impl Settings {
    /// Checks every rule that needs no file and no server.
    ///
    /// # Errors
    /// [`Kind::Input`](crate::Kind::Input) with the first rule that is broken.
    pub fn validate(&self) -> Result<()> {
        if self.instance.is_empty()
            || self.instance.len() > MAX_INSTANCE_BYTES
            || self.instance.chars().any(char::is_control)
        {
            return Err(Error::input(format!(
                "`instance`: expected 1 to {MAX_INSTANCE_BYTES} bytes without control characters"
            )));
        }
        let d = &self.database;
        for (key, url) in [("database.url", &d.url), ("database.ddl_url", &d.ddl_url)] {
            if let Some(url) = url {
                conninfo::parse(url.expose_secret()).map_err(|e| Error::input(format!("`{key}`: {e}")))?;
            }
        }
        if d.password.is_some() && d.password_file.is_some() {
            return Err(Error::input("`database.password_file`: expected nothing, as `database.password` is set")
                .with_hint("keep one of the two"));
        }
        if !(2..=64).contains(&d.pool_size) {
            return Err(Error::input(format!("`database.pool_size`: expected 2 to 64, found {}", d.pool_size)));
        }
        if d.port == Some(0) {
            return Err(Error::input("`database.port`: expected 1 to 65535, found 0"));
        }
        let (second, minute, hour) = (Duration::from_secs(1), Duration::from_secs(60), Duration::from_secs(3600));
        between("database.connect_timeout", d.connect_timeout, second, 5 * minute)?;
        between("database.keepalives_idle", d.keepalives_idle, second, 2 * hour)?;
        between("database.tcp_user_timeout", d.tcp_user_timeout, second, 10 * minute)?;
        between("lease.ttl", self.lease.ttl, 3 * second, 10 * minute)?;
        between("ddl.lock_timeout", self.ddl.lock_timeout, Duration::from_millis(10), 2 * second)?;
        between("ddl.patience", self.ddl.patience, second, 7 * 24 * hour)?;
        between("ddl.retry_max_wait", self.ddl.retry_max_wait, Duration::from_millis(100), 5 * minute)?;
        let h = &self.hooks;
        between("hooks.timeout", h.timeout, second, 5 * minute)?;
        between("hooks.throttled_after", h.throttled_after, second, 7 * 24 * hour)?;
        if let Some(program) = h.command.as_deref().filter(|p| !p.is_absolute()) {
            return Err(Error::input(format!(
                "`hooks.command`: expected an absolute path, found {}",
                program.display()
            )));
        }
        for (key, set) in
            [("webhook_secret", h.webhook_secret.is_some()), ("webhook_secret_file", h.webhook_secret_file.is_some())]
        {
            if set && h.webhook.is_none() {
                return Err(Error::input(format!("`hooks.{key}`: expected nothing, as there is no `hooks.webhook`")));
            }
        }
        if h.webhook_secret.is_some() && h.webhook_secret_file.is_some() {
            return Err(Error::input(
                "`hooks.webhook_secret_file`: expected nothing, as `hooks.webhook_secret` is set",
            )
            .with_hint("keep one of the two"));
        }
        if let Some(endpoint) = &self.telemetry.otlp_endpoint {
            if !cfg!(feature = "otel") {
                return Err(Error::input("`telemetry.otlp_endpoint`: this binary was built without export of traces")
                    .with_hint("build it with --features otel, or leave the setting out"));
            }
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                return Err(Error::input(format!(
                    "`telemetry.otlp_endpoint`: expected http://host[:port] or https://..., found {endpoint:?}"
                )));
            }
        }
        self.http.validate()?;
        log_filter(&self.log.level).map(|_| ())
    }
}

impl HttpSettings {
    fn validate(&self) -> Result<()> {
        let address = listen_address(&self.listen)?;
        if self.token.is_some() && self.token_file.is_some() {
            return Err(Error::input("`http.token` and `http.token_file`: expected one of them"));
        }
        if self.token.as_ref().is_some_and(|t| t.expose_secret().is_empty()) {
            return Err(Error::input("`http.token`: expected a token, found nothing"));
        }
        match (&self.tls_cert, &self.tls_key) {
            (Some(_), None) => return Err(Error::input("`http.tls_key`: expected the key of `http.tls_cert`")),
            (None, Some(_)) => return Err(Error::input("`http.tls_cert`: expected the certificate of `http.tls_key`")),
            _ => {}
        }
        let has_token = self.token.is_some() || self.token_file.is_some();
        let is_elsewhere = address.is_some_and(|a| !a.ip().is_loopback());
        if has_token && is_elsewhere && self.tls_cert.is_none() && !self.plaintext {
            return Err(Error::input(format!(
                "`http.token`: others reach {}, and a token would cross the network unencrypted",
                self.listen
            ))
            .with_hint(
                "set http.tls_cert and http.tls_key; or http.plaintext = true, if a proxy or the network encrypts",
            ));
        }
        Ok(())
    }
}

/// The filter of `log.level`.
///
/// # Errors
/// [`Kind::Input`](crate::Kind::Input) naming the key and the part that is wrong.
pub(crate) fn log_filter(level: &str) -> Result<tracing_subscriber::EnvFilter> {
    tracing_subscriber::EnvFilter::builder().parse(level).map_err(|e| {
        Error::input(format!("`log.level`: expected a level or a filter, found {level:?}"))
            .with_source(e)
            .with_hint("for example info, debug, or info,backfilld::ddl=debug")
    })
}

/// `off` and nothing mean no HTTP.
pub(super) fn listen_address(listen: &str) -> Result<Option<SocketAddr>> {
    if listen.is_empty() || listen == "off" {
        return Ok(None);
    }
    let numeric = listen.strip_prefix("localhost:").map_or_else(|| listen.to_owned(), |p| format!("127.0.0.1:{p}"));
    numeric.parse().map(Some).map_err(|_| {
        Error::input(format!(
            "`http.listen`: expected an address and port such as 127.0.0.1:9847 or off, found {listen:?}"
        ))
    })
}

fn between(key: &str, value: Duration, least: Duration, most: Duration) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let show = humantime::format_duration;
    Err(Error::input(format!("`{key}`: expected {} to {}, found {}", show(least), show(most), show(value))))
}
