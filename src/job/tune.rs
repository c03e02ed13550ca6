//! What may be tuned while a job runs: the keys with their bounds, and the job file's values with those of operators over them.
//!
//! Queries and addresses of the throttle are no such keys: whoever may tune a job need not be able to run SQL or to reach
//! hosts as the daemon.

use serde_json::Value;

use super::JobSpec;
use super::spec::Batching;
use super::throttle::{self, Throttle};
use super::validate;

/// Everything that may change under a running job. Read it where it is used, batch by batch; keep no copy of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Tunables {
    /// How batches are cut. `strategy` and `initial_rows` only matter before the first batch.
    pub batching: Batching,
    /// What makes batches wait.
    pub throttle: Throttle,
    /// Set: an operator stopped the batches for a while, for this reason.
    pub throttled: Option<String>,
}

impl From<&JobSpec> for Tunables {
    fn from(spec: &JobSpec) -> Self {
        Self { batching: spec.batching.clone(), throttle: spec.throttle.clone(), throttled: None }
    }
}

/// The key under which [`Tunables::throttled`] is stored. No key of the job file.
pub const THROTTLED: &str = "throttled";

/// A key that may be tuned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Its path in the job file.
    pub name: &'static str,
    /// What it may be, in words.
    pub bounds: &'static str,
}

/// All keys, in the order in which they are shown.
pub const KEYS: &[Key] = &[
    Key { name: "batching.target_duration", bounds: "1ms to 5s" },
    Key { name: "batching.min_rows", bounds: "1 to max_rows" },
    Key { name: "batching.max_rows", bounds: "min_rows to 1000000" },
    Key { name: "batching.pause", bounds: "0s to 1h" },
    Key { name: "batching.lanes", bounds: "1 to 8" },
    Key { name: "batching.growth_percent", bounds: "1 to 100" },
    Key { name: "batching.horizon_wait", bounds: "0s to 1day" },
    Key { name: "throttle.pace", bounds: "auto or constant" },
    Key { name: "throttle.duty", bounds: "0.01 to 1" },
    Key { name: "throttle.latency_budget", bounds: "1.05 to 10" },
    Key { name: "throttle.every", bounds: "100ms to 1m" },
    Key { name: "throttle.replicas", bounds: "names: [\"eu-1\"]" },
    Key { name: "throttle.replica_lag", bounds: "1ms to 1day" },
    Key { name: "throttle.replica_lag_mb", bounds: "1 or more" },
    Key { name: "throttle.slot_retained_mb", bounds: "1 or more" },
    Key { name: "throttle.slot_safe_mb", bounds: "0 or more" },
    Key { name: "throttle.wal_mb_per_second", bounds: "1 or more" },
    Key { name: "throttle.lock_waiters", bounds: "0 or more" },
    Key { name: "throttle.active_sessions", bounds: "2 or more" },
    Key { name: "throttle.oldest_transaction", bounds: "1s to 30days" },
    Key { name: "throttle.dead_rows_percent", bounds: "1 or more" },
    Key { name: "throttle.xid_age", bounds: "1 to 4294967295" },
    Key { name: "throttle.multixact_age", bounds: "1 to 4294967295" },
    Key { name: "throttle.commit_latency", bounds: "1ms to 1m" },
    Key { name: "throttle.probe_latency", bounds: "10ms to 1m" },
    Key { name: "throttle.give_way_after", bounds: "20ms to 5s" },
    Key { name: "throttle.ignore", bounds: "signals: [\"xid_age\"]" },
    Key { name: "throttle.critical", bounds: "limits: {replica_lag=60}" },
    Key { name: "throttle.windows", bounds: "[{from=\"22:00\",to=\"04:00\"}]" },
];

/// Keys of the job file beside [`KEYS`] that are not tuned: they matter before the first batch only, or are SQL.
#[cfg(test)]
const NOT_TUNED: &[&str] =
    &["batching.strategy", "batching.initial_rows", "batching.wal_compression", "throttle.queries", "throttle.http"];

/// The key of this name, with or without its section.
///
/// # Errors
/// What there is instead.
pub fn key(name: &str) -> Result<Key, String> {
    let found = KEYS.iter().find(|k| k.name == name || k.name.split_once('.').is_some_and(|(_, short)| short == name));
    found.copied().ok_or_else(|| {
        let all: Vec<&str> = KEYS.iter().map(|k| k.name).collect();
        format!("{name:?} is no key that can be tuned; expected one of {}", all.join(", "))
    })
}

impl Tunables {
    /// These values with another one, written as in the job file but for the quotes around text.
    ///
    /// # Errors
    /// One line that names the key, its bounds, and what was found.
    pub fn with(&self, key: Key, text: &str) -> Result<Self, String> {
        self.with_all(&[(key, text)])
    }

    /// These values with several others at once, since some bound each other.
    ///
    /// # Errors
    /// As [`Self::with`], for all keys that were given.
    pub fn with_all(&self, values: &[(Key, &str)]) -> Result<Self, String> {
        let mut next = self.clone();
        for (key, text) in values {
            next = next.put(*key, text).map_err(|_| refusal(&[(*key, text)]))?;
        }
        // It only says how a job begins, and must not be in the way of limits below or above it.
        let b = &mut next.batching;
        b.initial_rows = b.initial_rows.min(b.max_rows).max(b.min_rows);
        let mut problems = Vec::new();
        validate::batching(&next.batching, &mut problems);
        problems.extend(throttle::problems(&next.throttle));
        if problems.is_empty() {
            return Ok(next);
        }
        Err(format!("{} ({})", refusal(values), problems.join("; ")))
    }

    fn put(&self, key: Key, text: &str) -> Result<Self, String> {
        let value = value(text);
        let mut next = self.clone();
        let field = key.name.split_once('.').map_or("", |(_, field)| field);
        if key.name.starts_with("batching.") {
            next.batching = replaced(&self.batching, field, value)?;
        } else {
            next.throttle = replaced(&self.throttle, field, value)?;
        }
        Ok(next)
    }

    /// The job's values with stored ones over them. What cannot be is left out, and told.
    pub fn tuned(spec: &JobSpec, stored: &[(String, String)]) -> (Self, Vec<String>) {
        let (mut now, mut problems) = (Self::from(spec), Vec::new());
        let mut keys = Vec::new();
        for (name, text) in stored {
            if name == THROTTLED {
                now.throttled = Some(text.clone());
                continue;
            }
            match key(name) {
                Ok(key) => keys.push((key, text.as_str())),
                Err(e) => problems.push(e),
            }
        }
        match now.with_all(&keys) {
            Ok(next) => now = next,
            // One by one, so that a single bad value does not cost the others.
            Err(_) => {
                for (key, text) in keys {
                    match now.with(key, text) {
                        Ok(next) => now = next,
                        Err(e) => problems.push(e),
                    }
                }
            }
        }
        (now, problems)
    }

    /// The value of a key as it is shown; empty: not set.
    pub fn show(&self, key: Key) -> String {
        let (section, field) = key.name.split_once('.').unwrap_or(("", key.name));
        let all = match section {
            "batching" => serde_json::to_value(&self.batching),
            _ => serde_json::to_value(&self.throttle),
        };
        match all.unwrap_or_default().get(field) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        }
    }

    /// What is different in `next`, one line per key.
    pub fn differences(&self, next: &Self) -> Vec<String> {
        let text = |value: String| if value.is_empty() { "nothing".to_owned() } else { value };
        let mut out: Vec<String> = KEYS
            .iter()
            .map(|key| (key.name, text(self.show(*key)), text(next.show(*key))))
            .filter(|(_, was, is)| was != is)
            .map(|(name, was, is)| format!("{name}: was {was}, is {is}"))
            .collect();
        match (&self.throttled, &next.throttled) {
            (a, b) if a == b => {}
            (_, Some(reason)) => out.push(format!("batches are stopped: {reason}")),
            (_, None) => out.push("batches are no longer stopped by an operator".to_owned()),
        }
        out
    }
}

fn refusal(values: &[(Key, &str)]) -> String {
    let each: Vec<String> =
        values.iter().map(|(key, text)| format!("{}: expected {}, found {text:?}", key.name, key.bounds)).collect();
    each.join("; ")
}

/// A TOML value where the text is one, else the text itself.
fn value(text: &str) -> Value {
    let parsed: Option<toml::Table> = toml::from_str(&format!("v = {text}")).ok();
    let one = parsed.filter(|t| t.len() == 1).and_then(|mut t| t.remove("v"));
    match one {
        Some(toml::Value::Datetime(_)) | None => Value::String(text.to_owned()),
        Some(toml::Value::Float(f)) if !f.is_finite() => Value::String(text.to_owned()),
        Some(value) => serde_json::to_value(value).unwrap_or_else(|_| Value::String(text.to_owned())),
    }
}

fn replaced<T: serde::Serialize + serde::de::DeserializeOwned>(
    section: &T,
    field: &str,
    value: Value,
) -> Result<T, String> {
    let mut all = serde_json::to_value(section).map_err(|e| e.to_string())?;
    if let Some(fields) = all.as_object_mut() {
        fields.insert(field.to_owned(), value);
    }
    serde_json::from_value(all).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Tunables {
        Tunables { batching: Batching::default(), throttle: Throttle::default(), throttled: None }
    }

    #[test]
    fn every_key_of_the_job_file_is_tuned_or_said_not_to_be() {
        let sections = [
            ("batching", serde_json::to_value(Batching::default()).expect("JSON")),
            ("throttle", serde_json::to_value(Throttle::default()).expect("JSON")),
        ];
        let mut there: Vec<String> = sections
            .iter()
            .flat_map(|(s, v)| v.as_object().expect("an object").keys().map(move |k| format!("{s}.{k}")))
            .collect();
        let mut known: Vec<String> =
            KEYS.iter().map(|k| k.name).chain(NOT_TUNED.iter().copied()).map(str::to_owned).collect();
        there.sort();
        known.sort();
        assert_eq!(there, known, "a new key goes into KEYS with its bounds; SQL, URLs and commands into NOT_TUNED");
    }

    #[test]
    fn bounds_are_what_they_say() {
        for (name, good, bad) in [
            ("batching.target_duration", &["1ms", "5s"][..], &["999us", "5001ms", "5", "soon", "\"\""][..]),
            ("batching.min_rows", &["1", "10000"], &["0", "10001", "-1", "1.5"]),
            ("batching.max_rows", &["10", "1000000"], &["9", "1000001", "many"]),
            ("batching.pause", &["0s", "1h"], &["61m", "-1s"]),
            ("batching.lanes", &["1", "8"], &["0", "9"]),
            ("batching.growth_percent", &["1", "100"], &["0", "101", "-1"]),
            ("batching.horizon_wait", &["0s", "1day"], &["25h"]),
            ("throttle.duty", &["0.01", "1", "0.5"], &["0.009", "1.01", "nan", "inf", "half"]),
            ("throttle.every", &["100ms", "1m"], &["99ms", "61s"]),
            ("throttle.replicas", &["[]", "[\"a\", \"b\"]"], &["a", "[1]"]),
            ("throttle.replica_lag", &["1ms", "1day"], &["0s", "25h"]),
            ("throttle.replica_lag_mb", &["1", "100000"], &["0", "-5"]),
            ("throttle.slot_retained_mb", &["1"], &["0"]),
            ("throttle.slot_safe_mb", &["0"], &["-1"]),
            ("throttle.lock_waiters", &["0"], &["-1"]),
            ("throttle.active_sessions", &["2"], &["1"]),
            ("throttle.xid_age", &["1", "4294967295"], &["0", "4294967296"]),
            ("throttle.multixact_age", &["1", "4294967295"], &["0", "4294967296"]),
            ("throttle.wal_mb_per_second", &["1"], &["0"]),
            ("throttle.oldest_transaction", &["1s", "30days"], &["0s", "31days"]),
            ("throttle.dead_rows_percent", &["1"], &["0"]),
            ("throttle.commit_latency", &["1ms", "1m"], &["0s", "61s"]),
            ("throttle.pace", &["auto", "constant"], &["fast", "1"]),
            ("throttle.latency_budget", &["1.05", "10"], &["1", "11"]),
            ("throttle.critical", &["{}", "{replica_lag=60}"], &["60", "{replica_lag=1}", "{lag=1}"]),
            ("throttle.probe_latency", &["10ms", "1m"], &["9ms", "61s"]),
            ("throttle.give_way_after", &["20ms", "5s"], &["19ms", "6s"]),
            ("throttle.ignore", &["[\"xid_age\"]"], &["[\"cpu\"]", "xid_age"]),
            (
                "throttle.windows",
                &["[]", "[{from = \"22:00\", to = \"04:00\", days = [\"sat\"]}]"],
                &["[{from = \"1\", to = \"2\"}]", "night", "[{from = \"01:00\", to = \"01:00\"}]"],
            ),
        ] {
            let key = key(name).expect("known");
            for text in good {
                let next = defaults().with(key, text);
                assert!(next.is_ok(), "{name}={text}: {next:?}");
            }
            for text in bad {
                let refused = defaults().with(key, text).expect_err(text);
                assert!(refused.contains(key.bounds) && refused.contains(name), "{refused}");
            }
        }
    }

    #[test]
    fn a_stored_value_that_cannot_be_costs_no_other() {
        let spec = super::super::load::parse(
            "name = \"fill\"\ntarget.table = \"public.m\"\n[[columns]]\nname = \"o\"\nvalue = \"t.x\"",
            "job.toml",
            |_| unreachable!("no file"),
        )
        .expect("a job");
        let stored = [("throttle.duty", "0"), ("batching.min_rows", "700"), ("batching.max_rows", "800"), ("x", "1")];
        let stored = stored.map(|(k, v)| (k.to_owned(), v.to_owned()));
        let (now, problems) = Tunables::tuned(&spec, &stored);
        assert_eq!((now.batching.min_rows, now.batching.max_rows, now.throttle.duty), (700, 800, 1.0));
        assert_eq!(problems.len(), 2, "{problems:?}");
        let changes = Tunables::from(&spec).differences(&now);
        assert_eq!(changes, ["batching.min_rows: was 10, is 700", "batching.max_rows: was 10000, is 800"]);
    }

    #[test]
    fn short_names_do() {
        assert_eq!(key("duty").expect("known").name, "throttle.duty");
        assert!(key("queries").expect_err("refused").contains("throttle.give_way_after"));
        assert!(key("throttle.queries").is_err());
    }
}
