//! Where a walk in heap order stands; pure.
//!
//! The table is walked window by window, and each window in several rounds: round `k` takes the rows whose line pointer
//! is `k` modulo the number of rounds. A full page has no room for the new versions of all its rows, so that in one pass
//! they would go elsewhere and every index would get a new entry. After a small first round has committed, its dead
//! versions are pruned when the page is read again, and the following rounds find their room on the page: HOT updates.

/// Pages of a window: 8 MB of 8 kB pages. It stays in the buffer cache from round to round, and a checkpoint of the server
/// within it costs one more full-page image per page at most.
pub const WINDOW_PAGES: u64 = 1024;
/// Most pages of a batch: a quarter of a window, so that at least three other batches lie between two rounds over a page.
/// Dead versions can be pruned only when no snapshot is older than their deletion; by the time we come back, short
/// transactions of the application, and the batches of other lanes, are over. Measured with two lanes: 85% HOT updates
/// and +17% heap with a quarter, 74% and +28% with batches as large as the window.
pub const MAX_SLICE_PAGES: u32 = 256;
/// Most rounds per window. Each costs a look at every row of the page; measured on rows of 300 bytes, 32 rounds write as
/// much WAL as 16 and take 30% longer.
pub const MAX_ROUNDS: u32 = 16;

/// A walk in heap order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeapCursor {
    /// First page of the window.
    pub window: u64,
    /// First page of the next batch, within the window.
    pub block: u64,
    /// The current round, from 0.
    pub round: u32,
    /// Rounds of this window; a power of two.
    pub rounds: u32,
    /// Pages to walk: the size of the table when the sweep began, after the sync triggers were in place.
    pub bound: u64,
}

/// What one batch takes: rows of pages `low..high` whose line pointer is `round` modulo `rounds`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// First page.
    pub low: u64,
    /// Behind the last page.
    pub high: u64,
    /// The residue.
    pub round: u32,
    /// The modulus; a power of two.
    pub rounds: u32,
}

impl HeapCursor {
    /// A walk over `bound` pages that begins with `rounds` rounds per window.
    pub fn new(bound: u64, rounds: u32) -> Self {
        Self { window: 0, block: 0, round: 0, rounds: rounds_limit(rounds), bound }
    }

    fn window_end(&self) -> u64 {
        (self.window + WINDOW_PAGES).min(self.bound)
    }

    /// The next batch of up to `pages` pages; `None` at the end.
    pub fn slice(&self, pages: u32) -> Option<Slice> {
        if self.window >= self.bound {
            return None;
        }
        let high = self.window_end().min(self.block + u64::from(pages.max(1)));
        Some(Slice { low: self.block, high, round: self.round, rounds: self.rounds })
    }

    /// The cursor behind `slice`, which came from [`Self::slice`]. `next_rounds` is taken when a new window begins.
    #[must_use]
    pub fn after(&self, slice: Slice, next_rounds: u32) -> Self {
        let mut next = Self { block: slice.high, ..*self };
        if next.block >= self.window_end() {
            next.block = self.window;
            next.round += 1;
        }
        if next.round >= self.rounds {
            next = Self {
                window: self.window_end(),
                block: self.window_end(),
                round: 0,
                rounds: rounds_limit(next_rounds),
                bound: self.bound,
            };
        }
        next
    }

    /// Share of the walk that is done, 0 to 1.
    pub fn ratio(&self) -> f64 {
        if self.bound == 0 || self.window >= self.bound {
            return 1.0;
        }
        let pages = (self.window_end() - self.window) as f64;
        let inside = (f64::from(self.round) * pages + (self.block - self.window) as f64) / f64::from(self.rounds);
        (self.window as f64 + inside) / self.bound as f64
    }
}

fn rounds_limit(rounds: u32) -> u32 {
    rounds.clamp(1, MAX_ROUNDS).next_power_of_two().min(MAX_ROUNDS)
}

/// Rounds to begin with, for a table with this many rows per page: so that a round takes about two rows of a page, whose
/// room is what the following rounds live on.
pub fn initial_rounds(rows_per_page: f64) -> u32 {
    rounds_limit((rows_per_page / 2.0).clamp(1.0, f64::from(MAX_ROUNDS)).round() as u32)
}

/// Rounds of the next window, from the share of HOT updates (0 to 1) in the first round and in the others of this one;
/// `None`: no rows were updated there.
///
/// Room on the pages from the start (fillfactor, dead rows that were pruned) needs fewer rounds. If later rounds find no
/// room although the first made some, an old snapshot keeps the dead versions from being pruned: then rounds only cost.
pub fn next_rounds(rounds: u32, first: Option<f64>, others: Option<f64>) -> u32 {
    match (first, others) {
        (Some(first), _) if first > 0.9 => rounds_limit(rounds / 2),
        (Some(first), Some(others)) if first < 0.5 && others < 0.4 => 1,
        _ => rounds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_page_is_taken_once_per_residue(
            bound in 0u64..5_000,
            sizes in prop::collection::vec(1u32..700, 1..20),
            rounds in prop::collection::vec(1u32..20, 1..6),
        ) {
            let mut cursor = HeapCursor::new(bound, rounds[0]);
            let mut seen = vec![0u64; bound as usize];
            let mut last = 0.0;
            for step in 0.. {
                let Some(slice) = cursor.slice(sizes[step % sizes.len()]) else { break };
                prop_assert!(slice.low < slice.high && slice.high <= bound);
                for page in slice.low..slice.high {
                    // A residue of modulus m stands for 16/m residues of modulus 16.
                    for residue in (0..MAX_ROUNDS).filter(|r| r % slice.rounds == slice.round) {
                        prop_assert_eq!(seen[page as usize] >> residue & 1, 0);
                        seen[page as usize] |= 1 << residue;
                    }
                }
                cursor = cursor.after(slice, rounds[step % rounds.len()]);
                prop_assert!(cursor.ratio() > last);
                last = cursor.ratio();
            }
            prop_assert!(seen.iter().all(|s| *s == 0xffff));
            prop_assert_eq!(cursor.ratio(), 1.0);
        }
    }

    #[test]
    fn rounds_follow_density_and_room() {
        assert_eq!(initial_rounds(28.0), 16);
        assert_eq!(initial_rounds(4.0), 2);
        assert_eq!(initial_rounds(0.5), 1);
        assert_eq!(initial_rounds(120.0), 16);
        assert_eq!(next_rounds(16, Some(0.95), Some(1.0)), 8);
        assert_eq!(next_rounds(16, Some(0.1), Some(0.95)), 16);
        assert_eq!(next_rounds(16, Some(0.1), Some(0.1)), 1);
        assert_eq!(next_rounds(1, Some(0.0), None), 1);
    }
}
