//! Behind a real PgBouncer: session mode works from end to end; transaction mode is refused before anything is set there,
//! or passed by where `database.ddl_url` leads to the server itself.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use backfilld::demo::cluster::SUPERUSER;
use backfilld::demo::sample::DAEMON;
use tokio_postgres::NoTls;

use crate::support::{Cli, JobDir, Ledger, Template, TestDb, server, wait_until};

/// A PgBouncer in front of the tests' server, stopped when dropped.
struct PgBouncer {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl PgBouncer {
    /// `None` where it is not installed.
    async fn start(mode: &str, pool_size: u16) -> Option<Self> {
        let found = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"];
        let Some(program) = found.iter().find(|p| std::path::Path::new(p).exists()) else {
            eprintln!("pgbouncer is not there (scripts/ensure.sh installs it): not tried behind a pooler");
            return None;
        };
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("ours");
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
        let cluster = &server().cluster;
        let (users, config) = (dir.path().join("users"), dir.path().join("pgbouncer.ini"));
        let password = cluster.password();
        let logins: String = [DAEMON, SUPERUSER].map(|u| format!("\"{u}\" \"{password}\"\n")).concat();
        std::fs::write(&users, logins).expect("writable");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = {mode}\n\
             default_pool_size = {pool_size}\nmax_client_conn = 100\n",
            cluster.port(),
            users.display()
        );
        std::fs::write(&config, text).expect("writable");
        // It refuses to run as root.
        let root = std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
        let mut command = if root {
            let mut c = Command::new("setpriv");
            c.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]);
            c
        } else {
            Command::new(program)
        };
        let child = command.arg("-q").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let pooler = Self { child: child.expect("pgbouncer starts"), port, _dir: dir };
        wait_until("pgbouncer listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok())
            .await;
        Some(pooler)
    }

    /// `url` by way of this pooler.
    fn url(&self, url: &str) -> String {
        url.replace(&format!(":{}/", server().cluster.port()), &format!(":{}/", self.port))
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_pooler_in_session_mode_carries_a_whole_job() {
    let Some(pooler) = PgBouncer::start("session", 20).await else { return };
    let db = TestDb::new(Template::Rows(600)).await;
    let ledger = Ledger::new(&db).await;
    let (job, cli) = (JobDir::heap(), Cli::at(&pooler.url(&db.url(DAEMON))));
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    cli.run(&["rollback", job.path(), "--yes"]).await.expect(0, "");
}

#[tokio::test]
async fn a_pooler_in_transaction_mode_is_refused_before_anything_is_set_there() {
    // One process, so that whatever a session set there could not hide; and several, as usual.
    for pool_size in [1, 5] {
        let Some(pooler) = PgBouncer::start("transaction", pool_size).await else { return };
        let db = TestDb::new(Template::Schema).await;
        let (url, job) = (pooler.url(&db.url(DAEMON)), JobDir::shipped());
        for args in [&["run", "--once", job.path()][..], &["check", job.path()], &["status"]] {
            let ended = Cli::at(&url).run(args).await;
            ended
                .expect(5, "is a pooler in transaction mode")
                .expect(5, "database.url")
                .expect(5, "pool_mode = session");
        }
        // Who comes next finds every server process as PgBouncer made it.
        let mut clients = Vec::new();
        for _ in 0..pool_size {
            let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("it lets us in");
            tokio::spawn(connection);
            client.batch_execute("begin").await.expect("a process of its own");
            for (name, value) in [("row_security", "on"), ("search_path", "\"$user\", public"), ("lock_timeout", "0")] {
                let shown = client.simple_query(&format!("show {name}")).await.expect("shown");
                let shown = shown.iter().find_map(|m| match m {
                    tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
                    _ => None,
                });
                assert_eq!(shown, Some(value), "{name}");
            }
            clients.push(client);
        }
    }
}

#[tokio::test]
async fn past_a_pooler_in_transaction_mode_a_second_address_leads() {
    let Some(pooler) = PgBouncer::start("transaction", 5).await else { return };
    let db = TestDb::new(Template::Rows(600)).await;
    let ledger = Ledger::new(&db).await;
    let job = JobDir::shipped();
    let cli = Cli::at(&pooler.url(&db.url(DAEMON))).env("BACKFILLD_DATABASE__DDL_URL", &db.url(DAEMON));
    let ended = cli.run(&["run", "--once", job.path()]).await;
    ended.expect(0, "everything goes to database.ddl_url").expect(0, "the job is done");
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    // The other way round: the second address is the pooler.
    let cli = Cli::new(&db).env("BACKFILLD_DATABASE__DDL_URL", &pooler.url(&db.url(DAEMON)));
    let ended = cli.run(&["rollback", job.path(), "--yes"]).await;
    ended.expect(5, "is a pooler in transaction mode").expect(5, "database.ddl_url");
}

#[tokio::test]
async fn a_pooler_that_does_not_know_us_is_told_from_the_server() {
    let Some(pooler) = PgBouncer::start("session", 5).await else { return };
    let db = TestDb::new(Template::Schema).await;
    let stranger = db.url(DAEMON).replace(DAEMON, "stranger");
    Cli::at(&pooler.url(&stranger)).run(&["status"]).await.expect(4, "stranger").expect(4, "hint:");
}
