//! How a comparison of access is shown on a terminal.

use crate::ledger::access::{Outcome, Run};

/// One line about a run, for `status`.
pub fn line(run: &Run) -> String {
    let result = match run.passed {
        None => "not finished".to_owned(),
        Some(true) => "nobody's changes".to_owned(),
        Some(false) if run.differences == 0 => "could not be compared for everybody".to_owned(),
        Some(false) => format!("differs in {} ways", run.differences),
    };
    let flip = format!("{} the flip", run.stage);
    let accepted = if run.accepted > 0 { format!(", {} accepted", run.accepted) } else { String::new() };
    format!("{result} ({flip}, {} users as enforced, {} attempts{accepted})", run.users, run.attempts)
}

/// A run with its differences.
pub fn text(run: &Run, outcomes: &[Outcome]) -> String {
    let row = |name: &str, value: String| format!("{name:<20} {value}\n");
    let mut out = row("access", line(run));
    out.push_str(&row("begun", format!("{}, took {:.1} s", run.started_at, run.duration_ms as f64 / 1000.0)));
    if let (Some(users), Some(rows), Some(ms)) = (run.set_users, run.set_rows, run.set_ms) {
        let seconds = ms as f64 / 1000.0;
        out.push_str(&row("by sets", format!("{users} users, {rows} rows visible to them, {seconds:.1} s")));
    }
    for note in &run.notes {
        out.push_str(&row("note", note.clone()));
    }
    for o in outcomes {
        let mark = if o.verdict == "accepted" { "accepted" } else { "DIFFERENT" };
        out.push_str(&format!("\n{mark}: {} {}, as {}\n", o.command, o.attempt, o.actor()));
        out.push_str(&format!("  before: {}; after: {}\n", o.before, o.after));
        for (name, keys) in [("only before", &o.only_before), ("only after", &o.only_after)] {
            if !keys.is_empty() {
                let shown: Vec<String> = keys.iter().take(5).map(|k| k.join(",")).collect();
                let more = if keys.len() > 5 { " ..." } else { "" };
                out.push_str(&format!("  {name}: key {}{more}\n", shown.join("\n               ")));
            }
        }
        let why = if o.verdict == "accepted" { "reason" } else { "cause" };
        out.push_str(&format!("  {why}: {}\n", o.cause));
    }
    out.trim_end().to_owned()
}
