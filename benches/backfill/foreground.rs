//! An application beside the backfill: pgbench at a fixed rate or as fast as it goes, four clients, which read and update random messages.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backfilld::demo::cluster::SUPERUSER;
use backfilld::{Error, Result};
use serde_json::{Value, json};

use crate::report::median;
use crate::world::{Database, World};

/// Messages are 20 seconds apart, so their time stamp finds a random one whatever the key is.
const SCRIPT: &str = "\\set n random(1, :rows)
\\set m random(1, :rows)
begin;
select id, content from public.messages where created_at = timestamptz '2024-02-01 00:00:00+00' + :n * interval '20 seconds';
update public.messages set role = role where created_at = timestamptz '2024-02-01 00:00:00+00' + :m * interval '20 seconds';
end;
";

/// A running pgbench. Killed when dropped.
pub struct Foreground {
    child: Child,
    dir: tempfile::TempDir,
    rate: u32,
    began: f64,
}

/// What its transactions took, in milliseconds, sorted.
pub struct Latency {
    ms: Vec<f64>,
}

impl Foreground {
    /// `rate`: transactions per second; 0: as many as it can.
    pub fn start(world: &World, db: &Database, rate: u32) -> Result<Self> {
        let failed = |e: std::io::Error| Error::internal("cannot run pgbench").with_source(e);
        let dir = tempfile::tempdir().map_err(failed)?;
        let script = dir.path().join("script.sql");
        std::fs::write(&script, SCRIPT).map_err(failed)?;
        let log = std::fs::File::create(dir.path().join("log")).map_err(failed)?;
        let child = Command::new(world.cluster.bin().join("pgbench"))
            .args(["-n", "-c", "4", "-j", "1", "-T", "3600", "-l"])
            .args(if rate > 0 { vec!["-R".to_owned(), rate.to_string()] } else { Vec::new() })
            .args(["-D", &format!("rows={}", world.rows), "-f"])
            .arg(&script)
            .arg(world.cluster.url(SUPERUSER, &db.name))
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        Ok(Self { child, dir, rate, began: now() })
    }

    /// Forgets what was until now.
    pub fn mark(&mut self) {
        self.began = now();
    }

    /// Ends it. Gives the latency of each transaction up to now, with the time it was late: a client that has to wait sends
    /// later.
    pub async fn stop(mut self) -> Result<Latency> {
        let end = now();
        // pgbench writes its log by the block of 4 kB, about a hundred lines.
        tokio::time::sleep(Duration::from_secs_f64(
            0.5 + 150.0 / f64::from(if self.rate > 0 { self.rate } else { 1000 }),
        ))
        .await;
        let failed = |e: std::io::Error| Error::internal("cannot read the log of pgbench").with_source(e);
        let ended = self.child.try_wait().map_err(failed)?;
        let _ = self.child.kill();
        let _ = self.child.wait();
        let files: Vec<PathBuf> = std::fs::read_dir(self.dir.path())
            .map_err(failed)?
            .filter_map(|f| f.ok().map(|f| f.path()))
            .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pgbench_log")))
            .collect();
        let mut ms = Vec::new();
        for file in files {
            let text = std::fs::read_to_string(file).map_err(failed)?;
            // client, transaction, latency in us, script, seconds, microseconds, and with a rate the lag in us, which the latency
            // has in it. The last line may be cut.
            let whole = if self.rate > 0 { 7 } else { 6 };
            ms.extend(text.lines().filter_map(|line| {
                let fields: Vec<&str> = line.split(' ').collect();
                let field = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok());
                let (us, at) = (field(2)?, field(4)? + field(5)? / 1e6);
                (fields.len() >= whole && (self.began..=end).contains(&at)).then_some(us / 1000.0)
            }));
        }
        if ended.is_some() || ms.is_empty() {
            let said = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            return Err(Error::failed("pgbench did not run to the end").with_hint(said));
        }
        ms.sort_by(f64::total_cmp);
        Ok(Latency { ms })
    }
}

/// Unix time in seconds.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Latency {
    /// The latency that this share of the transactions kept within, in milliseconds.
    pub fn at(&self, share: f64) -> f64 {
        let i = ((self.ms.len() as f64 * share).ceil() as usize).clamp(1, self.ms.len()) - 1;
        self.ms[i]
    }

    /// How many there were.
    pub fn count(&self) -> usize {
        self.ms.len()
    }

    /// p50, p95, p99, longest, number; each a median over runs.
    pub fn cells(runs: &[&Self]) -> Vec<String> {
        let of = |get: &dyn Fn(&Self) -> f64| median(&runs.iter().map(|r| get(r)).collect::<Vec<_>>());
        let shares = [0.5, 0.95, 0.99, 1.0].map(|share| format!("{:.1}", of(&|l: &Self| l.at(share))));
        shares.into_iter().chain([format!("{:.0}", of(&|l: &Self| l.ms.len() as f64))]).collect()
    }

    pub fn json(&self) -> Value {
        json!({ "p50": self.at(0.5), "p95": self.at(0.95), "p99": self.at(0.99), "max": self.at(1.0), "n": self.ms.len() })
    }
}
