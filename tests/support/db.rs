//! A database per test, copied from a template that is built once.

use std::sync::atomic::{AtomicU32, Ordering};

use backfilld::demo::cluster::SUPERUSER;
use backfilld::demo::sample;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, NoTls};

use super::server::{block_on, digest, server};
use super::session::{Session, wait_until};

/// One key for all templates: building one also touches the roles, which belong to the whole server.
const BUILD_LOCK: i64 = 0x6261_636b_6669_6c6c;

/// Seed of the sample data in templates.
const SEED: u32 = 1;

/// What a test's database holds at first.
#[derive(Debug, Clone, Copy)]
pub enum Template {
    /// Nothing but the roles.
    Empty,
    /// The sample's schema without rows.
    Schema,
    /// The schema and this many messages.
    Rows(u32),
}

/// A database of its own, dropped with this value together with everyone who is still connected.
pub struct TestDb {
    name: String,
    /// Looks at the other sessions; logging in anew for each look would be most of a test's time.
    watcher: OnceCell<Client>,
}

impl TestDb {
    pub async fn new(template: Template) -> Self {
        let admin = connect(&server().url(SUPERUSER, "postgres")).await;
        let source = build(&admin, template).await;
        Self::copy_of(&admin, &source).await
    }

    /// A copy of a test's database, ledger included. Nobody may be connected to it any more, or stay.
    pub async fn copy(from: &Self) -> Self {
        let admin = connect(&server().url(SUPERUSER, "postgres")).await;
        Self::copy_of(&admin, &from.name).await
    }

    async fn copy_of(admin: &Client, source: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("t_{}_{}", server().token, NEXT.fetch_add(1, Ordering::Relaxed));
        let create = format!("create database {name} template {source}");
        // Whoever built or changed it may not have left it yet.
        wait_until("the template is free to be copied", async || match admin.batch_execute(&create).await {
            Ok(()) => true,
            Err(e) if e.code().is_some_and(|c| c.code() == "55006") => false,
            Err(e) => panic!("{create}: {}", backfilld::Error::from(e)),
        })
        .await;
        let db = Self { name, watcher: OnceCell::new() };
        sample::grant_on_database(&db.client(SUPERUSER).await).await.expect("grants");
        db
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A URL with password, for one of [`sample::LOGINS`].
    pub fn url(&self, role: &str) -> String {
        server().url(role, &self.name)
    }

    pub async fn client(&self, role: &str) -> Client {
        connect(&self.url(role)).await
    }

    /// A superuser's connection.
    pub async fn admin(&self) -> Client {
        self.client(SUPERUSER).await
    }

    /// A named session to interleave with others.
    pub async fn session(&self, name: &'static str, role: &str) -> Session {
        Session::new(name, self.client(role).await).await
    }

    /// Waits until the server says that the session waits for somebody else's lock.
    pub async fn wait_blocked(&self, session: &Session) {
        let what = format!("session {:?} waits for a lock", session.name());
        wait_until(&what, async || {
            assert!(!session.is_finished(), "session {:?} ended instead of waiting for a lock", session.name());
            self.is_blocked(session).await
        })
        .await;
    }

    /// Waits until the session has ended what it was sent, or waits for somebody else's lock.
    pub async fn wait_blocked_or_finished(&self, session: &Session) {
        let what = format!("session {:?} waits or ends", session.name());
        wait_until(&what, async || session.is_finished() || self.is_blocked(session).await).await;
    }

    async fn is_blocked(&self, session: &Session) -> bool {
        let watcher = self.watcher.get_or_init(|| self.admin()).await;
        let sql = "select cardinality(pg_blocking_pids($1)) > 0";
        watcher.query_one(sql, &[&session.pid()]).await.expect("pg_blocking_pids").get(0)
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let url = server().url(SUPERUSER, "postgres");
        let sql = format!("drop database if exists {} with (force)", self.name);
        block_on(async move {
            let _ = connect(&url).await.batch_execute(&sql).await;
        });
    }
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap_or_else(|e| {
        panic!("cannot connect to the test server: {}", backfilld::Error::from(e));
    });
    tokio::spawn(connection);
    client
}

/// The template's name; built if it does not exist. One that accepts connections was not finished.
async fn build(admin: &Client, template: Template) -> String {
    let content = [sample::ROLES_SQL, sample::SCHEMA_SQL, sample::DATA_SQL, &format!("{template:?}")];
    let name = format!("tpl_{}", &digest(&content)[..16]);
    let ready = "select exists (select from pg_database where datname = $1 and not datallowconn)";
    let is_ready = async || admin.query_one(ready, &[&name]).await.expect("pg_database is readable").get::<_, bool>(0);
    if is_ready().await {
        return name;
    }
    admin.execute("select pg_advisory_lock($1)", &[&BUILD_LOCK]).await.expect("lock");
    if !is_ready().await {
        let recreate = [format!("drop database if exists {name} with (force)"), format!("create database {name}")];
        for sql in &recreate {
            admin.batch_execute(sql).await.expect("a superuser may create databases");
        }
        sample::create_roles(admin, server().cluster.password()).await.expect("roles");
        {
            let client = connect(&server().url(SUPERUSER, &name)).await;
            if !matches!(template, Template::Empty) {
                sample::create_schema(&client).await.expect("schema");
            }
            if let Template::Rows(rows) = template {
                sample::generate(&client, rows.into(), SEED).await.expect("data");
            }
        }
        let finish = format!("alter database {name} with allow_connections false");
        admin.batch_execute(&finish).await.expect("a superuser may alter databases");
    }
    admin.execute("select pg_advisory_unlock($1)", &[&BUILD_LOCK]).await.expect("unlock");
    name
}
