//! How fast the daemon leaves on SIGTERM, how fast a standby then works, and how fast one is at work again after `kill -9`.

use std::time::{Duration, Instant};

use backfilld::{Error, Result};
use serde_json::json;

use crate::report::{Report, Table, max, median};
use crate::world::{Daemon, Database, JOB, Job, World, say};

/// Shorter than the default, so that the benchmark does not wait as long.
const TTL: &str = "5s";

pub async fn run(world: &World, runs: u32, report: &mut Report) -> Result<()> {
    let db = world.copy("expanded").await?;
    world.command(&db.name, &["cutover", JOB])?;
    // Slow enough that the table lasts for all of them, with batches that take a while.
    let size = (world.rows / 400).clamp(20, 2000);
    let batching = format!("initial_rows = {size}\nmin_rows = 20\nmax_rows = {size}\npause = \"50ms\"");
    let case = Case { world, db: &db, job: Job { hold_before: "\"constrain\"", batching: &batching } };

    let mut stop = Vec::new();
    let mut leased = Vec::new();
    let mut worked = Vec::new();
    let mut same = Vec::new();
    let mut other = Vec::new();
    let mut daemon = case.start("a", 3).await?;
    for i in 0..runs {
        say(&format!("interrupt {} of {runs}", i + 1));
        // Another moment of the batch each time.
        tokio::time::sleep(Duration::from_millis(u64::from(i) * 17 % 100)).await;
        stop.push(daemon.terminate().await?.as_secs_f64());
        daemon = case.start("a", 3).await?;
        let (lease, work, standby) = case.hand_over(daemon, "b").await?;
        leased.push(lease.as_secs_f64());
        worked.push(work.as_secs_f64());
        daemon = standby;
        daemon.terminate().await?;
        daemon = case.start("a", 3).await?;
        same.push(case.kill_and_start(daemon, "a").await?.as_secs_f64());
        daemon = case.start("a", 0).await?;
        other.push(case.kill_and_start(daemon, "b").await?.as_secs_f64());
        daemon = case.start("a", 3).await?;
    }
    daemon.terminate().await?;
    world.discard(db).await?;

    let line = |label: &str, values: &[f64]| {
        (label.to_owned(), vec![format!("{:.2}", median(values)), format!("{:.2}", max(values))])
    };
    let rows = vec![
        line("SIGTERM to exit", &stop),
        line("SIGTERM to standby's lease", &leased),
        line("SIGTERM to standby's batch", &worked),
        line("kill -9, same instance", &same),
        line("kill -9, other, ttl 5 s", &other),
    ];
    let data = json!({ "sigterm_to_exit_s": stop, "sigterm_to_standby_lease_s": leased,
        "sigterm_to_standby_batch_s": worked, "kill_same_instance_s": same, "kill_other_instance_s": other });
    report.add("interrupt", Table { title: "Seconds", head: vec!["median", "max"], rows }, data);
    Ok(())
}

struct Case<'a> {
    world: &'a World,
    db: &'a Database,
    job: Job<'a>,
}

impl Case<'_> {
    fn spawn(&self, instance: &str) -> Result<Daemon> {
        self.world.daemon(&self.db.name, instance, &self.job, &[], &[("BACKFILLD_LEASE__TTL", TTL)])
    }

    /// Starts a daemon and waits until it has committed a few batches.
    async fn start(&self, instance: &str, batches: i64) -> Result<Daemon> {
        let (epoch, before) = self.position().await?;
        let mut daemon = self.spawn(instance)?;
        let began = Instant::now();
        loop {
            let (now, done) = self.position().await?;
            if now > epoch && done > before + batches {
                return Ok(daemon);
            }
            if daemon.has_ended()? || began.elapsed() > Duration::from_secs(60) {
                return Err(daemon.failed("does no batches"));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// From SIGTERM of the daemon, beside which a standby waits, to the standby's lease and to its first committed batch.
    async fn hand_over(&self, mut leader: Daemon, name: &str) -> Result<(Duration, Duration, Daemon)> {
        let mut standby = self.spawn(name)?;
        let began = Instant::now();
        let waiting = "select count(*) from pg_stat_activity where datname = current_database()
                       and application_name like 'backfilld/%/heartbeat'";
        while self.db.admin.query_one(waiting, &[]).await?.get::<_, i64>(0) < 2 {
            if standby.has_ended()? || began.elapsed() > Duration::from_secs(60) {
                return Err(standby.failed("does not wait as a standby"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // It has looked for the lease at least once by then, and sleeps.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (epoch, _) = self.position().await?;
        let began = Instant::now();
        let signal = std::process::Command::new("kill").arg(leader.child.id().to_string()).status();
        signal.map_err(|e| Error::internal("cannot run kill").with_source(e))?;
        let mut leased: Option<(Duration, i64)> = None;
        loop {
            let (now, done) = self.position().await?;
            match leased {
                None if now > epoch => leased = Some((began.elapsed(), done)),
                Some((lease, before)) if done > before => {
                    let work = began.elapsed();
                    leader.wait().await?;
                    return Ok((lease, work, standby));
                }
                _ if standby.has_ended()? || began.elapsed() > Duration::from_secs(60) => {
                    return Err(standby.failed("does not take over"));
                }
                _ => {}
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// From `kill -9` of the daemon to the first batch that its successor has committed.
    async fn kill_and_start(&self, mut daemon: Daemon, successor: &str) -> Result<Duration> {
        let (epoch, _) = self.position().await?;
        let began = Instant::now();
        daemon.child.kill().map_err(|e| Error::internal("cannot kill").with_source(e))?;
        let mut next = self.spawn(successor)?;
        // The takeover waits for the batch in flight, so what is counted then is all that the dead one did.
        let mut taken: Option<i64> = None;
        loop {
            let (now, done) = self.position().await?;
            match taken {
                None if now > epoch => taken = Some(done),
                Some(before) if done > before => break,
                _ if next.has_ended()? || began.elapsed() > Duration::from_secs(60) => {
                    return Err(next.failed("does not take over"));
                }
                _ => {}
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let took = began.elapsed();
        next.terminate().await?;
        Ok(took)
    }

    /// Epoch of the lease, and batches committed.
    async fn position(&self) -> Result<(i64, i64)> {
        let sql = "select coalesce((select epoch from backfilld.lease), 0),
                          coalesce((select batches from backfilld.checkpoint where not finished), 0),
                          exists (select from backfilld.checkpoint where finished)";
        let row = self.db.admin.query_one(sql, &[]).await?;
        if row.get(2) {
            return Err(Error::failed("the table is too small for this many interruptions; give more --rows"));
        }
        Ok((row.get(0), row.get(1)))
    }
}
