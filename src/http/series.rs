//! The last hour in memory, for the charts: one point every two seconds, whoever looks.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::progress::{self, Progress, Snapshot};

/// Fine enough to see a batch stall, coarse enough for an hour in 1800 points.
pub const EVERY: Duration = Duration::from_secs(2);
/// An hour.
const KEPT: usize = 1800;
/// What a point has, in this order.
pub const COLUMNS: [&str; 7] =
    ["at_ms", "rows_per_second", "batch_p50_ms", "batch_p99_ms", "probe_latency_s", "replica_lag_s", "waiting"];

type Point = (u64, [Option<f64>; 6]);

/// The points.
#[derive(Default)]
pub struct Series {
    points: Mutex<VecDeque<Point>>,
}

impl Series {
    /// Adds a point every [`EVERY`] until dropped.
    pub async fn keep(&self, progress: &Progress) {
        let mut before = (0, progress.now());
        loop {
            tokio::time::sleep(EVERY).await;
            let now = (progress::now_ms(), progress.now());
            self.add(point(&before, &now));
            before = now;
        }
    }

    fn add(&self, point: Point) {
        let mut points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        if points.len() == KEPT {
            points.pop_front();
        }
        points.push_back(point);
    }

    /// The points after `since_ms`, as the page wants them.
    pub fn since(&self, since_ms: u64) -> Value {
        let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        let rows: Vec<Value> = points
            .iter()
            .filter(|p| p.0 > since_ms)
            .map(|(at, values)| {
                let values = values.iter().map(|v| v.map_or(Value::Null, |v| json!((v * 1000.0).round() / 1000.0)));
                Value::Array(std::iter::once(json!(at)).chain(values).collect())
            })
            .collect();
        json!({ "every_ms": EVERY.as_millis() as u64, "columns": COLUMNS, "points": rows })
    }
}

/// The rate is counted from point to point, so that it falls to zero where nothing moves.
fn point((then, before): &(u64, Snapshot), (at, now): &(u64, Snapshot)) -> Point {
    let seconds = at.saturating_sub(*then) as f64 / 1000.0;
    let moved = (now.rows_scanned - before.rows_scanned).max(0) + (now.rows_verified - before.rows_verified).max(0);
    let walks = now.status == "running" && matches!(now.phase.as_str(), "backfill" | "verify");
    let fresh = walks && now.batches > before.batches;
    let values = [
        (walks && seconds > 0.0 && *then > 0).then(|| moved as f64 / seconds),
        now.batch_p50_ms.filter(|_| fresh),
        now.batch_p99_ms.filter(|_| fresh),
        now.observed("probe_latency"),
        now.observed("replica_lag"),
        Some(f64::from(u8::from(!now.waiting.is_empty()))),
    ];
    (*at, values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_counted_from_point_to_point_and_an_hour_is_kept() {
        let at = |rows, batches| Snapshot {
            status: "running".into(),
            phase: "backfill".into(),
            rows_scanned: rows,
            batches,
            batch_p50_ms: Some(90.0),
            ..Snapshot::default()
        };
        let (_, values) = point(&(1000, at(100, 1)), &(3000, at(500, 2)));
        assert_eq!(values[..2], [Some(200.0), Some(90.0)]);
        let (_, values) = point(&(3000, at(500, 2)), &(5000, at(500, 2)));
        assert_eq!(values[..2], [Some(0.0), None], "it stands, and no batch speaks of its duration");
        let series = Series::default();
        (0..2000).for_each(|i| series.add((i, values)));
        assert_eq!(series.since(0)["points"].as_array().map(Vec::len), Some(1800));
        let new = series.since(1997);
        assert_eq!(new["points"].as_array().map(Vec::len), Some(2));
        assert_eq!(new["points"][0].as_array().map(Vec::len), Some(COLUMNS.len()));
    }
}
