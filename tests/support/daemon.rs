//! Daemons: in this process, or as the real binary, which can be signalled and killed.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use backfilld::daemon::Daemon;
use backfilld::job::{self, JobSpec};
use backfilld::phase::Status;
use backfilld::settings::Settings;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio_postgres::Client;

use super::{TestDb, wait_until};

/// Name of the shipped job.
pub const JOB: &str = "messages_auth_user_id";

/// Tests run side by side on one server, each an application that the others' batches would be gentle with.
const CONSTANT: &str = "[throttle]\npace = \"constant\"\n";

/// A copy of the shipped job that a test may change.
pub struct JobDir {
    dir: TempDir,
}

impl JobDir {
    /// The shipped job without change, but small batches, so that there are several, and with so much time for each that a
    /// busy machine does not make it smaller.
    pub fn shipped() -> Self {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs").join(JOB);
        let dir = tempfile::tempdir().expect("a directory");
        for file in ["job.toml", "add_message.sql"] {
            std::fs::copy(from.join(file), dir.path().join(file)).expect("the shipped job is readable");
        }
        let out = Self { dir };
        // The largest owners, some without rows and nobody are always among those whose access is compared: enough for tests
        // of something else.
        out.replace("[access]\n", "[access]\nsample = 1\n");
        out.append(CONSTANT);
        out.append("\n[batching]\nstrategy = \"keyset\"\ninitial_rows = 100\nmax_rows = 100\nmin_rows = 1\ntarget_duration = \"2s\"");
        out
    }

    /// The same, walked in heap order.
    pub fn heap() -> Self {
        let out = Self::shipped();
        out.replace("strategy = \"keyset\"", "strategy = \"heap\"");
        out
    }

    /// With the shipped job, and `lines` before its first table.
    pub fn with(lines: &str) -> Self {
        let out = Self::shipped();
        out.replace("[target]", &format!("{lines}\n[target]"));
        out
    }

    /// For tests whose policies are not the old ones in another form.
    pub fn without_access(&self) {
        self.edit("job.toml", |text| {
            let (from, to) =
                (text.find("[access]").expect("access"), text.find("[side_effects]").expect("side effects"));
            text[..from].to_owned() + &text[to..]
        });
    }

    pub fn path(&self) -> &str {
        self.dir.path().to_str().expect("UTF-8")
    }

    pub fn edit(&self, file: &str, change: impl FnOnce(String) -> String) {
        let path = self.dir.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, change(text)).expect("writable");
    }

    pub fn replace(&self, from: &str, to: &str) {
        self.edit("job.toml", |text| {
            assert!(text.contains(from), "{from:?} is not in job.toml");
            text.replacen(from, to, 1)
        });
    }

    pub fn append(&self, lines: &str) {
        // A table can be there only once.
        self.edit("job.toml", |text| match lines.contains("[throttle]\n") {
            true if lines.contains("pace = ") => text.replace(CONSTANT, "") + lines + "\n",
            true => text.replace(CONSTANT, "") + &lines.replacen("[throttle]\n", CONSTANT, 1) + "\n",
            false => text + lines + "\n",
        });
    }

    pub fn spec(&self) -> JobSpec {
        job::load(self.dir.path()).unwrap_or_else(|e| panic!("{}", e.render()))
    }
}

/// Settings for a database of a test, with some changed: `[("lease.ttl", "3s")]`.
pub fn settings(db: &TestDb, role: &str, changes: &[(&str, &str)]) -> Settings {
    let mut all = vec![("database.url".to_owned(), db.url(role)), ("instance".to_owned(), "here".to_owned())];
    // Short, so that tests need not wait for it; the least that is allowed.
    all.push(("lease.ttl".to_owned(), "3s".to_owned()));
    all.push(("ddl.retry_max_wait".to_owned(), "100ms".to_owned()));
    all.extend(changes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    Settings::load_from(None, &BTreeMap::new(), all).unwrap_or_else(|e| panic!("{}", e.render()))
}

/// A daemon in this process, on a thread of its own. Asked to leave when dropped.
pub struct Local {
    pub daemon: Daemon,
    ended: oneshot::Receiver<backfilld::Result<Status>>,
}

impl Local {
    pub fn start(db: &TestDb, spec: JobSpec, once: bool, changes: &[(&str, &str)]) -> Self {
        let settings = settings(db, backfilld::demo::sample::DAEMON, changes);
        let daemon = Daemon::new(settings, spec, once).expect("valid settings");
        let running = daemon.clone();
        let (send, ended) = oneshot::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let _ = send.send(runtime.block_on(running.run()));
        });
        Self { daemon, ended }
    }

    /// How it ended.
    pub async fn ended(&mut self) -> backfilld::Result<Status> {
        let ended = tokio::time::timeout(super::session::DEADLINE, &mut self.ended).await;
        ended.expect("the daemon ends in time").expect("the daemon does not panic")
    }

    /// Asks it to leave, and waits until it has.
    pub async fn stop(&mut self) {
        self.daemon.shutdown.cancel();
        let ended = self.ended().await;
        assert!(matches!(&ended, Err(e) if e.kind() == backfilld::Kind::Interrupted), "{ended:?}");
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.daemon.shutdown.cancel();
    }
}

/// Runs a job to its end in this process.
pub async fn run_once(db: &TestDb, spec: JobSpec) -> backfilld::Result<Status> {
    Local::start(db, spec, true, &[]).ended().await
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; `None`: a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Fails the test unless the exit code is `code` and stderr has `text`.
    #[track_caller]
    pub fn expect(&self, code: i32, text: &str) -> &Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(self.stderr.contains(text), "no {text:?} in {self:#?}");
        self
    }
}

/// The real binary on a test's database.
#[derive(Clone)]
pub struct Cli {
    env: BTreeMap<String, String>,
    /// What starts it, before the binary.
    wrapper: Vec<&'static str>,
}

impl Cli {
    pub fn new(db: &TestDb) -> Self {
        Self::at(&db.url(backfilld::demo::sample::DAEMON))
    }

    pub fn at(url: &str) -> Self {
        let env = [
            ("BACKFILLD_DATABASE__URL", url),
            ("BACKFILLD_HTTP__LISTEN", "off"),
            ("BACKFILLD_INSTANCE", "here"),
            ("BACKFILLD_LEASE__TTL", "3s"),
            ("BACKFILLD_DDL__RETRY_MAX_WAIT", "100ms"),
        ];
        Self { env: env.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(), wrapper: Vec::new() }
    }

    /// As process 1 of a namespace of its own, as in a container.
    #[must_use]
    pub fn in_pid_namespace(mut self) -> Self {
        self.wrapper = vec!["unshare", "--pid", "--fork", "--kill-child"];
        self
    }

    /// Told to outlive its terminal.
    #[must_use]
    pub fn under_nohup(mut self) -> Self {
        self.wrapper = vec!["nohup"];
        self
    }

    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.insert(key.to_owned(), value.to_owned());
        self
    }

    /// The environment, for who starts the binary otherwise.
    pub fn environment(&self) -> Vec<(&str, &str)> {
        self.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect()
    }

    pub fn start(&self, args: &[&str]) -> Process {
        let mut command = Command::new(self.wrapper.first().unwrap_or(&env!("CARGO_BIN_EXE_backfilld")));
        if let Some((_, rest)) = self.wrapper.split_first() {
            command.args(rest).arg(env!("CARGO_BIN_EXE_backfilld"));
        }
        let child = command
            .args(args)
            .envs(&self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the binary starts");
        Process { child: Some(child) }
    }

    pub async fn run(&self, args: &[&str]) -> Ended {
        self.start(args).ended().await
    }
}

/// A running binary, killed when dropped.
pub struct Process {
    child: Option<Child>,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.as_ref().and_then(Child::id).expect("it runs")
    }

    /// `TERM`, `INT`, `HUP` or `KILL`.
    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        let sent = std::process::Command::new("kill").args(["-s", name, &pid]).status().expect("kill");
        assert!(sent.success(), "kill -s {name} {pid}");
    }

    /// The same for the process that a wrapper started.
    pub fn signal_child(&self, name: &str) {
        let pid = self.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("readable");
        let sent = std::process::Command::new("kill").args(["-s", name, children.trim()]).status().expect("kill");
        assert!(sent.success(), "kill -s {name} {children}");
    }

    pub async fn ended(mut self) -> Ended {
        let child = self.child.take().expect("it runs");
        let out = tokio::time::timeout(super::session::DEADLINE, child.wait_with_output()).await;
        let out = out.expect("the command ends in time").expect("its output can be read");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ended { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
    }
}

/// What the ledger says of the shipped job.
pub struct Ledger {
    pub client: Arc<Client>,
}

impl Ledger {
    pub async fn new(db: &TestDb) -> Self {
        Self { client: Arc::new(db.admin().await) }
    }

    /// A value of the job's row as text; empty if there is none yet.
    async fn job(&self, column: &str) -> String {
        let there = "select to_regclass('backfilld.job') is not null";
        if !self.client.query_one(there, &[]).await.expect("readable").get::<_, bool>(0) {
            return String::new();
        }
        let sql = format!("select {column}::text from backfilld.job where name = $1");
        self.client.query_opt(&sql, &[&JOB]).await.expect("readable").map_or_else(String::new, |r| r.get(0))
    }

    pub async fn status(&self) -> String {
        self.job("status").await
    }

    pub async fn phase(&self) -> String {
        self.job("phase").await
    }

    pub async fn reason(&self) -> String {
        self.job("reason").await
    }

    pub async fn wait_status(&self, status: &str) {
        wait_until(&format!("the job is {status}"), async || self.status().await == status).await;
    }

    /// One number.
    pub async fn number(&self, sql: &str) -> i64 {
        self.client.query_one(&format!("select ({sql})::int8"), &[]).await.expect(sql).get(0)
    }

    /// One yes or no.
    pub async fn is(&self, sql: &str) -> bool {
        self.client.query_one(&format!("select ({sql})::bool"), &[]).await.expect(sql).get(0)
    }

    pub async fn run(&self, sql: &str) {
        if let Err(e) = self.client.batch_execute(sql).await {
            panic!("{sql}: {}", backfilld::Error::from(e));
        }
    }

    /// Rows that are not filled.
    pub async fn unfilled(&self) -> i64 {
        self.number("select count(*) from public.messages where auth_user_id is null").await
    }

    /// Rows whose value is not their conversation's.
    pub async fn drift(&self) -> i64 {
        self.number(
            "select count(*) from public.messages m left join public.conversations c on c.id = m.conversation_id
             where m.auth_user_id is distinct from c.auth_user_id",
        )
        .await
    }
}
