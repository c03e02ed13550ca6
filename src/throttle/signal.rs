//! Readings and what follows from them; pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::progress::Signal;

/// A waiting signal lets go only this far inside of its limit, so that it does not flutter.
const RELEASE: f64 = 0.8;

/// How the detail of a signal begins that could not be read.
pub const UNREADABLE: &str = "it cannot be read";

/// What one signal shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Stable name.
    pub signal: String,
    /// The value.
    pub observed: f64,
    /// Its limit.
    pub threshold: f64,
    /// Unit of both; empty for a plain number.
    pub unit: &'static str,
    /// The limit is a floor, not a ceiling.
    pub is_floor: bool,
    /// Whose value it is, or why there is none.
    pub detail: String,
    /// It could not be read, or says no by itself: wait whatever the value.
    pub refuses: bool,
}

impl Reading {
    /// A value with a ceiling.
    pub fn at_most(signal: &str, observed: f64, threshold: f64, unit: &'static str) -> Self {
        Self {
            signal: signal.into(),
            observed,
            threshold,
            unit,
            is_floor: false,
            detail: String::new(),
            refuses: false,
        }
    }

    /// A value with a floor.
    pub fn at_least(signal: &str, observed: f64, threshold: f64, unit: &'static str) -> Self {
        Self { is_floor: true, ..Self::at_most(signal, observed, threshold, unit) }
    }

    /// A signal that says wait by itself, or cannot be read.
    pub fn no(signal: &str, why: impl Into<String>) -> Self {
        Self { refuses: true, detail: why.into(), ..Self::at_most(signal, 1.0, 0.0, "") }
    }

    /// Says whose value it is.
    #[must_use]
    pub fn of(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// How far beyond its limit, as a factor; above 1 is beyond.
    fn excess(&self) -> f64 {
        match (self.refuses, self.is_floor) {
            (true, _) => f64::INFINITY,
            (_, true) => self.threshold / self.observed.max(f64::MIN_POSITIVE),
            (_, false) => self.observed / self.threshold.max(f64::MIN_POSITIVE),
        }
    }

    /// For whoever watches.
    pub fn shown(&self, is_waiting: bool) -> Signal {
        Signal {
            signal: self.signal.clone(),
            observed: self.observed,
            threshold: self.threshold,
            unit: self.unit.into(),
            is_floor: self.is_floor,
            refuses: self.refuses,
            is_waiting,
            text: self.text(),
        }
    }

    /// For people: signal, value, limit.
    pub fn text(&self) -> String {
        let detail = if self.detail.is_empty() { String::new() } else { format!(" ({})", self.detail) };
        if self.refuses {
            return format!("{}: {}", self.signal, self.detail);
        }
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        let limit = if self.is_floor { "at least" } else { "at most" };
        format!(
            "{} is {}{unit}, {limit} {}{unit} wanted{detail}",
            self.signal,
            short(self.observed),
            short(self.threshold)
        )
    }
}

/// Several, the first one first.
pub fn text(readings: &[Reading]) -> String {
    readings.iter().map(Reading::text).collect::<Vec<_>>().join("; ")
}

fn short(value: f64) -> String {
    let digits = if value.fract() == 0.0 || value.abs() >= 100.0 { 0 } else { 2 };
    format!("{value:.digits$}")
}

/// The worst of several, and whose it is.
#[derive(Default)]
pub struct Worst {
    value: f64,
    whose: String,
}

impl Worst {
    /// Looks at one more.
    pub fn see(&mut self, value: f64, whose: &str) {
        if value > self.value {
            self.value = value;
            self.whose = whose.to_owned();
        }
    }

    /// As a reading with a ceiling.
    pub fn reading(self, signal: &str, threshold: f64, unit: &'static str) -> Reading {
        Reading::at_most(signal, self.value, threshold, unit).of(self.whose)
    }
}

/// The reading that is beyond its critical limit, if one is. One that could not be read is not: it waits.
pub fn critical<'a>(readings: &'a [Reading], limits: &BTreeMap<String, f64>) -> Option<(&'a Reading, f64)> {
    readings.iter().filter(|r| !r.refuses).find_map(|r| {
        let limit = *limits.get(&r.signal)?;
        let beyond = if r.is_floor { r.observed < limit } else { r.observed > limit };
        beyond.then_some((r, limit))
    })
}

/// Remembers which signals wait.
#[derive(Debug, Default)]
pub struct Judge {
    waiting: BTreeSet<String>,
}

impl Judge {
    /// The readings that say wait, the strictest first; none: go.
    pub fn judge(&mut self, readings: &[Reading]) -> Vec<Reading> {
        let mut out: Vec<Reading> = readings
            .iter()
            .filter(|r| {
                let limit = if self.waiting.contains(&r.signal) { RELEASE } else { 1.0 };
                r.excess() > limit
            })
            .cloned()
            .collect();
        out.sort_by(|a, b| b.excess().total_cmp(&a.excess()));
        self.waiting = out.iter().map(|r| r.signal.clone()).collect();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lag(seconds: f64) -> Vec<Reading> {
        vec![Reading::at_most("replica_lag", seconds, 10.0, "s")]
    }

    #[test]
    fn a_signal_waits_beyond_its_limit_and_lets_go_well_inside_of_it() {
        let mut judge = Judge::default();
        assert!(judge.judge(&lag(10.0)).is_empty());
        assert_eq!(judge.judge(&lag(10.1)).len(), 1);
        assert_eq!(judge.judge(&lag(9.0)).len(), 1, "not yet");
        assert!(judge.judge(&lag(8.0)).is_empty());
        assert!(judge.judge(&lag(9.0)).is_empty(), "it had let go");
    }

    #[test]
    fn a_floor_waits_below_and_the_strictest_comes_first() {
        let mut judge = Judge::default();
        let readings = [
            Reading::at_most("a", 11.0, 10.0, ""),
            Reading::at_least("slot_safe", 100.0, 1000.0, "MB").of("slot cdc"),
            Reading::at_most("b", 1.0, 10.0, ""),
            Reading::no("query:x", "it gave no row"),
        ];
        let found = judge.judge(&readings);
        let names: Vec<_> = found.iter().map(|r| r.signal.as_str()).collect();
        assert_eq!(names, ["query:x", "slot_safe", "a"]);
        assert_eq!(found[1].text(), "slot_safe is 100 MB, at least 1000 MB wanted (slot cdc)");
        assert_eq!(found[0].text(), "query:x: it gave no row");
        assert_eq!(Reading::at_least("s", 0.0, 5.0, "").excess(), 5.0 / f64::MIN_POSITIVE);
    }

    #[test]
    fn critical_is_beyond_a_limit_of_its_own_and_never_what_cannot_be_read() {
        let limits: BTreeMap<String, f64> = [("replica_lag".into(), 60.0), ("slot_safe".into(), 100.0)].into();
        assert_eq!(critical(&lag(60.0), &limits), None);
        assert!(critical(&lag(60.1), &limits).is_some());
        assert!(critical(&[Reading::at_least("slot_safe", 99.0, 256.0, "MiB")], &limits).is_some());
        assert_eq!(critical(&[Reading::at_least("slot_safe", 100.0, 256.0, "MiB")], &limits), None);
        assert_eq!(critical(&[Reading::no("replica_lag", "gone")], &limits), None);
        assert_eq!(critical(&[Reading::at_most("xid_age", 1e12, 1.0, "")], &limits), None);
    }

    proptest! {
        #[test]
        fn whatever_went_before_far_inside_is_go_and_beyond_is_wait(history in prop::collection::vec(0.0f64..20.0, 0..30)) {
            let mut judge = Judge::default();
            for seconds in history {
                let waits = !judge.judge(&lag(seconds)).is_empty();
                prop_assert!(waits || seconds <= 10.0);
                prop_assert!(!waits || seconds > 8.0);
            }
        }
    }
}
