//! Connects. Every session of ours begins here, with the same settings, whoever it is for.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rand::seq::SliceRandom as _;
use secrecy::ExposeSecret as _;
use tokio_postgres::config::{self, SslNegotiation};
use tokio_postgres::{Client, Config, SimpleQueryMessage, Socket, tls};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::CancellationToken;

use super::connect_error::{Place, explain, summary, timed_out};
use super::session::Driver;
pub use super::session::{Canceller, Session};
use super::{pooler, tls as our_tls};
use crate::error::{Error, Kind, Result};
use crate::settings::{DatabaseSettings, HostSpec, SslMode, Target};

/// What every session of ours is set to, whatever the role, the database or the server say by default.
///
/// - `row_security = off`: a policy that would hide rows from us becomes an error (I8).
/// - `search_path`: our statements name schemas; nobody else's object can stand in for one of the system's.
/// - formats: text that we read back means the same everywhere.
/// - timeouts: the bound of last resort (I9); batches, DDL and scans set tighter or wider ones with SET LOCAL.
/// - where the server knows them: `idle_session_timeout` and `transaction_timeout` off, as a role's default would end
///   the heartbeat or an index build; `client_connection_check_interval` lets the server notice within 5 s that a killed
///   daemon is gone and stop its statement (Linux).
pub const SESSION_SETTINGS: &str = "\
set row_security = off;
set search_path = pg_catalog, pg_temp;
set datestyle = 'ISO, YMD';
set intervalstyle = postgres;
set timezone = 'UTC';
set extra_float_digits = 1;
set bytea_output = hex;
set standard_conforming_strings = on;
set client_min_messages = warning;
set lock_timeout = '2s';
set statement_timeout = '60s';
set idle_in_transaction_session_timeout = '60s';
set default_transaction_isolation = 'read committed';
set jit = off;
select pg_catalog.set_config(s.name, v.value, false)
  from (values ('idle_session_timeout', '0'), ('transaction_timeout', '0'),
               ('client_connection_check_interval', '5s')) v(name, value)
  join pg_catalog.pg_settings s on s.name = v.name
 where s.name <> 'client_connection_check_interval' or pg_catalog.version() ~ 'linux';
";

/// Who we are on the server; the last statement of the round trip that applies the settings.
const IDENTIFY: &str = "select pid, backend_start::text, pg_catalog.current_setting('server_version_num') \
                        from pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid());";

/// The server cuts `application_name` at `NAMEDATALEN - 1`.
const MAX_APPLICATION_NAME_BYTES: usize = 63;
/// Opens sessions. Cheap to clone; holds no connection.
#[derive(Clone)]
pub struct Connector {
    main: Arc<Endpoint>,
    ddl: Option<Arc<Endpoint>>,
}

/// One target with its TLS side.
struct Endpoint {
    target: Target,
    tls: MakeRustlsConnect,
    /// The setting that says where it is.
    setting: &'static str,
    /// Whether a session there keeps its server process; not known before the first one.
    keeps_process: OnceLock<bool>,
}

impl Connector {
    /// Resolves the settings (with libpq's environment and password file) and reads the certificates. Connects to
    /// nothing.
    ///
    /// # Errors
    /// [`Kind::Input`] for settings that contradict each other and files that cannot be used.
    pub fn new(settings: &DatabaseSettings) -> Result<Self> {
        let endpoint = |target: Target, setting| -> Result<Arc<Endpoint>> {
            if let Some(path) = &target.password_file {
                read_password(path, Kind::Input)?;
            }
            let (tls, keeps_process) = (our_tls::connector(&target.tls)?, OnceLock::new());
            Ok(Arc::new(Endpoint { target, tls, setting, keeps_process }))
        };
        let main = endpoint(settings.target()?, "database.url")?;
        let ddl = settings.ddl_target()?.map(|t| endpoint(t, "database.ddl_url")).transpose()?;
        Ok(Self { main, ddl })
    }

    /// Where [`Connector::connect`] goes.
    pub fn target(&self) -> &Target {
        &self.main.target
    }

    /// Where [`Connector::connect_ddl`] goes.
    pub fn ddl_target(&self) -> &Target {
        &self.ddl_endpoint().target
    }

    /// Opens a session with [`SESSION_SETTINGS`]; `purpose` becomes `application_name = backfilld/<purpose>`.
    ///
    /// # Errors
    /// [`Kind::Connect`] with host, port, user, database, the reason and a hint, never the password; [`Kind::Refused`]
    /// behind a pooler in transaction mode, unless `database.ddl_url` leads past it: then everything goes there.
    pub async fn connect(&self, purpose: &str) -> Result<Session> {
        let pooled = || self.main.keeps_process.get() == Some(&false);
        match &self.ddl {
            Some(direct) if pooled() => direct.session(purpose).await,
            Some(direct) => match self.main.session(purpose).await {
                Err(e) if pooled() => {
                    tracing::warn!("{e}; everything goes to database.ddl_url");
                    direct.session(purpose).await
                }
                result => result,
            },
            None => self.main.session(purpose).await,
        }
    }

    /// Like [`Connector::connect`] by way of `database.ddl_url`, if that is set: never through a transaction pooler.
    ///
    /// # Errors
    /// As [`Connector::connect`].
    pub async fn connect_ddl(&self, purpose: &str) -> Result<Session> {
        self.ddl_endpoint().session(purpose).await
    }

    /// Looks whether both ways to the server can be used, so that a wrong one is told before the first of them did anything.
    ///
    /// # Errors
    /// As [`Connector::connect`].
    pub async fn try_both(&self) -> Result<()> {
        if self.ddl.is_some() {
            self.connect("start").await?.close().await;
        }
        Ok(())
    }

    fn ddl_endpoint(&self) -> &Endpoint {
        self.ddl.as_deref().unwrap_or(&self.main)
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connector({})", self.main.target)
    }
}

impl Endpoint {
    /// Tries the hosts in turn. As in libpq, a host that answers and refuses the login ends the search.
    async fn session(&self, purpose: &str) -> Result<Session> {
        let name = application_name(purpose);
        let mut hosts: Vec<&HostSpec> = self.target.hosts.iter().collect();
        if self.target.shuffle {
            hosts.shuffle(&mut rand::rng());
        }
        let mut failed: Vec<Error> = Vec::new();
        for host in hosts {
            let place = Place { host, target: &self.target };
            let limit = self.target.connect_timeout;
            let result = tokio::time::timeout(limit, self.session_on(&place, &name)).await;
            match result.unwrap_or_else(|_| Err(timed_out(&place, limit))) {
                Ok(session) => return Ok(session),
                Err(e) if matches!(e.sqlstate(), Some("28P01" | "28000" | "3D000" | "42501")) => return Err(e),
                Err(e) => failed.push(e),
            }
        }
        Err(summary(failed))
    }

    async fn session_on(&self, place: &Place<'_>, application_name: &str) -> Result<Session> {
        let mut first_error = None;
        for mode in attempts(self.target.tls.mode, place.host) {
            let config = self.config(place.host, mode, application_name)?;
            match config.connect(self.tls.clone()).await {
                Ok((client, connection)) => return self.start(place, mode, client, connection).await,
                Err(e) => {
                    let refused = e.code().is_some_and(|c| c.code() == "28000");
                    let again = refused || super::connect_error::is_tls(&e);
                    let error = explain(&e, place);
                    match first_error.take() {
                        // The second way in was refused as well: the first refusal is what the operator has to look at.
                        Some(first) if refused => return Err(first),
                        _ if again => first_error = Some(error),
                        _ => return Err(error),
                    }
                }
            }
        }
        Err(first_error.unwrap_or_else(|| Error::internal("no way to connect was tried")))
    }

    /// Applies the session settings and learns who we are, in one round trip.
    async fn start<T>(
        &self,
        place: &Place<'_>,
        mode: config::SslMode,
        client: Client,
        connection: tokio_postgres::Connection<Socket, T>,
    ) -> Result<Session>
    where
        T: tls::TlsStream + Unpin + Send + 'static,
    {
        let (tls, timeout, at) = (self.tls.clone(), self.target.connect_timeout, place.host.to_string());
        let mut session = Session::new(client, connection, tls, timeout, at);
        if self.keeps_process.get() != Some(&true) {
            self.refuse_transaction_mode(place, mode, &session.client).await?;
        }
        let messages = session.client.simple_query(&format!("{SESSION_SETTINGS}{IDENTIFY}")).await;
        let messages = messages.map_err(|e| explain(&e, place).context("applying the session settings"))?;
        let rows = messages.iter().filter_map(|m| if let SimpleQueryMessage::Row(r) = m { Some(r) } else { None });
        let Some(row) = rows.filter(|r| r.len() == 3).last() else {
            return Err(Error::new(Kind::Connect, format!("{} did not say which backend this is", place.host)));
        };
        let text = |i: usize| row.try_get(i).ok().flatten().unwrap_or_default();
        session.pid = text(0).parse().unwrap_or_default();
        session.backend_start = text(1).to_owned();
        session.server_version_num = text(2).parse().unwrap_or_default();
        Ok(session)
    }

    /// A pooler in transaction mode would give our settings to whoever uses the server process next, and not to our own next
    /// statement. So this is found out with a second connection before anything is set, once per process.
    async fn refuse_transaction_mode(&self, place: &Place<'_>, mode: config::SslMode, first: &Client) -> Result<()> {
        let config = self.config(place.host, mode, &application_name("pooler"))?;
        let (second, connection) = config.connect(self.tls.clone()).await.map_err(|e| explain(&e, place))?;
        let driver = Driver::start(connection, CancellationToken::new(), Arc::default());
        let pooled = pooler::in_transaction_mode(first, &second).await;
        drop(second);
        drop(driver);
        let pooled = pooled.map_err(|e| e.context("looking for a pooler in transaction mode"))?;
        let _ = self.keeps_process.set(!pooled);
        if !pooled {
            return Ok(());
        }
        let (host, setting) = (place.host, self.setting);
        Err(Error::refused(format!("{host} is a pooler in transaction mode, where a session keeps no setting and no server process"))
            .with_hint(format!(
                "put the server's own address, or that of a pooler in session mode, into {setting}: with Supabase port 5432 \
                 instead of 6543, with PgBouncer pool_mode = session for this database"
            )))
    }

    fn config(&self, host: &HostSpec, mode: config::SslMode, application_name: &str) -> Result<Config> {
        let t = &self.target;
        let mut c = Config::new();
        c.host(&host.host).port(host.port).user(&t.user).dbname(&t.dbname).application_name(application_name);
        if let Some(address) = host.address {
            c.hostaddr(address);
        }
        match (&t.password_file, &host.password) {
            (Some(path), _) => {
                c.password(read_password(path, Kind::Connect)?);
            }
            (None, Some(password)) => {
                c.password(password.expose_secret());
            }
            (None, None) => {}
        }
        if let Some(options) = &t.options {
            c.options(options);
        }
        c.ssl_mode(mode).target_session_attrs(t.session_attrs).channel_binding(t.channel_binding);
        if t.tls.direct {
            c.ssl_negotiation(SslNegotiation::Direct);
        }
        c.connect_timeout(t.connect_timeout).tcp_user_timeout(t.tcp_user_timeout);
        c.keepalives(t.keepalives).keepalives_idle(t.keepalives_idle);
        if let Some(interval) = t.keepalives_interval {
            c.keepalives_interval(interval);
        }
        if let Some(count) = t.keepalives_count {
            c.keepalives_retries(count);
        }
        Ok(c)
    }
}

/// How to try one host, in order; the second way is taken only where the first failed for want of (or because of) TLS.
fn attempts(mode: SslMode, host: &HostSpec) -> Vec<config::SslMode> {
    use config::SslMode as Wire;
    match mode {
        _ if host.is_socket() => vec![Wire::Disable],
        SslMode::Disable => vec![Wire::Disable],
        SslMode::Allow => vec![Wire::Disable, Wire::Require],
        SslMode::Prefer => vec![Wire::Prefer, Wire::Disable],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => vec![Wire::Require],
    }
}

/// `backfilld/<purpose>`, at most 63 bytes.
fn application_name(purpose: &str) -> String {
    let mut name = format!("backfilld/{purpose}");
    while name.len() > MAX_APPLICATION_NAME_BYTES {
        name.pop();
    }
    name
}

/// The password in a file; one line end is not part of it. At start an unreadable file is wrong input, later (a secret
/// that is being rotated) it is one more reason to try again.
fn read_password(path: &Path, kind: Kind) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::new(kind, format!("`database.password_file`: cannot read {}", path.display())).with_source(e)
    })?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn application_names_fit_the_server() {
        assert_eq!(application_name("job/1/batch"), "backfilld/job/1/batch");
        let long = application_name(&"ü".repeat(60));
        assert!(long.len() <= MAX_APPLICATION_NAME_BYTES && long.starts_with("backfilld/ü"));
    }
}
