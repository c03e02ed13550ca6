//! Batches in flight: what others can feel of them, and when they keep still.
//!
//! A short batch works in pieces with rests in between, in which its transaction stays open. Only a piece is in flight.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::pacing;
use super::pulse::Pulse;
use super::rest;
use crate::context::Context;
use crate::job::throttle::Pace;

/// For how long a transaction may rest between its pieces, begin to end: what it has locked stays locked meanwhile. Together with
/// [`LONGEST_STILL`] less than the time after which somebody looks who waits for such locks.
const LONGEST_OPEN: Duration = Duration::from_millis(20);
/// How long a batch that rests between its pieces keeps still at most while it is measured how others fare without it. To end it at once
/// instead was tried: then it is transactions right behind a commit that others are compared with, and medians of five runs were 5,500 to
/// 7,600 rows/s, where they are 9,100 to 10,500 with this.
const LONGEST_STILL: Duration = Duration::from_millis(20);

/// Pieces of batches in flight, of all lanes.
pub(super) struct Flights {
    pub(super) now: usize,
    /// So many have taken off.
    pub(super) begun: u64,
    busy: Duration,
    asked: Instant,
    changed: Instant,
    /// Since when there is one, without a moment in between.
    since: Option<Instant>,
    /// None may begin.
    still: bool,
}

impl Flights {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { now: 0, begun: 0, busy: Duration::ZERO, asked: now, changed: now, since: None, still: false }
    }

    fn change(&mut self, now: usize) {
        if self.now > 0 {
            self.busy += self.changed.elapsed();
        }
        (self.now, self.changed) = (now, Instant::now());
        self.since = if now > 0 { self.since.or(Some(self.changed)) } else { None };
    }

    /// For how long there has been one at every moment.
    pub(super) fn flying_for(&self) -> Duration {
        self.since.map(|since| since.elapsed()).unwrap_or_default()
    }

    /// Share of the time in which there was one, since this was last asked.
    pub(super) fn share(&mut self) -> f64 {
        self.change(self.now);
        let share = self.busy.as_secs_f64() / self.asked.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        (self.busy, self.asked) = (Duration::ZERO, Instant::now());
        share.min(1.0)
    }
}

/// No piece begins until this is dropped, but that of a batch under way after [`LONGEST_STILL`]. Who holds it does not do so for long.
pub(super) struct Still<'a>(&'a watch::Sender<Flights>);

impl<'a> Still<'a> {
    pub(super) fn keep(flights: &'a watch::Sender<Flights>) -> Self {
        flights.send_modify(|f| f.still = true);
        Self(flights)
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|f| f.still = false);
    }
}

/// A batch; it has landed when this is dropped.
pub struct Flight<'a> {
    pulse: &'a Pulse,
    began: Instant,
    /// When the piece in flight began.
    piece: Instant,
    /// Round trips since then.
    trips: u32,
    /// Before that.
    worked: Duration,
    flying: bool,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.land();
    }
}

impl<'a> Flight<'a> {
    pub(super) async fn begin(pulse: &'a Pulse) -> Self {
        let now = Instant::now();
        let mut flight = Self { pulse, began: now, piece: now, trips: 0, worked: Duration::ZERO, flying: false };
        // To look and to begin is one step, or somebody could come between who asks batches to keep still.
        while !flight.take_off(|f| !f.still) {
            let _ = pulse.flights().subscribe().wait_for(|f| !f.still).await;
        }
        flight.began = flight.piece;
        flight
    }

    /// A round trip is over. Nobody works while messages travel.
    pub fn trip(&mut self) {
        self.trips += 1;
    }

    /// For how long it has been under way.
    pub fn took(&self) -> Duration {
        self.began.elapsed()
    }

    /// How long it has worked, without its rests.
    pub fn worked(&self) -> Duration {
        self.worked + self.worked_last()
    }

    /// How long it has worked since its last rest.
    pub fn worked_last(&self) -> Duration {
        self.piece.elapsed().saturating_sub(self.pulse.travel() * self.trips)
    }

    /// How many pieces it had best be made of.
    pub fn pieces(&self, ctx: &Context) -> u32 {
        let live = ctx.live.now();
        match live.throttle.pace {
            Pace::Auto => pacing::pieces(*self.pulse.pace().borrow(), live.batching.target_duration),
            Pace::Constant => 1,
        }
    }

    /// Rests before the next piece, as after a batch that took as long as the last one. Gives whether there should be one: not
    /// when the transaction would be open for too long, or somebody wants this process to end.
    pub async fn rest(&mut self, ctx: &Context) -> bool {
        let rest = rest(&ctx.live.now(), *self.pulse.pace().borrow(), self.worked_last());
        if self.began.elapsed() + rest > LONGEST_OPEN.min(ctx.live.now().batching.target_duration) {
            return false;
        }
        self.worked = self.worked();
        self.land();
        let stopping = tokio::select! {
            () = tokio::time::sleep(rest) => false,
            () = ctx.stopping() => true,
        };
        if !self.take_off(|f| !f.still) {
            let mut flights = self.pulse.flights().subscribe();
            let _ = tokio::time::timeout(LONGEST_STILL, flights.wait_for(|f| !f.still)).await;
            self.take_off(|_| true);
        }
        !stopping
    }

    /// Gives whether it did.
    fn take_off(&mut self, may: impl FnOnce(&Flights) -> bool) -> bool {
        let may = self.pulse.flights().send_if_modified(|f| {
            let may = may(f);
            if may {
                f.change(f.now + 1);
                f.begun += 1;
            }
            may
        });
        if may {
            self.piece = Instant::now();
            self.trips = 0;
            self.flying = true;
        }
        may
    }

    fn land(&mut self) {
        if std::mem::take(&mut self.flying) {
            self.pulse.flights().send_modify(|f| f.change(f.now.saturating_sub(1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;
    use crate::job::throttle::Throttle;

    #[tokio::test]
    async fn no_batch_begins_while_they_are_to_keep_still() {
        let pulse = Pulse::new(&Throttle::default());
        drop(Flight::begin(&pulse).await);
        let still = Still::keep(pulse.flights());
        let mut waits = pin!(Flight::begin(&pulse));
        tokio::select! {
            biased;
            _ = &mut waits => panic!("it does not keep still"),
            () = std::future::ready(()) => {}
        }
        let count = || (pulse.flights().borrow().now, pulse.flights().borrow().begun);
        assert_eq!(count(), (0, 1));
        drop(still);
        let mut flight = waits.await;
        assert_eq!(count(), (1, 2));
        flight.land();
        assert_eq!(count(), (0, 2), "it rests, and has locks");
        assert!(flight.take_off(|_| true));
        assert_eq!(count(), (1, 3));
        drop(flight);
        assert_eq!(count(), (0, 3));
    }

    #[tokio::test]
    async fn what_messages_take_on_their_way_is_not_work() {
        let pulse = Pulse::new(&Throttle::default());
        let mut flight = Flight::begin(&pulse).await;
        flight.piece = Instant::now().checked_sub(Duration::from_secs(60)).expect("some time ago");
        assert!(flight.worked() >= Duration::from_secs(60));
        pulse.travelled(Duration::from_secs(20));
        flight.trip();
        flight.trip();
        assert!((20..30).contains(&flight.worked().as_secs()), "{:?}", flight.worked());
        flight.trip();
        flight.trip();
        assert_eq!(flight.worked(), Duration::ZERO);
    }

    #[test]
    fn a_transaction_ends_before_somebody_looks_who_waits_for_its_locks() {
        assert!(LONGEST_OPEN + LONGEST_STILL < crate::throttle::blocking::EVERY);
    }
}
