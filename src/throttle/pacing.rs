//! How fast batches follow each other; pure.
//!
//! One number, the pace, is the share of time that a lane works; its eighth power is the share of its target duration that it
//! works without a rest, at least half a millisecond: up to 0.5 pieces of that length follow each other ever closer, beyond it they
//! grow. A batch of several pieces costs less than several batches. While nobody else works the pace is at full speed within a
//! second or two. While somebody does, it keeps what others feel within a budget.
//!
//! Small transactions at any moment are compared with those that come while batches keep still: what makes both slow is not ours.
//! What others feel is the slowest hundredth of what they do. A transaction counts as slow by how far it is beyond where that begins:
//! from nothing, far below, to one, far beyond. Each lowers the pace by as much of a step as it is slow, and raises it by what would be
//! slow on average if all that happens without batches took longer by the budget. So the pace comes to rest where as much is slow as
//! may be (a stochastic approximation: Robbins and Monro 1951). Steps are long at first, and shorter each time something was slow, so
//! that in the end chance moves it little; but when many are slow at once, it is down within a second.

use std::collections::VecDeque;
use std::time::Duration;

/// How often [`Pacer::tick`] is called.
pub const TICK: Duration = Duration::from_millis(500);
/// The lowest pace. It still makes progress: a twentieth of the time is work.
pub const FLOOR: f64 = 0.05;
/// The pace at first, and when somebody comes: of a fifth in short pieces little is felt, and it is left within seconds where nobody is there.
const START: f64 = 0.2;
/// The highest pace while others work: beyond it pieces grow, and what they do to others grows faster than the rate.
const MOST_BESIDE_OTHERS: f64 = 0.5;
/// The shortest piece of a batch. Who needs a core that a piece uses waits for the rest of it, or for the scheduler's next look, which
/// is some milliseconds as well (docs/throttle.md). Less is mostly what a piece costs whatever its size.
const SHORTEST: Duration = Duration::from_micros(500);
/// The pieces of a batch at most: it costs about as much as two of them whatever its size.
const MOST_PIECES: u32 = 4;
/// Ticks without others before nobody counts as there: 3 s, longer than an application with some requests per second is
/// silent.
const QUIET_TICKS: u32 = 6;
/// What others feel is their slowest hundredth, as their p99 does.
const TAIL: f64 = 0.01;
/// Transactions without batches before anything is judged: less know no tail.
const ENOUGH: usize = 30;
/// Transactions without batches that are kept, some three minutes.
const KEPT: usize = 600;
/// The share of them from which the slowest hundredth is extrapolated, of which they hold a handful at most.
const FEW: f64 = 0.1;
/// How far beyond where the slowest tenth begins it is at most. A few that took a hundred times as long say nothing about one in a
/// hundred, and would let anything pass.
const HEAVY: f64 = 3.0;
/// Those of them that say how it is now, some eight seconds: their median is steady, and soon follows a change of load.
const RECENT: usize = 24;
/// A median that differs from that of all by no more than this says nothing: it is a few of them.
const STEADY: std::ops::Range<f64> = 0.8..1.25;
/// The part of the budget that our small transactions may use. An application's are longer, and wait for each other where many come:
/// with all of it, pgbench's p99 was 1.07 times as long beside batches at 200 transactions per second, 1.4 times at 1000
/// (docs/throttle.md has what came of this).
const OURS: f64 = 0.9;
/// How sharp the line is between slow and not, as the power of the distance from it: at half of it a 257th, at twice of it all but that.
/// With a sharp line it would be one transaction in a hundred that says something, and the pace a matter of chance.
const SHARP: i32 = 8;
/// The step down for one that was as slow as can be, as a logarithm. First, and in the end: a third, and an eighth.
const FIRST_STEP: f64 = 0.4;
const STEP: f64 = 0.14;
/// What becomes of it each time.
const STEP_SHRINKS: f64 = 0.8;
/// The factor of a tick while nobody else works: from the start to full speed within two.
const ALONE_RISE: f64 = 4.0;
/// A fall for another reason than that.
const FALL: f64 = 0.75;
/// How close to a pace at which a batch was in somebody's way it may come, and for how many ticks: a minute.
const BELOW_CEILING: f64 = 0.85;
const CEILING_TICKS: u32 = 120;
/// The server itself is slow when transactions without batches take so many times what they took at their best.
const SATURATED: f64 = 3.0;
/// The factor of a tick while it is: at the floor within half a minute.
const SATURATED_FALL: f64 = 0.95;
/// Ticks after which the best is taken a little less seriously: 1% every ten seconds.
const BEST_FADES: f64 = 1.000_5;

/// What was seen since the last tick.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Somebody else works on this server, or it cannot be told.
    pub others: bool,
    /// What small transactions took, in seconds, at any moment while batches run.
    pub with: Vec<f64>,
    /// And while batches kept still.
    pub without: Vec<f64>,
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
    without: VecDeque<f64>,
    /// Median of transactions without batches, at its best.
    best: f64,
    step: f64,
    ceiling: f64,
    ceiling_ticks: u32,
}

impl Default for Pacer {
    fn default() -> Self {
        Self {
            pace: START,
            calm: START,
            // The first look tells; until then the pace is as if somebody were there.
            present: false,
            quiet: 0,
            without: VecDeque::new(),
            best: f64::INFINITY,
            step: FIRST_STEP,
            ceiling: 1.0,
            ceiling_ticks: 0,
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

    /// Whether it is known how others fare without batches.
    pub fn knows_enough(&self) -> bool {
        self.without.len() >= ENOUGH
    }

    /// Learns, and gives the next pace: at most `most`, with a `budget` above 1.
    pub fn tick(&mut self, seen: Seen, most: f64, budget: f64) -> f64 {
        let came = self.look_for_others(seen.others);
        if came {
            // What was measured without them says nothing about how it is with them.
            self.without.clear();
            self.step = FIRST_STEP;
        }
        self.without.extend(seen.without);
        self.without.drain(..self.without.len().saturating_sub(KEPT));
        self.ceiling_ticks = self.ceiling_ticks.saturating_sub(1);
        let now = self.pace;
        let next = if seen.stopped {
            // When it goes on, everybody else does too.
            now.min(self.calm).min(START)
        } else if seen.pressed {
            self.ceiling = now;
            self.ceiling_ticks = CEILING_TICKS;
            now * FALL
        } else if !self.present {
            now * ALONE_RISE
        } else if came {
            now.min(self.calm)
        } else {
            self.judge(now, &seen.with, budget)
        };
        let most = if self.present { most.min(MOST_BESIDE_OTHERS) } else { most };
        self.pace = next.min(most).max(FLOOR.min(most));
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

    fn judge(&mut self, now: f64, with: &[f64], budget: f64) -> f64 {
        if !self.knows_enough() {
            return now;
        }
        let without = sorted(&self.without);
        let recent = quantile(&sorted(self.without.iter().rev().take(RECENT)), 0.5);
        self.best = (self.best * BEST_FADES).min(recent);
        if recent > self.best * SATURATED {
            // Not by us alone, but less of us is less of it.
            return now * SATURATED_FALL;
        }
        let longer = 1.0 + (budget - 1.0) * OURS;
        // Where the slowest hundredth of what took so much longer begins. Should that be a little off, it is so for both.
        let line = tail(&without) * longer;
        let may_be = without.iter().map(|took| slow(took * longer, line)).sum::<f64>() / without.len() as f64;
        // As it is now, not as it was in the last minutes.
        let change = recent / quantile(&without, 0.5).max(f64::MIN_POSITIVE);
        let line = if STEADY.contains(&change) { line } else { line * change };
        let slow: Vec<f64> = with.iter().map(|took| slow(*took, line)).collect();
        let many = slow.iter().filter(|slow| **slow > 0.5).count();
        // Two within a tick are hardly by chance.
        let step = if many > 1 { FIRST_STEP } else { self.step };
        self.step = (self.step * STEP_SHRINKS.powi(many as i32)).max(STEP);
        let next = now * (step * slow.iter().map(|slow| may_be - slow).sum::<f64>()).exp();
        let most = if self.ceiling_ticks > 0 { self.ceiling * BELOW_CEILING } else { 1.0 };
        // It may be above that already, but goes no further.
        if next > now { next.min(most.max(now)) } else { next }
    }
}

/// How slow something is that took so long, 0 to 1, and a half at the line.
fn slow(took: f64, line: f64) -> f64 {
    1.0 / (1.0 + (line / took.max(f64::MIN_POSITIVE)).powi(SHARP))
}

/// How long a batch may work without a rest at this pace, of a target for full speed. Its eighth power: short ones do others the least
/// harm, long ones do the most in the time.
fn piece_target(pace: f64, target: Duration) -> Duration {
    target.mul_f64(pace.clamp(0.0, 1.0).powi(8)).max(SHORTEST.min(target))
}

/// How long a batch may work at this pace, without its rests: where it can be made of pieces, as long as several of them.
pub fn batch_target(pace: f64, target: Duration, in_pieces: bool) -> Duration {
    let least = SHORTEST * if in_pieces { MOST_PIECES } else { 2 };
    piece_target(pace, target).max(least.min(target))
}

/// In how many pieces it does.
pub fn pieces(pace: f64, target: Duration) -> u32 {
    let (batch, piece) = (batch_target(pace, target, true), piece_target(pace, target));
    (batch.as_secs_f64() / piece.as_secs_f64().max(f64::MIN_POSITIVE)).round().clamp(1.0, f64::from(MOST_PIECES)) as u32
}

fn sorted<'a>(values: impl IntoIterator<Item = &'a f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.into_iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Where the slowest hundredth begins: extrapolated from the slowest tenth as if that fell off by a power, whose exponent is the
/// mean of its logarithms (Hill 1975, Weissman 1978). In 2,500 commits of a benchmark's server, cut into pieces of 200, this
/// differed from piece to piece by 16%, the value at that place by 34%.
fn tail(sorted: &[f64]) -> f64 {
    let from = quantile(sorted, 1.0 - FEW).max(f64::MIN_POSITIVE);
    let slowest: Vec<f64> = sorted.iter().filter(|v| **v > from).map(|v| (v / from).ln()).collect();
    let mean = slowest.iter().sum::<f64>() / slowest.len().max(1) as f64;
    from * (FEW / TAIL).powf(mean).min(HEAVY)
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

        /// A request at any moment.
        fn felt_at(&mut self, pace: f64) -> f64 {
            if self.random.random_bool(pace) { self.beside(pace) } else { self.between() }
        }

        /// What the application's slowest hundredth takes at this pace.
        fn p99(&mut self, pace: f64) -> f64 {
            let mut felt: Vec<f64> = (0..4000).map(|_| self.felt_at(pace)).collect();
            felt.sort_by(f64::total_cmp);
            felt[3960]
        }

        /// As [`Self::p99`], as a multiple of what it is without batches.
        fn felt(&mut self, pace: f64) -> f64 {
            self.p99(pace) / self.p99(0.0)
        }

        /// The highest of these paces at which the application feels no more than this.
        fn highest(&mut self, budget: f64) -> f64 {
            [MOST_BESIDE_OTHERS, 0.4, 0.3, 0.2, 0.14, 0.1, 0.07]
                .into_iter()
                .find(|p| self.felt(*p) <= budget)
                .unwrap_or(0.05)
        }

        /// Half a second: five looks, about one of three without batches.
        fn run(&mut self, pacer: &mut Pacer, ticks: usize) -> Vec<f64> {
            let tick = |plant: &mut Self, pacer: &mut Pacer| {
                let pace = pacer.pace();
                let without = if plant.random.random_bool(0.67) { 2 } else { 1 };
                let with = (without..5).map(|_| plant.felt_at(pace)).collect();
                let without = (0..without).map(|_| plant.between()).collect();
                let seen = Seen { others: plant.others, with, without, ..Seen::default() };
                pacer.tick(seen, 1.0, BUDGET)
            };
            (0..ticks).map(|_| tick(self, pacer)).collect()
        }
    }

    /// Seconds that a piece takes.
    fn batch(pace: f64) -> f64 {
        piece_target(pace, Duration::from_millis(100)).as_secs_f64()
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
            let (mean, most) = (mean(&settled), plant.highest(BUDGET));
            // The line is soft, so it is not exactly the slowest hundredth that is a quarter longer.
            let felt = plant.felt(mean);
            prop_assert!(mean <= FLOOR * 1.25 || felt <= 1.0 + (BUDGET - 1.0) * 1.5, "{felt} times at {mean}");
            prop_assert!(mean >= most * 0.3, "{mean} of {most}");
            let far = settled.iter().filter(|p| **p < mean / 1.8 || **p > mean * 1.8).count();
            prop_assert!(far <= settled.len() / 10, "{far} of {} are far from {mean}", settled.len());
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
                let seen = Seen { others, with: vec![beside; 8], without: vec![between; 8], pressed, stopped };
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
            prop_assert!(before > 0.3 && during <= 0.12, "{before} -> {during}");
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
    fn the_tail_is_where_the_slowest_hundredth_begins() {
        // A hundredth of these is beyond the root of 10, by the definition of Pareto's distribution with a minimum of 1, exponent 4.
        let mut pareto: Vec<f64> = (0..600).map(|i| (1.0 - (f64::from(i) + 0.5) / 600.0).powf(-0.25)).collect();
        assert!((tail(&pareto) / 10f64.sqrt() - 1.0).abs() < 0.05, "{}", tail(&pareto));
        pareto.extend([1e6; 20]);
        assert!(tail(&pareto) < 3.0 * 2.1, "a few that stand alone change little: {}", tail(&pareto));
        assert_eq!(tail(&[0.5; 50]), 0.5);
        assert_eq!(tail(&[0.0; 50]), f64::MIN_POSITIVE);
    }

    #[test]
    fn pieces_are_short_until_the_pace_is_high_and_then_there_is_one() {
        let target = Duration::from_millis(100);
        let of = |pace, target| (batch_target(pace, target, true), pieces(pace, target));
        assert_eq!(of(1.0, target), (target, 1));
        assert_eq!(of(0.75, target), (target.mul_f64(0.75f64.powi(8)), 1));
        assert_eq!(of(0.56, target), (SHORTEST * 4, 2));
        assert_eq!(of(0.3, target), (SHORTEST * 4, 4));
        assert_eq!(of(0.0, target), (SHORTEST * 4, 4));
        assert_eq!(of(0.25, SHORTEST / 2), (SHORTEST / 2, 1));
        assert_eq!(batch_target(0.3, target, false), SHORTEST * 2);
    }
}
