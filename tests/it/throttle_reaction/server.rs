//! Causes that the server itself shows: what it writes, how old and how slow it is, what its statistics say; and the clock.

use backfilld::demo::cluster::SUPERUSER;

use super::{ONE_AT_A_TIME, RUNS, Rig, note, small_batches, stopped};
use crate::support::{Cli, JobDir, Ledger, Template, TestDb, wait_until};
use crate::throttle_servers::World;

/// Slots are lost beyond a size, there is room for many locks, and the target is due for a vacuum against wraparound as
/// soon as a hundred thousand transactions went by.
const SETTINGS: [&str; 3] =
    ["max_slot_wal_keep_size = 64MB", "max_wal_size = 64MB", "max_locks_per_transaction = 3000"];
const DUE: &str = "alter table public.messages set (autovacuum_freeze_max_age = 100000)";
const GO_BY: &str = "do $$ begin for n in 1..100100 loop perform txid_current(); commit; end loop; end $$";

/// More than three tenths of the table's rows.
const DEAD: &str = "begin; set local session_replication_role = replica;
    insert into public.messages (id, conversation_id, role, content)
    select md5(n::text)::uuid, (select id from public.conversations limit 1), 'user', 'x' from generate_series(1, 12000) n;
    rollback";

const MB: i64 = 1024 * 1024;

impl Rig {
    /// The cause is the commit of what is beyond the limit. It goes on when that is more than five seconds ago.
    async fn wal_rate(&self) {
        let mut took = Vec::new();
        self.tune(&["wal_mb_per_second=8"]).await;
        for run in 0..RUNS {
            self.goes_on(run).await;
            self.write_wal(60).await;
            took.push(self.stopped("wal_rate is", self.now().await).await);
            self.goes_on(run).await;
        }
        self.tune(&["--reset", "wal_mb_per_second"]).await;
        note("`wal_rate`: within a moment more is written than the limit allows in five seconds | 1 s", took);
    }

    /// The same.
    async fn slot_safe(&self) {
        let ledger = &self.world.ledger;
        let left = "select safe_wal_size from pg_replication_slots";
        let mut took = Vec::new();
        for run in 0..RUNS {
            ledger.run("select pg_create_physical_replication_slot('unread', true)").await;
            // The limit is half of what the server keeps.
            while ledger.number(left).await > 34 * MB {
                self.write_wal(1).await;
            }
            self.write_wal(4).await;
            took.push(self.stopped("slot_safe is", self.now().await).await);
            ledger.run("select pg_drop_replication_slot('unread')").await;
            self.goes_on(run).await;
        }
        note("`slot_safe`: more than the limit is written | 1 s", took);
    }

    /// Two who hold one row's lock are a multixact.
    async fn multixact_age(&self) {
        let (one, other) = (self.world.session("one", SUPERUSER).await, self.world.session("other", SUPERUSER).await);
        one.run("create table public.shared as select 1 as n").await;
        let multixact = async || {
            for session in [&one, &other] {
                session.run("begin; select from public.shared for key share").await;
            }
            one.run("commit").await;
            other.run("commit").await;
        };
        multixact().await;
        let mut took = Vec::new();
        for run in 0..RUNS {
            let age = "select mxid_age(datminmxid) from pg_database where datname = current_database()";
            let age = self.world.ledger.number(age).await;
            self.tune(&[&format!("multixact_age={age}")]).await;
            self.goes_on(run).await;
            multixact().await;
            took.push(self.stopped("multixact_age is", self.now().await).await);
            self.tune(&["--reset", "multixact_age"]).await;
            self.goes_on(run).await;
        }
        note("`multixact_age`: the one is made that is beyond the limit | 1 s", took);
    }

    /// The cause is the end of the session, with which its counts are in the statistics.
    async fn dead_rows(&self) {
        let vacuum = "vacuum (truncate false) public.messages";
        let mut took = Vec::new();
        self.world.ledger.run(vacuum).await;
        self.tune(&["dead_rows_percent=30"]).await;
        for run in 0..RUNS {
            let session = self.world.session("import", SUPERUSER).await;
            session.run(DEAD).await;
            drop(session);
            took.push(self.stopped("dead_rows is", self.now().await).await);
            self.world.ledger.run(vacuum).await;
            self.goes_on(run).await;
        }
        self.tune(&["--reset", "dead_rows_percent"]).await;
        note("`dead_rows`: an insert of more rows than the limit is rolled back, and its session ends | 1 s", took);
    }

    /// A vacuum that would take minutes; it is cancelled, so that the table stays due.
    async fn wraparound_vacuum(&self) {
        let mut took = Vec::new();
        let mut vacuum = self.world.session("vacuum", SUPERUSER).await;
        vacuum.run("set vacuum_cost_delay = 100; set vacuum_cost_limit = 1").await;
        for run in 0..RUNS {
            vacuum.send("vacuum (disable_page_skipping) public.messages");
            took.push(self.stopped("wraparound_vacuum", self.now().await).await);
            self.world.ledger.run(&format!("select pg_cancel_backend({})", vacuum.pid())).await;
            assert_eq!(vacuum.finish_err().await, "57014");
            self.goes_on(run).await;
        }
        note("`wraparound_vacuum`: a vacuum begins on a table that is due | 1 s", took);
    }

    /// The measurement looks at all locks, and there are many.
    async fn probe_latency(&self) {
        let mut took = Vec::new();
        let session = self.world.session("locks", SUPERUSER).await;
        self.tune(&["probe_latency=100ms"]).await;
        for run in 0..RUNS {
            session.run("select count(pg_advisory_lock(n)) from generate_series(1, 250000) n").await;
            took.push(self.stopped("probe_latency is", self.now().await).await);
            session.run("select pg_advisory_unlock_all()").await;
            self.goes_on(run).await;
        }
        self.tune(&["--reset", "probe_latency"]).await;
        note(
            "`probe_latency`: a session takes 250,000 locks, which makes the measurement slow; limit 100 ms | 1 s",
            took,
        );
    }

    /// Changes the server's settings: `reset all`, or `set name = value`.
    async fn alter(&self, changes: &[&str]) {
        for change in changes {
            self.world.ledger.run(&format!("alter system {change}")).await;
        }
        self.world.ledger.run("select pg_reload_conf()").await;
    }

    async fn commit_latency(&self) {
        let mut took = Vec::new();
        self.tune(&["commit_latency=50ms"]).await;
        for run in 0..RUNS {
            let cause = self.now().await;
            self.alter(&["set fsync = on", "set commit_siblings = 0", "set commit_delay = 100000"]).await;
            took.push(self.stopped("commit_latency is", cause).await);
            self.alter(&["reset all"]).await;
            self.goes_on(run).await;
        }
        self.tune(&["--reset", "commit_latency"]).await;
        note("`commit_latency`: each commit takes 100 ms, limit 50 ms | 1 s, each write", took);
    }

    async fn no_commits(&self) {
        let mut took = Vec::new();
        for run in 0..RUNS {
            let cause = self.now().await;
            self.alter(&["set synchronous_standby_names = 'nobody'"]).await;
            // What the daemon says of it is a commit that waits as well.
            let idle = "select max(updated_at) < clock_timestamp() - interval '1 s' from backfilld.checkpoint";
            wait_until("no batch for a second", async || self.world.ledger.is(idle).await).await;
            took.push(super::since(&self.world.ledger, cause).await);
            self.alter(&["reset all"]).await;
            let said = format!(
                "select exists (select from backfilld.event where kind = 'throttle' and detail->>'reason' like '%commit_latency%'
                   and at > to_timestamp({cause} / 1000))"
            );
            wait_until("it was because of commits", async || self.world.ledger.is(&said).await).await;
            self.goes_on(run).await;
        }
        note("`commit_latency`: no commit comes back, as the synchronous standby is gone | 1 s, each write", took);
    }
}

#[tokio::test]
#[ignore = "measures"]
async fn how_long_from_what_the_server_shows_to_the_last_batch() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let world = World::start(30_000, &SETTINGS).await;
    world.ledger.run(DUE).await;
    world.ledger.run(GO_BY).await;
    let rig = Rig::start(world, "").await;
    rig.wal_rate().await;
    rig.slot_safe().await;
    rig.multixact_age().await;
    rig.dead_rows().await;
    rig.wraparound_vacuum().await;
    rig.probe_latency().await;
    rig.commit_latency().await;
}

#[tokio::test]
#[ignore = "measures"]
async fn how_long_from_when_commits_no_longer_come_back_to_the_last_batch() {
    let _alone = ONE_AT_A_TIME.lock().await;
    Rig::start(World::start(30_000, &[]).await, "").await.no_commits().await;
}

/// A window ends with a minute, so that as many jobs as there are runs wait for one.
#[tokio::test]
#[ignore = "measures"]
async fn how_long_from_the_end_of_a_window_to_the_last_batch() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let job = JobDir::shipped();
    small_batches(&job, "20ms");
    // The first minute that is far enough for all of them to be under way.
    let times = "select to_char(at - interval '1 h', 'HH24:MI'), to_char(at, 'HH24:MI'), (extract(epoch from at) * 1000)::float8
                 from (select date_trunc('minute', clock_timestamp() + interval '85 s') as at) t";
    let here = TestDb::new(Template::Rows(6000)).await;
    let ledger = Ledger::new(&here).await;
    ledger.run("set timezone = 'UTC'").await;
    let row = ledger.client.query_one(times, &[]).await.expect("times");
    let (from, to, cause): (String, String, f64) = (row.get(0), row.get(1), row.get(2));
    job.append(&format!("[throttle]\n[[throttle.windows]]\nfrom = \"{from}\"\nto = \"{to}\""));
    let mut jobs = Vec::new();
    for _ in 0..RUNS {
        let db = TestDb::new(Template::Rows(6000)).await;
        let daemon = Cli::new(&db).start(&["run", "--once", job.path()]);
        jobs.push((Ledger::new(&db).await, db, daemon));
    }
    for (ledger, ..) in &jobs {
        wait_until("batches run", async || {
            ledger.is("select to_regclass('backfilld.checkpoint') is not null").await
                && ledger.is("select exists (select from backfilld.checkpoint where batches > 0)").await
        })
        .await;
    }
    assert!(ledger.is(&format!("select extract(epoch from clock_timestamp()) * 1000 < {cause}")).await, "too late");
    ledger.run(&format!("select pg_sleep_until(to_timestamp({cause}::float8 / 1000))")).await;
    let mut took = Vec::new();
    for (ledger, ..) in &jobs {
        took.push(stopped(ledger, "window", cause).await);
    }
    note(&format!("`window`: it ends, for {RUNS} jobs at once | 1 s"), took);
}
