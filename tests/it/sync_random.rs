//! Random schedules, one statement at a time over four sessions, against one reference UPDATE; and a hammer.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use backfilld::demo::cluster::SUPERUSER;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::support::Session;
use crate::sync_fixture::{BatchSession, CHAIN, Case, Fixture, LEVELS, LOOSE, OWNED};

/// Schedules of a case's run: together some seconds. With `PROPTEST_CASES` more.
const SCHEDULES: u32 = 24;

/// One step of a schedule.
#[derive(Debug, Clone)]
enum Step {
    /// The next statement of the batch: begin, fill, recheck and commit.
    Batch,
    /// A statement of writer 0 to 2, and perhaps the end of its transaction.
    Write { who: usize, op: usize, kid: i64, parent: i64, level: usize, end: bool },
    /// Vacuum, which prunes and freezes what the batches go over.
    Vacuum,
}

fn step() -> impl Strategy<Value = Step> {
    let write = (0..3usize, 0..12usize, 1..8i64, 1..5i64, 0..8usize, any::<bool>())
        .prop_map(|(who, op, kid, parent, level, end)| Step::Write { who, op, kid, parent, level, end });
    prop_oneof![4 => Just(Step::Batch), 12 => write, 1 => Just(Step::Vacuum)]
}

fn statement(job: &str, op: usize, kid: i64, parent: i64) -> String {
    let (table, value) = if job == "chain" { ("accounts", "name") } else { ("parents", "owner") };
    match op {
        0 | 1 => format!(
            "insert into public.kids (id, parent_id, owner) values ({kid} + 3, {parent}, 'spoofed')
                          on conflict (id) do update set parent_id = excluded.parent_id, owner = null"
        ),
        2 => format!("update public.kids set parent_id = {parent} where id = {kid}"),
        3 => format!("update public.kids set parent_id = {parent}, owner = null, body = 'whole' where id = {kid}"),
        4 => format!("update public.kids set id = id + 20 where id = {kid}"),
        5 => format!("delete from public.kids where id = {kid} + 2"),
        6 | 7 => format!("update public.{table} set {value} = 'v{kid}' where id = {parent}"),
        8 => format!("update public.{table} set {value} = null where id = {parent}"),
        9 if job == "chain" => format!("update public.parents set account_id = 1 + {kid} % 3 where id = {parent}"),
        9 if job == "loose" => format!("delete from public.parents where id = {parent}"),
        10 if job == "loose" => format!("insert into public.parents values ({parent}, 'p{kid}')"),
        11 if job == "loose" => format!("update public.kids set own = nullif('o{kid}', 'o1') where id = {kid}"),
        9 => format!("update public.parents set id = id + 4 where id = {parent}"),
        10 => "set constraints all immediate".to_owned(),
        _ => format!("update public.kids set body = 'y' where id = {kid}"),
    }
}

/// Errors that the contract names, and the ones that such statements have without any trigger.
const EXPECTED: [&str; 5] = ["40001", "40P01", "0A000", "23503", "23505"];

struct Writer {
    session: Session,
    open: bool,
}

struct Play<'a> {
    f: &'a Fixture,
    writers: Vec<Writer>,
    batch: BatchSession,
    /// 0: outside, 1: begun, 2: filled.
    at: u8,
}

impl Play<'_> {
    async fn step(&mut self, step: &Step) {
        match step {
            Step::Vacuum => {
                // Not while somebody waits: vacuum could be what they wait for.
                self.f.sql("vacuum public.kids").await;
            }
            Step::Batch if self.batch.session.is_finished() => self.batch_step().await,
            Step::Write { who, op, kid, parent, level, end } if self.writers[*who].session.is_finished() => {
                let mut sql = String::new();
                if !self.writers[*who].open {
                    // Most at the usual level.
                    sql = format!("begin isolation level {};", LEVELS[level.saturating_sub(5)]);
                }
                sql.push_str(&statement(&self.f.spec.name, *op, *kid, *parent));
                if *end {
                    sql.push_str("; commit");
                }
                self.collect(*who).await;
                self.writers[*who].open = !end;
                self.writers[*who].session.send(&sql);
                self.f.db.wait_blocked_or_finished(&self.writers[*who].session).await;
            }
            // It waits for somebody.
            Step::Batch | Step::Write { .. } => {}
        }
    }

    async fn batch_step(&mut self) {
        match self.at {
            0 => {
                if !self.batch.begin(3).await {
                    self.batch.rewind();
                    return;
                }
                self.at = 1;
            }
            1 => {
                let fill = self.batch.fill();
                self.batch.session.send(&fill);
                self.f.db.wait_blocked_or_finished(&self.batch.session).await;
                self.at = 2;
            }
            _ => {
                self.at = 0;
                // The daemon would try again, from its checkpoint.
                match self.batch.session.finish().await {
                    Ok(_) => self.batch.finish().await,
                    Err(e) => {
                        assert_eq!(e.code().map(|c| c.code()), Some("40P01"), "{e:?}");
                        self.batch.session.run("rollback").await;
                    }
                }
            }
        }
    }

    /// The result of what a writer sent last, if it has ended.
    async fn collect(&mut self, who: usize) {
        let writer = &mut self.writers[who];
        if !writer.session.has_result() {
            return;
        }
        if let Err(e) = writer.session.finish().await {
            let code = e.code().map(|c| c.code().to_owned()).unwrap_or_default();
            assert!(EXPECTED.contains(&code.as_str()), "{e:?}");
            writer.session.run("rollback").await;
            writer.open = false;
        }
    }

    /// Ends everything: who does not wait commits, until nobody waits.
    async fn end(&mut self) {
        loop {
            let mut waiting = 0;
            for who in 0..self.writers.len() {
                self.f.db.wait_blocked_or_finished(&self.writers[who].session).await;
                if !self.writers[who].session.is_finished() {
                    waiting += 1;
                    continue;
                }
                self.collect(who).await;
                if self.writers[who].open {
                    self.writers[who].open = false;
                    self.writers[who].session.send("commit");
                    self.f.db.wait_blocked_or_finished(&self.writers[who].session).await;
                    waiting += 1;
                }
            }
            if self.at != 0 {
                self.f.db.wait_blocked_or_finished(&self.batch.session).await;
                if self.batch.session.is_finished() {
                    self.batch_step().await;
                }
                waiting += 1;
            }
            if waiting == 0 {
                return;
            }
        }
    }
}

fn schedules(case: Case, dedicated: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let f = runtime.block_on(Fixture::with(case, dedicated));
    let mut writers = Vec::new();
    for name in ["one", "two", "three"] {
        // A superuser may have deadlocks found at once.
        let session = runtime.block_on(f.db.session(name, SUPERUSER));
        runtime.block_on(session.run("set deadlock_timeout = '10ms'"));
        writers.push(Writer { session, open: false });
    }
    let batch = runtime.block_on(f.batch("batch"));
    let play = std::cell::RefCell::new(Play { f: &f, writers, batch, at: 0 });
    let config = Config {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(SCHEDULES),
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let result = TestRunner::new_with_rng(config, rng).run(&prop::collection::vec(step(), 10..40), |steps| {
        let mut play = play.borrow_mut();
        runtime.block_on(async {
            f.reset().await;
            f.unfill().await;
            play.batch.rewind();
            for step in &steps {
                play.step(step).await;
            }
            play.end().await;
            // What the interleaving left to fill, and nothing else.
            let before = f.findings().await;
            let drift = before.get("drift").copied();
            f.sweep(4).await;
            let after = f.stale().await;
            prop_assert!(drift.is_none() && after.is_none(), "drift {drift:?}, after the last sweep {after:?}");
            Ok(())
        })
    });
    result.unwrap_or_else(|e| panic!("{}, dedicated {dedicated}: {e}", f.spec.name));
}

#[test]
fn random_schedules_over_a_guaranteed_parent_end_as_one_update_would() {
    schedules(OWNED, true);
}

#[test]
fn random_schedules_with_a_shared_login_end_as_one_update_would() {
    schedules(OWNED, false);
}

#[test]
fn random_schedules_over_a_parent_that_may_be_missing_end_as_one_update_would() {
    schedules(LOOSE, true);
}

#[test]
fn random_schedules_over_a_chain_end_as_one_update_would() {
    schedules(CHAIN, true);
}

/// Transactions of each client of the hammer.
const BLOWS: u64 = 60;

async fn hammer(case: Case) {
    let f = Fixture::new(case).await;
    f.sql("insert into public.kids (id, parent_id) select n, 1 + n % 3 from generate_series(100, 400) n").await;
    f.unfill().await;
    let (retried, done) = (AtomicU32::new(0), AtomicBool::new(false));
    let client = async |seed: u64| {
        let session = f.db.client(SUPERUSER).await;
        session.batch_execute("set deadlock_timeout = '20ms'").await.expect("a superuser may");
        for blow in 0..BLOWS {
            // A fixed walk through the cases, different for every client.
            let n = (seed * 7919 + blow * 104_729) % 1009;
            let (p, q, id) = (1 + n % 3, 1 + (n / 3) % 3, 1000 + seed * BLOWS + blow);
            let (table, value) = if f.spec.name == "chain" { ("accounts", "name") } else { ("parents", "owner") };
            let insert = format!("insert into public.kids (id, parent_id) values ({id}, {p})");
            let change = format!("update public.{table} set {value} = nullif('v{n}', 'v7') where id = {q}");
            let sql = match n % 7 {
                0 | 1 => insert,
                2 => change,
                3 => format!("update public.kids set parent_id = {p} where id = {}", 100 + n % 300),
                4 => format!("begin; {insert}; {change}; commit"),
                5 => {
                    format!("begin; {change}; {insert}; update public.kids set parent_id = {q} where id = {id}; commit")
                }
                _ => format!("update public.kids set body = 'y', owner = null where id = {}", 100 + n % 300),
            };
            while let Err(e) = session.batch_execute(&sql).await {
                let code = e.code().map(|c| c.code().to_owned()).unwrap_or_default();
                assert!(matches!(code.as_str(), "40P01" | "40001"), "{sql}: {e:?}");
                retried.fetch_add(1, Ordering::Relaxed);
                session.batch_execute("rollback").await.expect("it can roll back");
            }
        }
    };
    let batches = async {
        let mut batch = f.batch("batch").await;
        while !done.load(Ordering::Relaxed) {
            batch.session.run("set lock_timeout = '250ms'").await;
            if !batch.begin(20).await {
                batch.rewind();
                continue;
            }
            let fill = batch.fill();
            batch.session.send(&fill);
            match batch.session.finish().await {
                Ok(_) => batch.finish().await,
                Err(e) => {
                    let code = e.code().map(|c| c.code().to_owned()).unwrap_or_default();
                    assert!(matches!(code.as_str(), "40P01" | "55P03"), "{e:?}");
                    batch.session.run("rollback").await;
                }
            }
        }
    };
    let clients = async {
        futures_util::future::join_all((1..=6).map(client)).await;
        done.store(true, Ordering::Relaxed);
    };
    futures_util::join!(clients, batches);
    println!("{}: {} retried", f.spec.name, retried.load(Ordering::Relaxed));
    let drift = f.findings().await.get("drift").copied();
    assert_eq!(drift, None, "before the last sweep");
    f.sweep(1000).await;
    f.assert_no_drift("after the hammer").await;
}

#[tokio::test]
async fn clients_that_hammer_a_few_hot_parents_leave_no_stale_row() {
    for case in [OWNED, LOOSE, CHAIN] {
        hammer(case).await;
    }
}
