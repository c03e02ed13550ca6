//! Memory and CPU of the daemon's process, for a small and for the whole table.

use backfilld::{Error, Result};
use serde_json::json;

use crate::report::{Report, Table};
use crate::world::{JOB, Job, World, say};

const SMALL: u64 = 100_000;
/// Linux counts CPU time for user space in hundredths of a second.
const TICKS: f64 = 100.0;

pub async fn run(world: &World, report: &mut Report) -> Result<()> {
    world.generate("small", SMALL).await?;
    world.expand("small", "small_expanded", "").await?;
    let mut rows = Vec::new();
    let mut data = Vec::new();
    for (count, template) in [(SMALL, "small_expanded"), (world.rows, "expanded")] {
        say(&format!("resources: {count} rows"));
        let db = world.copy(template).await?;
        world.command(&db.name, &["cutover", JOB])?;
        let job = Job { hold_before: "\"constrain\"", ..Job::default() };
        let mut daemon = world.daemon(&db.name, "bench", &job, &[], &[])?;
        // Backfill and verification lie behind it then, and it is still there to be asked.
        db.until(&mut daemon, |_, status, _| status == "held").await?;
        let wall = daemon.started.elapsed().as_secs_f64();
        let (memory, cpu) = usage(daemon.child.id())?;
        daemon.terminate().await?;
        world.discard(db).await?;
        rows.push((
            format!("{count} rows"),
            vec![
                format!("{memory:.1}"),
                format!("{cpu:.2}"),
                format!("{wall:.1}"),
                format!("{:.1}%", cpu / wall * 100.0),
            ],
        ));
        data.push(json!({ "rows": count, "peak_rss_mb": memory, "cpu_seconds": cpu, "wall_seconds": wall }));
    }
    let head = vec!["peak MB", "CPU s", "wall s", "CPU/wall"];
    report.add("resources", Table { title: "The daemon's process", head, rows }, data.into());
    Ok(())
}

/// Peak resident memory in MB, and CPU seconds so far.
pub fn usage(pid: u32) -> Result<(f64, f64)> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        std::fs::read_to_string(&path).map_err(|e| Error::internal(format!("cannot read {path}")).with_source(e))
    };
    let status = read("status")?;
    let peak_kb = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<f64>().ok());
    let stat = read("stat")?;
    // After the name, which may hold anything: state is field 3, utime 14, stime 15.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok());
    match (peak_kb, ticks(11), ticks(12)) {
        (Some(kb), Some(user), Some(system)) => Ok((kb / 1024.0, (user + system) / TICKS)),
        _ => Err(Error::internal("/proc has another format than expected")),
    }
}
