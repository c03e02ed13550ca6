//! The server that all tests share, also across processes and runs. The first one starts it, under a file lock; it
//! stays for the next run until `make test-clean`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use backfilld::demo::cluster::{self, Cluster, ClusterOptions, SUPERUSER};
use sha2::{Digest as _, Sha256};

/// Directory with the programs of the server to test against; default: as the demo finds them.
const BIN_ENV: &str = "BACKFILLD_TEST_PG_BIN";

/// Nothing in a test server has to survive a power failure. Logical decoding and prepared transactions are there for
/// the tests that need slots and two-phase commit.
const SETTINGS: &str = "\
fsync = off
full_page_writes = off
synchronous_commit = off
max_connections = 200
shared_buffers = 128MB
wal_level = logical
max_replication_slots = 20
max_wal_senders = 20
max_prepared_transactions = 10
track_commit_timestamp = off
log_min_duration_statement = -1
log_lock_waits = on";

pub struct Server {
    pub cluster: Cluster,
    /// Part of the name of every database of this process.
    pub token: String,
    /// Locked as long as this process lives, which is how others know that its databases are in use.
    _alive: File,
}

/// The shared server. The first call in a process finds or starts it, and may take some seconds.
pub fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(Server::find)
}

impl Server {
    pub fn url(&self, role: &str, database: &str) -> String {
        self.cluster.url(role, database)
    }

    fn find() -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("tmp is inside of target");
        let root = target.join("test-pg");
        fs::create_dir_all(&root).expect("target is writable");
        let bin = std::env::var_os(BIN_ENV).map(PathBuf::from);
        let bin = cluster::find_binaries(bin.as_deref()).unwrap_or_else(|e| panic!("{}", e.render()));
        let version = cluster::server_version(&bin).expect("the server has a version");
        let key = digest(&[SETTINGS, &bin.to_string_lossy()]);
        let name = format!("{version}-{}", &key[..8]);

        let lock = File::create(root.join(format!("{name}.lock"))).expect("target is writable");
        lock.lock().expect("the file system has locks");
        let cluster = adopt_or_start(&root.join(&name), bin);
        let alive = root.join(format!("{name}.alive"));
        fs::create_dir_all(&alive).expect("target is writable");
        let dead = dead_tokens(&alive);
        if !dead.is_empty() {
            let url = cluster.url(SUPERUSER, "postgres");
            block_on(async move { collect(&url, &dead).await });
        }
        let token = uuid::Uuid::new_v4().simple().to_string()[..12].to_owned();
        let file = File::create(alive.join(&token)).expect("target is writable");
        file.lock().expect("the file system has locks");
        Self { cluster, token, _alive: file }
    }
}

/// `place` is the cluster's directory, or leads to it where the server's account could not get into `target`.
fn adopt_or_start(place: &Path, bin: PathBuf) -> Cluster {
    if let Some(cluster) = place.canonicalize().ok().and_then(|dir| Cluster::adopt(&dir)) {
        return cluster;
    }
    if let Ok(stale) = place.canonicalize() {
        fs::remove_dir_all(stale).expect("a dead server's directory can be deleted");
    }
    let _ = fs::remove_file(place);
    let inside = place.parent().is_some_and(cluster::is_open_to_others);
    let settings = SETTINGS.lines().map(str::to_owned).collect();
    let dir = inside.then(|| place.to_owned());
    let options = ClusterOptions { bin: Some(bin), dir, port: None, settings };
    let mut cluster = Cluster::start(&options).unwrap_or_else(|e| panic!("{}", e.render()));
    if !inside {
        std::os::unix::fs::symlink(cluster.dir(), place).expect("target is writable");
    }
    cluster.keep();
    cluster
}

/// Processes that ended without dropping their databases: nobody holds the lock on their file.
fn dead_tokens(alive: &Path) -> Vec<String> {
    let mut dead = Vec::new();
    for entry in fs::read_dir(alive).expect("target is readable").flatten() {
        let free = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if free && fs::remove_file(entry.path()).is_ok() {
            dead.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    dead
}

async fn collect(url: &str, dead: &[String]) {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.expect("the server answers");
    tokio::spawn(connection);
    let rows = client.query("select datname from pg_database where datname like 't\\_%'", &[]).await;
    for row in rows.expect("pg_database is readable") {
        let name: String = row.get(0);
        if dead.iter().any(|token| name.starts_with(&format!("t_{token}_"))) {
            let _ = client.batch_execute(&format!("drop database if exists {name} with (force)")).await;
        }
    }
}

/// Whether the server is that new. If not, the caller's test is left out, and this says why.
pub fn has_version(major: u32, why: &str) -> bool {
    let version = cluster::server_version(server().cluster.bin()).expect("the server has a version");
    let is = version.split('.').next().and_then(|v| v.parse().ok()).is_some_and(|v: u32| v >= major);
    if !is {
        eprintln!("left out on PostgreSQL {version}: {why}");
    }
    is
}

/// Runs a future to its end from anywhere, also from `drop` inside of a runtime.
pub fn block_on<T: Send>(future: impl Future<Output = T> + Send) -> T {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(future)
    };
    std::thread::scope(|scope| scope.spawn(run).join().expect("it did not panic"))
}

/// Hexadecimal.
pub fn digest(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
