//! The daemon's own settings: file < environment < flags, validated, each with a documented default.
//!
//! A value comes from the flag, else from the environment (`BACKFILLD_DATABASE__POOL_SIZE` for `database.pool_size`),
//! else from the TOML file, else from the default below. docs/settings.md is made from the comments in this file.

mod conninfo;
mod layers;
mod pgpass;
mod service;
mod show;
mod target;
mod validate;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use show::{Reference, example, reference, reference_markdown, refuse_secret};
pub use target::{HostSpec, Roots, Target, TlsSpec};
pub(crate) use validate::log_filter;

/// Connections in the pool for control work: heartbeat, status, throttle probes and one spare.
pub const DEFAULT_POOL_SIZE: u32 = 4;
/// Long enough for a cold DNS name and a TLS handshake across an ocean, short enough to notice a dead host.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Twice per minute: below the idle limits of common load balancers (60 s and more).
pub const DEFAULT_KEEPALIVES_IDLE: Duration = Duration::from_secs(30);
/// A network cut is noticed about when the lease has certainly expired.
pub const DEFAULT_TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
/// Loopback only: the endpoints have no authentication.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:9847";
/// What an operator wants to read day by day.
pub const DEFAULT_LOG_LEVEL: &str = "info";
/// A standby takes over this long after the holder went silent.
pub const DEFAULT_LEASE_TTL: Duration = Duration::from_secs(15);
/// Application statements queue behind waiting DDL for at most this long: above most round trips, below what users
/// feel.
pub const DEFAULT_LOCK_TIMEOUT: Duration = Duration::from_millis(150);
/// Longer than ordinary long transactions such as reports and dumps of one table.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Retries come often enough to catch a gap between two long transactions.
pub const DEFAULT_RETRY_MAX_WAIT: Duration = Duration::from_secs(10);

/// Everything the daemon itself can be told. What to backfill is in the job file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Name of this daemon. When a daemon with the same name comes back it may take its own lease at once, without
    /// waiting for the time to live. So two daemons that run at the same time need different names. Default: the host
    /// name.
    pub instance: String,
    /// How to reach the database. A value in `url` wins over the same value in the keys below it, and what is in neither
    /// is looked up as libpq does: PGHOST, PGHOSTADDR, PGPORT, PGUSER, PGDATABASE, PGPASSWORD, PGOPTIONS, PGSSLMODE,
    /// PGSSLROOTCERT, PGSSLCERT and PGSSLKEY, then the password file (PGPASSFILE or ~/.pgpass).
    pub database: DatabaseSettings,
    /// The read-only HTTP endpoints.
    pub http: HttpSettings,
    /// What is logged and how.
    pub log: LogSettings,
    /// The lease that keeps two daemons from working on one job.
    pub lease: LeaseSettings,
    /// How statements that take strong locks are tried.
    pub ddl: DdlSettings,
    /// Who is told what happens to the job.
    pub hooks: HookSettings,
    /// Where traces go.
    pub telemetry: TelemetrySettings,
    /// Key path to where its value came from; a key that is missing here has its default.
    #[serde(skip)]
    sources: BTreeMap<String, String>,
}

/// How to reach the database.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DatabaseSettings {
    /// Connection URL or libpq key/value string, for example
    /// `postgresql://backfilld@db.example.com:5432/app?sslmode=verify-full`. Several hosts may be given, separated by
    /// commas. Secret, as it may hold a password.
    #[serde(serialize_with = "show::secret_conninfo")]
    #[schemars(with = "Option<String>", extend("format" = "conninfo"))]
    pub url: Option<SecretString>,
    /// Host name, address, or directory of the Unix socket.
    pub host: Option<String>,
    /// TCP port. Default: 5432.
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// Role to log in as. Default: the name of the operating system's user.
    pub user: Option<String>,
    /// Database. Default: the role's name.
    pub name: Option<String>,
    /// Password. Better kept in `password_file` or the environment than in the settings file.
    #[serde(serialize_with = "show::secret")]
    #[schemars(with = "Option<String>", extend("format" = "secret"))]
    pub password: Option<SecretString>,
    /// File that holds the password and nothing else (one trailing newline is allowed). Read again for each connection,
    /// so that a rotated secret needs no restart.
    pub password_file: Option<PathBuf>,
    /// TLS as libpq means it. Default: prefer (verify-full if `sslrootcert` is `system`).
    pub sslmode: Option<SslMode>,
    /// PEM file with the certificate authorities to trust, or `system` for those of the operating system. Default:
    /// ~/.postgresql/root.crt if it exists, else (for verify-ca and verify-full) those of the operating system.
    pub sslrootcert: Option<String>,
    /// PEM file with the client's certificate chain.
    pub sslcert: Option<PathBuf>,
    /// PEM file with the client's private key, unencrypted, not readable by others.
    pub sslkey: Option<PathBuf>,
    /// Second connection string, used for DDL and the lease, for when `url` goes through a pooler. It must reach the same
    /// database directly or in session mode. What it leaves out is taken from the settings above. If `url` turns out to be a
    /// pooler in transaction mode, where no setting of a session holds, everything goes here.
    /// Secret.
    #[serde(serialize_with = "show::secret_conninfo")]
    #[schemars(with = "Option<String>", extend("format" = "conninfo"))]
    pub ddl_url: Option<SecretString>,
    /// Connections in the pool for control work, 2 to 64. Batches and DDL have connections of their own.
    #[schemars(range(min = 2, max = 64))]
    pub pool_size: u32,
    /// Limit for one attempt to connect to one host, from the name look-up to the end of authentication, 1s to 5m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub connect_timeout: Duration,
    /// A TCP connection that is idle for this long is probed, 1s to 2h.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub keepalives_idle: Duration,
    /// Data that the server does not acknowledge for this long breaks the connection (Linux), 1s to 10m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub tcp_user_timeout: Duration,
    /// `true` promises that nobody but backfilld ever logs in as this role. Then batches may skip our own sync trigger,
    /// which would otherwise be the larger part of the cost per row. If the promise is broken, whoever logs in as the
    /// role can write a stale value.
    pub dedicated_login: bool,
}

/// TLS as libpq means it; the names are libpq's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// Without TLS, or with it if the server refuses that.
    Allow,
    /// TLS without looking at the certificate, or without TLS if the server has none.
    Prefer,
    /// TLS; the certificate is checked only if `sslrootcert` names a file, as for verify-ca.
    Require,
    /// TLS with a certificate of a trusted authority, whatever host it names.
    VerifyCa,
    /// TLS with a certificate of a trusted authority for the host we asked for.
    VerifyFull,
}

/// The read-only HTTP endpoints.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HttpSettings {
    /// Address and port for the status page, /metrics, /healthz and /readyz; `off` or nothing for none. Nothing can be
    /// changed over it. Where others reach the address, the page is served only with a token, and over TLS.
    pub listen: String,
    /// Token that page and metrics ask for: as bearer token, or as the password of any user in a browser. Better kept in
    /// `token_file` or the environment than in the settings file.
    #[serde(serialize_with = "show::secret")]
    #[schemars(with = "Option<String>", extend("format" = "secret"))]
    pub token: Option<SecretString>,
    /// File that holds the token and nothing else (one trailing newline is allowed). Read at start.
    pub token_file: Option<PathBuf>,
    /// Certificate in PEM format, with those that lead to its authority behind it. With it, everything is https. Read at
    /// start.
    pub tls_cert: Option<PathBuf>,
    /// Its key in PEM format, which only the owner may read. Read at start.
    pub tls_key: Option<PathBuf>,
    /// A token may come over an address that others reach although nothing encrypts it here: a proxy in front or the
    /// network itself does.
    pub plaintext: bool,
}

/// What is logged and how.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// `auto` is text on a terminal and JSON otherwise.
    pub format: LogFormat,
    /// What to log: off, error, warn, info, debug or trace, or a filter by module such as `info,backfilld::ddl=debug`.
    pub level: String,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// The lease that keeps two daemons from working on one job.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LeaseSettings {
    /// A lease that was not renewed for this long may be taken by another daemon, 3s to 10m. It is renewed every third
    /// of it.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub ttl: Duration,
}

/// How statements that take strong locks are tried.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DdlSettings {
    /// How long one attempt waits for its lock, 10ms to 2s. The application's statements queue behind it for as long.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub lock_timeout: Duration,
    /// How long one DDL step keeps retrying before it gives up, 1s to 7days.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub patience: Duration,
    /// Longest pause between two attempts, 100ms to 5m. Pauses start short, double, and are jittered.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub retry_max_wait: Duration,
}

/// Who is told what happens to the job: each phase, a hold point, a pause, a failure, the end, a long wait, rows that cannot
/// be updated. Nothing of it holds up the backfill. docs/control.md says what is told.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HookSettings {
    /// Program to run for each event: an absolute path, without arguments and without a shell. It finds the event in its
    /// environment (BACKFILLD_EVENT, BACKFILLD_JOB, BACKFILLD_PHASE, BACKFILLD_STATUS, BACKFILLD_REASON, BACKFILLD_HINT,
    /// BACKFILLD_AT, BACKFILLD_INSTANCE) and nothing of the daemon's own.
    pub command: Option<PathBuf>,
    /// How long the program may take before it is killed, 1s to 5m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub timeout: Duration,
    /// Address to which each event is posted as JSON, http or https; any answer but 2xx is tried again for half a minute.
    /// Secret, as it may hold a token.
    #[serde(serialize_with = "show::secret")]
    #[schemars(with = "Option<String>", extend("format" = "secret"))]
    pub webhook: Option<SecretString>,
    /// Sent with each post as `Authorization: Bearer ...`.
    #[serde(serialize_with = "show::secret")]
    #[schemars(with = "Option<String>", extend("format" = "secret"))]
    pub webhook_secret: Option<SecretString>,
    /// File that holds the secret and nothing else, instead of `webhook_secret`.
    pub webhook_secret_file: Option<PathBuf>,
    /// A wait of the batches that takes longer than this is told, once, 1s to 7days.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "duration"))]
    pub throttled_after: Duration,
}

/// Where traces go.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetrySettings {
    /// Address of an OpenTelemetry collector that takes OTLP over HTTP, without the path, for example
    /// `http://127.0.0.1:4318`: `run` posts to /v1/traces there a span for the job, each of its phases and each batch. What
    /// cannot be sent is dropped. Only for binaries built with `--features otel`. Headers and sampling come from the variables
    /// OTEL_EXPORTER_OTLP_HEADERS and OTEL_TRACES_SAMPLER.
    pub otlp_endpoint: Option<String>,
}

impl Default for HookSettings {
    fn default() -> Self {
        Self {
            command: None,
            // A program that asks a chat service takes a second or two.
            timeout: Duration::from_secs(10),
            webhook: None,
            webhook_secret: None,
            webhook_secret_file: None,
            // Longer than a checkpoint or a nightly import's peak: short waits are what the throttle is for.
            throttled_after: Duration::from_secs(10 * 60),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            instance: whoami::hostname().unwrap_or_else(|_| "backfilld".into()),
            database: DatabaseSettings::default(),
            http: HttpSettings::default(),
            log: LogSettings::default(),
            lease: LeaseSettings::default(),
            ddl: DdlSettings::default(),
            hooks: HookSettings::default(),
            telemetry: TelemetrySettings::default(),
            sources: BTreeMap::new(),
        }
    }
}

impl Default for DatabaseSettings {
    fn default() -> Self {
        Self {
            url: None,
            host: None,
            port: None,
            user: None,
            name: None,
            password: None,
            password_file: None,
            sslmode: None,
            sslrootcert: None,
            sslcert: None,
            sslkey: None,
            ddl_url: None,
            pool_size: DEFAULT_POOL_SIZE,
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            keepalives_idle: DEFAULT_KEEPALIVES_IDLE,
            tcp_user_timeout: DEFAULT_TCP_USER_TIMEOUT,
            dedicated_login: false,
        }
    }
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            listen: DEFAULT_LISTEN.into(),
            token: None,
            token_file: None,
            tls_cert: None,
            tls_key: None,
            plaintext: false,
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { format: LogFormat::Auto, level: DEFAULT_LOG_LEVEL.into() }
    }
}

impl Default for LeaseSettings {
    fn default() -> Self {
        Self { ttl: DEFAULT_LEASE_TTL }
    }
}

impl Default for DdlSettings {
    fn default() -> Self {
        Self { lock_timeout: DEFAULT_LOCK_TIMEOUT, patience: DEFAULT_PATIENCE, retry_max_wait: DEFAULT_RETRY_MAX_WAIT }
    }
}

impl Settings {
    /// Loads `file` (if any), the process environment and `flags` (key path and value, the last one wins), and
    /// validates.
    ///
    /// # Errors
    /// [`Kind::Input`](crate::Kind::Input) naming the file or variable, the key path and what was expected.
    pub fn load(file: Option<&Path>, flags: Vec<(String, String)>) -> Result<Self> {
        Self::load_from(file, &layers::process_environment()?, flags)
    }

    /// Like [`Settings::load`] with the environment given.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn load_from(
        file: Option<&Path>,
        environment: &BTreeMap<String, String>,
        flags: Vec<(String, String)>,
    ) -> Result<Self> {
        let (mut settings, sources): (Self, _) = layers::merge(file, environment, flags)?;
        settings.sources = sources;
        settings.validate()?;
        Ok(settings)
    }
}

impl HttpSettings {
    /// The address to listen on, or `None` where HTTP is switched off.
    ///
    /// # Errors
    /// [`Kind::Input`](crate::Kind::Input) naming `http.listen`.
    pub fn address(&self) -> Result<Option<SocketAddr>> {
        validate::listen_address(&self.listen)
    }

    /// The token that the endpoints ask for, if one is set.
    ///
    /// # Errors
    /// [`Kind::Input`](crate::Kind::Input) naming `http.token_file` if it cannot be read or holds nothing.
    pub fn read_token(&self) -> Result<Option<SecretString>> {
        let Some(file) = &self.token_file else { return Ok(self.token.clone()) };
        let text = std::fs::read_to_string(file)
            .map_err(|e| Error::input(format!("`http.token_file`: cannot read {}", file.display())).with_source(e))?;
        let token = text.strip_suffix('\n').unwrap_or(&text);
        if token.is_empty() {
            return Err(Error::input(format!("`http.token_file`: {} is empty", file.display())));
        }
        Ok(Some(token.to_owned().into()))
    }
}

impl LeaseSettings {
    /// How often the holder renews: a third of the time to live, so that two renewals may fail.
    pub fn heartbeat(&self) -> Duration {
        self.ttl / 3
    }
}

#[cfg(test)]
mod tests;
