//! How long something will still take, from how fast it went lately; pure.
//!
//! Time counts whether work is done in it or not, so what throttles the work moves the estimate. A mean that forgets
//! exponentially needs two numbers and no list of samples, and a pause can only make it slower: a sliding window would get
//! faster during a pause in which an older and slower stretch leaves it.

use std::time::Duration;

use crate::progress::Eta;

/// Time constant of the best guess: long enough that a pause of some seconds is a part of the mean, short enough to follow a
/// limit that an operator moves.
const LONG: f64 = 120.0;
/// Time constant of the second guess. Where both disagree, the speed changes, and they are the range.
const SHORT: f64 = 20.0;
/// Less time than this says nothing.
const LEAST_SECONDS: f64 = 5.0;
/// Nor does less work than this, unless `SLOW_SECONDS` have shown that it is just slow.
const LEAST_DONE: f64 = 0.001;
/// See `LEAST_DONE`.
const SLOW_SECONDS: f64 = 60.0;
/// What would take longer than this, 100 days, is standing.
const MOST_SECONDS: f64 = 100.0 * 86_400.0;

/// Knows how fast a ratio grows.
#[derive(Debug, Clone, Default)]
pub struct Estimator {
    /// Time and ratio of the first and of the last look.
    first: Option<(Duration, f64)>,
    last: (Duration, f64),
    long: Mean,
    short: Mean,
}

/// Work and time, each forgotten at the same pace.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    done: f64,
    time: f64,
}

impl Mean {
    fn add(&mut self, done: f64, time: f64, constant: f64) {
        let keep = (-time / constant).exp();
        let weight = constant * (1.0 - keep);
        self.done = self.done * keep + done / time * weight;
        self.time = self.time * keep + weight;
    }

    /// Seconds until `left` is done; none: never.
    fn seconds(&self, left: f64) -> Option<f64> {
        let seconds = left * self.time / self.done;
        seconds.is_finite().then_some(seconds.min(MOST_SECONDS))
    }
}

impl Estimator {
    /// Notes that `ratio`, 0 to 1, is done at `at`, time since any fixed moment. What was done before the first look tells
    /// nothing about speed. Time and work that go back count as standing.
    pub fn observe(&mut self, at: Duration, ratio: f64) {
        let ratio = if ratio.is_finite() { ratio.clamp(0.0, 1.0) } else { self.last.1 };
        if self.first.is_none() {
            self.first = Some((at, ratio));
            self.last = (at, ratio);
            return;
        }
        let time = at.saturating_sub(self.last.0).as_secs_f64();
        if time <= 0.0 {
            // The work counts with the time that is to come.
            return;
        }
        let done = (ratio - self.last.1).max(0.0);
        self.long.add(done, time, LONG);
        self.short.add(done, time, SHORT);
        self.last = (at, ratio.max(self.last.1));
    }

    /// The estimate as of the last look; none while it would mean nothing.
    pub fn eta(&self) -> Option<Eta> {
        let first = self.first?;
        let (seconds, done) = ((self.last.0 - first.0).as_secs_f64(), self.last.1 - first.1);
        if seconds < LEAST_SECONDS || done <= 0.0 || (done < LEAST_DONE && seconds < SLOW_SECONDS) {
            return None;
        }
        let left = 1.0 - self.last.1;
        let long = self.long.seconds(left).filter(|s| *s < MOST_SECONDS)?;
        let short = self.short.seconds(left).unwrap_or(MOST_SECONDS);
        Some(Eta { seconds: long, least_seconds: long.min(short), most_seconds: long.max(short) })
    }
}

/// From one look: `ratio` was done in `time`.
pub fn overall(ratio: f64, time: Duration) -> Option<Eta> {
    let mut estimator = Estimator::default();
    estimator.observe(Duration::ZERO, 0.0);
    estimator.observe(time, ratio);
    estimator.eta()
}

/// For people: two units at most, since more would claim to be exact.
pub fn words(seconds: f64) -> String {
    let s = seconds.clamp(0.0, MOST_SECONDS).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(steps: &[(f64, f64)]) -> Estimator {
        let mut e = Estimator::default();
        let (mut at, mut ratio) = (0.0, 0.0);
        e.observe(Duration::ZERO, 0.0);
        for (time, done) in steps {
            at += time;
            ratio += done;
            e.observe(Duration::from_secs_f64(at), ratio);
        }
        e
    }

    #[test]
    fn nothing_is_said_before_it_means_something() {
        assert_eq!(Estimator::default().eta(), None);
        assert_eq!(after(&[(1.0, 0.2)]).eta(), None, "too early");
        assert_eq!(after(&[(50.0, 0.0)]).eta(), None, "nothing moved");
        assert_eq!(after(&[(10.0, 0.0001)]).eta(), None, "hardly anything moved");
        assert!(after(&[(70.0, 0.0001)]).eta().is_some(), "it is slow");
        assert_eq!(after(&[(70.0, 1e-9)]).eta(), None, "centuries");
        assert_eq!(overall(0.25, Duration::from_secs(30)).unwrap().seconds.round(), 90.0);
        assert_eq!(overall(1.0, Duration::from_secs(30)).unwrap().seconds, 0.0);
    }

    #[test]
    fn what_was_done_before_the_first_look_is_no_speed() {
        let mut e = Estimator::default();
        e.observe(Duration::from_secs(100), 0.9);
        e.observe(Duration::from_secs(110), 0.91);
        assert!((e.eta().unwrap().seconds - 90.0).abs() < 0.01);
    }

    #[test]
    fn words_have_two_units() {
        let said: Vec<String> = [0.4, 59.0, 61.0, 3700.0, 90_000.0].into_iter().map(words).collect();
        assert_eq!(said, ["0 s", "59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]);
    }

    proptest! {
        #[test]
        fn steady_work_gives_the_time_that_is_left(seconds in 20.0..100_000.0f64, share in 0.1..0.9f64, looks in 1..200u32) {
            let n = f64::from(looks);
            let e = after(&vec![(seconds * share / n, share / n); looks as usize]);
            prop_assume!(seconds * share >= LEAST_SECONDS);
            let eta = e.eta().unwrap();
            let left = seconds * (1.0 - share);
            prop_assert!((eta.seconds / left - 1.0).abs() < 0.01, "{} for {left}", eta.seconds);
        }

        #[test]
        fn a_new_speed_is_learned(before in 0.0001..0.001f64, now in 0.0001..0.0005f64) {
            let mut steps = vec![(1.0, before); 100];
            steps.extend(vec![(1.0, now); 800]);
            let e = after(&steps);
            let left = 1.0 - before * 100.0 - now * 800.0;
            prop_assert!((e.eta().unwrap().seconds / (left / now) - 1.0).abs() < 0.05);
        }

        #[test]
        fn whatever_happens_it_is_a_time_and_a_pause_raises_it(
            steps in prop::collection::vec((0.0..100.0f64, -0.01..0.05f64), 1..100), pause in 1.0..50.0f64,
        ) {
            let mut e = after(&steps);
            if let Some(eta) = e.eta() {
                prop_assert!(0.0 <= eta.least_seconds && eta.least_seconds <= eta.seconds);
                prop_assert!(eta.seconds <= eta.most_seconds && eta.most_seconds <= MOST_SECONDS);
                e.observe(e.last.0 + Duration::from_secs_f64(pause), e.last.1);
                if let Some(later) = e.eta() {
                    prop_assert!(later.seconds > eta.seconds || e.last.1 == 1.0, "{} after {}", later.seconds, eta.seconds);
                }
            }
        }
    }
}
