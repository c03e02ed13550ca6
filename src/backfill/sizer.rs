//! How many rows the next batch gets; pure.
//!
//! A servo on batch duration: the 90th percentile of the recent time per row, or for short ones the median, against the target
//! duration. It grows by a
//! bounded factor per step, and one batch that took far too long shrinks it at once.

use std::collections::VecDeque;
use std::time::Duration;

/// Batches that the percentile looks at: enough for a stable 90th percentile, few enough to follow a change of load
/// within a second or two of 100 ms batches.
const WINDOW: usize = 10;
/// Largest growth per batch.
const GROWTH: f64 = 1.5;
/// A batch that took this many times its target shrinks the size at once.
const OUTLIER: f64 = 2.0;
/// Below this it is not the rows that make one batch in ten longer than the others, but a disk or a scheduler: the median
/// counts then, and an outlier has to be longer by as much.
const SHORT: Duration = Duration::from_millis(10);

/// The servo.
#[derive(Debug, Clone)]
pub struct Sizer {
    target: Duration,
    min: u32,
    max: u32,
    rows: u32,
    recent: VecDeque<f64>,
}

impl Sizer {
    /// Starts with `rows`, kept between `min` and `max`. Requires `1 <= min <= max`.
    pub fn new(target: Duration, min: u32, max: u32, rows: u32) -> Self {
        Self { target, min, max, rows: rows.clamp(min, max), recent: VecDeque::new() }
    }

    /// Takes other limits. A shorter target makes the next batch smaller at once; a longer one lets it grow as ever.
    /// Requires `1 <= min <= max`.
    pub fn retune(&mut self, target: Duration, min: u32, max: u32) {
        let shorter = (target.as_secs_f64() / self.target.as_secs_f64()).min(1.0);
        let rows = (f64::from(self.rows) * shorter) as u32;
        *self = Self { target, min, max, rows: rows.clamp(min, max), recent: std::mem::take(&mut self.recent) };
    }

    /// Size of the next batch.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Learns from a committed batch of `rows` that took `took`.
    pub fn committed(&mut self, rows: u32, took: Duration) {
        if rows == 0 {
            return;
        }
        self.recent.push_back(took.as_secs_f64() / f64::from(rows));
        if self.recent.len() > WINDOW {
            self.recent.pop_front();
        }
        let over = took.as_secs_f64() / self.target.as_secs_f64();
        let wanted = if over > OUTLIER && took > self.target + SHORT {
            f64::from(rows) / over
        } else {
            self.target.as_secs_f64() / self.usual().max(f64::MIN_POSITIVE)
        };
        // A batch costs some time whatever its size, so few rows seem dear each: it has to try one more to see.
        let whole = if wanted > f64::from(self.rows) { wanted.ceil() } else { wanted.floor() };
        let capped = whole.min(f64::from(self.rows) * GROWTH + 1.0).min(f64::from(u32::MAX));
        self.rows = (capped as u32).clamp(self.min, self.max);
    }

    /// Learns from a batch that was rolled back: half the size.
    pub fn rolled_back(&mut self) {
        self.rows = (self.rows / 2).max(self.min);
    }

    /// Whether it cannot get smaller.
    pub fn at_floor(&self) -> bool {
        self.rows == self.min
    }

    /// Seconds per row that most of the recent batches took at most.
    fn usual(&self) -> f64 {
        let tenths = if self.target < SHORT { 5 } else { 9 };
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let at = (sorted.len() * tenths).div_ceil(10).saturating_sub(1);
        sorted.get(at).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TARGET: Duration = Duration::from_millis(100);

    fn plant(sizer: &mut Sizer, per_row_us: u64, batches: usize) {
        for _ in 0..batches {
            let rows = sizer.rows();
            sizer.committed(rows, Duration::from_micros(per_row_us * u64::from(rows)));
        }
    }

    proptest! {
        #[test]
        fn it_converges_on_the_target(per_row_us in 10u64..5_000, start in 1u32..10_000) {
            let mut sizer = Sizer::new(TARGET, 1, 1_000_000, start);
            plant(&mut sizer, per_row_us, 60);
            let ms = u64::from(sizer.rows()) * per_row_us / 1000;
            prop_assert!((50..=130).contains(&ms), "{} rows, {ms} ms", sizer.rows());
        }

        #[test]
        fn it_stays_between_floor_and_ceiling(steps in prop::collection::vec((1u32..50_000, 0u64..10_000), 1..100)) {
            let mut sizer = Sizer::new(TARGET, 10, 5_000, 500);
            for (rows, ms) in steps {
                sizer.committed(rows, Duration::from_millis(ms));
                prop_assert!((10..=5_000).contains(&sizer.rows()));
            }
        }
    }

    #[test]
    fn short_batches_find_their_size_beside_what_each_costs_and_are_not_frightened_by_hiccups() {
        let mut sizer = Sizer::new(Duration::from_millis(1), 1, 1000, 1);
        let mut sizes = Vec::new();
        for n in 0..300 {
            let rows = sizer.rows();
            sizes.push(rows);
            let hiccup = if n % 7 == 0 { 4000 } else { 0 };
            sizer.committed(rows, Duration::from_micros(600 + 20 * u64::from(rows) + hiccup));
        }
        assert!(sizes[200..].iter().all(|rows| (17..=24).contains(rows)), "{sizes:?}");
    }

    #[test]
    fn other_limits_hold_from_the_next_batch_on() {
        let mut sizer = Sizer::new(TARGET, 1, 100_000, 1000);
        plant(&mut sizer, 100, 20);
        sizer.retune(TARGET / 4, 1, 100_000);
        assert!((225..=275).contains(&sizer.rows()), "{}", sizer.rows());
        plant(&mut sizer, 100, 1);
        assert!((225..=275).contains(&sizer.rows()), "it stays there: {}", sizer.rows());
        sizer.retune(TARGET, 1, 120);
        assert_eq!(sizer.rows(), 120);
        sizer.retune(TARGET, 300, 100_000);
        assert_eq!(sizer.rows(), 300);
    }

    #[test]
    fn an_outlier_shrinks_at_once_and_growth_is_slow() {
        let mut sizer = Sizer::new(TARGET, 1, 100_000, 1000);
        plant(&mut sizer, 100, 20);
        assert!((900..=1100).contains(&sizer.rows()));
        sizer.committed(1000, Duration::from_millis(1000));
        assert!(sizer.rows() <= 110, "{}", sizer.rows());
        let before = sizer.rows();
        plant(&mut sizer, 100, 1);
        assert!(sizer.rows() <= before * 3 / 2 + 1);
    }
}
