//! Charts as inline SVG. Pure.

use std::fmt::Write as _;

use super::html::escape;
use super::tables::{bytes, count, duration, ms};
use crate::ledger::sample::Sample;

/// Small, so that text stays readable on a phone, where a chart is as wide as the screen.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 190.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 26.0;

/// One line of a chart.
struct Line {
    name: &'static str,
    /// Seconds since the first sample, and value; in parts, where there is a gap.
    points: Vec<(f64, f64)>,
}

/// A chart with its title and a sentence that says the same.
struct Chart {
    title: &'static str,
    lines: Vec<Line>,
    unit: fn(f64) -> String,
    /// What the axis counts in, in units of the values.
    scale: f64,
    /// Adds up or lasts, so that its ends mean something.
    level: bool,
}

/// All charts of the course; none if there are fewer than two samples.
pub fn charts(samples: &[Sample]) -> String {
    let Some(first) = samples.first().filter(|_| samples.len() > 1) else {
        return "<p class=\"note\">no course yet: the daemon takes samples while it works</p>".into();
    };
    let end = samples.last().map_or(1.0, |s| s.at - first.at).max(0.001);
    let level = |value: fn(&Sample) -> f64| samples.iter().map(|s| (s.at - first.at, value(s))).collect::<Vec<_>>();
    let rate = samples.windows(2).filter(|w| w[1].at > w[0].at).map(|w| {
        let rows = (w[1].rows_scanned - w[0].rows_scanned).max(0) as f64;
        (w[1].at - first.at, rows / (w[1].at - w[0].at))
    });
    let latency = |value: fn(&Sample) -> Option<f64>| {
        samples.iter().filter_map(|s| Some((s.at - first.at, value(s)?))).collect::<Vec<_>>()
    };
    let wal = samples.iter().map(|s| (s.at - first.at, (s.wal_bytes - first.wal_bytes) as f64));
    let waited = level(|s| s.throttled_ms.values().sum::<u64>() as f64 / 1000.0);
    let all = [
        Chart {
            title: "Rows per second",
            lines: vec![Line { name: "rows/s", points: rate.collect() }],
            unit: |v| count(v as i64),
            scale: 1.0,
            level: false,
        },
        Chart {
            title: "Time of a batch",
            lines: vec![
                Line { name: "median", points: latency(|s| s.batch_p50_ms) },
                Line { name: "99th percentile", points: latency(|s| s.batch_p99_ms) },
            ],
            unit: ms,
            scale: 1.0,
            level: false,
        },
        Chart {
            title: "WAL of the whole server, since the start",
            lines: vec![Line { name: "WAL", points: wal.collect() }],
            unit: bytes,
            scale: 1_048_576.0,
            level: true,
        },
        Chart {
            title: "Size",
            lines: vec![
                Line { name: "table", points: level(|s| s.table_bytes as f64) },
                Line { name: "indexes", points: level(|s| s.index_bytes as f64) },
            ],
            unit: bytes,
            scale: 1_048_576.0,
            level: true,
        },
        Chart {
            title: "Time that batches have waited",
            lines: vec![Line { name: "waited", points: waited }],
            unit: duration,
            scale: 1.0,
            level: true,
        },
    ];
    let marks = marks(samples);
    let drawn: Vec<String> = all.iter().map(|c| draw(c, end, &marks)).collect();
    format!("<div class=\"charts\">\n{}</div>\n{}", drawn.join(""), legend(&marks))
}

/// Where phases begin: seconds and name.
fn marks(samples: &[Sample]) -> Vec<(f64, &str)> {
    let mut out: Vec<(f64, &str)> = Vec::new();
    for s in samples {
        if out.last().is_none_or(|m| m.1 != s.phase) {
            out.push((s.at - samples[0].at, &s.phase));
        }
    }
    out
}

fn legend(marks: &[(f64, &str)]) -> String {
    let list: Vec<String> = marks.iter().map(|(at, name)| format!("{} at {}", escape(name), duration(*at))).collect();
    format!("<p class=\"note\">Dotted lines: {}.</p>\n", list.join(", "))
}

fn draw(chart: &Chart, end: f64, marks: &[(f64, &str)]) -> String {
    let most = chart.lines.iter().flat_map(|l| &l.points).map(|p| p.1).fold(0.0, f64::max);
    let top = nice(most / chart.scale) * chart.scale;
    let x = |t: f64| LEFT + (WIDTH - LEFT - RIGHT) * (t / end).clamp(0.0, 1.0);
    let y = |v: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - (v / top).clamp(0.0, 1.0));
    let mut svg = String::new();
    for step in 0..=2 {
        let v = top * f64::from(step) / 2.0;
        let at = y(v);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            (chart.unit)(v)
        );
    }
    for (t, _) in marks.iter().skip(1) {
        let at = x(*t);
        let _ = write!(
            svg,
            "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/>",
            HEIGHT - BOTTOM
        );
    }
    for (t, anchor) in [(0.0, "start"), (end / 2.0, "middle"), (end, "end")] {
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            x(t),
            HEIGHT - 8.0,
            duration(t)
        );
    }
    for (i, line) in chart.lines.iter().enumerate() {
        let points: Vec<String> = line.points.iter().map(|(t, v)| format!("{:.1},{:.1}", x(*t), y(*v))).collect();
        let _ = write!(svg, "<polyline class=\"line l{i}\" points=\"{}\"/>", points.join(" "));
        // A single point has no line.
        if let [(t, v)] = line.points[..] {
            let _ = write!(svg, "<circle class=\"dot l{i}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\"/>", x(t), y(v));
        }
    }
    let said: Vec<String> = chart.lines.iter().map(|l| sentence(l, chart)).collect();
    let keys: Vec<String> = chart
        .lines
        .iter()
        .zip(&said)
        .enumerate()
        .map(|(i, (_, s))| format!("<span class=\"key l{i}\">{s}</span>"))
        .collect();
    format!(
        "<figure><figcaption>{0}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}: {1}\">\
         {svg}</svg><p class=\"keys\">{2}</p></figure>\n",
        chart.title,
        said.join("; "),
        keys.join(" ")
    )
}

/// `table: 60.1 MB to 72.0 MB, most 72.0 MB`.
fn sentence(line: &Line, chart: &Chart) -> String {
    let unit = chart.unit;
    let (Some(first), Some(last)) = (line.points.first(), line.points.last()) else {
        return format!("{}: nothing", line.name);
    };
    let most = line.points.iter().map(|p| p.1).fold(0.0, f64::max);
    if !chart.level {
        return format!("{}: at most {}", line.name, unit(most));
    }
    format!("{}: {} to {}, most {}", line.name, unit(first.1), unit(last.1), unit(most))
}

/// The next of 1, 2, 2.5, 5 times a power of ten.
fn nice(most: f64) -> f64 {
    if most <= 0.0 || !most.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf(most.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|s| s * power).find(|v| *v >= most).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!((nice(0.0), nice(0.9), nice(1.0), nice(21.0), nice(70_000.0)), (1.0, 1.0, 1.0, 25.0, 100_000.0));
    }

    #[test]
    fn a_course_without_change_or_time_is_drawn_as_well() {
        let sample = |at: f64, phase: &str| Sample {
            at,
            phase: phase.into(),
            rows_scanned: 0,
            rows_updated: 0,
            batches: 0,
            wal_bytes: 0,
            table_bytes: 0,
            index_bytes: 0,
            throttled_ms: Default::default(),
            batch_p50_ms: None,
            batch_p99_ms: None,
        };
        assert!(charts(&[]).contains("no course yet") && charts(&[sample(1.0, "expand")]).contains("no course yet"));
        let text = charts(&[sample(1.0, "expand"), sample(1.0, "<b>")]);
        assert!(text.contains("&lt;b&gt;") && !text.contains("NaN") && !text.contains("inf"), "{text}");
    }
}
