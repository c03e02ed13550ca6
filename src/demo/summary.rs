//! What the demo found, for people (80 columns) and for machines, and whether it is as it must be.

use std::fmt;

use serde::Serialize;

use super::measure::ListTiming;
use super::traffic::{Oracle, TrafficReport};
use crate::error::{Error, Result};

/// What the daemon did between "before" and "after".
#[derive(Debug, Clone, Default, Serialize)]
pub struct DriveReport {
    /// The daemon's phases, in order.
    pub phases: Vec<PhaseDuration>,
    /// Rows that batches filled.
    pub rows_updated: u64,
    /// While batches ran, pauses included.
    pub rows_per_second: f64,
    /// Longest time for which anything of ours held ACCESS EXCLUSIVE, milliseconds.
    pub longest_access_exclusive_ms: f64,
    /// Rows without a value, by the daemon's own verification.
    pub nulls: u64,
    /// Rows with another value than their source, by the daemon's own verification.
    pub drift: u64,
    /// Where the report of the job was written.
    pub report: Option<std::path::PathBuf>,
}

/// How long one phase took.
#[derive(Debug, Clone, Serialize)]
pub struct PhaseDuration {
    /// The phase's name.
    pub name: String,
    /// Wall time.
    pub seconds: f64,
}

/// Everything the demo found.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Such as `15.18`.
    pub server_version: String,
    /// Messages generated.
    pub rows: u64,
    /// What the daemon did.
    pub drive: DriveReport,
    /// What the application noticed.
    pub traffic: TrafficReport,
    /// Whether every acknowledged write is still there, and nothing else.
    pub oracle: Oracle,
    /// Rows without a value, counted when everything had stopped; `None` without the column.
    pub nulls: Option<u64>,
    /// Rows with another value than their source, counted when everything had stopped.
    pub drift: Option<u64>,
    /// The list under row level security, before anything was changed.
    pub list_before: Vec<ListTiming>,
    /// The same, under the new policies.
    pub list_after: Vec<ListTiming>,
}

impl Summary {
    /// Everything that is not as it must be, one line each.
    pub fn problems(&self) -> Vec<String> {
        let (traffic, oracle) = (&self.traffic, &self.oracle);
        let mut out: Vec<String> = [
            (traffic.application_errors, "application errors"),
            (traffic.foreign_inserts_accepted, "foreign inserts accepted"),
            (traffic.foreign_rows_seen, "foreign rows seen"),
            (traffic.own_rows_missed, "own rows missed"),
            (oracle.lost, "acknowledged rows lost"),
            (oracle.altered, "rows altered"),
            (oracle.resurrected, "deleted rows back"),
            (oracle.unexpected, "rows that nobody wrote"),
            (oracle.touched, "rows whose updated_at moved without the application"),
            (oracle.stray_broadcasts, "broadcasts that the application did not cause"),
            (self.nulls.unwrap_or(self.drive.nulls), "rows without a value"),
            (self.drift.unwrap_or(self.drive.drift), "rows with a wrong value"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
        if self.nulls.is_none() {
            out.push("the column does not exist".to_owned());
        }
        if traffic.foreign_inserts_refused == 0 {
            out.push("no foreign insert was tried, so nothing shows that one is refused".to_owned());
        }
        out
    }

    /// An error of kind [`crate::Kind::Failed`] if there is a problem.
    ///
    /// # Errors
    /// Names the problems.
    pub fn verdict(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::failed(format!("the demo did not end as it must: {}", problems.join(", "))))
    }

    /// The whole summary with `ok` and `problems`, pretty-printed.
    ///
    /// # Errors
    /// None in practice: every field is plain data.
    pub fn to_json(&self) -> Result<String> {
        #[derive(Serialize)]
        struct Judged<'a> {
            ok: bool,
            problems: Vec<String>,
            #[serde(flatten)]
            summary: &'a Summary,
        }
        let problems = self.problems();
        serde_json::to_string_pretty(&Judged { ok: problems.is_empty(), problems, summary: self })
            .map_err(|e| Error::internal("cannot write the summary").with_source(e))
    }

    fn write_drive(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let drive = &self.drive;
        writeln!(f, "PostgreSQL {}, {} messages", self.server_version, thousands(self.rows))?;
        if !drive.phases.is_empty() {
            writeln!(f, "\nPhases")?;
        }
        for phase in &drive.phases {
            writeln!(f, "  {:<32}{:>12.2} s", phase.name, phase.seconds)?;
        }
        writeln!(f, "\nBackfill")?;
        line(f, "rows filled", &thousands(drive.rows_updated))?;
        line(f, "rows per second", &thousands(drive.rows_per_second.round() as u64))?;
        line(f, "longest ACCESS EXCLUSIVE", &format!("{:.1} ms", drive.longest_access_exclusive_ms))?;
        let count = |n: Option<u64>| n.map_or("no column".to_owned(), thousands);
        line(f, "rows without value (NULL)", &count(self.nulls))?;
        line(f, "rows with wrong value (drift)", &count(self.drift))
    }

    fn write_traffic(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (traffic, oracle) = (&self.traffic, &self.oracle);
        writeln!(f, "\nApplication")?;
        line(f, "requests", &thousands(traffic.requests))?;
        line(f, "errors", &thousands(traffic.application_errors))?;
        for error in traffic.errors.iter().take(10) {
            let text = format!("{} x {} {}: {}", error.count, error.operation, error.code, error.message);
            writeln!(f, "    {}", text.chars().take(76).collect::<String>())?;
        }
        let retries: Vec<String> = traffic.retries.iter().map(|(state, n)| format!("{n} x {state}")).collect();
        line(f, "retried as applications do", &if retries.is_empty() { "0".into() } else { retries.join(", ") })?;
        line(f, "refused after a change of hands", &thousands(traffic.expected_refusals))?;
        let tried = traffic.foreign_inserts_refused + traffic.foreign_inserts_accepted;
        let refused = format!("{} of {}", thousands(traffic.foreign_inserts_refused), thousands(tried));
        line(f, "foreign inserts refused", &refused)?;
        let reads = format!("{}, {}", traffic.foreign_rows_seen, traffic.own_rows_missed);
        line(f, "foreign rows seen, own rows missed", &reads)?;
        let rows = format!("{}, {}, {}", oracle.lost, oracle.altered, oracle.unexpected + oracle.resurrected);
        line(f, "rows lost, altered, unexpected", &rows)?;
        line(f, "stray updated_at, stray broadcasts", &format!("{}, {}", oracle.touched, oracle.stray_broadcasts))?;

        writeln!(f, "\nRequest time, ms       requests         p50         p99         max")?;
        for l in &traffic.latency {
            let phase = format!("{:?}", l.phase).to_lowercase();
            let requests = thousands(l.requests);
            writeln!(f, "  {phase:<18}{requests:>11}{:>12.1}{:>12.1}{:>12.1}", l.p50_ms, l.p99_ms, l.max_ms)?;
        }
        Ok(())
    }

    fn write_lists(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (owner, pages) = ("List under RLS, ms", "pages before/after");
        writeln!(f, "\n{owner:<28}{:>10}{:>10}{:>10}{pages:>22}", "before", "after", "faster")?;
        for (before, after) in self.list_before.iter().zip(&self.list_after) {
            let owner = format!("{} ({} messages)", before.owner, thousands(after.messages));
            let faster = times(before.time_ms / after.time_ms.max(0.001));
            let pages = format!("{}/{}", thousands(before.buffers), thousands(after.buffers));
            writeln!(f, "  {owner:<26}{:>10.2}{:>10.2}{faster:>10}{pages:>22}", before.time_ms, after.time_ms)?;
        }
        if self.list_before.iter().zip(&self.list_after).any(|(before, after)| after.time_ms > before.time_ms) {
            // Before, the newest rows of all were walked until 50 were one's own, which suits whoever owns many of them.
            writeln!(f, "  Below 1 is slower: all rows of that owner are read and sorted. Where that")?;
            writeln!(f, "  matters, add an index on (auth_user_id, created_at) to the job.")?;
        }
        Ok(())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_drive(f)?;
        self.write_traffic(f)?;
        self.write_lists(f)?;
        if let Some(path) = &self.drive.report {
            writeln!(f, "\nReport: {}", path.display())?;
        }
        let problems = self.problems();
        if problems.is_empty() {
            return write!(f, "\nEverything is as it must be.");
        }
        write!(f, "\nNot as it must be:")?;
        problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

/// A factor with two significant digits at least.
fn times(factor: f64) -> String {
    let digits = if factor >= 10.0 {
        0
    } else if factor >= 1.0 {
        1
    } else {
        2
    };
    format!("{factor:.digits$} x")
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "  {name:<36}{value:>20}")
}

/// 1234567 as 1,234,567.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::traffic::{ErrorSample, Latency, Phase};

    fn good() -> Summary {
        let latency = Phase::ALL.map(|phase| Latency {
            phase,
            requests: 1_234_567,
            p50_ms: 1.2,
            p99_ms: 12_345.6,
            max_ms: 123_456.7,
        });
        let list = |time_ms, buffers| {
            let messages = 1_234_567;
            vec![ListTiming { owner: "most", messages, time_ms, buffers, plan: vec!["Seq Scan on messages".into()] }]
        };
        Summary {
            server_version: "15.18".into(),
            rows: 100_000_000,
            drive: DriveReport {
                phases: vec![PhaseDuration { name: "backfill".into(), seconds: 12_345.678 }],
                rows_updated: 100_000_000,
                ..DriveReport::default()
            },
            traffic: TrafficReport {
                requests: 1,
                latency: latency.to_vec(),
                foreign_inserts_refused: 1,
                ..TrafficReport::default()
            },
            oracle: Oracle::default(),
            nulls: Some(0),
            drift: Some(0),
            list_before: list(12_345.67, 12_345_678),
            list_after: list(0.0, 12),
        }
    }

    #[test]
    fn the_table_fits_eighty_columns() {
        let mut summary = good();
        let message = "a message that goes on and on, because servers like to explain themselves".into();
        summary.traffic.errors = vec![ErrorSample { operation: "send", code: "23502".into(), message, count: 7 }];
        for line in summary.to_string().lines() {
            assert!(line.chars().count() <= 80, "{line:?} has {} columns", line.chars().count());
        }
    }

    #[test]
    fn each_thing_that_must_not_be_fails_the_demo_by_name() {
        assert!(good().verdict().is_ok());
        type Change = fn(&mut Summary);
        let cases: [(Change, &str); 9] = [
            (|s| s.traffic.application_errors = 2, "2 application errors"),
            (|s| s.traffic.foreign_inserts_accepted = 1, "1 foreign inserts accepted"),
            (|s| s.traffic.foreign_inserts_refused = 0, "no foreign insert was tried"),
            (|s| s.traffic.own_rows_missed = 1, "1 own rows missed"),
            (|s| s.oracle.lost = 1, "1 acknowledged rows lost"),
            (|s| s.oracle.touched = 1, "updated_at"),
            (|s| s.nulls = Some(3), "3 rows without a value"),
            (|s| s.drift = Some(4), "4 rows with a wrong value"),
            (|s| s.nulls = None, "the column does not exist"),
        ];
        for (change, expected) in cases {
            let mut summary = good();
            change(&mut summary);
            let error = summary.verdict().expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(error.kind(), crate::Kind::Failed);
            assert!(summary.to_json().unwrap().contains("\"ok\": false"));
        }
    }
}
