//! The report of all checks: a table for people, JSON for machines.

use serde::Serialize;

use super::check::{Check, Status};
use super::estimate::Estimate;

/// Column of the table in which names stand.
pub(super) const NAME_WIDTH: usize = 21;

/// Narrowest table; below it nothing can be read.
const MIN_WIDTH: usize = 50;

/// The server that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Server {
    /// `server_version`, such as `15.18`.
    pub version: String,
    /// `server_version_num`, such as 150018.
    pub version_num: i32,
    /// The database.
    pub database: String,
    /// The login of the session.
    pub login: String,
    /// A standby.
    pub in_recovery: bool,
}

/// What preflight found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Name of the job.
    pub job: String,
    /// The server.
    pub server: Server,
    /// Every check of the catalogue, once, in its order.
    pub checks: Vec<Check>,
    /// How long the backfill may take; `None` if nothing could be measured.
    pub estimate: Option<Estimate>,
    /// SQL that gives exactly the rights that are missing, for an administrator to read and run.
    pub grants: Vec<String>,
}

impl Report {
    /// No check failed. Warnings do not count.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|c| c.status != Status::Fail)
    }

    /// The result of one check.
    pub fn check(&self, name: &str) -> Option<&Check> {
        self.checks.iter().find(|c| c.name == name)
    }

    /// Number of checks that came out like this.
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|c| c.status == status).count()
    }

    /// What failed: `name: summary`, one line each.
    pub fn failures(&self) -> Vec<String> {
        let failed = self.checks.iter().filter(|c| c.status == Status::Fail);
        failed.map(|c| format!("{}: {}", c.name, c.summary)).collect()
    }

    /// For machines; docs/checks.md describes it.
    pub fn json(&self) -> serde_json::Value {
        let counts = serde_json::json!({
            "pass": self.count(Status::Pass), "warn": self.count(Status::Warn),
            "fail": self.count(Status::Fail), "skip": self.count(Status::Skip),
        });
        let mut value = serde_json::to_value(self).unwrap_or_default();
        if let Some(object) = value.as_object_mut() {
            object.insert("passed".into(), self.passed().into());
            object.insert("counts".into(), counts);
        }
        value
    }

    /// For people, without colours, at most `width` columns wide.
    pub fn table(&self, width: usize) -> String {
        self.table_with(width, false)
    }

    /// For people; `colour`: the status words in ANSI colours.
    pub fn table_with(&self, width: usize, colour: bool) -> String {
        let width = width.max(MIN_WIDTH);
        let mut out = format!("preflight of job {}\n", self.job);
        let recovery = if self.server.in_recovery { " (standby)" } else { "" };
        let server = format!(
            "PostgreSQL {}{recovery}, database {}, login {}",
            self.server.version, self.server.database, self.server.login
        );
        push_wrapped(&mut out, "", "  ", &server, width);
        out.push('\n');
        for check in &self.checks {
            if !self.is_repeated_skip(check) {
                check_lines(&mut out, check, width, colour);
            }
        }
        for (reason, names) in self.repeated_skips() {
            let head = format!("{}  {} checks ", paint(Status::Skip, colour), names.len());
            push_wrapped(&mut out, &head, "      ", &format!("{reason}: {}", names.join(", ")), width);
        }
        out.push_str(&format!(
            "\n{} passed, {} warnings, {} failed, {} skipped\n",
            self.count(Status::Pass),
            self.count(Status::Warn),
            self.count(Status::Fail),
            self.count(Status::Skip)
        ));
        if let Some(estimate) = &self.estimate {
            push_wrapped(&mut out, "estimate: ", "  ", &estimate.to_string(), width);
        }
        if !self.grants.is_empty() {
            out.push_str(
                "\n-- SQL that gives the rights that are missing; read it, then run it as an administrator:\n",
            );
            for grant in &self.grants {
                out.push_str(&format!("{grant};\n"));
            }
        }
        out
    }

    /// Skips that share their reason, for example all checks of a job whose target is missing, are one line.
    fn repeated_skips(&self) -> Vec<(&str, Vec<&str>)> {
        let mut out: Vec<(&str, Vec<&str>)> = Vec::new();
        for check in self.checks.iter().filter(|c| c.status == Status::Skip) {
            match out.iter_mut().find(|(reason, _)| *reason == check.summary) {
                Some((_, names)) => names.push(check.name),
                None => out.push((&check.summary, vec![check.name])),
            }
        }
        out.retain(|(_, names)| names.len() > 2);
        out
    }

    fn is_repeated_skip(&self, check: &Check) -> bool {
        check.status == Status::Skip && self.repeated_skips().iter().any(|(reason, _)| *reason == check.summary)
    }
}

fn check_lines(out: &mut String, check: &Check, width: usize, colour: bool) {
    let head = format!("{}  {:NAME_WIDTH$}  ", paint(check.status, colour), check.name);
    let indent = " ".repeat(4 + 2 + NAME_WIDTH + 2);
    push_wrapped(out, &head, &indent, &check.summary, width);
    for line in &check.details {
        push_wrapped(out, "        ", "          ", line, width);
    }
    if !matches!(check.status, Status::Warn | Status::Fail) {
        return;
    }
    if !check.samples.is_empty() {
        let total = check.count.map_or(String::new(), |n| format!(" of {n}"));
        let head = format!("        {}{total}: ", check.samples.len());
        push_wrapped(out, &head, "          ", &check.samples.join(", "), width);
    }
    if let Some(hint) = &check.hint {
        push_wrapped(out, "        fix: ", "          ", hint, width);
    }
}

fn paint(status: Status, colour: bool) -> String {
    let code = match status {
        _ if !colour => return status.label().to_owned(),
        Status::Pass => 32,
        Status::Warn => 33,
        Status::Fail => 31,
        Status::Skip => 90,
    };
    format!("\u{1b}[{code}m{}\u{1b}[0m", status.label())
}

/// Appends `text` after `head`, wrapped at spaces; a word longer than a line is cut. Escape sequences do not count.
fn push_wrapped(out: &mut String, head: &str, indent: &str, text: &str, width: usize) {
    out.push_str(head);
    let visible = |s: &str| -> usize {
        let mut escaped = false;
        s.chars()
            .filter(|c| {
                let count = !escaped && *c != '\u{1b}';
                escaped = (escaped || *c == '\u{1b}') && *c != 'm';
                count
            })
            .count()
    };
    let mut used = visible(head);
    let mut fresh = true;
    for word in text.split_whitespace() {
        let mut rest: Vec<char> = word.chars().collect();
        let gap = usize::from(!fresh);
        if used + gap + rest.len() > width && !fresh {
            out.push('\n');
            out.push_str(indent);
            (used, fresh) = (indent.len(), true);
        }
        if !fresh {
            out.push(' ');
            used += 1;
        }
        while used + rest.len() > width {
            let cut = width.saturating_sub(used).max(1).min(rest.len());
            out.extend(rest.drain(..cut));
            if rest.is_empty() {
                break;
            }
            out.push('\n');
            out.push_str(indent);
            used = indent.len();
        }
        used += rest.len();
        out.extend(rest);
        fresh = false;
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(checks: Vec<Check>) -> Report {
        let server = Server {
            version: "15.18".into(),
            version_num: 150_018,
            database: "app".into(),
            login: "backfilld".into(),
            in_recovery: false,
        };
        Report { job: "owner".into(), server, checks, estimate: None, grants: vec!["grant a to b".into()] }
    }

    #[test]
    fn the_table_fits_and_tells_details_only_of_what_is_wrong() {
        let key = "0f0e0d0c-0000-4000-8000-000000000001".to_owned();
        let long = "a sentence that is long enough to be wrapped at least once in a table of eighty columns";
        let r = report(vec![
            Check::pass("orphans", long).samples(vec!["hidden".into()]).hint("hidden"),
            Check::fail("reference_null", "3 rows").count(3).samples(vec![key.clone(), key]).hint(long),
            Check::skip("rules", "x".repeat(200)),
        ]);
        let text = r.table(80);
        assert!(text.lines().all(|l| l.chars().count() <= 80 || l.starts_with("--")), "{text}");
        assert!(
            !text.contains("hidden") && text.contains("fix: a sentence") && text.contains("2 of 3: 0f0e"),
            "{text}"
        );
        assert!(text.contains("1 passed, 0 warnings, 1 failed, 1 skipped"), "{text}");
        assert!(text.ends_with("grant a to b;\n"), "{text}");
        assert!(!r.passed() && r.failures() == ["reference_null: 3 rows"]);
    }

    #[test]
    fn colours_change_nothing_but_colours() {
        let r = report(vec![Check::warn("orphans", "one two three four five six seven eight nine ten eleven twelve")]);
        let plain = r.table_with(60, true).replace("\u{1b}[33m", "").replace("\u{1b}[0m", "");
        assert_eq!(plain, r.table(60));
    }

    #[test]
    fn skips_for_one_reason_are_one_line() {
        let skip = |name| Check::skip(name, "the job does not resolve");
        let text = report(vec![skip("orphans"), skip("rules"), skip("names")]).table(80);
        assert!(text.contains("SKIP  3 checks the job does not resolve: orphans, rules, names"), "{text}");
    }

    #[test]
    fn json_has_the_verdict_and_the_counts() {
        let json = report(vec![Check::warn("orphans", "x").count(7)]).json();
        assert_eq!(json["passed"], true);
        assert_eq!(json["counts"]["warn"], 1);
        assert_eq!(json["checks"][0]["status"], "warn");
        assert_eq!(json["checks"][0]["count"], 7);
        assert_eq!(json["grants"][0], "grant a to b");
    }
}
