//! What the settings, a connection string, libpq's environment and the password file together say about where to
//! connect. This is the only place that knows their order.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use tokio_postgres::config::{ChannelBinding, TargetSessionAttrs};

use super::conninfo::{self, Params};
use super::{DEFAULT_CONNECT_TIMEOUT, DatabaseSettings, SslMode, pgpass, service};
use crate::error::{Error, Result};

/// Where to connect, and how. `Debug` shows no password.
#[derive(Debug, Clone)]
pub struct Target {
    /// Tried in this order, never empty.
    pub hosts: Vec<HostSpec>,
    /// Try the hosts in random order.
    pub shuffle: bool,
    /// The role.
    pub user: String,
    /// The database.
    pub dbname: String,
    /// A file that holds the password; read at each connection, before `HostSpec::password`.
    pub password_file: Option<PathBuf>,
    /// Command line options for the server process.
    pub options: Option<String>,
    /// TLS.
    pub tls: TlsSpec,
    /// Whether SCRAM is bound to the TLS channel.
    pub channel_binding: ChannelBinding,
    /// Which kind of server will do.
    pub session_attrs: TargetSessionAttrs,
    /// Limit for one attempt at one host.
    pub connect_timeout: Duration,
    /// Whether idle TCP connections are probed.
    pub keepalives: bool,
    /// Idle time before the first probe.
    pub keepalives_idle: Duration,
    /// Time between probes, if not the system's.
    pub keepalives_interval: Option<Duration>,
    /// Lost probes that break the connection, if not the system's.
    pub keepalives_count: Option<u32>,
    /// Time without acknowledgement that breaks the connection.
    pub tcp_user_timeout: Duration,
    /// The connection string said `pgbouncer=true`: expect a pooler in transaction mode.
    pub pgbouncer: bool,
}

/// One server.
#[derive(Debug, Clone)]
pub struct HostSpec {
    /// Name, address or socket directory (begins with `/`).
    pub host: String,
    /// Address to use instead of looking up `host`.
    pub address: Option<IpAddr>,
    /// Port, also part of a socket's name.
    pub port: u16,
    /// The password for this host, if there is one outside `password_file`.
    pub password: Option<SecretString>,
}

impl HostSpec {
    /// Whether this is a Unix socket, where TLS does not apply.
    pub fn is_socket(&self) -> bool {
        self.host.starts_with('/')
    }
}

/// `host:port`, `[::1]:port` or `/directory:port`.
impl fmt::Display for HostSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// TLS with libpq's meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSpec {
    /// How much is asked for.
    pub mode: SslMode,
    /// Whom to trust.
    pub roots: Roots,
    /// The client's certificate chain and key, PEM files.
    pub client: Option<(PathBuf, PathBuf)>,
    /// Begin with TLS at once instead of asking first (PostgreSQL 17).
    pub direct: bool,
    /// Refuse TLS 1.2.
    pub only_tls13: bool,
}

/// Whom to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// Nothing was said: those of the operating system where a mode needs some.
    Unset,
    /// Those of the operating system.
    System,
    /// A PEM file.
    File(PathBuf),
}

/// `user@host:port,host:port/database`: for messages, without the password.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<String> = self.hosts.iter().map(ToString::to_string).collect();
        write!(f, "{}@{}/{}", self.user, hosts.join(","), self.dbname)
    }
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

impl DatabaseSettings {
    /// Where batches and control connections go, with libpq's environment and password file as fallback.
    ///
    /// # Errors
    /// [`Kind::Input`](crate::Kind::Input) naming the setting, the parameter and what was expected, never a value that
    /// could be secret.
    pub fn target(&self) -> Result<Target> {
        self.target_from(&|name| std::env::var(name).ok())
    }

    /// Where DDL goes if `ddl_url` is set.
    ///
    /// # Errors
    /// As [`DatabaseSettings::target`].
    pub fn ddl_target(&self) -> Result<Option<Target>> {
        let Some(url) = &self.ddl_url else { return Ok(None) };
        let env: Lookup<'_> = &|name| std::env::var(name).ok();
        let main = params("database.url", self.url.as_ref(), env)?;
        let mut own = params("database.ddl_url", Some(url), env)?;
        // Another place, but the same database, role and rules unless it says otherwise.
        for (key, value) in main {
            if !matches!(key.as_str(), "host" | "hostaddr" | "port" | "pgbouncer" | "options") {
                own.entry(key).or_insert(value);
            }
        }
        let fallback = service::environment(env)?;
        Resolver { settings: self, params: own, fallback, env, setting: "database.ddl_url" }.target().map(Some)
    }

    /// Like [`DatabaseSettings::target`] with the environment given.
    ///
    /// # Errors
    /// As [`DatabaseSettings::target`].
    pub fn target_from(&self, env: Lookup<'_>) -> Result<Target> {
        let params = params("database.url", self.url.as_ref(), env)?;
        let fallback = service::environment(env)?;
        Resolver { settings: self, params, fallback, env, setting: "database.url" }.target()
    }
}

fn params(setting: &str, url: Option<&SecretString>, env: Lookup<'_>) -> Result<Params> {
    let Some(url) = url else { return Ok(Params::new()) };
    let params = conninfo::parse(url.expose_secret()).map_err(|e| Error::input(format!("`{setting}`: {e}")))?;
    service::expand(setting, params, env)
}

struct Resolver<'a> {
    settings: &'a DatabaseSettings,
    params: Params,
    /// What libpq's environment says.
    fallback: Params,
    env: Lookup<'a>,
    setting: &'static str,
}

impl Resolver<'_> {
    fn target(&self) -> Result<Target> {
        let s = self.settings;
        let user = match self.first("user", s.user.clone()) {
            Some(user) => user,
            None => whoami::username().map_err(|e| {
                Error::input("`database.user` is not set and the operating system's user has no name").with_source(e)
            })?,
        };
        let dbname = self.first("dbname", s.name.clone()).unwrap_or_else(|| user.clone());
        let mut hosts = self.hosts()?;
        let password_file = if self.params.contains_key("password") { None } else { s.password_file.clone() };
        if password_file.is_none() {
            let given = s.password.as_ref().map(|p| p.expose_secret().to_owned());
            let password = self.first("password", given);
            for host in &mut hosts {
                host.password = match &password {
                    Some(password) => Some(SecretString::from(password.clone())),
                    None => self.password_from_file(host, &dbname, &user),
                };
            }
        }
        Ok(Target {
            hosts,
            shuffle: self.choice("load_balance_hosts", &[("disable", false), ("random", true)])?.unwrap_or(false),
            user,
            dbname,
            password_file,
            options: self.first("options", None),
            tls: self.tls()?,
            channel_binding: self
                .choice(
                    "channel_binding",
                    &[
                        ("disable", ChannelBinding::Disable),
                        ("prefer", ChannelBinding::Prefer),
                        ("require", ChannelBinding::Require),
                    ],
                )?
                .unwrap_or(ChannelBinding::Prefer),
            session_attrs: self
                .choice(
                    "target_session_attrs",
                    &[
                        ("any", TargetSessionAttrs::Any),
                        ("read-write", TargetSessionAttrs::ReadWrite),
                        ("primary", TargetSessionAttrs::ReadWrite),
                        ("read-only", TargetSessionAttrs::ReadOnly),
                        ("standby", TargetSessionAttrs::ReadOnly),
                    ],
                )?
                .unwrap_or(TargetSessionAttrs::Any),
            connect_timeout: self.connect_timeout()?,
            keepalives: self.choice("keepalives", &[("0", false), ("1", true)])?.unwrap_or(true),
            keepalives_idle: self.seconds("keepalives_idle")?.unwrap_or(s.keepalives_idle),
            keepalives_interval: self.seconds("keepalives_interval")?,
            keepalives_count: self.number::<u32>("keepalives_count")?.filter(|n| *n > 0),
            tcp_user_timeout: self
                .number("tcp_user_timeout")?
                .filter(|ms| *ms > 0)
                .map_or(s.tcp_user_timeout, Duration::from_millis),
            pgbouncer: self.choice("pgbouncer", &[("true", true), ("false", false)])?.unwrap_or(false),
        })
    }

    /// Connection string, else settings, else environment; empty counts as not set.
    fn first(&self, param: &str, setting: Option<String>) -> Option<String> {
        let found = self.params.get(param).cloned().or(setting).filter(|v| !v.is_empty());
        found.or_else(|| self.fallback.get(param).cloned())
    }

    /// The same for what is no setting of ours.
    fn value(&self, param: &str) -> Option<&String> {
        self.params.get(param).or_else(|| self.fallback.get(param))
    }

    /// Only a limit that somebody set stands before libpq's variable.
    fn connect_timeout(&self) -> Result<Duration> {
        let own = self.settings.connect_timeout;
        let said_here = own != DEFAULT_CONNECT_TIMEOUT && !self.params.contains_key("connect_timeout");
        Ok(if said_here { own } else { self.seconds("connect_timeout")?.unwrap_or(own) })
    }

    fn wrong(&self, param: &str, expected: &str) -> Error {
        Error::input(format!("`{}`: parameter `{param}`: expected {expected}", self.setting))
    }

    fn choice<T: Copy>(&self, param: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.value(param) else { return Ok(None) };
        match choices.iter().find(|(name, _)| name == value) {
            Some((_, chosen)) => Ok(Some(*chosen)),
            None => {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                Err(self.wrong(param, &format!("one of {}", names.join(", "))))
            }
        }
    }

    fn number<T: FromStr>(&self, param: &str) -> Result<Option<T>> {
        let Some(value) = self.value(param) else { return Ok(None) };
        value.trim().parse().map(Some).map_err(|_| self.wrong(param, "a whole number"))
    }

    fn seconds(&self, param: &str) -> Result<Option<Duration>> {
        Ok(self.number(param)?.filter(|s| *s > 0).map(Duration::from_secs))
    }

    fn hosts(&self) -> Result<Vec<HostSpec>> {
        let s = self.settings;
        let list = |text: Option<String>| -> Vec<String> {
            text.map(|t| t.split(',').map(|p| p.trim().to_owned()).collect()).unwrap_or_default()
        };
        let mut names = list(self.first("host", s.host.clone()));
        let addresses = list(self.first("hostaddr", None));
        let ports = list(self.first("port", s.port.map(|p| p.to_string())));
        if names.is_empty() && addresses.is_empty() {
            names.push(String::new());
        }
        let count = names.len().max(addresses.len());
        if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
            return Err(self.wrong("hostaddr", &format!("{} addresses, one per host", names.len())));
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(self.wrong("port", &format!("one port, or {count}, one per host")));
        }
        let mut hosts = Vec::new();
        for i in 0..count {
            let port = match ports.get(i).or(ports.first()).map(String::as_str) {
                None | Some("") => 5432,
                Some(port) => port
                    .parse()
                    .ok()
                    .filter(|p| *p > 0)
                    .ok_or_else(|| self.wrong("port", "a number from 1 to 65535"))?,
            };
            let address = match addresses.get(i).filter(|a| !a.is_empty()) {
                Some(text) => Some(text.parse::<IpAddr>().map_err(|_| self.wrong("hostaddr", "an IP address"))?),
                None => None,
            };
            let host = match names.get(i).filter(|n| !n.is_empty()) {
                Some(name) => name.clone(),
                None => address.map_or_else(|| default_host(port), |a| a.to_string()),
            };
            hosts.push(HostSpec { host, address, port, password: None });
        }
        Ok(hosts)
    }

    fn password_from_file(&self, host: &HostSpec, dbname: &str, user: &str) -> Option<SecretString> {
        let path = match self.first("passfile", None) {
            Some(path) => PathBuf::from(path),
            None => self.home(".pgpass")?,
        };
        // libpq calls a socket in its default directory `localhost`; we do so for any of the usual ones.
        let default_socket = SOCKET_DIRECTORIES.contains(&host.host.as_str());
        let name = if default_socket { "localhost" } else { &host.host };
        pgpass::look_up(&path, name, host.port, dbname, user)
    }

    fn home(&self, name: &str) -> Option<PathBuf> {
        (self.env)("HOME").filter(|h| !h.is_empty()).map(|home| Path::new(&home).join(name))
    }

    fn tls(&self) -> Result<TlsSpec> {
        let s = self.settings;
        let mode = match (self.params.get("sslmode").cloned(), s.sslmode) {
            (None, Some(mode)) => Some(mode),
            (text, _) => match text.or_else(|| self.fallback.get("sslmode").cloned()) {
                Some(text) => Some(ssl_mode(&text).ok_or_else(|| {
                    self.wrong("sslmode", "one of disable, allow, prefer, require, verify-ca, verify-full")
                })?),
                None => None,
            },
        };
        let roots = match self.first("sslrootcert", s.sslrootcert.clone()) {
            Some(system) if system == "system" => Roots::System,
            Some(path) => Roots::File(PathBuf::from(path)),
            None => self.home(".postgresql/root.crt").filter(|p| p.exists()).map_or(Roots::Unset, Roots::File),
        };
        let mode = match (mode, &roots) {
            (None, Roots::System) => SslMode::VerifyFull,
            (Some(mode), Roots::System) if mode < SslMode::VerifyFull => {
                return Err(Error::input("`database.sslmode`: expected verify-full with sslrootcert=system")
                    .with_hint(
                        "a public authority signs certificates for anybody, so the host name has to be checked",
                    ));
            }
            (mode, _) => mode.unwrap_or(SslMode::Prefer),
        };
        let path = |p: &Option<PathBuf>| p.as_ref().map(|p| p.display().to_string());
        let cert = self.first("sslcert", path(&s.sslcert)).map(PathBuf::from);
        let key = self.first("sslkey", path(&s.sslkey)).map(PathBuf::from);
        let client = match (cert, key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => {
                let cert = self.home(".postgresql/postgresql.crt").filter(|p| p.exists());
                let key = self.home(".postgresql/postgresql.key").filter(|p| p.exists());
                cert.zip(key)
            }
            (Some(_), None) => return Err(Error::input("`database.sslkey`: expected a file, as sslcert is set")),
            (None, Some(_)) => return Err(Error::input("`database.sslcert`: expected a file, as sslkey is set")),
        };
        let direct = self.choice("sslnegotiation", &[("postgres", false), ("direct", true)])?.unwrap_or(false);
        if direct && mode < SslMode::Require {
            return Err(self.wrong("sslmode", "require or stronger with sslnegotiation=direct"));
        }
        let versions = [("TLSv1", false), ("TLSv1.1", false), ("TLSv1.2", false), ("TLSv1.3", true)];
        let only_tls13 = self.choice("ssl_min_protocol_version", &versions)?.unwrap_or(false);
        Ok(TlsSpec { mode, roots, client, direct, only_tls13 })
    }
}

/// Where Debian and the PostgreSQL project put the server's socket.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// The first usual directory that has a socket for this port, else `localhost`.
fn default_host(port: u16) -> String {
    let found = SOCKET_DIRECTORIES.iter().find(|d| Path::new(d).join(format!(".s.PGSQL.{port}")).exists());
    found.map_or_else(|| "localhost".into(), |d| (*d).to_owned())
}

fn ssl_mode(text: &str) -> Option<SslMode> {
    Some(match text {
        "disable" => SslMode::Disable,
        "allow" => SslMode::Allow,
        "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" => SslMode::VerifyCa,
        "verify-full" => SslMode::VerifyFull,
        _ => return None,
    })
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
