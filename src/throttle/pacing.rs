//! How fast batches follow each other; pure.
//!
//! One number, the pace, is the share of time that a lane works; its square root is the share of its target duration that a
//! batch takes: at 0.1 a batch of 32 ms and a rest of 285 ms. While nobody else works it is at full speed within a second or
//! two. While somebody does, it follows what batches cost others: a small write that commits beside a batch is compared
//! with one that commits between two. Above the budget the pace falls, well within it rises, and in between it stays. After
//! a fall it keeps below the pace that was too much for a while, so that it does not go up and down like a saw.

use std::collections::VecDeque;
use std::time::Duration;

/// How often [`Pacer::tick`] is called.
pub const TICK: Duration = Duration::from_millis(500);
/// The lowest pace. It still makes progress: a twentieth of the time is work.
pub const FLOOR: f64 = 0.05;
/// The pace at first, and when somebody comes: a tenth is hardly felt, and is left within seconds where nobody is there.
const START: f64 = 0.1;
/// The highest pace while others work: without a rest there is nothing to compare with.
const MOST_BESIDE_OTHERS: f64 = 0.8;
/// The shortest batch: below that most of it is round trips.
const SHORTEST: Duration = Duration::from_millis(5);
/// Ticks without others before nobody counts as there: 3 s, longer than an application with some requests per second is
/// silent.
const QUIET_TICKS: u32 = 6;
/// Samples beside batches before a change is judged.
const ENOUGH: usize = 16;
/// So many are enough where it is far beyond the budget.
const ENOUGH_FOR_ALARM: usize = 6;
/// Far beyond: this many times the budget.
const ALARM: f64 = 1.6;
/// Samples that are kept: of between, some ten seconds; beside, since the last change.
const KEPT: usize = 48;
/// What a commit may take longer whatever the budget, in seconds: jitter of the network and of the scheduler. Nobody feels a
/// millisecond, and with 0.3 ms the noise of a small server brought the pace to its floor.
const SLACK: f64 = 0.001;
/// A rise, as a factor per judgement.
const RISE: f64 = 1.15;
/// The same until it was too much for the first time: from the start to the most in half a dozen judgements.
const FIRST_RISE: f64 = 1.4;
/// The same while nobody else works: from the start to full speed within two ticks.
const ALONE_RISE: f64 = 4.0;
/// A fall.
const FALL: f64 = 0.75;
/// How close to a pace that was too much it may come, and for how many ticks: a minute.
const BELOW_CEILING: f64 = 0.85;
const CEILING_TICKS: u32 = 120;
/// The server itself is slow when commits between batches take so many times what they took at their best.
const SATURATED: f64 = 3.0;
/// Ticks after which the best is taken a little less seriously: 1% every ten seconds.
const BEST_FADES: f64 = 1.000_5;

/// What was seen since the last tick.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Somebody else works on this server, or it cannot be told.
    pub others: bool,
    /// Commit times in seconds, of small writes while a batch ran.
    pub beside: Vec<f64>,
    /// And while none ran.
    pub between: Vec<f64>,
    /// A batch kept somebody waiting, or waited for somebody's lock in vain.
    pub pressed: bool,
    /// Batches wait for a signal.
    pub stopped: bool,
}

/// The controller.
#[derive(Debug, Clone)]
pub struct Pacer {
    pace: f64,
    /// The last pace beside others: where it begins when they are back.
    calm: f64,
    present: bool,
    quiet: u32,
    beside: VecDeque<f64>,
    between: VecDeque<f64>,
    /// Median of commits between batches, at its best.
    best: f64,
    ceiling: f64,
    ceiling_ticks: u32,
    /// It was too much, or the server saturated, once since somebody came.
    warned: bool,
}

impl Default for Pacer {
    fn default() -> Self {
        Self {
            pace: START,
            calm: START,
            // The first look tells; until then the pace is as if somebody were there.
            present: false,
            quiet: 0,
            beside: VecDeque::new(),
            between: VecDeque::new(),
            best: f64::INFINITY,
            ceiling: 1.0,
            ceiling_ticks: 0,
            warned: false,
        }
    }
}

impl Pacer {
    /// The pace now, [`FLOOR`] to 1.
    pub fn pace(&self) -> f64 {
        self.pace
    }

    /// Whether others count as working.
    pub fn beside_others(&self) -> bool {
        self.present
    }

    /// Learns, and gives the next pace: at most `most`, with a `budget` above 1.
    pub fn tick(&mut self, seen: Seen, most: f64, budget: f64) -> f64 {
        keep(&mut self.beside, seen.beside);
        keep(&mut self.between, seen.between);
        let came = self.look_for_others(seen.others);
        self.ceiling_ticks = self.ceiling_ticks.saturating_sub(1);
        if self.ceiling_ticks == 0 {
            self.ceiling = 1.0;
        }
        let now = self.pace;
        let next = if seen.stopped {
            // When it goes on, everybody else does too.
            now.min(self.calm).min(START)
        } else if seen.pressed {
            self.too_much(now)
        } else if !self.present {
            now * ALONE_RISE
        } else if came {
            self.warned = false;
            now.min(self.calm)
        } else {
            self.judge(now, budget)
        };
        let most = if self.present { most.min(MOST_BESIDE_OTHERS) } else { most };
        self.pace = next.min(most).max(FLOOR.min(most));
        if self.pace != now {
            self.beside.clear();
        }
        if self.present {
            self.calm = self.pace;
        }
        self.pace
    }

    /// Gives whether somebody came who was not there.
    fn look_for_others(&mut self, others: bool) -> bool {
        self.quiet = if others { 0 } else { self.quiet.saturating_add(1) };
        let before = self.present;
        self.present = others || before && self.quiet < QUIET_TICKS;
        self.present && !before
    }

    fn judge(&mut self, now: f64, budget: f64) -> f64 {
        if self.between.len() < ENOUGH_FOR_ALARM {
            return now;
        }
        let alone = upper(&self.between);
        let saturated = self.is_saturated();
        let beside = upper(&self.beside);
        let limit = alone * budget + SLACK;
        let n = self.beside.len();
        if n >= ENOUGH_FOR_ALARM && beside > limit * ALARM || n >= ENOUGH && beside > limit {
            return self.too_much(now);
        }
        if n < ENOUGH {
            return now;
        }
        self.beside.clear();
        if saturated {
            // Not by us alone, but less of us is less of it.
            self.warned = true;
            return now * FALL;
        }
        let well_within = alone * (1.0 + (budget - 1.0) / 2.0) + SLACK / 2.0;
        let rise = if self.warned { RISE } else { FIRST_RISE };
        if beside < well_within { (now * rise).min((self.ceiling * BELOW_CEILING).max(FLOOR)) } else { now }
    }

    fn too_much(&mut self, now: f64) -> f64 {
        self.warned = true;
        self.ceiling = now;
        self.ceiling_ticks = CEILING_TICKS;
        now * FALL
    }

    fn is_saturated(&mut self) -> bool {
        let median = quantile(&self.between, 0.5);
        self.best = (self.best * BEST_FADES).min(median);
        self.between.len() >= ENOUGH && median > self.best * SATURATED + SLACK
    }
}

/// How long a batch may take at this pace, of a target for full speed. Its square root: a batch costs some milliseconds
/// whatever its size, and as short as the pace is low most of it would be that.
pub fn batch_target(pace: f64, target: Duration) -> Duration {
    target.mul_f64(pace.clamp(0.0, 1.0).sqrt()).max(SHORTEST.min(target))
}

fn keep(kept: &mut VecDeque<f64>, new: Vec<f64>) {
    kept.extend(new);
    let excess = kept.len().saturating_sub(KEPT);
    kept.drain(..excess);
}

/// The mean of the upper half without its uppermost tenth: what is felt, without what a single fsync makes of it.
fn upper(values: &VecDeque<f64>) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    let (from, to) = (sorted.len() / 2, (sorted.len() * 9).div_ceil(10));
    let half = sorted.get(from..to).unwrap_or_default();
    if half.is_empty() { 0.0 } else { half.iter().sum::<f64>() / half.len() as f64 }
}

fn quantile(values: &VecDeque<f64>, share: f64) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    const BUDGET: f64 = 1.25;

    /// A server: commits take `base` seconds, and beside a batch `1 + harm * pace` times that, with noise on both.
    struct Plant {
        base: f64,
        harm: f64,
        noise: f64,
        others: bool,
        random: StdRng,
    }

    impl Plant {
        fn new(seed: u64, base: f64, harm: f64, noise: f64) -> Self {
            Self { base, harm, noise, others: true, random: StdRng::seed_from_u64(seed) }
        }

        fn sample(&mut self, factor: f64) -> f64 {
            self.base * factor * (1.0 + self.noise * self.random.random_range(-1.0..1.0))
        }

        fn seen(&mut self, pace: f64) -> Seen {
            let beside = (0..2).map(|_| self.sample(1.0 + self.harm * pace)).collect();
            let between = (0..2).map(|_| self.sample(1.0)).collect();
            Seen { others: self.others, beside, between, ..Seen::default() }
        }

        fn run(&mut self, pacer: &mut Pacer, ticks: usize) -> Vec<f64> {
            (0..ticks)
                .map(|_| {
                    let seen = self.seen(pacer.pace());
                    pacer.tick(seen, 1.0, BUDGET)
                })
                .collect()
        }
    }

    fn extremes(paces: &[f64]) -> (f64, f64) {
        paces.iter().fold((f64::INFINITY, 0.0), |(low, high), p| (low.min(*p), f64::max(high, *p)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The pace at which a batch costs exactly the budget is (BUDGET - 1) / harm.
        #[test]
        fn it_converges_below_the_budget_and_does_not_oscillate(
            seed: u64, base in 0.002f64..0.05, harm in 0.4f64..8.0, noise in 0.0f64..0.3,
        ) {
            let (mut plant, mut pacer) = (Plant::new(seed, base, harm, noise), Pacer::default());
            plant.run(&mut pacer, 1200);
            let settled = plant.run(&mut pacer, 1200);
            let (low, high) = extremes(&settled);
            let allowed = ((BUDGET - 1.0) / harm + SLACK / base / harm).clamp(FLOOR, MOST_BESIDE_OTHERS);
            let mean = settled.iter().sum::<f64>() / settled.len() as f64;
            prop_assert!(high <= (allowed * 1.6).max(FLOOR), "{high} of {allowed}");
            prop_assert!(mean >= (allowed * 0.3).min(0.7), "{mean} of {allowed}");
            prop_assert!(high / low <= 4.0, "{low} to {high}");
            let turns = settled.windows(2).filter(|w| w[1] < w[0]).count();
            prop_assert!(turns <= 40, "{turns} falls in ten minutes");
        }

        #[test]
        fn it_never_starves_and_never_leaves_its_bounds(
            steps in prop::collection::vec((any::<bool>(), 0.0f64..10.0, 0.0f64..10.0, any::<bool>(), any::<bool>()), 1..200),
            most in 0.01f64..1.0,
        ) {
            let mut pacer = Pacer::default();
            for (others, beside, between, pressed, stopped) in steps {
                let seen = Seen { others, beside: vec![beside; 8], between: vec![between; 8], pressed, stopped };
                let pace = pacer.tick(seen, most, BUDGET);
                prop_assert!(pace >= FLOOR.min(most) && pace <= most, "{pace}");
            }
        }

        #[test]
        fn it_yields_when_others_get_slow_and_recovers(seed: u64, base in 0.002f64..0.02) {
            let (mut plant, mut pacer) = (Plant::new(seed, base, 1.0, 0.2), Pacer::default());
            plant.run(&mut pacer, 600);
            let before = pacer.pace();
            // Batches cost ten times as much from now on.
            plant.harm = 40.0;
            plant.run(&mut pacer, 120);
            let during = pacer.pace();
            prop_assert!(during <= FLOOR * 2.0, "{before} -> {during}");
            plant.harm = 1.0;
            plant.run(&mut pacer, 600);
            prop_assert!(pacer.pace() > 0.08, "{before} -> {during} -> {}", pacer.pace());
        }

        #[test]
        fn a_saturated_server_gets_the_floor(seed: u64) {
            let (mut plant, mut pacer) = (Plant::new(seed, 0.003, 0.1, 0.2), Pacer::default());
            plant.run(&mut pacer, 300);
            plant.base *= 10.0;
            plant.run(&mut pacer, 240);
            prop_assert!(pacer.pace() <= FLOOR * 1.5, "{}", pacer.pace());
            plant.base /= 10.0;
            plant.run(&mut pacer, 600);
            prop_assert!(pacer.pace() > START, "{}", pacer.pace());
        }
    }

    #[test]
    fn nobody_there_is_full_speed_within_two_seconds_and_somebody_is_gentle_at_once() {
        let (mut plant, mut pacer) = (Plant::new(1, 0.003, 1.0, 0.1), Pacer { present: false, ..Pacer::default() });
        plant.others = false;
        assert_eq!(plant.run(&mut pacer, 4).last(), Some(&1.0));
        plant.others = true;
        assert!(plant.run(&mut pacer, 1)[0] <= START);
        plant.others = false;
        assert!(plant.run(&mut pacer, QUIET_TICKS as usize + 4).last() == Some(&1.0));
    }

    #[test]
    fn pressure_lowers_the_pace_at_once() {
        let (mut plant, mut pacer) = (Plant::new(1, 0.003, 0.1, 0.0), Pacer::default());
        plant.run(&mut pacer, 200);
        let before = pacer.pace();
        let seen = Seen { others: true, pressed: true, ..Seen::default() };
        assert!(pacer.tick(seen, 1.0, BUDGET) < before);
        assert!(plant.run(&mut pacer, 100).iter().all(|p| *p < before), "and it stays below that for a while");
    }

    #[test]
    fn it_rises_fast_until_it_was_too_much_once() {
        let (mut plant, mut pacer) = (Plant::new(1, 0.003, 0.1, 0.0), Pacer::default());
        plant.run(&mut pacer, 70);
        assert_eq!(pacer.pace(), MOST_BESIDE_OTHERS);
        let pressed = Seen { others: true, pressed: true, ..Seen::default() };
        let fell = pacer.tick(pressed, 1.0, BUDGET);
        pacer.ceiling_ticks = 0;
        let next = plant.run(&mut pacer, 20).into_iter().find(|p| *p > fell);
        assert!(next.is_some_and(|p| p <= fell * RISE * 1.000_001), "{fell} -> {next:?}");
    }

    #[test]
    fn batches_get_shorter_with_the_square_root_of_the_pace() {
        let target = Duration::from_millis(100);
        assert_eq!(batch_target(1.0, target), target);
        assert_eq!(batch_target(0.25, target), target / 2);
        assert_eq!(batch_target(0.0, target), SHORTEST);
        assert_eq!(batch_target(0.25, Duration::from_millis(2)), Duration::from_millis(2));
    }
}
