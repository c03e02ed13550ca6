#![allow(clippy::unwrap_used, reason = "a test may panic")]
//! Connections as libpq means them, against a real server with real certificates.
//!
//! Needs PostgreSQL (in BACKFILLD_PG_BIN, PATH or Debian's directories) and the `openssl` command. Each test has a
//! server of its own in a temporary directory, and stops it.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use backfilld::pg::connect::{Connector, Session};
use backfilld::pg::pool::Pool;
use backfilld::settings::DatabaseSettings;
use backfilld::{Error, Kind};
use secrecy::SecretString;

const HBA: &str = "\
local   all all           trust
local   replication all   trust
hostssl all onlytls   all scram-sha-256
hostnossl all onlyplain all scram-sha-256
hostssl all certified all cert
host    all app       all scram-sha-256
host    all missing   all scram-sha-256
";

const ROLES: &str = "\
create role app login password 'right:p@ss/word';
create role onlytls login password 'right:p@ss/word';
create role onlyplain login password 'right:p@ss/word';
create role certified login;
create database app;
";

/// `right:p@ss/word` in a URL.
const PASSWORD: &str = "right%3Ap%40ss%2Fword";

/// A throwaway server with certificates beside it.
struct Server {
    dir: tempfile::TempDir,
    owner: Option<(u32, u32)>,
    port: u16,
}

impl Server {
    /// `certificate` makes `server.crt` and `server.key` in the directory; `None` switches TLS off.
    fn start(certificate: Option<fn(&Path)>) -> Self {
        let dir = tempfile::Builder::new().prefix("backfilld-tls-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let root = output(Command::new("id").arg("-u")) == "0";
        let postgres = |flag| output(Command::new("id").args([flag, "postgres"])).parse().unwrap();
        let owner = root.then(|| (postgres("-u"), postgres("-g")));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Self { dir, owner, port };
        server.give(server.dir.path());
        server.pg("initdb", &["--no-sync", "-A", "trust", "-U", "postgres", "-D", &server.path("data")]);
        let tls = match certificate {
            None => "ssl = off\n".to_owned(),
            Some(make) => {
                make(server.dir.path());
                server.give(&server.dir.path().join("server.key"));
                let ca = server.dir.path().join("ca.crt");
                let ca = if ca.exists() { format!("ssl_ca_file = '{}'\n", ca.display()) } else { String::new() };
                let (cert, key) = (server.path("server.crt"), server.path("server.key"));
                format!("ssl = on\nssl_cert_file = '{cert}'\nssl_key_file = '{key}'\n{ca}")
            }
        };
        let (conf, hba) = (server.path("data/postgresql.conf"), server.path("data/pg_hba.conf"));
        let base = format!(
            "listen_addresses = 'localhost'\nport = {port}\nunix_socket_directories = '{}'\nfsync = off\n\
             password_encryption = 'scram-sha-256'\n",
            server.dir.path().display()
        );
        fs::write(conf, base + &tls).unwrap();
        fs::write(hba, HBA).unwrap();
        server.pg("pg_ctl", &["-w", "-s", "-D", &server.path("data"), "-l", &server.path("log"), "start"]);
        let socket = server.dir.path().display().to_string();
        for statement in ROLES.lines() {
            let port = port.to_string();
            server
                .pg("psql", &["-qX", "-h", &socket, "-p", &port, "-U", "postgres", "-d", "postgres", "-c", statement]);
        }
        server
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn give(&self, path: &Path) {
        if let Some((uid, gid)) = self.owner {
            chown(path, Some(uid), Some(gid)).unwrap();
        }
    }

    /// Runs a program of PostgreSQL, as `postgres` where we are root.
    fn pg(&self, program: &str, args: &[&str]) {
        let program = binary(program);
        let mut command = match self.owner {
            None => Command::new(program),
            Some((uid, gid)) => {
                let mut c = Command::new("setpriv");
                c.args([&format!("--reuid={uid}"), &format!("--regid={gid}"), "--clear-groups"]).arg(program);
                c
            }
        };
        run(command.args(args).current_dir(self.dir.path()));
    }

    /// A hot standby that follows this server, begun with a copy of its data.
    fn standby(&self) -> Standby<'_> {
        let (data, copy) = (self.path("data"), self.path("standby"));
        self.pg("pg_ctl", &["-w", "-s", "-D", &data, "-m", "fast", "stop"]);
        self.pg("cp", &["-a", &data, &copy]);
        fs::write(format!("{copy}/standby.signal"), "").unwrap();
        let conninfo = format!("host={} port={} user=postgres", self.dir.path().display(), self.port);
        fs::write(format!("{copy}/postgresql.auto.conf"), format!("primary_conninfo = '{conninfo}'\n")).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let standby = Standby { primary: self, port };
        for (data, log, port) in [(data, "log", self.port), (copy, "standby.log", port)] {
            let (log, port) = (self.path(log), format!("-p {port}"));
            self.pg("pg_ctl", &["-w", "-s", "-D", &data, "-l", &log, "-o", &port, "start"]);
        }
        standby
    }

    /// Settings for `user@host` with `parameters` in the URL.
    fn settings(&self, user: &str, host: &str, parameters: &str) -> DatabaseSettings {
        let url = format!("postgresql://{user}:{PASSWORD}@{host}:{}/app?{parameters}", self.port);
        DatabaseSettings { url: Some(SecretString::from(url)), ..DatabaseSettings::default() }
    }

    async fn connect(&self, user: &str, host: &str, parameters: &str) -> Result<Session, Error> {
        Connector::new(&self.settings(user, host, parameters))?.connect("test").await
    }

    /// The error of a connection that must fail, complete with hint.
    async fn refusal(&self, user: &str, host: &str, parameters: &str) -> String {
        let error = self.connect(user, host, parameters).await.expect_err(parameters);
        assert_eq!(error.kind(), Kind::Connect, "{}", error.render());
        let text = error.render();
        assert!(text.contains("hint: ") && !text.contains("right:p@ss"), "{text}");
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.dir.path().join("data/postmaster.pid").exists() {
            self.pg("pg_ctl", &["-s", "-D", &self.path("data"), "-m", "immediate", "stop"]);
        }
    }
}

/// Stopped when dropped; its files are the primary's to delete.
struct Standby<'a> {
    primary: &'a Server,
    port: u16,
}

impl Drop for Standby<'_> {
    fn drop(&mut self) {
        self.primary.pg("pg_ctl", &["-s", "-D", &self.primary.path("standby"), "-m", "immediate", "stop"]);
    }
}

fn binary(name: &str) -> PathBuf {
    let mut places: Vec<PathBuf> = std::env::var_os("BACKFILLD_PG_BIN").map(PathBuf::from).into_iter().collect();
    let mut debian: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|d| d.filter_map(|e| Some(e.ok()?.path().join("bin"))).collect())
        .unwrap_or_default();
    debian.sort();
    places.extend(debian.into_iter().rev());
    places.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let found = places.into_iter().map(|p| p.join(name)).find(|p| p.is_file());
    found.unwrap_or_else(|| panic!("{name} not found: install PostgreSQL or set BACKFILLD_PG_BIN"))
}

fn run(command: &mut Command) -> Output {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

fn output(command: &mut Command) -> String {
    String::from_utf8(run(command).stdout).unwrap().trim().to_owned()
}

fn openssl(dir: &Path, args: &str) {
    run(Command::new("openssl").args(args.split(' ')).current_dir(dir));
}

const NEW_KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";

fn authority(dir: &Path, name: &str) {
    openssl(dir, &format!("req -x509 {NEW_KEY} -days 30 -subj /CN={name} -keyout {name}.key -out {name}.crt"));
}

fn signed(dir: &Path, name: &str, subject: &str, extension: &str, days: &str) {
    fs::write(dir.join("ext"), extension).unwrap();
    openssl(dir, &format!("req -new {NEW_KEY} -subj /CN={subject} -keyout {name}.key -out {name}.csr"));
    let sign = format!("x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile ext");
    openssl(dir, &format!("{sign} -days {days} -out {name}.crt"));
}

fn for_localhost(dir: &Path) {
    authority(dir, "ca");
    authority(dir, "other");
    signed(dir, "server", "db.example.com", "subjectAltName=DNS:localhost", "30");
    signed(dir, "client", "certified", "extendedKeyUsage=clientAuth", "30");
}

fn expired(dir: &Path) {
    authority(dir, "ca");
    signed(dir, "server", "localhost", "subjectAltName=DNS:localhost", "-1");
}

/// The manual's own example: a self-signed certificate whose only name is the common name.
fn self_signed(dir: &Path) {
    openssl(dir, &format!("req -x509 {NEW_KEY} -days 30 -subj /CN=localhost -keyout server.key -out server.crt"));
}

async fn uses_tls(session: &Session) -> bool {
    let sql = "select ssl from pg_catalog.pg_stat_ssl where pid = pg_catalog.pg_backend_pid()";
    session.client.query_typed(sql, &[]).await.unwrap()[0].get(0)
}

#[tokio::test]
async fn verification_accepts_the_right_server_and_says_what_is_wrong_with_others() {
    let s = Server::start(Some(for_localhost));
    let ca = s.path("ca.crt");
    let other = s.path("other.crt");

    for mode in ["verify-full", "verify-ca", "require"] {
        let session = s.connect("app", "localhost", &format!("sslmode={mode}&sslrootcert={ca}")).await.unwrap();
        assert!(uses_tls(&session).await, "{mode}");
    }
    // Encryption without identity.
    assert!(uses_tls(&s.connect("app", "127.0.0.1", "sslmode=require").await.unwrap()).await);
    assert!(uses_tls(&s.connect("app", "127.0.0.1", "sslmode=prefer").await.unwrap()).await);
    assert!(!uses_tls(&s.connect("app", "127.0.0.1", "sslmode=disable").await.unwrap()).await);
    // SCRAM bound to the channel.
    let bound = format!("sslmode=verify-full&sslrootcert={ca}&channel_binding=require");
    s.connect("app", "localhost", &bound).await.unwrap();
    s.connect("app", "127.0.0.1", "sslmode=require&channel_binding=require").await.unwrap();
    let e = s.refusal("app", "127.0.0.1", "sslmode=disable&channel_binding=require").await;
    assert!(e.contains("channel binding"), "{e}");

    for mode in ["verify-full", "verify-ca", "require"] {
        let e = s.refusal("app", "localhost", &format!("sslmode={mode}&sslrootcert={other}")).await;
        assert!(e.contains("authority that is not trusted") && e.contains("database.sslrootcert"), "{mode}: {e}");
    }
    let e = s.refusal("app", "localhost", "sslrootcert=system").await;
    assert!(e.contains("authority that is not trusted"), "{e}");
    let e = s.refusal("app", "127.0.0.1", &format!("sslmode=verify-full&sslrootcert={ca}")).await;
    assert!(e.contains("not for 127.0.0.1 but for") && e.contains("localhost") && e.contains("verify-ca"), "{e}");
    s.connect("app", "127.0.0.1", &format!("sslmode=verify-ca&sslrootcert={ca}")).await.unwrap();
    // The name that is checked is `host`, the address that is used `hostaddr`.
    let e =
        s.refusal("app", "db.example.com", &format!("hostaddr=127.0.0.1&sslmode=verify-full&sslrootcert={ca}")).await;
    assert!(e.contains("not for db.example.com"), "{e}");

    let e = s.connect("app", "localhost", "sslmode=verify-full&sslrootcert=/nonexistent").await.unwrap_err();
    assert_eq!(e.kind(), Kind::Input);
    assert!(e.to_string().contains("`database.sslrootcert`"), "{e}");
}

#[tokio::test]
async fn client_certificates_log_in() {
    let s = Server::start(Some(for_localhost));
    let with = format!(
        "sslmode=verify-full&sslrootcert={}&sslcert={}&sslkey={}",
        s.path("ca.crt"),
        s.path("client.crt"),
        s.path("client.key")
    );
    fs::set_permissions(s.path("client.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let e = s.connect("certified", "localhost", &with).await.unwrap_err();
    assert!(e.kind() == Kind::Input && e.render().contains("chmod 0600"), "{}", e.render());
    fs::set_permissions(s.path("client.key"), fs::Permissions::from_mode(0o600)).unwrap();
    s.connect("certified", "localhost", &with).await.unwrap();
    let e = s.refusal("certified", "localhost", "sslmode=require").await;
    assert!(e.contains("28000") && e.contains("certificate"), "{e}");
    let mixed = with.replace("client.key", "ca.key");
    let e = s.connect("certified", "localhost", &mixed).await.unwrap_err();
    assert!(e.kind() == Kind::Input && e.to_string().contains("does not belong"), "{}", e.render());
}

#[tokio::test]
async fn an_expired_certificate_is_called_expired() {
    let s = Server::start(Some(expired));
    let e = s.refusal("app", "localhost", &format!("sslmode=verify-full&sslrootcert={}", s.path("ca.crt"))).await;
    assert!(e.contains("has expired"), "{e}");
    s.connect("app", "localhost", "sslmode=require").await.unwrap();
}

#[tokio::test]
async fn a_self_signed_certificate_with_a_common_name_can_be_pinned() {
    let s = Server::start(Some(self_signed));
    let pinned = format!("sslrootcert={}", s.path("server.crt"));
    s.connect("app", "localhost", &format!("sslmode=verify-full&{pinned}")).await.unwrap();
    s.connect("app", "127.0.0.1", &format!("sslmode=verify-ca&{pinned}")).await.unwrap();
    let e = s.refusal("app", "127.0.0.1", &format!("sslmode=verify-full&{pinned}")).await;
    assert!(e.contains("not for 127.0.0.1"), "{e}");
}

#[tokio::test]
async fn allow_and_prefer_find_the_way_that_the_server_lets_them() {
    let tls = Server::start(Some(for_localhost));
    for mode in ["allow", "prefer"] {
        assert!(uses_tls(&tls.connect("onlytls", "localhost", &format!("sslmode={mode}")).await.unwrap()).await);
        assert!(!uses_tls(&tls.connect("onlyplain", "localhost", &format!("sslmode={mode}")).await.unwrap()).await);
    }
    assert!(!uses_tls(&tls.connect("app", "localhost", "sslmode=allow").await.unwrap()).await);
    let e = tls.refusal("onlytls", "localhost", "sslmode=disable").await;
    assert!(e.contains("SQLSTATE: 28000") && e.contains("database.sslmode"), "{e}");
    let e = tls.refusal("onlyplain", "localhost", "sslmode=require").await;
    assert!(e.contains("SQLSTATE: 28000"), "{e}");

    let plain = Server::start(None);
    for mode in ["disable", "allow", "prefer"] {
        assert!(!uses_tls(&plain.connect("app", "localhost", &format!("sslmode={mode}")).await.unwrap()).await);
    }
    let e = plain.refusal("app", "localhost", "sslmode=require").await;
    assert!(e.contains("server does not support TLS") && e.contains("switch it on"), "{e}");
    // TLS does not apply to sockets.
    let socket = plain.dir.path().display().to_string().replace('/', "%2F");
    plain.connect("app", &socket, "sslmode=verify-full").await.unwrap();
}

#[tokio::test]
async fn refused_logins_and_unreachable_servers_say_why() {
    let s = Server::start(None);
    let mut wrong = s.settings("app", "localhost", "");
    wrong.url = Some(SecretString::from(format!("postgresql://app:wrong@localhost:{}/app", s.port)));
    let e = Connector::new(&wrong).unwrap().connect("test").await.unwrap_err().render();
    assert!(e.contains("as app, database app") && e.contains("28P01") && e.contains("password_file"), "{e}");
    assert!(!e.contains("wrong@"), "{e}");

    let e = s.refusal("missing", "localhost", "").await;
    assert!(e.contains("28P01"), "{e}");
    let e = s.refusal("stranger", "localhost", "").await;
    assert!(e.contains("28000") && e.contains("pg_hba.conf"), "{e}");
    let e = s.refusal("app", "localhost", "dbname=nodb").await;
    assert!(e.contains("3D000") && e.contains("database.name"), "{e}");
    let e = s.refusal("app", "no-such-host.invalid", "").await;
    assert!(e.contains("host not found"), "{e}");
    let e = s.refusal("app", "localhost", "port=1").await;
    assert!(e.contains("localhost:1") && e.contains("connection refused"), "{e}");
    let e = s.refusal("app", "%2Fnonexistent", "").await;
    assert!(e.contains("no server socket"), "{e}");
    let e = s.refusal("app", "localhost", "target_session_attrs=read-only").await;
    assert!(e.contains("the server allows writes"), "{e}");
    let e = s.refusal("app", "localhost,no-such-host.invalid", "port=1,5432").await;
    assert!(e.contains("none of 2 hosts") && e.contains("refused") && e.contains("not found"), "{e}");
    // A server that accepts and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let e = s.refusal("app", "127.0.0.1", &format!("port={port}&connect_timeout=1")).await;
    assert!(e.contains("no answer within 1s"), "{e}");
    // An unreachable host among several does not matter.
    let both = format!("port=1,{}&host=localhost,localhost", s.port);
    s.connect("app", "localhost", &both).await.unwrap();
}

#[tokio::test]
async fn among_several_hosts_the_primary_is_found_and_a_standby_is_called_read_only() {
    let s = Server::start(None);
    let standby = s.standby();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hosts = |ports: &[u16], attrs: &str| {
        let (names, ports): (Vec<_>, Vec<_>) = ports.iter().map(|port| ("localhost", port.to_string())).unzip();
        let (names, ports) = (names.join(","), ports.join(","));
        format!("host={names}&port={ports}&target_session_attrs={attrs}&connect_timeout=5")
    };
    let is_standby = async |parameters: &str| {
        let session = s.connect("app", "localhost", parameters).await.unwrap();
        session.client.query_typed("select pg_catalog.pg_is_in_recovery()", &[]).await.unwrap()[0].get::<_, bool>(0)
    };
    assert!(!is_standby(&hosts(&[standby.port, s.port], "read-write")).await);
    assert!(is_standby(&hosts(&[s.port, standby.port], "read-only")).await);
    // Neither one that refuses nor one that says nothing is in the way.
    let quick = |parameters: String| parameters.replace("connect_timeout=5", "connect_timeout=1");
    let silent = silent.local_addr().unwrap().port();
    assert!(!is_standby(&quick(hosts(&[1, silent, standby.port, s.port], "read-write"))).await);

    let e = s.refusal("app", "localhost", &hosts(&[standby.port], "read-write")).await;
    assert!(e.contains(&format!("localhost:{}", standby.port)) && e.contains("the server is read-only"), "{e}");
    assert!(e.contains("target_session_attrs") && e.contains("name the right host, or several"), "{e}");
    let e = s.refusal("app", "localhost", &hosts(&[1, standby.port], "read-write")).await;
    assert!(e.contains("none of 2 hosts") && e.contains("refused") && e.contains("read-only"), "{e}");

    // Who does not ask for a kind of server lands on the standby, and is told what to set.
    let job = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/jobs/messages_auth_user_id");
    let url = format!("postgresql://app:{PASSWORD}@localhost:{},localhost:{}/app", standby.port, s.port);
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_backfilld"));
    daemon.env("BACKFILLD_DATABASE__URL", url).env("BACKFILLD_HTTP__LISTEN", "off");
    let ran = daemon.args(["run", "--once", job]).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(5), "{said}");
    assert!(said.contains("this server is read-only") && said.contains("target_session_attrs=read-write"), "{said}");
}

#[tokio::test]
async fn tls_without_asking_first_works_from_17_on_and_is_explained_before() {
    let s = Server::start(Some(for_localhost));
    let plain = s.connect("app", "localhost", "sslmode=disable").await.unwrap();
    let direct = format!("sslmode=verify-full&sslrootcert={}&sslnegotiation=direct", s.path("ca.crt"));
    if plain.server_version_num >= 170_000 {
        assert!(uses_tls(&s.connect("app", "localhost", &direct).await.unwrap()).await);
        let e = s.refusal("app", "127.0.0.1", &direct).await;
        assert!(e.contains("not for 127.0.0.1"), "{e}");
    } else {
        let e = s.refusal("app", "localhost", &direct).await;
        assert!(e.contains("sslnegotiation=direct needs PostgreSQL 17"), "{e}");
    }
}

#[tokio::test]
async fn every_session_has_our_settings_and_can_be_cancelled_over_tls() {
    let s = Server::start(Some(for_localhost));
    let settings = s.settings("app", "localhost", &format!("sslmode=verify-full&sslrootcert={}", s.path("ca.crt")));
    let connector = Connector::new(&settings).unwrap();
    let session = connector.connect("messages_auth_user_id/1f2e3d4c/batch").await.unwrap();
    for (name, value) in [
        ("row_security", "off"),
        ("search_path", "pg_catalog, pg_temp"),
        ("statement_timeout", "1min"),
        ("client_connection_check_interval", "5s"),
        ("application_name", "backfilld/messages_auth_user_id/1f2e3d4c/batch"),
    ] {
        let row = &session.client.query_typed(&format!("show {name}"), &[]).await.unwrap()[0];
        assert_eq!(row.get::<_, &str>(0), value, "{name}");
    }
    let sql = "select pid = pg_catalog.pg_backend_pid() and backend_start = $2::text::timestamptz
                 from pg_catalog.pg_stat_activity where pid = $1";
    let types = [
        (&session.pid as _, tokio_postgres::types::Type::INT4),
        (&session.backend_start as _, tokio_postgres::types::Type::TEXT),
    ];
    assert!(session.client.query_typed(sql, &types).await.unwrap()[0].get::<_, bool>(0));
    assert!(session.server_version_num >= 120_000);

    // A request that comes before the statement is lost.
    let watcher = connector.connect("watcher").await.unwrap();
    let under_way = "select count(*) from pg_catalog.pg_stat_activity where pid = $1 and wait_event = 'PgSleep'";
    let cancel = async {
        let types = [(&session.pid as _, tokio_postgres::types::Type::INT4)];
        while watcher.client.query_typed(under_way, &types).await.unwrap()[0].get::<_, i64>(0) == 0 {}
        session.canceller().cancel().await.unwrap();
    };
    let (ended, ()) = tokio::join!(session.client.batch_execute("select pg_catalog.pg_sleep(60)"), cancel);
    let error = ended.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57014");

    let pid = session.pid;
    session.close().await;
    let pool = Pool::new(&connector, &settings, "pool").unwrap();
    let client = pool.get().await.unwrap();
    assert_eq!((pool.status().in_use, pool.status().idle), (1, 0));
    let row = &client.query_typed("show row_security", &[]).await.unwrap()[0];
    assert_eq!(row.get::<_, &str>(0), "off");
    // A closed session leaves no backend; the server may need a moment to notice the goodbye.
    let left = "select count(*) from pg_catalog.pg_stat_activity where pid = $1";
    let types = [(&pid as _, tokio_postgres::types::Type::INT4)];
    while client.query_typed(left, &types).await.unwrap()[0].get::<_, i64>(0) > 0 {}
    drop(client);
    assert_eq!((pool.status().in_use, pool.status().idle), (0, 1));

    let second = connector.connect("watched").await.unwrap();
    let client = pool.get().await.unwrap();
    let terminate = "select pg_catalog.pg_terminate_backend($1)";
    client.query_typed(terminate, &[(&second.pid, tokio_postgres::types::Type::INT4)]).await.unwrap();
    second.closed().await;
    assert!(second.is_closed());
}

#[tokio::test]
async fn a_pool_says_why_it_cannot_connect() {
    let s = Server::start(None);
    let mut settings = s.settings("app", "localhost", "");
    settings.url = Some(SecretString::from(format!("postgresql://app@localhost:{}/app", s.port)));
    let file = s.dir.path().join("password");
    fs::write(&file, "wrong\n").unwrap();
    settings.password_file = Some(file.clone());
    let connector = Connector::new(&settings).unwrap();
    let pool = Pool::new(&connector, &settings, "pool").unwrap();
    let e = pool.get().await.unwrap_err();
    assert!(e.render().contains("28P01"), "{}", e.render());
    // A rotated secret needs no restart.
    fs::write(&file, "right:p@ss/word\n").unwrap();
    let _client = pool.get().await.unwrap();
}
