//! What one check says, and the list of all checks.

use serde::Serialize;

use crate::error::Error;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it must be.
    Pass,
    /// Does not apply to this job, or cannot be said; the summary says why.
    Skip,
    /// Works, but somebody should know.
    Warn,
    /// The job must not start, or would not get through.
    Fail,
}

impl Status {
    /// The word in front of a line of the table.
    pub fn label(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Skip => "SKIP",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// Stable name; one of [`CATALOGUE`].
    pub name: &'static str,
    /// What is checked, in a few words.
    pub title: String,
    /// How it came out.
    pub status: Status,
    /// What was found, in one sentence.
    pub summary: String,
    /// Number of findings, where they are counted.
    pub count: Option<i64>,
    /// Keys of some of the rows found, or names of objects; never other values of a row.
    pub samples: Vec<String>,
    /// What to do.
    pub hint: Option<String>,
    /// What there is, line by line, where the list itself is the answer.
    pub details: Vec<String>,
    /// Statements that would give the rights that are missing.
    #[serde(skip)]
    pub grants: Vec<String>,
}

impl Check {
    /// A result for `name`, which must be in the catalogue.
    pub fn new(name: &'static str, status: Status, summary: impl Into<String>) -> Self {
        let title = CATALOGUE.iter().find(|c| c.0 == name).map_or(name, |c| c.1);
        Self {
            name,
            title: title.to_owned(),
            status,
            summary: summary.into(),
            count: None,
            samples: Vec::new(),
            hint: None,
            details: Vec::new(),
            grants: Vec::new(),
        }
    }

    /// As it must be.
    pub fn pass(name: &'static str, summary: impl Into<String>) -> Self {
        Self::new(name, Status::Pass, summary)
    }

    /// Does not apply, or cannot be said.
    pub fn skip(name: &'static str, summary: impl Into<String>) -> Self {
        Self::new(name, Status::Skip, summary)
    }

    /// Works, but somebody should know.
    pub fn warn(name: &'static str, summary: impl Into<String>) -> Self {
        Self::new(name, Status::Warn, summary)
    }

    /// Must be put right first.
    pub fn fail(name: &'static str, summary: impl Into<String>) -> Self {
        Self::new(name, Status::Fail, summary)
    }

    /// A check that could not be made is a failed one: not knowing is no reason to go on (I10).
    pub fn could_not(name: &'static str, error: &Error) -> Self {
        let state = error.sqlstate().map_or(String::new(), |s| format!(" (SQLSTATE {s})"));
        let hint = match error.sqlstate() {
            Some("42501") => "this login lacks a right; see the privilege checks and the GRANT statements below",
            Some("57014") => "the server cancelled it: try again when there is less load, or check a standby",
            Some(s) if s.starts_with("22") => "an expression of the job raises for some row; make it give NULL instead",
            _ => error.hint().unwrap_or("try the check again; if it stays, look at the server's log"),
        };
        Self::fail(name, format!("could not be checked: {error}{state}")).hint(hint)
    }

    /// Adds the number of findings.
    #[must_use]
    pub fn count(mut self, count: i64) -> Self {
        self.count = Some(count);
        self
    }

    /// Adds keys or names.
    #[must_use]
    pub fn samples(mut self, samples: Vec<String>) -> Self {
        self.samples = samples;
        self
    }

    /// Adds what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds lines.
    #[must_use]
    pub fn details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    /// Adds statements that would give the missing rights.
    #[must_use]
    pub fn grants(mut self, grants: Vec<String>) -> Self {
        self.grants = grants;
        self
    }
}

/// Findings of several severities that become one check: the worst decides.
#[derive(Debug, Default)]
pub struct Tally {
    fails: Vec<String>,
    warns: Vec<String>,
    hints: Vec<String>,
    grants: Vec<String>,
}

impl Tally {
    /// Something that must be put right.
    pub fn fail(&mut self, what: impl Into<String>, hint: impl Into<String>) {
        once(&mut self.fails, what.into());
        once(&mut self.hints, hint.into());
    }

    /// Something to know.
    pub fn warn(&mut self, what: impl Into<String>, hint: impl Into<String>) {
        once(&mut self.warns, what.into());
        once(&mut self.hints, hint.into());
    }

    /// A statement that would give a missing right.
    pub fn grant(&mut self, sql: impl Into<String>) {
        once(&mut self.grants, sql.into());
    }

    /// The check: `ok` is the summary if nothing was found.
    pub fn check(self, name: &'static str, ok: impl Into<String>) -> Check {
        let status = match (self.fails.is_empty(), self.warns.is_empty()) {
            (false, _) => Status::Fail,
            (true, false) => Status::Warn,
            (true, true) => return Check::pass(name, ok),
        };
        let mut all = self.fails;
        all.extend(self.warns);
        let count = i64::try_from(all.len()).unwrap_or(i64::MAX);
        let mut check = Check::new(name, status, all.join("; ")).count(count).grants(self.grants);
        if !self.hints.is_empty() {
            check.hint = Some(self.hints.join("; "));
        }
        check
    }
}

fn once(list: &mut Vec<String>, text: String) {
    if !text.is_empty() && !list.contains(&text) {
        list.push(text);
    }
}

/// Every check with its title, in the order of the report. docs/checks.md explains each; a test keeps them in step.
pub const CATALOGUE: &[(&str, &str)] = &[
    ("server_version", "the server's version is one that works"),
    ("standby", "the server is not a standby"),
    ("read_only", "this login may write here"),
    ("pooler", "no pooler in transaction mode in between"),
    ("dedicated_login", "nobody else uses this login"),
    ("job", "tables, columns, keys and expressions of the job resolve"),
    ("job_state", "the job is not already there with another content"),
    ("total_rows", "rows to fill, and how long that may take"),
    ("reference_null", "every target row refers to a source row"),
    ("orphans", "every reference finds its source row"),
    ("source_nulls", "every source row gives a value"),
    ("source_references", "every value exists in the foreign key's table"),
    ("paths_agree", "the other paths lead to the same value"),
    ("existing_column", "the column is new, or fit to be filled"),
    ("source_nullable", "source rows cannot lose their value later"),
    ("table_kind", "target and sources are tables that triggers can guard"),
    ("key_order", "the key has a dependable order"),
    ("expressions", "the job's policies and index predicates compile"),
    ("constraints", "the job's foreign keys and indexes can be made"),
    ("report_queries", "the queries of the report can be prepared"),
    ("policies_before", "the table has exactly the policies that the job names"),
    ("functions_before", "the functions to replace are there and can be put back"),
    ("policy_lint", "the policies after the job are fast and as narrow as they look"),
    ("policies_elsewhere", "no policy of another table reads the target"),
    ("views", "views over the target read as their caller"),
    ("definer_functions", "security definer functions on the job's tables have a fixed search_path"),
    ("column_lists", "functions name the columns of the target"),
    ("unindexed_keys", "every foreign key of the target has an index"),
    ("app_bypass", "the application is subject to the policies"),
    ("access", "old and new access can be compared"),
    ("column_grants", "no column grants that the new column would break"),
    ("rls_visibility", "policies hide no row from this login"),
    ("rls_sync_functions", "policies hide no row from the sync triggers"),
    ("privilege:owner", "this login may alter the target"),
    ("privilege:sources", "this login may put triggers on the sources"),
    ("privilege:rows", "this login may read and update the rows"),
    ("privilege:sync", "the target's owner may read and lock the sources"),
    ("privilege:references", "this login may refer to the foreign key's table"),
    ("privilege:schemas", "our own schemas can be created"),
    ("privilege:index", "this login may create indexes in the target's schema"),
    ("privilege:replica", "batches may switch the application's triggers off"),
    ("privilege:functions", "this login may replace the functions"),
    ("privilege:policies", "the policies' roles exist and may call their functions"),
    ("privilege:monitor", "this login sees what other sessions do"),
    ("names", "our names are free and fit"),
    ("invalid_indexes", "no invalid indexes on the target"),
    ("trigger_order", "our BEFORE triggers come last"),
    ("side_effects", "every UPDATE trigger of the target has an answer"),
    ("rules", "no rewrite rules on the target"),
    ("publications", "every publication of the target has an answer"),
    ("propagation_index", "a change of a source row finds its target rows by index"),
    ("largest_fanout", "no source row has too many target rows"),
    ("isolation", "writers of the sources run at READ COMMITTED"),
    ("lock_timeouts", "timeouts of roles and database fit ours"),
    ("long_transactions", "no long transactions"),
    ("prepared_transactions", "no forgotten prepared transactions"),
    ("xid_age", "no transaction id wraparound in sight"),
    ("replication_slots", "replication slots can take the extra WAL"),
    ("table_growth", "size now and expected growth"),
    ("throttle", "the throttle's signals can be measured"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_the_table() {
        for (i, (name, title)) in CATALOGUE.iter().enumerate() {
            assert!(CATALOGUE[..i].iter().all(|c| c.0 != *name), "{name} is there twice");
            assert!(name.len() <= super::super::report::NAME_WIDTH, "{name} is too long for the table");
            assert!(!title.is_empty());
        }
    }

    #[test]
    fn the_documentation_lists_every_check_and_no_other() {
        let text = include_str!("../../docs/checks.md");
        let documented: Vec<&str> =
            text.lines().filter_map(|l| l.strip_prefix("### `")).filter_map(|l| l.strip_suffix('`')).collect();
        let known: Vec<&str> = CATALOGUE.iter().map(|c| c.0).collect();
        assert_eq!(documented, known);
    }

    #[test]
    fn the_worst_finding_decides() {
        let mut tally = Tally::default();
        tally.warn("a", "look");
        tally.fail("b", "fix");
        tally.fail("c", "fix");
        let check = tally.check("names", "fine");
        assert_eq!((check.status, check.count), (Status::Fail, Some(3)));
        assert_eq!((check.summary.as_str(), check.hint.as_deref()), ("b; c; a", Some("look; fix")));
        assert_eq!(Tally::default().check("names", "fine").status, Status::Pass);
    }
}
