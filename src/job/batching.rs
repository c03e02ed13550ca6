//! `[batching]`: how rows are walked and batches cut.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How batches are cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Batching {
    /// How rows are walked. `auto` picks the best that the table allows.
    pub strategy: Strategy,
    /// What a batch should take; the number of rows follows from it. 1 ms to 5 s.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub target_duration: Duration,
    /// Rows of the first batch.
    pub initial_rows: u32,
    /// Fewest rows of a batch.
    pub min_rows: u32,
    /// Most rows of a batch.
    pub max_rows: u32,
    /// Pause after each batch.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub pause: Duration,
    /// Ranges of the table that are filled at the same time, each by a connection of its own; heap order only. 1 to 8. Two are
    /// about 1.6 times as fast as one where the server has the cores, and press on the application accordingly. Without it, tables
    /// of 16 MB and more have a second one, which only works while nobody else does: at full speed with `throttle.pace = "auto"`.
    pub lanes: Option<u32>,
    /// How long to wait, once per holder, for a snapshot, replication slot or prepared transaction that keeps dead row versions
    /// from being pruned: while it is there, heap order writes as much as one big UPDATE. At most 1 day.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub horizon_wait: Duration,
    /// A target for the table's growth in heap order; beyond it, `VACUUM` makes room, for time and WAL. 1 to 100.
    pub growth_percent: Option<u32>,
    /// How the WAL of batches is compressed, which is mostly full-page images where checkpoints are frequent. Needs PostgreSQL
    /// 15 and `grant set on parameter wal_compression`, or a superuser. Takes effect with the next connection.
    pub wal_compression: WalCompression,
}

impl Default for Batching {
    fn default() -> Self {
        Self {
            strategy: Strategy::Auto,
            // An application statement that waits for a batch's row waits about this long at most.
            target_duration: Duration::from_millis(100),
            initial_rows: 500,
            min_rows: 10,
            // Bounds the locks and the work that one cancelled batch throws away.
            max_rows: 10_000,
            pause: Duration::ZERO,
            lanes: None,
            // Longer than a request or a report on a dashboard, shorter than anybody's patience with a job that stands still.
            horizon_wait: Duration::from_secs(60),
            growth_percent: None,
            wal_compression: WalCompression::Auto,
        }
    }
}

/// Compression of full-page images in the WAL that batches write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WalCompression {
    /// `lz4` where the login may set it and the server has it, else the server's own setting: a third to a half less WAL
    /// for a twentieth to a tenth more time.
    #[default]
    Auto,
    /// The server's own setting.
    Server,
    /// None.
    Off,
    /// LZ4.
    Lz4,
    /// PostgreSQL's own method: slower than LZ4, no smaller.
    Pglz,
    /// Zstandard: a sixth less than LZ4, and slower.
    Zstd,
}

/// How rows are walked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The best that the table allows.
    #[default]
    Auto,
    /// In the order of the heap, in rounds: least WAL, least growth. Ordinary heap tables.
    Heap,
    /// By key, with row comparison: works for every table.
    Keyset,
}
