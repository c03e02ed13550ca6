//! What the pace costs: the application's latency and the backfill's rate from gentle to unthrottled, and with the defaults.

use std::time::{Duration, Instant};

use backfilld::{Error, Result};
use serde_json::json;

use crate::chart::{self, Curve};
use crate::foreground::{Foreground, Latency};
use crate::report::{Report, Table, median};
use crate::world::{JOB, Job, World, say};

/// How long each run is looked at; a fast one ends before.
const LOOK: Duration = Duration::from_secs(15);
/// What the default has to find its pace, which a backfill of any size has as well.
const SETTLE: Duration = Duration::from_secs(45);
/// What it takes to rise to a limit where no budget is in the way.
const RISE: Duration = Duration::from_secs(15);

const ALONE: &str = "alone";
const LONG: &str = "10 ms, a tenth of the time";
const LONG_BATCHES: &str = "target_duration = \"10ms\"\n[throttle]\npace = \"constant\"\nduty = 0.1";
const UNTHROTTLED: &str = "unthrottled";
const CONSTANT: &str = "[throttle]\npace = \"constant\"";
const AUTO: &str = "default (auto)";
const PACES: [f64; 4] = [0.1, 0.2, 0.35, 0.5];

/// What is in the job file.
fn curve() -> Vec<(String, String)> {
    // As the defaults work, but with a budget that nothing exceeds, so that the limit is what it is.
    let at = |pace: f64| (format!("pace {pace}"), format!("[throttle]\nlatency_budget = 10.0\nduty = {pace}"));
    let mut points: Vec<_> = PACES.map(at).into();
    points.push((LONG.into(), LONG_BATCHES.into()));
    points.push((UNTHROTTLED.into(), CONSTANT.into()));
    points
}

struct Run {
    point: String,
    /// Rows per second.
    rate: f64,
    /// What was looked at, in seconds.
    seconds: f64,
    latency: Latency,
}

pub async fn run(world: &World, runs: u32, all: bool, rate: u32, report: &mut Report) -> Result<()> {
    let mut points = vec![(ALONE.to_owned(), String::new()), (AUTO.to_owned(), String::new())];
    if all {
        points.splice(1..1, curve());
    }
    let mut results = Vec::new();
    for turn in 0..runs as usize {
        for i in 0..points.len() {
            let (point, batching) = &points[(i + turn) % points.len()];
            say(&format!("pace {} of {runs}: {point}", turn + 1));
            results.push(one(world, point, batching, rate).await?);
        }
    }
    // With nobody beside it.
    let mut idle = Vec::new();
    for batching in [CONSTANT, ""] {
        idle.push(without_others(world, batching).await?);
    }
    let of = |point: &str| results.iter().filter(|r| r.point == point).collect::<Vec<_>>();
    let mut rows = Vec::new();
    for (point, _) in &points {
        let runs = of(point);
        let rate = median(&runs.iter().map(|r| r.rate).collect::<Vec<_>>());
        let latencies: Vec<_> = runs.iter().map(|r| &r.latency).collect();
        let mut cells = vec![format!("{rate:.0}")];
        cells.extend(Latency::cells(&latencies).into_iter().take(4));
        rows.push((point.clone(), cells));
    }
    rows.push(("idle, unthrottled".into(), vec![format!("{:.0}", idle[0])]));
    rows.push(("idle, default (auto)".into(), vec![format!("{:.0}", idle[1])]));
    let data = results
        .iter()
        .map(|r| json!({ "point": r.point, "rows_per_second": r.rate, "foreground_ms": r.latency.json() }))
        .collect::<Vec<_>>();
    let data = json!({ "transactions_per_second": rate, "runs": data, "idle_rows_per_second": idle });
    if all {
        let line = |share: f64| {
            // Long batches are not on the way from gentle to unthrottled.
            let points = points.iter().filter(|(point, _)| ![ALONE, LONG].contains(&point.as_str()));
            let at = |point: &str| {
                let rate = median(&of(point).iter().map(|r| r.rate).collect::<Vec<_>>());
                (rate, median(&of(point).iter().map(|r| r.latency.at(share)).collect::<Vec<_>>()))
            };
            points.map(|(point, _)| at(point)).filter(|p| p.0 > 0.0).collect()
        };
        let title = format!("The application's latency beside the backfill, {rate} transactions per second");
        let lines = [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)].map(|(name, share)| (name, line(share)));
        let curve = Curve { title, x: "rows per second", y: "ms", lines: lines.into() };
        report.chart("pace", chart::curve(&curve));
    }
    report.add(
        "pace",
        Table { title: "Pace", head: vec!["rows/s", "p50 ms", "p95 ms", "p99 ms", "max ms"], rows },
        data,
    );
    Ok(())
}

async fn filled(db: &crate::world::Database) -> Result<i64> {
    let sql = "select coalesce(sum(rows_updated), 0)::int8 from backfilld.checkpoint";
    Ok(db.admin.query_one(sql, &[]).await?.get(0))
}

async fn one(world: &World, point: &str, batching: &str, rate: u32) -> Result<Run> {
    let db = world.copy("expanded").await?;
    world.command(&db.name, &["cutover", JOB])?;
    let mut traffic = Foreground::start(world, &db, rate)?;
    // Caches are warm, and connections are there.
    tokio::time::sleep(Duration::from_secs(2)).await;
    if point == ALONE {
        traffic.mark();
        tokio::time::sleep(LOOK).await;
        let run =
            Run { point: point.to_owned(), rate: 0.0, seconds: LOOK.as_secs_f64(), latency: traffic.stop().await? };
        world.discard(db).await?;
        return Ok(run);
    }
    let job = Job { hold_before: "\"constrain\"", batching };
    let mut daemon = world.daemon(&db.name, "pace", &job, &[], &[])?;
    db.until(&mut daemon, |_, _, batches| batches > 0).await?;
    let settle = match point {
        AUTO => SETTLE,
        _ if batching.contains("constant") => Duration::ZERO,
        _ => RISE,
    };
    tokio::time::sleep(settle).await;
    traffic.mark();
    let (began, before) = (Instant::now(), filled(&db).await?);
    while began.elapsed() < LOOK {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if db.progress().await?.0 != "backfill" {
            break;
        }
    }
    let (took, rows) = (began.elapsed().as_secs_f64(), filled(&db).await? - before);
    let latency = traffic.stop().await?;
    if daemon.has_ended()? {
        return Err(Error::failed("the daemon ended"));
    }
    drop(daemon);
    world.discard(db).await?;
    Ok(Run { point: point.to_owned(), rate: rows as f64 / took, seconds: took, latency })
}

/// Beside an application that already takes all that the server has.
pub async fn saturated(world: &World, runs: u32, report: &mut Report) -> Result<()> {
    let points = [(ALONE, ""), (UNTHROTTLED, CONSTANT), (AUTO, "")];
    let mut results = Vec::new();
    for turn in 0..runs as usize {
        for i in 0..points.len() {
            let (point, batching) = points[(i + turn) % points.len()];
            say(&format!("saturated {} of {runs}: {point}", turn + 1));
            results.push(one(world, point, batching, 0).await?);
        }
    }
    let rows = points.iter().map(|(point, _)| {
        let of: Vec<&Run> = results.iter().filter(|r| r.point == *point).collect();
        let figure = |get: &dyn Fn(&Run) -> f64| median(&of.iter().map(|r| get(r)).collect::<Vec<_>>());
        let mut cells = vec![format!("{:.0}", figure(&|r| r.rate)), format!("{:.0}", figure(&transactions))];
        cells.extend(Latency::cells(&of.iter().map(|r| &r.latency).collect::<Vec<_>>()).into_iter().take(3));
        ((*point).to_owned(), cells)
    });
    let rows = rows.collect();
    let data = results
        .iter()
        .map(|r| json!({ "point": r.point, "rows_per_second": r.rate, "transactions_per_second": transactions(r), "foreground_ms": r.latency.json() }))
        .collect::<Vec<_>>();
    let head = vec!["rows/s", "tx/s", "p50 ms", "p95 ms", "p99 ms"];
    report.add("saturated", Table { title: "Saturated server", head, rows }, json!({ "runs": data }));
    Ok(())
}

/// Transactions per second.
fn transactions(run: &Run) -> f64 {
    run.latency.count() as f64 / run.seconds
}

async fn without_others(world: &World, batching: &str) -> Result<f64> {
    let db = world.copy("expanded").await?;
    world.command(&db.name, &["cutover", JOB])?;
    let job = Job { hold_before: "\"constrain\"", batching };
    let mut daemon = world.daemon(&db.name, "pace", &job, &[], &[])?;
    db.until(&mut daemon, |_, _, batches| batches > 0).await?;
    let (began, before) = (Instant::now(), filled(&db).await?);
    db.until(&mut daemon, |phase, _, _| phase != "backfill").await?;
    let rate = (filled(&db).await? - before) as f64 / began.elapsed().as_secs_f64();
    drop(daemon);
    world.discard(db).await?;
    Ok(rate)
}
