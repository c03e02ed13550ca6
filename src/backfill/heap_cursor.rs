//! Where a walk in heap order stands; pure.
//!
//! The table is walked window by window, and each window in several rounds: round `k` takes the rows whose line pointer
//! is `k` modulo the number of rounds. A full page has no room for the new versions of all its rows, so that in one pass
//! they would go elsewhere and every index would get a new entry. After a small first round has committed, its dead
//! versions are pruned when the page is read again, and the following rounds find their room on the page: HOT updates.

use crate::plan::rounds::{MAX_ROUNDS, rounds_limit};

/// Pages of a window: 8 MB of 8 kB pages. It stays in the buffer cache from round to round, and a checkpoint of the server
/// within it costs one more full-page image per page at most.
pub const WINDOW_PAGES: u64 = 1024;
/// Most pages of a batch: a quarter of a window, so that at least three other batches lie between two rounds over a page.
/// Dead versions can be pruned only when no snapshot is older than their deletion; by the time we come back, short
/// transactions of the application, and the batches of other lanes, are over. Measured with two lanes: 85% HOT updates
/// and +17% heap with a quarter, 74% and +28% with batches as large as the window.
pub const MAX_SLICE_PAGES: u32 = 256;
/// Lanes where their number was left open. The server's cores cannot be asked for, but hardly any server has just one; measured
/// on two cores, two lanes fill 1.6 times as many rows per second as one.
const OPEN_LANES: u32 = 2;
/// Fewest pages of a lane.
const LEAST_LANE_PAGES: u64 = 16;
/// A walk in heap order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeapCursor {
    /// First page of the window.
    pub window: u64,
    /// First page of the next batch, within the window.
    pub block: u64,
    /// The current round, from 0.
    pub round: u32,
    /// Rounds of this window.
    pub rounds: u32,
    /// First page of the walk.
    pub start: u64,
    /// Behind its last page. For the last lane that is the size of the table when the sweep began, after the sync triggers
    /// were in place.
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
    /// The modulus.
    pub rounds: u32,
}

impl Slice {
    /// Its pages in up to `n` pieces of about the same size, in order.
    pub fn pieces(self, n: u32) -> impl Iterator<Item = Self> {
        let pages = self.high - self.low;
        let n = u64::from(n).clamp(1, pages.max(1));
        (0..n).map(move |i| Self { low: self.low + pages * i / n, high: self.low + pages * (i + 1) / n, ..self })
    }
}

impl HeapCursor {
    /// A walk over the pages from `start` up to but without `bound` that begins with `rounds` rounds per window.
    pub fn new(start: u64, bound: u64, rounds: u32) -> Self {
        Self { window: start, block: start, round: 0, rounds: rounds_limit(rounds), start, bound }
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
                ..*self
            };
        }
        next
    }

    /// Share of the walk that is done, 0 to 1.
    pub fn ratio(&self) -> f64 {
        if self.window >= self.bound {
            return 1.0;
        }
        let pages = (self.window_end() - self.window) as f64;
        let inside = (f64::from(self.round) * pages + (self.block - self.window) as f64) / f64::from(self.rounds);
        ((self.window - self.start) as f64 + inside) / (self.bound - self.start) as f64
    }
}

/// The pages of lane `lane` of `lanes` over a table of `pages` pages: first, and behind the last.
pub fn lane_range(pages: u64, lanes: u32, lane: u32) -> (u64, u64) {
    let at = |i: u32| (u128::from(pages) * u128::from(i) / u128::from(lanes.max(1))) as u64;
    (at(lane), at(lane + 1))
}

/// How many lanes a table of this size gets: of those that are `wanted` each has at least as many pages as a small batch;
/// where it was left open, each of [`OPEN_LANES`] has a window.
pub fn lanes_for(pages: u64, wanted: Option<u32>) -> u32 {
    let (least, most) = wanted.map_or((WINDOW_PAGES, OPEN_LANES), |n| (LEAST_LANE_PAGES, n));
    (pages / least).clamp(1, u64::from(most.max(1))) as u32
}

/// How many lanes may work: where it was left open, one, and all while the pace is that of a server on which nobody else works.
pub fn lanes_at_work(wanted: Option<u32>, adapts: bool, pace: f64) -> u32 {
    wanted.unwrap_or(if adapts && pace >= 1.0 { OPEN_LANES } else { 1 })
}

/// Share of HOT updates below which the rounds after the first do not work.
pub const HOT_WORKS: f64 = 0.4;

/// Share of HOT updates below which they are not just too few: something keeps updates from being HOT at all.
pub const HOT_NEVER: f64 = 0.05;

/// Share of HOT updates from which the pages have room for more than a round takes.
pub const HOT_ROOMY: f64 = 0.98;

/// Chooses the rounds of the next window from what was seen in this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steering {
    /// Where the table's density suggests to begin.
    initial: u32,
    /// Fewer than this were tried and left too little room.
    floor: u32,
    /// Updates cannot be HOT, whatever room they find.
    never: bool,
    /// The last step was to fewer rounds.
    halved: bool,
}

impl Steering {
    /// Begins with `initial` rounds.
    pub fn new(initial: u32) -> Self {
        Self { initial: rounds_limit(initial), floor: 1, never: false, halved: false }
    }

    /// Updates are not HOT although nobody keeps dead versions: they change an indexed column, by a trigger for example. Rows
    /// find room on their pages all the same, so that the table hardly grows: measured with an index on `updated_at`, +18% heap in
    /// rounds, +99% in single ones, for the same WAL. So the rounds stay, and more of them would only cost. Gives whether this is new.
    pub fn cannot_be_hot(&mut self) -> bool {
        !std::mem::replace(&mut self.never, true)
    }

    /// Rounds of the next window. `first`, `others`: the share of HOT updates (0 to 1) in the first round and in the others
    /// of a window of `rounds`; `None`: no rows were updated there. `held`: somebody's old snapshot keeps dead versions from being
    /// pruned.
    ///
    /// Room on the pages from the start (fillfactor, dead rows that were pruned) needs fewer rounds, as long as all the later
    /// ones find room: on pages with fillfactor 70, 16 rounds gave 100% HOT updates and no growth, 2 rounds 87% and +14%. A step
    /// to fewer that costs HOT updates is taken back and not tried again. Where the later rounds find too little, they take too
    /// much at once. While nothing can be pruned, rounds only cost.
    pub fn next(&mut self, rounds: u32, first: Option<f64>, others: Option<f64>, held: bool) -> u32 {
        if held {
            return 1;
        }
        self.never &= others.is_none_or(|share| share < HOT_NEVER);
        if self.never {
            return self.initial;
        }
        let halved = std::mem::take(&mut self.halved);
        let roomy = |share: Option<f64>| share.is_none_or(|s| s >= HOT_ROOMY);
        match (first, others) {
            (_, Some(others)) if rounds < MAX_ROUNDS && (others < 0.7 || halved && others < HOT_ROOMY) => {
                self.floor = self.floor.max(rounds * 2);
                rounds_limit(rounds * 2)
            }
            (Some(first), None) if rounds == 1 && first < if halved { HOT_ROOMY } else { 0.9 } => {
                self.floor = self.floor.max(2);
                if halved { 2 } else { self.initial }
            }
            (Some(first), others) if first > 0.9 && roomy(others) && rounds > 1 && rounds / 2 >= self.floor => {
                self.halved = true;
                rounds_limit(rounds / 2)
            }
            _ => rounds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_page_is_taken_once_per_residue(
            start in 0u64..3_000,
            pages in 0u64..2_500,
            sizes in prop::collection::vec(1u32..700, 1..20),
            rounds in prop::collection::vec(1u32..20, 1..6),
        ) {
            let bound = start + pages;
            let mut cursor = HeapCursor::new(start, bound, rounds[0]);
            let mut seen = vec![[0u64; 4]; bound as usize];
            let mut last = 0.0;
            for step in 0.. {
                let Some(slice) = cursor.slice(sizes[step % sizes.len()]) else { break };
                prop_assert!(start <= slice.low && slice.low < slice.high && slice.high <= bound);
                for page in slice.low..slice.high {
                    for byte in (slice.round as usize..256).step_by(slice.rounds as usize) {
                        prop_assert_eq!(seen[page as usize][byte / 64] >> (byte % 64) & 1, 0);
                        seen[page as usize][byte / 64] |= 1 << (byte % 64);
                    }
                }
                cursor = cursor.after(slice, rounds[step % rounds.len()]);
                prop_assert!(cursor.ratio() > last);
                last = cursor.ratio();
            }
            prop_assert!(seen[start as usize..].iter().all(|s| *s == [u64::MAX; 4]));
            prop_assert_eq!(cursor.ratio(), 1.0);
        }
    }

    proptest! {
        #[test]
        fn pieces_are_the_slice(low in 0u64..5000, pages in 1u64..300, n in 0u32..10) {
            let slice = Slice { low, high: low + pages, round: 3, rounds: 7 };
            let pieces: Vec<Slice> = slice.pieces(n).collect();
            prop_assert_eq!(pieces.len() as u64, u64::from(n.max(1)).min(pages));
            prop_assert_eq!((pieces[0].low, pieces[pieces.len() - 1].high), (slice.low, slice.high));
            prop_assert!(pieces.windows(2).all(|w| w[0].high == w[1].low));
            prop_assert!(pieces.iter().all(|p| p.low < p.high && (p.round, p.rounds) == (3, 7)));
        }
    }

    #[test]
    fn rounds_follow_density_and_room() {
        let mut steering = Steering::new(16);
        assert_eq!(steering.next(16, Some(0.95), Some(1.0), false), 8);
        assert_eq!(steering.next(8, Some(0.3), Some(0.99), false), 8, "the first round no longer finds room");
        assert_eq!(steering.next(8, Some(0.1), Some(0.1), true), 1, "nothing can be pruned");
        assert_eq!(steering.next(1, Some(0.1), None, true), 1);
        assert_eq!(steering.next(1, Some(0.1), None, false), 16, "it can again");
        assert_eq!(steering.next(4, Some(0.1), Some(0.5), false), 8);
        assert_eq!(steering.next(8, Some(0.95), Some(0.9), false), 8, "four were too few");
        assert_eq!(steering.next(16, None, None, false), 16);
    }

    #[test]
    fn fewer_rounds_that_cost_hot_updates_are_taken_back() {
        // What a fillfactor of 70 gives: all later updates are HOT with four rounds and more.
        let others = |rounds: u32| match rounds {
            1 => None,
            2 => Some(0.87),
            _ => Some(1.0),
        };
        let mut steering = Steering::new(16);
        let mut rounds = 16;
        let mut seen = Vec::new();
        for _ in 0..8 {
            rounds = steering.next(rounds, Some(0.99), others(rounds), false);
            seen.push(rounds);
        }
        assert_eq!(seen, [8, 4, 2, 4, 4, 4, 4, 4]);
    }

    #[test]
    fn where_updates_cannot_be_hot_rounds_stay_as_they_began_until_some_are() {
        let mut steering = Steering::new(8);
        assert!(steering.cannot_be_hot());
        assert!(!steering.cannot_be_hot(), "known");
        assert_eq!(steering.next(8, Some(0.0), Some(0.0), false), 8);
        assert_eq!(steering.next(8, Some(0.0), Some(0.0), true), 1, "and nothing can be pruned");
        assert_eq!(steering.next(1, Some(0.0), None, false), 8, "it can again");
        assert_eq!(steering.next(8, Some(0.0), Some(0.5), false), 16, "the index is gone");
        assert!(steering.cannot_be_hot());
    }

    #[test]
    fn lanes_share_all_pages() {
        for (pages, lanes) in [(0, 1), (1, 1), (70, 3), (1_000_003, 8)] {
            let ranges: Vec<_> = (0..lanes).map(|i| lane_range(pages, lanes, i)).collect();
            assert_eq!(ranges[0].0, 0);
            assert_eq!(ranges[ranges.len() - 1].1, pages);
            assert!(ranges.windows(2).all(|w| w[0].1 == w[1].0));
        }
        assert_eq!([0, 40, 1000].map(|pages| lanes_for(pages, Some(4))), [1, 2, 4]);
        assert_eq!([0, 2047, 2048, 1_000_000].map(|pages| lanes_for(pages, None)), [1, 1, 2, 2]);
    }

    #[test]
    fn lanes_that_nobody_asked_for_work_only_while_nobody_else_does() {
        assert_eq!([0.05, 0.8, 1.0].map(|pace| lanes_at_work(None, true, pace)), [1, 1, 2]);
        assert_eq!(lanes_at_work(None, false, 1.0), 1, "a constant pace does not say who else is there");
        assert_eq!([0.05, 1.0].map(|pace| lanes_at_work(Some(3), true, pace)), [3, 3]);
    }
}
