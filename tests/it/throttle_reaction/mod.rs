//! How long it takes from a cause to the last batch, and how long locks of batches keep others waiting, for
//! docs/throttle.md. Run by hand: `cargo test --test it throttle_reaction -- --ignored --nocapture`.

mod locks;
mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use backfilld::demo::cluster::SUPERUSER;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{Ended, JOB, JobDir, Ledger, Process, Session, wait_until};
use crate::throttle_servers::{Replica, World};

/// Times of each cause.
const RUNS: usize = 7;

/// Who measures wants the machine for itself.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const THROTTLE: &str = r#"[throttle]
lock_waiters = 2
active_sessions = 6
oldest_transaction = "3s"
replica_lag_mb = 1
slot_retained_mb = 24
[[throttle.queries]]
name = "gate"
sql = "select public.gate()"
[[throttle.http]]
name = "freno"
url = "URL"
"#;

/// A row of a table.
fn note(cells: &str, mut took: Vec<f64>) {
    took.sort_by(f64::total_cmp);
    println!("| {cells} | {:.0} ms | {:.0} ms |", took[took.len() / 2], took[took.len() - 1]);
}

/// An endpoint that answers as it is told.
async fn endpoint() -> (String, Arc<AtomicBool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/check", listener.local_addr().expect("an address"));
    let fine = Arc::new(AtomicBool::new(true));
    let answers = fine.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            let status = if answers.load(Ordering::Relaxed) { "200 OK" } else { "429 Too Many" };
            let _ = stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
        }
    });
    (url, fine)
}

/// Waits until the job stands for `reason`, and gives the time from `cause` to the last batch.
async fn stopped(ledger: &Ledger, reason: &str, cause: f64) -> f64 {
    let stands = format!(
        "select exists (select from backfilld.job where reason like '%{reason}%')
           and max(updated_at) < clock_timestamp() - interval '300 ms' from backfilld.checkpoint"
    );
    wait_until(reason, async || ledger.is(&stands).await).await;
    since(ledger, cause).await
}

/// The time from `cause` to the last batch.
async fn since(ledger: &Ledger, cause: f64) -> f64 {
    let last = "select (extract(epoch from max(updated_at)) * 1000)::float8 from backfilld.checkpoint";
    let last: f64 = ledger.client.query_one(last, &[]).await.expect("a checkpoint").get(0);
    (last - cause).max(0.0)
}

/// Batches of one row.
fn small_batches(job: &JobDir, pause: &str) {
    job.replace(
        "initial_rows = 100\nmax_rows = 100\nmin_rows = 1\ntarget_duration = \"2s\"",
        &format!("initial_rows = 1\nmax_rows = 1\nmin_rows = 1\npause = \"{pause}\""),
    );
}

async fn gate(ledger: &Ledger, open: bool) {
    ledger
        .run(&format!("create or replace function public.gate() returns boolean language sql as 'select {open}'"))
        .await;
}

struct Rig {
    world: World,
    _daemon: Process,
}

impl Rig {
    /// Until batches run.
    async fn start(world: World, throttle: &str) -> Self {
        let job = JobDir::shipped();
        small_batches(&job, "10ms");
        job.append(throttle);
        // As by default, not as short as in tests.
        let daemon = world.cli().env("BACKFILLD_LEASE__TTL", "15s").start(&["run", "--once", job.path()]);
        let there = "select to_regclass('backfilld.checkpoint') is not null";
        wait_until("the ledger is there", async || world.ledger.is(there).await).await;
        let rig = Self { world, _daemon: daemon };
        rig.goes_on(0).await;
        println!("| Cause | Looks every | Median of {RUNS} | Longest |\n|---|---|---|---|");
        rig
    }

    /// The server's time in milliseconds.
    async fn now(&self) -> f64 {
        let sql = "select (extract(epoch from clock_timestamp()) * 1000)::float8";
        self.world.ledger.client.query_one(sql, &[]).await.expect("a time").get(0)
    }

    async fn stopped(&self, reason: &str, cause: f64) -> f64 {
        stopped(&self.world.ledger, reason, cause).await
    }

    /// Until the cause is over; then it goes on for another while, so that the next cause is at no special time.
    async fn goes_on(&self, run: usize) {
        self.world.goes_on(2 + 9 * run as i64).await;
        assert_eq!(self.world.ledger.status().await, "running", "more rows are needed");
    }

    async fn tune(&self, what: &[&str]) {
        self.cli(&[&["tune", JOB], what].concat()).await.expect(0, "");
    }

    async fn cli(&self, args: &[&str]) -> Ended {
        self.world.cli().run(args).await
    }

    async fn operator(&self, what: &str, stop: &[&str], back: &[&str], reason: &str) {
        let mut took = Vec::new();
        for run in 0..RUNS {
            let cause = self.now().await;
            self.cli(stop).await.expect(0, "");
            took.push(self.stopped(reason, cause).await);
            self.cli(back).await.expect(0, "");
            self.goes_on(run).await;
        }
        note(&format!("{what} | each batch"), took);
    }

    async fn query(&self) {
        let mut took = Vec::new();
        for run in 0..RUNS {
            gate(&self.world.ledger, false).await;
            took.push(self.stopped("query_gate", self.now().await).await);
            gate(&self.world.ledger, true).await;
            self.goes_on(run).await;
        }
        note("`query_<name>`: its function says no | 1 s", took);
    }

    async fn http(&self, fine: &AtomicBool) {
        let mut took = Vec::new();
        for run in 0..RUNS {
            fine.store(false, Ordering::Relaxed);
            took.push(self.stopped("http_freno", self.now().await).await);
            fine.store(true, Ordering::Relaxed);
            self.goes_on(run).await;
        }
        note("`http_<name>`: the endpoint answers 429 | 1 s", took);
    }

    /// As many sessions as are named.
    async fn sessions(&self, n: usize) -> Vec<Session> {
        let mut all = Vec::new();
        for _ in 0..n {
            all.push(self.world.session("other", SUPERUSER).await);
        }
        all
    }

    async fn lock_waiters(&self) {
        let mut took = Vec::new();
        let (holder, mut waiters) = (self.world.session("holder", SUPERUSER).await, self.sessions(3).await);
        holder.run("create table public.kept ()").await;
        for run in 0..RUNS {
            holder.run("begin; lock table public.kept").await;
            waiters.iter_mut().for_each(|w| w.send("begin; lock table public.kept; commit"));
            took.push(self.stopped("lock_waiters", self.now().await).await);
            holder.run("commit").await;
            for waiter in &mut waiters {
                waiter.finish_ok().await;
            }
            self.goes_on(run).await;
        }
        note("`lock_waiters`: three wait, limit 2 | 1 s", took);
    }

    async fn active_sessions(&self) {
        let (mut took, mut busy) = (Vec::new(), self.sessions(8).await);
        let end = "select count(pg_cancel_backend(pid)) from pg_stat_activity where query = 'select pg_sleep(601)'";
        for run in 0..RUNS {
            busy.iter_mut().for_each(|b| b.send("select pg_sleep(601)"));
            took.push(self.stopped("active_sessions", self.now().await).await);
            self.world.ledger.run(end).await;
            for session in &mut busy {
                session.finish_err().await;
            }
            self.goes_on(run).await;
        }
        note("`active_sessions`: eight more, limit 6 | 1 s", took);
    }

    /// The cause is the moment at which the transaction is older than the limit.
    async fn oldest_transaction(&self) {
        let mut took = Vec::new();
        let report = self.world.session("report", SUPERUSER).await;
        for run in 0..RUNS {
            let cause = self.now().await + 3000.0;
            report.run("begin isolation level repeatable read; select 1").await;
            took.push(self.stopped("oldest_transaction", cause).await);
            report.run("commit").await;
            self.goes_on(run).await;
        }
        note("`oldest_transaction`: from the moment at which it is older than the limit | 1 s", took);
    }

    async fn write_wal(&self, mib: u32) {
        let sql = format!(
            "select count(pg_logical_emit_message(true, '', repeat('x', 1048576))) from generate_series(1, {mib})"
        );
        self.world.ledger.run(&sql).await;
    }

    /// The cause is the commit of what is beyond the limit.
    async fn replica(&self, replica: &Replica) {
        let mut took = Vec::new();
        for run in 0..RUNS {
            replica.run(&["select pg_wal_replay_pause()"]).await;
            self.write_wal(2).await;
            took.push(self.stopped("replica_lag_bytes", self.now().await).await);
            replica.run(&["select pg_wal_replay_resume()"]).await;
            self.goes_on(run).await;
        }
        note("`replica_lag_bytes`: a replica replays nothing, and more than the limit is written | 1 s", took);
        // The cause is the moment at which the oldest of what it has not replayed is older than the limit.
        let mut took = Vec::new();
        self.tune(&["replica_lag=2s", "replica_lag_mb=1000"]).await;
        for run in 0..RUNS {
            replica.run(&["select pg_wal_replay_pause()"]).await;
            took.push(self.stopped("replica_lag is", self.now().await + 2000.0).await);
            replica.run(&["select pg_wal_replay_resume()"]).await;
            self.goes_on(run).await;
        }
        self.tune(&["--reset", "replica_lag", "--reset", "replica_lag_mb"]).await;
        note(
            "`replica_lag`: a replica replays nothing, from the moment at which it is later than the limit | 1 s",
            took,
        );
        let mut took = Vec::new();
        self.tune(&["replicas=[\"eu-1\"]"]).await;
        for run in 0..RUNS {
            let cause = self.now().await;
            replica.kill();
            took.push(self.stopped("eu-1 is not streaming", cause).await);
            replica.up();
            self.goes_on(run).await;
        }
        self.tune(&["--reset", "replicas"]).await;
        note("`replica_lag`: a named replica is killed | 1 s", took);
    }

    async fn slot(&self) {
        let mut took = Vec::new();
        for run in 0..RUNS {
            // A new slot retains from the last checkpoint on.
            self.world.ledger.run("checkpoint").await;
            self.world.ledger.run("select pg_create_physical_replication_slot('unread', true)").await;
            self.write_wal(20).await;
            self.write_wal(5).await;
            took.push(self.stopped("slot_retained", self.now().await).await);
            self.world.ledger.run("select pg_drop_replication_slot('unread')").await;
            self.goes_on(run).await;
        }
        note("`slot_retained`: more than the limit is written | 1 s", took);
    }
}

#[tokio::test]
#[ignore = "measures"]
async fn how_long_from_a_cause_to_the_last_batch() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let (url, fine) = endpoint().await;
    let world = World::start(30_000, &[]).await;
    let replica = Replica::start(&world.cluster, "eu-1");
    gate(&world.ledger, true).await;
    let rig = Rig::start(world, &THROTTLE.replace("URL", &url)).await;
    rig.query().await;
    rig.http(&fine).await;
    rig.lock_waiters().await;
    rig.active_sessions().await;
    rig.oldest_transaction().await;
    rig.replica(&replica).await;
    rig.slot().await;
    let (throttle, off) = (&["throttle", JOB, "--for", "10m"], &["throttle", JOB, "--off"]);
    rig.operator("`operator`: `backfilld throttle`, the command's own start included", throttle, off, "operator").await;
    let (tune, reset) = (&["tune", JOB, "xid_age=1"], &["tune", JOB, "--reset", "xid_age"]);
    rig.operator("`xid_age`: a limit below what is there, by `backfilld tune`, likewise", tune, reset, "xid_age").await;
    let (pause, resume) = (&["pause", JOB, "--reason", "lunch"], &["resume", JOB]);
    rig.operator("`backfilld pause`, likewise", pause, resume, "lunch").await;
    // Before the primary, in whose directory it is.
    drop(replica);
}
