//! The server, its template databases, and daemons as processes.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use backfilld::demo::cluster::{self, Cluster, ClusterOptions, SUPERUSER};
use backfilld::demo::sample;
use backfilld::{Error, Result};
use tokio_postgres::{Client, NoTls};

/// The daemon that is measured: the release binary.
pub const BINARY: &str = env!("CARGO_BIN_EXE_backfilld");

/// The shipped job.
pub const JOB: &str = "messages_auth_user_id";

/// Durable. Autovacuum would fall into some runs and not into others, so it is off.
const SETTINGS: [&str; 6] = [
    "checkpoint_timeout = 30min",
    "wal_level = logical",
    "max_connections = 50",
    "autovacuum = off",
    "track_io_timing = off",
    "cluster_name = 'backfilld bench'",
];

/// Longer than any single step takes with ten million rows.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Rare enough to cost nothing beside what is measured.
const POLL: Duration = Duration::from_millis(25);

/// Kinds of tables that heap order has to cope with.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// 1.5 kB on the page, five rows to each, and 6 kB more in TOAST for every ninth row
    Wide,
    /// 80 bytes, nearly all of it keys and times
    Narrow,
    /// fillfactor 70: nearly a third of each page is free
    Fillfactor,
    /// A GIN index on the words of the text
    Gin,
    /// An index on updated_at, which a trigger that fires changes: no update can be HOT
    UpdatedAt,
}

impl Shape {
    fn sql(self) -> &'static [&'static str] {
        const REPLICA: &str = "set session_replication_role = replica";
        const REWRITE: &str = "vacuum full analyze public.messages";
        match self {
            // Digests do not compress.
            Self::Wide => &[
                REPLICA,
                "alter table public.messages alter column content set storage external",
                "update public.messages m set content = (select string_agg(md5(m.id::text || n), '')
                   from generate_series(1, case when m.created_at = date_trunc('minute', m.created_at)
                     and extract(minute from m.created_at)::int % 3 = 0 then 234 else 42 end) n)",
                REWRITE,
            ],
            Self::Narrow => {
                &[REPLICA, "update public.messages set content = '', metadata = '{}', image_url = null", REWRITE]
            }
            Self::Fillfactor => &["alter table public.messages set (fillfactor = 70)", REWRITE],
            Self::Gin => &["create index messages_words on public.messages using gin (to_tsvector('simple', content))"],
            Self::UpdatedAt => &[
                "create index messages_updated_at on public.messages (updated_at)",
                "drop trigger messages_broadcast on public.messages",
            ],
        }
    }
}

pub struct World {
    pub cluster: Cluster,
    pub rows: u64,
    pub shape: Option<Shape>,
    admin: Client,
    files: tempfile::TempDir,
    next: Cell<u32>,
}

/// A database of its own; dropped by [`World::discard`].
pub struct Database {
    pub name: String,
    pub admin: Client,
}

/// Where the job stops, and how its batches are cut.
#[derive(Default)]
pub struct Job<'a> {
    pub hold_before: &'a str,
    pub batching: &'a str,
}

/// A running daemon. Killed when dropped.
pub struct Daemon {
    pub child: Child,
    pub started: Instant,
    log: PathBuf,
}

impl World {
    pub async fn start(rows: u64, server: &[(&str, &str)], bigint: bool, shape: Option<Shape>) -> Result<Self> {
        say(&format!("a server with {rows} messages"));
        let mut settings = SETTINGS.map(str::to_owned).to_vec();
        settings.extend(server.iter().map(|(name, value)| format!("{name} = '{}'", value.replace('\'', "''"))));
        let options = ClusterOptions { settings, ..Default::default() };
        let cluster = tokio::task::block_in_place(|| Cluster::start(&options))?;
        let admin = connect(&cluster.url(SUPERUSER, "postgres")).await?;
        sample::create_roles(&admin, cluster.password()).await?;
        let files = tempfile::tempdir().map_err(|e| Error::internal("no temporary directory").with_source(e))?;
        let world = Self { cluster, rows, shape, admin, files, next: Cell::new(0) };
        world.generate("plain", rows).await?;
        if bigint {
            world.number_rows("plain").await?;
        }
        if let Some(shape) = shape {
            let client = connect(&world.cluster.url(SUPERUSER, "plain")).await?;
            for sql in shape.sql() {
                client.batch_execute(sql).await?;
            }
        }
        world.expand("plain", "expanded", "").await?;
        Ok(world)
    }

    pub fn server_version(&self) -> Result<String> {
        cluster::server_version(self.cluster.bin())
    }

    /// A template with the sample's tables before anything happened to them.
    pub async fn generate(&self, name: &str, rows: u64) -> Result<()> {
        self.admin.batch_execute(&format!("create database {name}")).await?;
        let client = connect(&self.cluster.url(SUPERUSER, name)).await?;
        sample::grant_on_database(&client).await?;
        sample::create_schema(&client).await?;
        sample::generate(&client, rows, 1).await
    }

    /// Gives the table a bigint key, in the order of its rows.
    async fn number_rows(&self, name: &str) -> Result<()> {
        let client = connect(&self.cluster.url(SUPERUSER, name)).await?;
        client
            .batch_execute(
                "alter table public.messages drop column id;
                 alter table public.messages add column id bigint generated by default as identity primary key;",
            )
            .await?;
        Ok(client.batch_execute("vacuum full analyze public.messages").await?)
    }

    /// A template with the job held before its first batch. How its rows are walked is fixed then.
    pub async fn expand(&self, from: &str, name: &str, batching: &str) -> Result<()> {
        self.create(from, name).await?;
        self.run_to_hold(name, &Job { hold_before: "\"backfill\"", batching }).await
    }

    /// A template with the job held before its flip.
    pub async fn ready_to_flip(&self) -> Result<String> {
        let name = "ready".to_owned();
        self.create("expanded", &name).await?;
        self.command(&name, &["cutover", JOB])?;
        self.run_to_hold(&name, &Job { hold_before: "\"flip\"", ..Job::default() }).await?;
        Ok(name)
    }

    /// Runs a job that is held before its flip to its end.
    pub async fn flip(&self, db: &Database) -> Result<()> {
        self.command(&db.name, &["cutover", JOB])?;
        let job = Job { hold_before: "\"flip\"", ..Job::default() };
        let mut daemon = self.daemon(&db.name, "bench", &job, &["--once"], &[])?;
        let status = daemon.wait().await?;
        if status.success() { Ok(()) } else { Err(daemon.failed(&format!("ended with {status}"))) }
    }

    async fn run_to_hold(&self, name: &str, job: &Job<'_>) -> Result<()> {
        let mut daemon = self.daemon(name, "bench", job, &["--once"], &[])?;
        let code = daemon.wait().await?.code();
        // 5: held.
        if code == Some(5) { Ok(()) } else { Err(daemon.failed(&format!("ended with {code:?}"))) }
    }

    async fn create(&self, template: &str, name: &str) -> Result<()> {
        let version: i32 =
            self.admin.query_one("select current_setting('server_version_num')::int4", &[]).await?.get(0);
        let strategy = if version >= 150_000 { " strategy file_copy" } else { "" };
        let sql = format!("create database {name} template {template}{strategy}");
        let began = Instant::now();
        // Whoever used the template last may still be leaving it.
        while let Err(e) = self.admin.batch_execute(&sql).await {
            if e.code().is_none_or(|c| c.code() != "55006") || began.elapsed() > Duration::from_secs(10) {
                return Err(e.into());
            }
            tokio::time::sleep(POLL).await;
        }
        sample::grant_on_database(&connect(&self.cluster.url(SUPERUSER, name)).await?).await
    }

    /// A fresh copy of a template, with everything written to disk.
    pub async fn copy(&self, template: &str) -> Result<Database> {
        let name = format!("run{}", self.next.replace(self.next.get() + 1));
        self.create(template, &name).await?;
        let admin = connect(&self.cluster.url(SUPERUSER, &name)).await?;
        admin.batch_execute("checkpoint").await?;
        Ok(Database { name, admin })
    }

    pub async fn discard(&self, database: Database) -> Result<()> {
        let sql = format!("drop database {} with (force)", database.name);
        drop(database);
        Ok(self.admin.batch_execute(&sql).await?)
    }

    /// Starts the daemon on a database, for the shipped job with other hold points and batches.
    pub fn daemon(
        &self,
        database: &str,
        instance: &str,
        job: &Job<'_>,
        flags: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Daemon> {
        let dir = self.job(job).map_err(|e| Error::internal("cannot write the job").with_source(e))?;
        let log = self.files.path().join(format!("{database}-{instance}.log"));
        let spawn = || -> std::io::Result<Child> {
            let stderr = std::fs::File::create(&log)?;
            let mut command = self.backfilld(database);
            command.arg("run").arg(&dir).args(flags).env("BACKFILLD_INSTANCE", instance).envs(env.iter().copied());
            command.stdout(Stdio::null()).stderr(stderr).spawn()
        };
        let started = Instant::now();
        let child = spawn().map_err(|e| Error::internal(format!("cannot run {BINARY}")).with_source(e))?;
        Ok(Daemon { child, started, log })
    }

    /// Runs another command of the binary to its end; gives what it printed.
    pub fn command(&self, database: &str, args: &[&str]) -> Result<String> {
        let output = self.backfilld(database).args(args).output();
        let output = output.map_err(|e| Error::internal(format!("cannot run {BINARY}")).with_source(e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::failed(format!("{args:?}: {}", String::from_utf8_lossy(&output.stderr).trim_end())))
    }

    fn backfilld(&self, database: &str) -> Command {
        let mut command = Command::new(BINARY);
        for (key, _) in std::env::vars_os() {
            let key = key.to_string_lossy().into_owned();
            if key.starts_with("BACKFILLD_") || key.starts_with("PG") {
                command.env_remove(key);
            }
        }
        command
            .env("BACKFILLD_DATABASE__URL", self.cluster.url(sample::DAEMON, database))
            .env("BACKFILLD_DATABASE__DEDICATED_LOGIN", "true")
            .env("BACKFILLD_HTTP__LISTEN", "off")
            .stdin(Stdio::null());
        command
    }

    /// Whether the application's triggers fire in batches.
    pub fn fires(&self) -> bool {
        self.shape == Some(Shape::UpdatedAt)
    }

    fn job(&self, job: &Job<'_>) -> std::io::Result<PathBuf> {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs").join(JOB);
        let text = std::fs::read_to_string(shipped.join("job.toml"))?;
        let text = match self.fires() {
            true => text.replace("triggers = \"skip\"", "triggers = \"fire\""),
            false => text,
        };
        let text = format!("hold_before = [{}]\n{text}\n[batching]\n{}\n", job.hold_before, job.batching);
        let dir = self.files.path().join(format!("job{}", self.next.replace(self.next.get() + 1)));
        std::fs::create_dir(&dir)?;
        std::fs::copy(shipped.join("add_message.sql"), dir.join("add_message.sql"))?;
        std::fs::write(dir.join("job.toml"), text)?;
        Ok(dir)
    }
}

impl Database {
    /// Phase, status and committed batches of the job.
    pub async fn progress(&self) -> Result<(String, String, i64)> {
        let row = self
            .admin
            .query_one(
                "select j.phase, j.status, coalesce((select sum(batches) from backfilld.checkpoint), 0)::int8
                 from backfilld.job j",
                &[],
            )
            .await?;
        Ok((row.get(0), row.get(1), row.get(2)))
    }

    /// Looks until `condition` holds on phase, status and batches.
    pub async fn until(&self, daemon: &mut Daemon, condition: impl Fn(&str, &str, i64) -> bool) -> Result<()> {
        while daemon.started.elapsed() < PATIENCE {
            let (phase, status, batches) = self.progress().await?;
            if condition(&phase, &status, batches) {
                return Ok(());
            }
            if status == "failed" || daemon.has_ended()? {
                return Err(daemon.failed(&format!("stands in {phase} as {status}")));
            }
            tokio::time::sleep(POLL).await;
        }
        Err(daemon.failed("takes too long"))
    }
}

impl Daemon {
    pub fn has_ended(&mut self) -> Result<bool> {
        let ended = self.child.try_wait().map_err(|e| Error::internal("cannot wait").with_source(e))?;
        Ok(ended.is_some())
    }

    pub async fn wait(&mut self) -> Result<ExitStatus> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(e) => return Err(Error::internal("cannot wait for the daemon").with_source(e)),
            }
        }
    }

    /// Sends SIGTERM and waits for the end; gives the time it took.
    pub async fn terminate(&mut self) -> Result<Duration> {
        let began = Instant::now();
        let kill = Command::new("kill").arg(self.child.id().to_string()).status();
        kill.map_err(|e| Error::internal("cannot run kill").with_source(e))?;
        let status = self.wait().await?;
        if status.success() { Ok(began.elapsed()) } else { Err(self.failed(&format!("{status} on SIGTERM"))) }
    }

    pub fn failed(&self, what: &str) -> Error {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(5)..].join("\n");
        Error::failed(format!("the daemon {what}")).with_hint(tail)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn connect(url: &str) -> Result<Client> {
    // Named as one of ours: the daemon's pace looks who else works.
    let url = format!("{url}?application_name=backfilld/bench");
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// stdout is for the report.
pub fn say(line: &str) {
    eprintln!("bench: {line}");
}
