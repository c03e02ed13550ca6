//! What the application noticed: counts, errors, latencies.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::ledger::Ledger;

/// Which part of the demo a request belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nothing has been done to the database yet.
    Before,
    /// The daemon works.
    During,
    /// The daemon is done.
    After,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Before, Self::During, Self::After];
}

/// What a request took, from BEGIN to the answer to COMMIT, retries included.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    /// The part of the demo.
    pub phase: Phase,
    /// Requests that ended in it.
    pub requests: u64,
    /// Median, milliseconds.
    pub p50_ms: f64,
    /// 99th percentile, milliseconds.
    pub p99_ms: f64,
    /// The slowest, milliseconds.
    pub max_ms: f64,
}

/// The first of its kind, and how many there were.
#[derive(Debug, Clone, Serialize)]
pub struct ErrorSample {
    /// The request's name.
    pub operation: &'static str,
    /// SQLSTATE, or a word of ours where the server saw no error.
    pub code: String,
    /// The first message.
    pub message: String,
    /// How many.
    pub count: u64,
}

/// What the application went through.
#[derive(Debug, Default, Serialize)]
pub struct TrafficReport {
    /// Requests that were answered, well or not.
    pub requests: u64,
    /// Requests by name.
    pub operations: BTreeMap<&'static str, u64>,
    /// One entry per phase that saw requests.
    pub latency: Vec<Latency>,
    /// Requests that failed for the application.
    pub application_errors: u64,
    /// What they said.
    pub errors: Vec<ErrorSample>,
    /// Attempts that a normal application repeats (40P01, 40001), by SQLSTATE.
    pub retries: BTreeMap<String, u64>,
    /// Refusals that are right, because the conversation had just changed hands.
    pub expected_refusals: u64,
    /// Inserts into somebody else's conversation that were refused with 42501, as they must be.
    pub foreign_inserts_refused: u64,
    /// Those that were accepted.
    pub foreign_inserts_accepted: u64,
    /// Reads that returned somebody else's message.
    pub foreign_rows_seen: u64,
    /// Reads that did not return an own message.
    pub own_rows_missed: u64,
    /// What was acknowledged, for the oracle.
    #[serde(skip)]
    pub(in crate::demo) ledger: Ledger,
}

/// Collects while the workers run.
pub(super) struct Stats {
    phases: [(u64, Histogram<u64>); 3],
    operations: BTreeMap<&'static str, u64>,
    errors: Vec<ErrorSample>,
    retries: BTreeMap<String, u64>,
    pub(super) expected_refusals: u64,
    pub(super) foreign_inserts_refused: u64,
    pub(super) foreign_inserts_accepted: u64,
    pub(super) foreign_rows_seen: u64,
    pub(super) own_rows_missed: u64,
}

impl Stats {
    pub(super) fn new() -> Self {
        // Two digits are 1%; it resizes as it goes.
        let histogram = || Histogram::new(2).map(|h| (0, h));
        let [a, b, c] = [histogram(), histogram(), histogram()].map(|h| h.expect("two digits are valid"));
        Self {
            phases: [a, b, c],
            operations: BTreeMap::new(),
            errors: Vec::new(),
            retries: BTreeMap::new(),
            expected_refusals: 0,
            foreign_inserts_refused: 0,
            foreign_inserts_accepted: 0,
            foreign_rows_seen: 0,
            own_rows_missed: 0,
        }
    }

    /// One request. With a `pace`, a slow one also counts for the requests that it kept from being sent, or the worst
    /// moments would hold the fewest samples ("coordinated omission").
    pub(super) fn record(&mut self, phase: Phase, operation: &'static str, took: Duration, pace: Option<Duration>) {
        let (requests, histogram) = &mut self.phases[phase as usize];
        *requests += 1;
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX).max(1);
        // Cannot fail: the histogram resizes.
        let _ = histogram.record_correct(us(took), pace.map_or(0, us));
        *self.operations.entry(operation).or_default() += 1;
    }

    pub(super) fn retry(&mut self, sqlstate: &str) {
        *self.retries.entry(sqlstate.to_owned()).or_default() += 1;
    }

    pub(super) fn error(&mut self, operation: &'static str, code: &str, message: impl Into<String>) {
        match self.errors.iter_mut().find(|e| e.operation == operation && e.code == code) {
            Some(sample) => sample.count += 1,
            None => {
                self.errors.push(ErrorSample { operation, code: code.to_owned(), message: message.into(), count: 1 });
            }
        }
    }

    pub(super) fn report(self, ledger: Ledger) -> TrafficReport {
        let ms = |us: u64| us as f64 / 1000.0;
        let latency = Phase::ALL
            .into_iter()
            .zip(&self.phases)
            .filter(|(_, (requests, _))| *requests > 0)
            .map(|(phase, (requests, h))| Latency {
                phase,
                requests: *requests,
                p50_ms: ms(h.value_at_quantile(0.5)),
                p99_ms: ms(h.value_at_quantile(0.99)),
                max_ms: ms(h.max()),
            })
            .collect();
        TrafficReport {
            requests: self.phases.iter().map(|(n, _)| n).sum(),
            operations: self.operations,
            latency,
            application_errors: self.errors.iter().map(|e| e.count).sum(),
            errors: self.errors,
            retries: self.retries,
            expected_refusals: self.expected_refusals,
            foreign_inserts_refused: self.foreign_inserts_refused,
            foreign_inserts_accepted: self.foreign_inserts_accepted,
            foreign_rows_seen: self.foreign_rows_seen,
            own_rows_missed: self.own_rows_missed,
            ledger,
        }
    }
}
