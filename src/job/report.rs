//! `[report]`: what `backfilld report` measures of the application.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::lex;
use crate::pg::ident::Ident;

/// What the report measures of the application: its queries, explained before the flip and after it, for owners with few
/// rows, a median number of them, and the most.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Report {
    /// How a user is impersonated: settings for the transaction, with `{user}` (the owner's value of the first column) and
    /// `{role}` in their values.
    pub settings: BTreeMap<String, String>,
    /// How long one run of a query may take: 100 ms to 5 min. One that takes longer is shown as cancelled.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub statement_timeout: Duration,
    /// The queries. They are run, in read-only transactions.
    pub queries: Vec<ReportQuery>,
}

/// A query of the application.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReportQuery {
    /// What people call it, up to 60 characters.
    pub name: String,
    /// One SELECT, as the application sends it, without parameters; tables and functions with their schema.
    pub sql: String,
    /// The role as which it runs.
    #[schemars(with = "String")]
    pub role: Ident,
}

impl Default for Report {
    fn default() -> Self {
        // Twice the longest that hosting platforms give an API request.
        Self { settings: BTreeMap::new(), statement_timeout: Duration::from_secs(15), queries: Vec::new() }
    }
}

impl Report {
    /// The settings for one user. In a value that is a JSON object the user goes in as the inside of a JSON string.
    pub fn settings_for(&self, role: &str, user: &str) -> Vec<(&String, String)> {
        let json = |text: &str| {
            let quoted = serde_json::Value::from(text).to_string();
            quoted[1..quoted.len() - 1].to_owned()
        };
        let fill = |value: &String| {
            let is_json = value.trim_start().starts_with('{') && value.trim_end().ends_with('}') && value.len() > 8;
            let (user, role) = if is_json { (json(user), json(role)) } else { (user.to_owned(), role.to_owned()) };
            // In one pass: a user whose name is "{role}" stays that.
            let mut parts = value.split("{user}").map(|part| part.replace("{role}", &role));
            let first = parts.next().unwrap_or_default();
            parts.fold(first, |text, part| text + &user + &part)
        };
        self.settings.iter().map(|(name, value)| (name, fill(value))).collect()
    }
}

/// What is wrong with it, one line each.
pub fn problems(r: &Report) -> Vec<String> {
    let mut out = Vec::new();
    if !(Duration::from_millis(100)..=Duration::from_secs(300)).contains(&r.statement_timeout) {
        out.push(format!(
            "report.statement_timeout: expected 100ms to 5m, found {}",
            humantime::format_duration(r.statement_timeout)
        ));
    }
    for name in r.settings.keys() {
        let fine = name.contains('.') && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.'));
        // Others could undo what makes these runs harmless, such as statement_timeout.
        if !fine && name != "search_path" {
            out.push(format!(
                "report.settings: expected names such as request.jwt.claims, or search_path; found {name:?}"
            ));
        }
    }
    let mut names = BTreeSet::new();
    for (i, q) in r.queries.iter().enumerate() {
        let length = q.name.chars().count();
        if !(1..=60).contains(&length) || !names.insert(&q.name) {
            out.push(format!("report.queries[{i}].name: expected 1 to 60 characters, unique; found {:?}", q.name));
        }
        let statements = lex::split_statements(&q.sql).unwrap_or_default().len();
        let words = lex::leading_words(&q.sql, 1).unwrap_or_default();
        let reads = words.first().is_some_and(|w| matches!(w.as_str(), "select" | "with" | "table" | "values"));
        if statements != 1 || !reads || q.sql.trim_end().ends_with(';') {
            out.push(format!("report.queries[{i}].sql: expected one SELECT without a semicolon"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_stays_inside_the_json_string() {
        let settings = [("request.jwt.claims", "{\"sub\":\"{user}\",\"role\":\"{role}\"}"), ("app.user", "{user}")];
        let settings = settings.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let report = Report { settings, ..Default::default() };
        let filled: BTreeMap<_, _> = report.settings_for("web", "a\",\"role\":\"{role}").into_iter().collect();
        let claims: serde_json::Value = serde_json::from_str(&filled[&"request.jwt.claims".to_owned()]).expect("JSON");
        assert_eq!((claims["sub"].as_str(), claims["role"].as_str()), (Some("a\",\"role\":\"{role}"), Some("web")));
        assert_eq!(filled[&"app.user".to_owned()], "a\",\"role\":\"{role}");
    }

    #[test]
    fn what_could_do_harm_is_refused() {
        let query =
            |sql: &str| ReportQuery { name: "q".into(), sql: sql.into(), role: Ident::new("web").expect("a name") };
        let bad = Report {
            settings: [("statement_timeout".to_owned(), "0".to_owned())].into(),
            statement_timeout: Duration::ZERO,
            queries: vec![query("delete from a"), query("select 1; select 2"), query("select 1;")],
        };
        assert_eq!(problems(&bad).len(), 1 + 1 + 3 + 2, "{:?}", problems(&bad));
        let good = Report { queries: vec![query("with a as (select 1) select ';'")], ..Default::default() };
        assert_eq!(problems(&good), Vec::<String>::new());
    }
}
