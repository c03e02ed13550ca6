//! `[verification]` and `[watch]`: how the result is proven, and looked after once the flip is done.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the result is verified.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Verification {
    /// Pages of the target per verification query; each query is a snapshot of its own, so that no long one holds back
    /// vacuum. 128 to 1,000,000.
    pub chunk_pages: u32,
    /// Keys listed per kind of finding.
    pub sample: u32,
}

impl Default for Verification {
    fn default() -> Self {
        // 4096 pages of 8 kB are 32 MB: a fraction of a second from cache, a second or two from disk.
        Self { chunk_pages: 4096, sample: 20 }
    }
}

/// Watching after the flip: policies, functions, sync triggers, index, constraints and rows are looked at again and again.
/// What is found is shown in `status` and in the metrics until it is mended, and ends nothing. The job is done when the time is
/// over and nothing is wrong; `run --once` stays that long.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Watch {
    /// How long, from the flip. In this time every row of the table is compared once, and a small table with each look. At most
    /// 90 days.
    #[serde(with = "humantime_serde", rename = "for")]
    #[schemars(with = "String")]
    pub lasts: Duration,
    /// Time between two looks. 100 ms to 1 day.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub every: Duration,
}

impl Default for Watch {
    fn default() -> Self {
        // A day has every kind of traffic; five minutes are what an alert waits as a rule.
        Self { lasts: Duration::from_secs(86_400), every: Duration::from_secs(300) }
    }
}
