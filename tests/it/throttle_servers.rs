//! The throttle with real replicas and slots, on servers of their own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use backfilld::demo::cluster::{Cluster, ClusterOptions, SUPERUSER};
use backfilld::demo::sample;
use tokio_postgres::{Client, NoTls};

use crate::support::{Cli, JobDir, Ledger, Session, wait_until};

const DATABASE: &str = "app";
const MB: i64 = 1024 * 1024;

/// A server with the sample's table.
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    pub(crate) ledger: Ledger,
}

impl World {
    pub(crate) async fn start(rows: u64, settings: &[&str]) -> Self {
        let bin = std::env::var_os("BACKFILLD_TEST_PG_BIN").map(Into::into);
        let mut all = vec!["fsync = off".to_owned(), "wal_level = logical".into(), "autovacuum = off".into()];
        all.extend(settings.iter().map(|s| (*s).to_owned()));
        let options = ClusterOptions { bin, settings: all, ..ClusterOptions::default() };
        let cluster = Cluster::start(&options).unwrap_or_else(|e| panic!("{}", e.render()));
        let admin = connect(&cluster.url(SUPERUSER, "postgres")).await;
        sample::create_roles(&admin, cluster.password()).await.expect("roles");
        admin.batch_execute(&format!("create database {DATABASE}")).await.expect("a database");
        let client = connect(&cluster.url(SUPERUSER, DATABASE)).await;
        sample::grant_on_database(&client).await.expect("grants");
        sample::create_schema(&client).await.expect("schema");
        sample::generate(&client, rows, 1).await.expect("data");
        Self { cluster, ledger: Ledger { client: Arc::new(client) } }
    }

    pub(crate) fn cli(&self) -> Cli {
        Cli::at(&self.cluster.url(sample::DAEMON, DATABASE))
    }

    pub(crate) async fn session(&self, name: &'static str, role: &str) -> Session {
        Session::new(name, connect(&self.cluster.url(role, DATABASE)).await).await
    }

    async fn waits_for(&self, text: &str) {
        let there = "select to_regclass('backfilld.job') is not null";
        let sql =
            format!("select exists (select from backfilld.job where status = 'running' and reason like '%{text}%')");
        wait_until(text, async || self.ledger.is(there).await && self.ledger.is(&sql).await).await;
    }

    /// Batches that were committed.
    async fn batches(&self) -> i64 {
        self.ledger.number("select coalesce(sum(batches), 0) from backfilld.checkpoint").await
    }

    /// Until more than `n` batches have gone on.
    pub(crate) async fn goes_on(&self, n: i64) {
        let before = self.batches().await;
        wait_until("batches go on", async || self.batches().await > before + n || self.ledger.status().await == "done")
            .await;
    }
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("it answers");
    tokio::spawn(connection);
    client
}

/// A streaming replica, made by `pg_basebackup`. Stopped when dropped.
pub(crate) struct Replica {
    bin: PathBuf,
    data: PathBuf,
    port: u16,
    url: String,
}

impl Replica {
    pub(crate) fn start(primary: &Cluster, name: &str) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let data = primary.dir().join(name);
        let url = primary.url(SUPERUSER, "postgres").replace(&format!(":{}/", primary.port()), &format!(":{port}/"));
        let replica = Self { bin: primary.bin().to_owned(), data, port, url };
        let mut backup = replica.program("pg_basebackup");
        backup.arg("-D").arg(&replica.data).args(["-R", "-X", "stream", "--checkpoint=fast", "-d"]);
        backup.arg(format!("{}?application_name={name}", primary.url(SUPERUSER, "postgres")));
        succeed(backup);
        let conf = format!(
            "\nprimary_conninfo = 'host=127.0.0.1 port={} user={SUPERUSER} password={} application_name={name}'\n",
            primary.port(),
            primary.password()
        );
        let path = replica.data.join("postgresql.auto.conf");
        let text = std::fs::read_to_string(&path).expect("readable");
        std::fs::write(&path, text + &conf).expect("writable");
        replica.up();
        replica
    }

    fn program(&self, name: &str) -> Command {
        use std::os::unix::fs::MetadataExt as _;
        use std::os::unix::process::CommandExt as _;
        let owner = std::fs::metadata(self.data.parent().unwrap_or(Path::new("/"))).expect("it is there");
        let mut command = Command::new(self.bin.join(name));
        command.current_dir("/").uid(owner.uid()).gid(owner.gid());
        command
    }

    pub(crate) fn up(&self) {
        let mut start = self.program("pg_ctl");
        start.args(["start", "-w", "-D"]).arg(&self.data).arg("-l").arg(self.data.with_extension("log"));
        start.args(["-o", &format!("-p {}", self.port)]);
        succeed(start);
    }

    pub(crate) fn kill(&self) {
        let mut stop = self.program("pg_ctl");
        stop.args(["stop", "-w", "-m", "immediate", "-D"]).arg(&self.data);
        succeed(stop);
    }

    pub(crate) async fn run(&self, statements: &[&str]) {
        let client = connect(&self.url).await;
        for sql in statements {
            client.batch_execute(sql).await.expect(sql);
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let mut stop = self.program("pg_ctl");
        let _ = stop.args(["stop", "-m", "immediate", "-D"]).arg(&self.data).output();
    }
}

/// The server keeps the program's output open, so it goes nowhere.
fn succeed(mut command: Command) {
    use std::process::Stdio;
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.as_ref().is_ok_and(std::process::ExitStatus::success), "{command:?}: {status:?}");
}

#[tokio::test]
async fn a_replica_that_falls_behind_is_late_or_dies_stops_batches_until_it_has_caught_up() {
    let world = World::start(20_000, &[]).await;
    if !world.cluster.bin().join("pg_basebackup").is_file() {
        eprintln!("left out: no pg_basebackup in {}", world.cluster.bin().display());
        return;
    }
    let replica = Replica::start(&world.cluster, "eu-1");
    let job = JobDir::shipped();
    job.replace("max_rows = 100", "max_rows = 100\npause = \"10ms\"");
    job.append("[throttle]\nevery = \"100ms\"\nreplicas = [\"eu-1\"]\nreplica_lag = \"2s\"\nreplica_lag_mb = 1");
    let lag = "select pg_current_wal_lsn() - replay_lsn from pg_stat_replication";
    // It no longer replays.
    replica.run(&["select pg_wal_replay_pause()"]).await;
    let daemon = world.cli().start(&["run", "--once", job.path()]);
    world.waits_for("replica_lag_bytes is % MiB, at most 1 MiB wanted (eu-1)").await;
    let (batches, overshoot) = (world.batches().await, world.ledger.number(lag).await - MB);
    eprintln!("lag beyond the limit when batches had stopped: {} kB", overshoot / 1024);
    assert!(overshoot < 8 * MB, "{overshoot}");
    // Many measurements later there is no further batch; one was perhaps under way.
    let later = "select count(*) from pg_stat_activity where application_name like '%/throttle'
                 and query_start > (select max(at) + interval '1 s' from backfilld.event where kind = 'throttle')";
    wait_until("ten measurements", async || world.ledger.number(later).await > 0).await;
    assert!(world.batches().await <= batches + 1, "{batches}");
    replica.run(&["select pg_wal_replay_resume()"]).await;
    world.goes_on(2).await;
    // It replays late.
    replica.run(&["alter system set recovery_min_apply_delay = '1min'", "select pg_reload_conf()"]).await;
    world.waits_for("replica_lag").await;
    replica.run(&["alter system reset recovery_min_apply_delay", "select pg_reload_conf()"]).await;
    world.goes_on(2).await;
    // It is gone.
    replica.kill();
    world.waits_for("replica_lag: replica eu-1 is not streaming").await;
    let batches = world.batches().await;
    assert_eq!(world.ledger.status().await, "running");
    replica.up();
    daemon.ended().await.expect(0, "done");
    assert!(world.batches().await > batches, "it was not over yet");
    assert_eq!((world.ledger.unfilled().await, world.ledger.drift().await), (0, 0));
}

/// With the defaults of the throttle.
#[tokio::test]
async fn a_logical_slot_that_nobody_reads_survives() {
    let keep = ["max_slot_wal_keep_size = 64MB", "max_wal_size = 64MB", "min_wal_size = 32MB"];
    let world = World::start(20_000, &keep).await;
    let ledger = &world.ledger;
    ledger.run("select pg_create_logical_replication_slot('cdc', 'pgoutput')").await;
    let left = "select safe_wal_size from pg_replication_slots where slot_name = 'cdc'";
    // Something was written already, so that batches have to stop half way.
    ledger.run("create table public.filler (t text)").await;
    while ledger.number(left).await > 40 * MB {
        ledger.run("insert into public.filler select repeat(md5(n::text), 20) from generate_series(1, 2000) n").await;
    }
    let job = JobDir::shipped();
    job.append("[throttle]\nevery = \"100ms\"");
    let daemon = world.cli().start(&["run", "--once", job.path()]);
    world.waits_for("slot_safe is % MiB, at least 32 MiB wanted (slot cdc)").await;
    assert!(ledger.unfilled().await > 0, "half way");
    // A checkpoint is when the server takes away what it need not keep.
    ledger.run("checkpoint").await;
    assert!(ledger.number(left).await > 0);
    assert!(ledger.is("select wal_status in ('reserved', 'extended') from pg_replication_slots").await);
    ledger.run("select pg_replication_slot_advance('cdc', pg_current_wal_lsn())").await;
    daemon.ended().await.expect(0, "done");
    assert!(ledger.is("select wal_status <> 'lost' from pg_replication_slots").await);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
}

/// All that the server writes counts; the budget holds over five seconds.
#[tokio::test]
async fn a_budget_for_wal_stops_batches_until_less_is_written() {
    let world = World::start(600, &[]).await;
    let job = JobDir::shipped();
    job.append("[throttle]\nevery = \"100ms\"\nwal_mb_per_second = 1");
    let ledger = &world.ledger;
    ledger.run("create table public.filler (t text)").await;
    let daemon = world.cli().start(&["run", "--once", job.path()]);
    wait_until("the budget is used up", async || {
        ledger.run("insert into public.filler select repeat(md5(n::text), 20) from generate_series(1, 2000) n").await;
        ledger.reason().await.contains("wal_rate is")
    })
    .await;
    daemon.ended().await.expect(0, "done");
    assert_eq!(ledger.unfilled().await, 0);
}
