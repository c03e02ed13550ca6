//! What HTML and Markdown share: numbers for people, and the tables of the report. Pure.

use serde_json::Value;

use super::Report;
use crate::ledger::plans::{QueryPlan, Stage};

/// A table of the report.
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Column heads; those that begin with `#` hold numbers.
    pub head: Vec<&'static str>,
    /// Cells.
    pub rows: Vec<Vec<String>>,
    /// Said under it; or in its place, if it has no rows.
    pub note: String,
}

/// `12,345`.
pub fn count(n: i64) -> String {
    let digits = n.unsigned_abs().to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    if n < 0 { format!("-{out}") } else { out }
}

/// `0.42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        _ if seconds < 10.0 => format!("{seconds:.2} s"),
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// `1.2 ms`.
pub fn ms(ms: f64) -> String {
    match ms {
        m if m >= 100.0 => format!("{} ms", count(m.round() as i64)),
        m if m >= 1.0 => format!("{m:.1} ms"),
        m => format!("{m:.2} ms"),
    }
}

/// `12.3 MB`.
pub fn bytes(n: f64) -> String {
    let mb = n / 1_048_576.0;
    match mb {
        m if m >= 10_240.0 => format!("{:.1} GB", m / 1024.0),
        m if m >= 100.0 => format!("{} MB", count(m.round() as i64)),
        m => format!("{m:.1} MB"),
    }
}

/// `key: value, key: value`; nothing for an empty object.
pub fn detail(value: &Value) -> String {
    let word = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    match value.as_object() {
        Some(o) => o.iter().map(|(k, v)| format!("{k}: {}", word(v))).collect::<Vec<_>>().join(", "),
        None => word(value),
    }
}

/// The head of the report: names and numbers.
pub fn facts(r: &Report) -> Vec<(&'static str, String)> {
    let mut out = vec![
        ("Rows filled", count(r.rows_updated)),
        ("Rows looked at", count(r.rows_scanned)),
        ("Rows per second", r.rows_per_second().map_or("-".into(), |n| count(n as i64))),
        ("Batches", count(r.batches)),
        ("Time", duration(r.seconds)),
        ("Longest ACCESS EXCLUSIVE", r.longest_exclusive_ms().map_or("-".into(), ms)),
    ];
    let waited: f64 = r.throttled_seconds.values().sum();
    out.push(("Batches waited", duration(waited)));
    if let (Some(first), Some(last)) = (r.samples.first(), r.samples.last()) {
        out.push(("WAL, whole server", bytes((last.wal_bytes - first.wal_bytes) as f64)));
        let size = |s: &crate::ledger::sample::Sample| (s.table_bytes + s.index_bytes) as f64;
        out.push(("Table and indexes", format!("{} to {}", bytes(size(first)), bytes(size(last)))));
    }
    if let Some(v) = r.verdicts.first() {
        let found: i64 = v.counts.values().sum();
        let text =
            if v.passed { format!("passed, {} rows", count(v.rows_checked)) } else { format!("{found} findings") };
        out.push(("Proof of the data", text));
    }
    out
}

/// Phases and statements.
pub fn course(r: &Report) -> Vec<Table> {
    let phases =
        r.phases.iter().map(|p| vec![p.phase.clone(), p.ended_at.clone(), duration(p.seconds), p.next.clone()]);
    let ddl = r.ddl.iter().map(|d| {
        let lock = if d.lock.is_empty() { "none that anybody waits for".into() } else { d.lock.clone() };
        vec![d.what.clone(), d.at.clone(), lock, ms(d.ms)]
    });
    let events = r.events.iter().map(|e| vec![e.at.clone(), e.kind.clone(), e.detail.clone(), e.actor.clone()]);
    let waits = r.throttled_seconds.iter().map(|(signal, s)| vec![signal.clone(), duration(*s)]);
    vec![
        table("Phases", vec!["Phase", "Ended (UTC)", "#Time", "Next"], phases, "no phase was completed yet"),
        table("Statements that took locks", vec!["What", "At (UTC)", "Strongest lock", "#Held"], ddl, "none yet"),
        table("Time that batches waited", vec!["Signal", "#Time"], waits, "no batch had to wait"),
        table("What else happened", vec!["At (UTC)", "What", "Detail", "Login"], events, "nothing"),
    ]
}

/// The proofs.
pub fn proofs(r: &Report) -> Vec<Table> {
    let kinds = |counts: &std::collections::BTreeMap<String, i64>| {
        let found: Vec<String> = counts.iter().map(|(k, n)| format!("{k} {}", count(*n))).collect();
        found.join(", ")
    };
    let data = r.verdicts.iter().map(|v| {
        let passed = if v.passed { "passed" } else { "FAILED" };
        vec![v.at.clone(), passed.into(), count(v.rows_checked), duration(v.seconds), kinds(&v.counts)]
    });
    let mut out = vec![table(
        "Data: every row against its source",
        vec!["At (UTC)", "Verdict", "#Rows", "#Time", "Found"],
        data,
        "not made yet",
    )];
    let keys = r.verdicts.first().into_iter().flat_map(|v| &v.samples).filter(|s| !s.1.is_empty());
    let keys: Vec<_> = keys
        .map(|(kind, keys)| {
            let shown: Vec<String> = keys.iter().take(20).map(|k| k.join(", ")).collect();
            vec![kind.clone(), shown.join(" | ")]
        })
        .collect();
    if !keys.is_empty() {
        out.push(table("Keys of rows found", vec!["Kind", "Keys"], keys.into_iter(), ""));
    }
    out.extend(access(r));
    out
}

fn access(r: &Report) -> Vec<Table> {
    let runs = r.access.iter().map(|a| {
        let passed = match a.run.passed {
            Some(true) => "passed",
            Some(false) => "FAILED",
            None => "not finished",
        };
        let sets = match (a.run.set_users, a.run.set_rows) {
            (Some(users), Some(rows)) => format!("{} users, {} pairs of user and row", count(users), count(rows)),
            _ => "not made".into(),
        };
        vec![
            format!("{} the flip", a.run.stage),
            passed.into(),
            sets,
            count(a.run.users),
            count(a.run.attempts),
            count(a.run.differences),
            count(a.run.accepted),
        ]
    });
    let mut out = vec![table(
        "Access: old policies against new ones",
        vec!["When", "Verdict", "By sets", "#Users as enforced", "#Attempts", "#Differences", "#Accepted"],
        runs,
        "not made for this job",
    )];
    let differences: Vec<_> = r
        .access
        .iter()
        .flat_map(|a| a.differences.iter().map(|d| (&a.run.stage, d)))
        .map(|(stage, d)| {
            let what = format!("{} {}", d.command, d.attempt);
            vec![stage.clone(), d.actor(), what, d.before.clone(), d.after.clone(), d.verdict.clone(), d.cause.clone()]
        })
        .collect();
    if !differences.is_empty() {
        let head = vec!["Run", "Who", "What", "Before", "After", "Verdict", "Cause"];
        out.push(table("Differences of access", head, differences.into_iter(), ""));
    }
    out
}

/// Before and after, side by side.
pub fn queries(r: &Report) -> Table {
    let rows = pairs(&r.plans).into_iter().map(|(before, after)| {
        let any = before.or(after);
        let cell = |p: Option<&QueryPlan>| match p {
            Some(p) if !p.error.is_empty() => (p.error.clone(), "-".to_owned()),
            Some(p) => (p.time_ms.map_or("-".into(), ms), p.buffers.map_or("-".into(), count)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let (b, a) = (cell(before), cell(after));
        let ratio = match (before.and_then(|p| p.time_ms), after.and_then(|p| p.time_ms)) {
            (Some(b), Some(a)) if a > 0.0 => {
                let ratio = b / a;
                if ratio >= 10.0 { format!("{} x", count(ratio as i64)) } else { format!("{ratio:.2} x") }
            }
            _ => "-".to_owned(),
        };
        vec![
            any.map_or(String::new(), |p| p.query.clone()),
            any.map_or(String::new(), |p| format!("{} ({} rows)", p.owner, count(p.owner_rows))),
            b.0,
            a.0,
            ratio,
            b.1,
            a.1,
        ]
    });
    table(
        "The application's queries under row level security",
        vec!["Query", "Owner", "#Before", "#After", "#Faster", "#Pages before", "#Pages after"],
        rows,
        "the job names no queries in [report]; with some, their plans before and after the flip would stand here",
    )
}

/// Plans of the same query and owner.
pub fn pairs(plans: &[QueryPlan]) -> Vec<(Option<&QueryPlan>, Option<&QueryPlan>)> {
    let mut out: Vec<(Option<&QueryPlan>, Option<&QueryPlan>)> = Vec::new();
    for p in plans {
        let same = |x: &Option<&QueryPlan>| x.is_some_and(|x| x.query == p.query && x.owner == p.owner);
        let at = out.iter().position(|(b, a)| same(b) || same(a)).unwrap_or_else(|| {
            out.push((None, None));
            out.len() - 1
        });
        match p.stage {
            Stage::Before => out[at].0 = Some(p),
            Stage::After => out[at].1 = Some(p),
        }
    }
    out
}

/// What is left.
pub fn remains(r: &Report) -> Vec<Table> {
    let objects = r.remains.iter().map(|x| vec![x.kind.clone(), x.names.join(", ")]);
    let mut out = vec![table("In the database, made by this job", vec!["Kind", "Names"], objects, "nothing")];
    if r.remains.iter().any(|x| x.kind == "trigger") {
        out[0].note = "The sync triggers stay when the job is done: they keep the column right, whoever writes.".into();
    }
    let rows = r.quarantine.iter().map(|q| vec![q.key.join(", "), q.sqlstate.clone()]);
    let mut quarantine = table("Quarantine: rows that cannot be updated", vec!["Key", "SQLSTATE"], rows, "empty");
    if r.quarantined > r.quarantine.len() as i64 {
        quarantine.note = format!("{} in all; backfilld.quarantine has the others", count(r.quarantined));
    }
    out.push(quarantine);
    out
}

fn table(title: &str, head: Vec<&'static str>, rows: impl Iterator<Item = Vec<String>>, empty: &str) -> Table {
    let rows: Vec<_> = rows.collect();
    let note = if rows.is_empty() { empty.to_owned() } else { String::new() };
    Table { title: title.to_owned(), head, rows, note }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(
            (count(0), count(999), count(1_234_567), count(-1000)),
            ("0".into(), "999".into(), "1,234,567".into(), "-1,000".into())
        );
        assert_eq!(duration(3.456), "3.46 s");
        assert_eq!(duration(185.0), "3 min 5 s");
        assert_eq!(duration(273_700.0), "3 d 4 h");
        assert_eq!((ms(0.094), ms(4.12), ms(1234.5)), ("0.09 ms".into(), "4.1 ms".into(), "1,235 ms".into()));
        assert_eq!(bytes(1_500_000_000.0), "1,431 MB");
    }
}
