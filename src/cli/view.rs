//! How a job stands, as some lines for a terminal, or as one for whoever has none; pure.

use crate::eta;
use crate::http::{Mood, Summary};
use crate::phase::Phase;
use crate::progress::{Event, Snapshot};

/// What the terminal can show.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    pub width: usize,
    pub color: bool,
    /// More than ASCII.
    pub unicode: bool,
}

impl Look {
    /// Of the terminal at this moment.
    pub fn now() -> Self {
        Self {
            width: crate::terminal::size().1,
            color: !crate::telemetry::no_color(),
            unicode: crate::terminal::is_unicode(),
        }
    }
}

/// Fewer columns than this hold no name of each phase.
const ALL_PHASES: usize = 74;
/// A longer bar is no better to read.
const LONGEST_BAR: usize = 60;

#[derive(Clone, Copy)]
enum Style {
    Plain,
    Bold,
    Dim,
    Green,
    Yellow,
    Red,
}

type Spans = Vec<(Style, String)>;

/// The view of a moment. `last`: what happened last. `why_old`: why these numbers are.
pub fn lines(now: &Snapshot, last: Option<&Event>, why_old: Option<&str>, look: &Look) -> Vec<String> {
    let summary = Summary::of(now);
    let (style, label, headline) = match why_old {
        Some(why) => (Style::Red, "no answer", lost(why)),
        None => (color(summary.mood), summary.label.as_str(), summary.headline.clone()),
    };
    let mut out = vec![vec![(Style::Bold, now.job.clone()), (Style::Plain, "  ".into()), (style, label.to_owned())]];
    out.push(phases(now, &summary, look));
    out.extend(bar(now, &summary, look));
    // What it waits for stands at the end, and is not to be cut.
    out.extend(wrap(&headline, look.width).into_iter().map(|text| vec![(style, text)]));
    let row = |name: &str, text: String| vec![(Style::Dim, format!("{name:<8} ")), (Style::Plain, text)];
    out.extend(rows(now, &summary).map(|text| row("rows", text)));
    out.extend(batches(now).map(|text| row("batches", text)));
    out.extend(lag(now).map(|text| row("lag", text)));
    if !now.lease.holder.is_empty() {
        out.push(row("daemon", now.lease.holder.clone()));
    }
    out.extend(last.map(|e| row("last", said(e))));
    if !summary.next.command.is_empty() && (summary.mood != Mood::Ok || look.width >= ALL_PHASES) {
        out.push(row("next", summary.next.command.clone()));
    }
    out.into_iter().map(|spans| paint(spans, look)).collect()
}

/// The same in one line.
pub fn line(now: &Snapshot) -> String {
    let summary = Summary::of(now);
    let label = if place(now) == summary.label { String::new() } else { format!(": {}", summary.label) };
    let mut parts = vec![format!("{} {}{label}", now.job, place(now))];
    parts.extend(summary.ratio.filter(|_| walks(now)).map(|ratio| format!("{:.1} %", ratio * 100.0)));
    parts.extend(now.eta.filter(|_| walks(now)).map(|e| format!("about {} left", eta::words(e.seconds))));
    parts.extend(rows(now, &summary));
    if !matches!(summary.mood, Mood::Ok | Mood::Done) {
        parts.push(summary.headline);
    }
    clean(&parts.join(", "))
}

/// What has to change before somebody who reads lines wants another one at once.
pub fn news(now: &Snapshot) -> String {
    let waits: Vec<&str> = now.waiting.iter().map(|s| s.signal.as_str()).collect();
    format!("{} {} {} {}", now.stored_phase, now.status, waits.join(" "), now.lease.holder)
}

/// Why the numbers are old.
pub fn lost(why: &str) -> String {
    format!("no answer from the database, trying again: {why}")
}

/// Time of day, UTC.
pub fn clock(at_ms: u64) -> String {
    let seconds = at_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn place(now: &Snapshot) -> &str {
    match (now.stored_phase.as_str(), now.phase.as_str()) {
        ("", "") => "starting",
        ("", shown) => shown,
        (stored, _) => stored,
    }
}

fn walks(now: &Snapshot) -> bool {
    matches!(now.stored_phase.as_str(), "backfill" | "verify")
}

fn color(mood: Mood) -> Style {
    match mood {
        Mood::Ok | Mood::Done => Style::Green,
        Mood::Waiting | Mood::Calm => Style::Yellow,
        Mood::Attention => Style::Red,
    }
}

/// Where it is among the phases.
fn phases(now: &Snapshot, summary: &Summary, look: &Look) -> Spans {
    let all = &Phase::ALL[..Phase::ALL.len() - 1];
    let at = now.stored_phase.parse::<Phase>().ok();
    if look.width < ALL_PHASES || at.is_none() {
        let number = at.and_then(|at| all.iter().position(|p| *p == at));
        let of = number.map_or(String::new(), |n| format!(", phase {} of {}", n + 1, all.len()));
        return vec![(Style::Plain, format!("{}{of}", place(now)))];
    }
    let marks = if look.unicode { ["✓ ", "▸ ", "· "] } else { ["+ ", "> ", "- "] };
    let mut out = Vec::new();
    for phase in all {
        let (mark, style) = match at {
            Some(at) if *phase == at => (marks[1], color(summary.mood)),
            Some(at) if *phase < at => (marks[0], Style::Plain),
            _ => (marks[2], Style::Dim),
        };
        if !out.is_empty() {
            out.push((Style::Plain, "  ".into()));
        }
        out.push((style, format!("{mark}{phase}")));
    }
    out
}

fn bar(now: &Snapshot, summary: &Summary, look: &Look) -> Option<Spans> {
    let ratio = summary.ratio.filter(|_| walks(now))?.clamp(0.0, 1.0);
    let left = now.eta.map_or(String::new(), |e| format!("  about {} left", eta::words(e.seconds)));
    let text = format!(" {:>5.1} %{left}", ratio * 100.0);
    // A bar that does not grow and shrink with the words beside it.
    let room = look.width.saturating_sub(33).clamp(5, LONGEST_BAR);
    let full = (ratio * room as f64) as usize;
    let (done, open) = if look.unicode { ("█", "░") } else { ("#", ".") };
    Some(vec![(color(summary.mood), done.repeat(full)), (Style::Dim, open.repeat(room - full)), (Style::Plain, text)])
}

fn rows(now: &Snapshot, summary: &Summary) -> Option<String> {
    let speed = now.rows_per_second;
    let speed =
        if summary.moves && speed > 0.0 { format!(", {} rows/s", thousands(speed as i64)) } else { String::new() };
    if now.stored_phase == "verify" && now.rows_verified > 0 {
        return Some(format!("{} compared{speed}", thousands(now.rows_verified)));
    }
    if now.batches == 0 {
        return None;
    }
    let of = if now.rows_estimate > 0 { format!(" of about {}", thousands(now.rows_estimate)) } else { String::new() };
    let sweep = if now.sweep > 1 { format!(", sweep {}", now.sweep) } else { String::new() };
    let (walked, filled) = (thousands(now.rows_scanned), thousands(now.rows_updated));
    Some(format!("{walked}{of}, {filled} filled{speed}{sweep}"))
}

fn batches(now: &Snapshot) -> Option<String> {
    let (p50, p99) = (now.batch_p50_ms?, now.batch_p99_ms?);
    let text = format!("{}, lately {p50:.0} ms each, {p99:.0} ms the longest", thousands(now.batches));
    (now.stored_phase == "backfill").then_some(text)
}

fn lag(now: &Snapshot) -> Option<String> {
    let signal = now.signals.iter().find(|s| s.signal == "replica_lag" && !s.refuses)?;
    Some(format!("{:.1} s, at most {:.0} s", signal.observed, signal.threshold))
}

fn said(event: &Event) -> String {
    let mut out = format!("{} {}", clock(event.at_ms), event.message);
    for (name, value) in event.fields.iter().filter(|(name, _)| name.as_str() != "job") {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        out.push_str(&format!(" {name}={value}"));
    }
    out
}

/// In lines of whole words where they fit, four at most.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let is_last = out.len() == 4;
        match out.last_mut() {
            Some(line) if is_last || line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => out.push(word.to_owned()),
        }
    }
    out
}

fn thousands(n: i64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && out != "-" {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// What operators and servers write must not move the cursor.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Cuts to the width, then colors.
fn paint(spans: Spans, look: &Look) -> String {
    let whole: usize = spans.iter().map(|(_, text)| text.chars().count()).sum();
    let dots = if look.unicode { "…" } else { "..." };
    let mut room = if whole > look.width { look.width.saturating_sub(dots.chars().count()) } else { whole };
    let mut out = String::new();
    for (style, text) in spans {
        let cut: String = clean(&text).chars().take(room).collect();
        room -= cut.chars().count();
        let code = match style {
            Style::Plain => "",
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Green => "32",
            Style::Yellow => "33",
            Style::Red => "31",
        };
        match code {
            _ if cut.is_empty() => {}
            "" => out.push_str(&cut),
            code if look.color => out.push_str(&format!("\x1b[{code}m{cut}\x1b[0m")),
            _ => out.push_str(&cut),
        }
    }
    if whole > look.width {
        out.push_str(dots);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::{Eta, LeaseState, Signal};

    fn filling() -> Snapshot {
        Snapshot {
            job: "orders_region".into(),
            phase: "backfill".into(),
            stored_phase: "backfill".into(),
            status: "running".into(),
            rows_scanned: 432_000,
            rows_updated: 431_998,
            rows_estimate: 1_000_000,
            sweep: 1,
            rows_per_second: 12_345.6,
            eta: Some(Eta { seconds: 130.0, ..Eta::default() }),
            batches: 1234,
            batch_p50_ms: Some(91.3),
            batch_p99_ms: Some(204.0),
            signals: vec![Signal {
                signal: "replica_lag".into(),
                observed: 0.31,
                threshold: 10.0,
                ..Signal::default()
            }],
            lease: LeaseState { holder: "db-tools-1".into(), ..LeaseState::default() },
            ..Snapshot::default()
        }
    }

    fn event() -> Event {
        let fields = serde_json::json!({"job": "orders_region", "phase": "expand", "duration_ms": 31});
        let serde_json::Value::Object(fields) = fields else { unreachable!() };
        Event { at_ms: 81_783_000, level: "info".into(), message: "phase complete".into(), fields }
    }

    const WIDE: Look = Look { width: 80, color: false, unicode: true };
    const NARROW: Look = Look { width: 40, color: false, unicode: false };

    #[test]
    fn the_view_of_each_state() {
        let waiting = vec![Signal { text: "replica_lag is 12 s, at most 10 s wanted".into(), ..Signal::default() }];
        let waits = Snapshot { waiting, rows_per_second: 0.0, eta: None, ..filling() };
        let failed = Snapshot {
            status: "failed".into(),
            phase: "failed".into(),
            stored_phase: "constrain".into(),
            reason: "index orders_region_idx is not ours".into(),
            ..filling()
        };
        let done = Snapshot {
            status: "done".into(),
            phase: "done".into(),
            stored_phase: "done".into(),
            rows_scanned: 1_000_000,
            rows_updated: 1_000_000,
            ..filling()
        };
        let starting = Snapshot { job: "orders_region".into(), ..Snapshot::default() };
        let mut out = String::new();
        let states = [
            ("filling", filling(), None),
            ("waiting", waits, None),
            ("lost", filling(), Some("127.0.0.1:5432: connection refused")),
            ("failed", failed, None),
            ("done", done, None),
            ("starting", starting, None),
        ];
        for (name, now, why_old) in states {
            for look in [WIDE, NARROW] {
                let text = lines(&now, Some(&event()), why_old, &look).join("\n");
                out.push_str(&format!("--- {name}, {} columns\n{text}\n", look.width));
            }
            out.push_str(&format!("--- {name}, a line\n{}\n\n", line(&now)));
        }
        insta::assert_snapshot!(out);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_and_nothing_moves_the_cursor() {
        let evil = Snapshot { reason: "\x1b[2J\n\tx ".repeat(40), status: "paused".into(), ..filling() };
        for width in [1, 5, 20, 40, 80, 200] {
            for unicode in [true, false] {
                let look = Look { width, color: true, unicode };
                for line in lines(&evil, Some(&event()), Some("gone"), &look) {
                    let seen = console::strip_ansi_codes(&line).into_owned();
                    assert!(seen.chars().count() <= width.max(3), "{width}: {seen:?}");
                    assert!(!seen.contains(char::is_control), "{seen:?}");
                }
                let plain = lines(&evil, None, None, &Look { color: false, ..look });
                assert!(plain.iter().all(|l| !l.contains('\x1b')), "{plain:?}");
            }
        }
    }

    #[test]
    fn numbers_are_grouped() {
        let said: Vec<String> = [0, 999, 1000, 12_345_678, -1000, -100].into_iter().map(thousands).collect();
        assert_eq!(said, ["0", "999", "1,000", "12,345,678", "-1,000", "-100"]);
    }
}
