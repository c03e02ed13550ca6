//! How fast batches follow each other; pure.
//!
//! One number, the pace, is the share of time that a lane works; its fifth power is the share of its target duration that a
//! batch takes, at least a millisecond: up to 0.4 batches of that length follow each other ever closer, beyond it they grow.
//! While nobody else works it is at full speed within a second or two. While somebody does, it keeps what others feel within
//! a budget. Small writes that commit beside a batch are compared with those that commit between two: what makes both slow is
//! not ours. What others feel is the slowest hundredth of what
//! they do: one slow moment in a hundred is the most that batches may add up to, however slow it is beside a batch and
//! however often there is one. So the rarer batches are, the more often one of them may be felt.
//!
//! Beyond the budget the pace falls, well within it rises, and in between it stays. After a fall it keeps below the pace
//! that was too much for a while, so that it does not go up and down like a saw.

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
/// The shortest batch. Who needs a core that a batch uses waits for the rest of it, or for the scheduler's next look, which is
/// some milliseconds as well: beside batches of 10 ms the application's slowest hundredth took 4.4 ms, at 0.1 of the time and
/// 6,200 rows per second; beside batches of 1 ms 2.8 ms, at 0.4 of the time and 11,500 rows per second; alone 2.0 ms
/// (docs/throttle.md). Below a millisecond most of it is what a batch costs whatever its size.
const SHORTEST: Duration = Duration::from_millis(1);
/// Ticks without others before nobody counts as there: 3 s, longer than an application with some requests per second is
/// silent.
const QUIET_TICKS: u32 = 6;
/// What others feel is their slowest hundredth, as their p99 does.
const TAIL: f64 = 0.01;
/// So many slow commits must have been possible within the budget before none of them means something.
const EVIDENCE: f64 = 3.0;
/// Commits between batches before anything is judged: less know no tail.
const ENOUGH: usize = 50;
/// Commits between batches that are kept, about a minute: a hundredth of them is a handful.
const KEPT: usize = 400;
/// Those of them that say how it is now, some five seconds: their median is steady, and soon follows a change of load.
const RECENT: usize = 24;
/// What a commit may take longer whatever the budget, in seconds: jitter of the network and of the scheduler.
const SLACK: f64 = 0.00025;
/// A rise, as a factor per judgement.
const RISE: f64 = 1.15;
/// The same until it was too much for the first time: from the start to the most in four judgements.
const FIRST_RISE: f64 = 1.7;
/// The same while nobody else works: from the start to full speed within two ticks.
const ALONE_RISE: f64 = 4.0;
/// A fall.
const FALL: f64 = 0.75;
/// The same where it is far beyond, which is [`FAR`] times too often.
const STEEP_FALL: f64 = 0.5;
const FAR: f64 = 4.0;
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
    /// Share of the time in which a batch ran, of any lane.
    pub busy: f64,
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
    /// Since the last judgement.
    beside: Vec<f64>,
    /// The share of time in which a batch ran, in each tick since then.
    busy: Vec<f64>,
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
            beside: Vec::new(),
            busy: Vec::new(),
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
        let came = self.look_for_others(seen.others);
        if came {
            // What was measured without them says nothing about how it is with them.
            self.between.clear();
            self.forget();
        }
        self.beside.extend(seen.beside);
        self.busy.push(seen.busy);
        self.between.extend(seen.between);
        self.between.drain(..self.between.len().saturating_sub(KEPT));
        self.ceiling_ticks = self.ceiling_ticks.saturating_sub(1);
        if self.ceiling_ticks == 0 {
            self.ceiling = 1.0;
        }
        let now = self.pace;
        let next = if seen.stopped {
            // When it goes on, everybody else does too.
            now.min(self.calm).min(START)
        } else if seen.pressed {
            self.too_much(now, FALL)
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
            self.forget();
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
        if self.between.len() < ENOUGH {
            return now;
        }
        let between = sorted(&self.between);
        let recent = quantile(&sorted(self.between.iter().rev().take(RECENT)), 0.5);
        self.best = (self.best * BEST_FADES).min(recent);
        // Where the slowest hundredth begins, as it is now.
        let tail = quantile(&between, 1.0 - TAIL) * recent / quantile(&between, 0.5);
        let limit = tail * budget + SLACK;
        let over = |v: &f64| *v > limit;
        // So often it is slow without us; the rest of the hundredth is for us.
        let without_us = between.iter().filter(|v| over(v)).count() as f64 / between.len() as f64;
        let busy = (self.busy.iter().sum::<f64>() / self.busy.len().max(1) as f64).clamp(TAIL, 1.0);
        let share = ((TAIL - (1.0 - busy) * without_us) / busy).clamp(TAIL / 2.0, 1.0);
        let allowed = self.beside.len() as f64 * share;
        let found = self.beside.iter().filter(|v| over(v)).count() as f64;
        if found > allowed.max(EVIDENCE) {
            return self.too_much(now, if found > allowed * FAR { STEEP_FALL } else { FALL });
        }
        if allowed < EVIDENCE {
            return now;
        }
        self.forget();
        if recent > self.best * SATURATED + SLACK {
            // Not by us alone, but less of us is less of it.
            self.warned = true;
            return now * FALL;
        }
        let rise = if self.warned { RISE } else { FIRST_RISE };
        if found <= allowed / 2.0 { (now * rise).min((self.ceiling * BELOW_CEILING).max(FLOOR)) } else { now }
    }

    fn too_much(&mut self, now: f64, fall: f64) -> f64 {
        self.warned = true;
        self.ceiling = now;
        self.ceiling_ticks = CEILING_TICKS;
        now * fall
    }

    /// Begins to look anew at what batches cost.
    fn forget(&mut self) {
        self.beside.clear();
        self.busy.clear();
    }
}

/// How long a batch may take at this pace, of a target for full speed. Its fifth power: short ones do others the least harm,
/// long ones do the most in the time.
pub fn batch_target(pace: f64, target: Duration) -> Duration {
    target.mul_f64(pace.clamp(0.0, 1.0).powi(5)).max(SHORTEST.min(target))
}

fn sorted<'a>(values: impl IntoIterator<Item = &'a f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.into_iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    const BUDGET: f64 = 1.25;

    /// A server and its application. Nothing of the controller's is in it: what the application feels is drawn request by
    /// request.
    struct Plant {
        /// Median time of a commit in seconds, and how much they differ.
        base: f64,
        spread: f64,
        /// One commit in so many takes ten times as long, whoever does what.
        hiccup: f64,
        /// Beside a batch a commit takes `1 + harm` times as long, and some part of the rest of the batch, up to this.
        harm: f64,
        queue: f64,
        others: bool,
        random: StdRng,
    }

    impl Plant {
        fn new(seed: u64, base: f64, harm: f64, queue: f64) -> Self {
            let random = StdRng::seed_from_u64(seed);
            Self { base, spread: 0.4, hiccup: 0.002, harm, queue, others: true, random }
        }

        fn between(&mut self) -> f64 {
            // Near enough to a normal distribution.
            let normal = ((0..4).map(|_| self.random.random_range(0.0..1.0)).sum::<f64>() - 2.0) * 3.0f64.sqrt();
            let slow = if self.random.random_bool(self.hiccup) { 10.0 } else { 1.0 };
            self.base * (normal * self.spread).exp() * slow
        }

        fn beside(&mut self, pace: f64) -> f64 {
            let waits = self.queue * batch(pace) * self.random.random_range(0.0..1.0);
            self.between() * (1.0 + self.harm) + waits
        }

        /// What the application's slowest hundredth takes at this pace.
        fn p99(&mut self, pace: f64) -> f64 {
            let mut felt: Vec<f64> = (0..4000)
                .map(|_| if self.random.random_bool(pace) { self.beside(pace) } else { self.between() })
                .collect();
            felt.sort_by(f64::total_cmp);
            felt[3960]
        }

        /// As [`Self::p99`], as a multiple of what it is without batches and of what nobody feels.
        fn felt(&mut self, pace: f64) -> f64 {
            self.p99(pace) / (self.p99(0.0) + SLACK / BUDGET)
        }

        /// The highest of these paces at which the application feels no more than this.
        fn highest(&mut self, budget: f64) -> f64 {
            [0.8, 0.6, 0.45, 0.3, 0.2, 0.14, 0.1, 0.07].into_iter().find(|p| self.felt(*p) <= budget).unwrap_or(0.05)
        }

        /// Half a second: at most three looks of each kind, and not more than three in one batch.
        fn run(&mut self, pacer: &mut Pacer, ticks: usize) -> Vec<f64> {
            let tick = |plant: &mut Self, pacer: &mut Pacer| {
                let pace = pacer.pace();
                let batches = 0.5 * pace / batch(pace);
                let looks = if plant.random.random_bool(batches.min(1.0)) { 3 } else { 1 };
                let beside = (0..looks).map(|_| plant.beside(pace)).collect();
                let between = (0..3).map(|_| plant.between()).collect();
                let busy = (pace * plant.random.random_range(0.7..1.3)).min(1.0);
                let seen = Seen { others: plant.others, beside, between, busy, ..Seen::default() };
                pacer.tick(seen, 1.0, BUDGET)
            };
            (0..ticks).map(|_| tick(self, pacer)).collect()
        }
    }

    /// Seconds that a batch takes.
    fn batch(pace: f64) -> f64 {
        batch_target(pace, Duration::from_millis(100)).as_secs_f64()
    }

    fn mean(paces: &[f64]) -> f64 {
        paces.iter().sum::<f64>() / paces.len() as f64
    }

    proptest! {
        // What is asserted about random requests holds nearly always, so the same ones are drawn each time.
        #![proptest_config(ProptestConfig {
            cases: 8, rng_seed: RngSeed::Fixed(8), failure_persistence: None, ..ProptestConfig::default()
        })]

        #[test]
        fn it_converges_on_what_the_application_does_not_feel_and_does_not_oscillate(
            seed: u64, base in 0.001f64..0.03, harm in 0.0f64..3.0, queue in 0.0f64..1.0,
        ) {
            let (mut plant, mut pacer) = (Plant::new(seed, base, harm, queue), Pacer::default());
            plant.run(&mut pacer, 1200);
            let settled = plant.run(&mut pacer, 1200);
            let (mean, ideal, most) = (mean(&settled), plant.highest(BUDGET), plant.highest(BUDGET * 1.25));
            let beyond = settled.iter().filter(|p| **p > most * 1.25).count();
            prop_assert!(beyond <= settled.len() / 5, "{beyond} of {} beyond {most}, {mean}", settled.len());
            prop_assert!(mean >= ideal * 0.3, "{mean} of {ideal}");
            let turns = settled.windows(2).filter(|w| w[1] < w[0]).count();
            prop_assert!(turns <= 40, "{turns} falls in ten minutes");
        }

        /// What is slow for other reasons is slow between batches too.
        #[test]
        fn an_application_that_suffers_from_something_else_does_not_hold_it_up(seed: u64, base in 0.002f64..0.02) {
            let (mut plant, mut pacer) = (Plant::new(seed, base, 0.0, 0.0), Pacer::default());
            let mut paces = Vec::new();
            for minute in 0..20 {
                plant.base = base * [1.0, 1.6, 2.2, 1.4][minute % 4];
                paces.extend(plant.run(&mut pacer, 120));
            }
            prop_assert!(mean(&paces) >= 0.3, "{}", mean(&paces));
        }

        #[test]
        fn it_never_starves_and_never_leaves_its_bounds(
            steps in prop::collection::vec((any::<bool>(), 0.0f64..10.0, 0.0f64..10.0, any::<bool>(), any::<bool>()), 1..200),
            most in 0.01f64..1.0,
        ) {
            let mut pacer = Pacer::default();
            for (others, beside, between, pressed, stopped) in steps {
                let busy = beside / 10.0;
                let seen =
                    Seen { others, beside: vec![beside; 8], between: vec![between; 8], busy, pressed, stopped };
                let pace = pacer.tick(seen, most, BUDGET);
                prop_assert!(pace >= FLOOR.min(most) && pace <= most, "{pace}");
            }
        }

        #[test]
        fn it_yields_within_seconds_when_others_suffer_and_recovers(seed: u64, base in 0.002f64..0.02) {
            let (mut plant, mut pacer) = (Plant::new(seed, base, 0.05, 0.0), Pacer::default());
            plant.run(&mut pacer, 600);
            let before = pacer.pace();
            // From now on whoever comes beside a batch waits for several of their own commits.
            plant.harm = 9.0;
            plant.run(&mut pacer, 30);
            let during = pacer.pace();
            prop_assert!(before > 0.3 && during <= 0.1, "{before} -> {during}");
            plant.harm = 0.05;
            plant.run(&mut pacer, 1200);
            prop_assert!(pacer.pace() > 0.3, "{before} -> {during} -> {}", pacer.pace());
        }

        #[test]
        fn a_saturated_server_gets_the_floor(seed: u64) {
            let (mut plant, mut pacer) = (Plant::new(seed, 0.003, 0.05, 0.0), Pacer::default());
            plant.run(&mut pacer, 300);
            plant.base *= 10.0;
            plant.run(&mut pacer, 360);
            prop_assert!(pacer.pace() <= FLOOR * 2.0, "{}", pacer.pace());
            plant.base /= 10.0;
            plant.run(&mut pacer, 600);
            prop_assert!(pacer.pace() > START, "{}", pacer.pace());
        }
    }

    #[test]
    fn nobody_there_is_full_speed_within_two_seconds_and_somebody_is_gentle_at_once() {
        let (mut plant, mut pacer) = (Plant::new(1, 0.003, 1.0, 0.1), Pacer::default());
        plant.others = false;
        assert_eq!(plant.run(&mut pacer, 4).last(), Some(&1.0));
        plant.others = true;
        assert!(plant.run(&mut pacer, 1)[0] <= START);
        plant.others = false;
        assert!(plant.run(&mut pacer, QUIET_TICKS as usize + 4).last() == Some(&1.0));
    }

    #[test]
    fn pressure_lowers_the_pace_at_once() {
        let (mut plant, mut pacer) = (Plant::new(1, 0.003, 0.0, 0.0), Pacer::default());
        plant.run(&mut pacer, 200);
        let before = pacer.pace();
        let seen = Seen { others: true, pressed: true, ..Seen::default() };
        assert!(pacer.tick(seen, 1.0, BUDGET) < before);
        assert!(plant.run(&mut pacer, 100).iter().all(|p| *p < before), "and it stays below that for a while");
    }

    #[test]
    fn it_rises_fast_until_it_was_too_much_once() {
        let (mut plant, mut pacer) = (Plant::new(1, 0.003, 0.0, 0.0), Pacer::default());
        plant.run(&mut pacer, 240);
        assert_eq!(pacer.pace(), MOST_BESIDE_OTHERS);
        let pressed = Seen { others: true, pressed: true, ..Seen::default() };
        let fell = pacer.tick(pressed, 1.0, BUDGET);
        pacer.ceiling_ticks = 0;
        let next = plant.run(&mut pacer, 200).into_iter().find(|p| *p > fell);
        assert!(next.is_some_and(|p| p <= fell * RISE * 1.000_001), "{fell} -> {next:?}");
    }

    #[test]
    fn batches_are_short_until_the_pace_is_high() {
        let target = Duration::from_millis(100);
        assert_eq!(batch_target(1.0, target), target);
        assert_eq!(batch_target(0.5, target), target / 32);
        assert_eq!(batch_target(0.3, target), SHORTEST);
        assert_eq!(batch_target(0.0, target), SHORTEST);
        assert_eq!(batch_target(0.25, SHORTEST / 2), SHORTEST / 2);
    }
}
