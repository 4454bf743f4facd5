//! Clocks that stop while the observer does not run, and the patience of one path.

use super::Settings;
use crate::sabotage::Sabotage;
use serde::{Deserialize, Serialize};

/// What the observer knows of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnSample {
    /// Highest PSI "some" of CPU, memory and I/O, thousandths.
    pub pressure_permille: u32,
    /// Time stolen by a hypervisor, thousandths.
    pub steal_permille: u32,
}

/// Turns monotonic time into waking time: time in which the observer ran and was not starved.
#[derive(Clone, Debug)]
pub struct OwnClock {
    last_ms: Option<u64>,
    awake_ms: u64,
    settle_until_ms: u64,
    starved: bool,
    sabotage: Sabotage,
}

impl Default for OwnClock {
    fn default() -> Self {
        Self::new()
    }
}

impl OwnClock {
    /// At its start.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            last_ms: None,
            awake_ms: 0,
            settle_until_ms: 0,
            starved: false,
            sabotage: Sabotage::None,
        }
    }

    /// A deliberately broken variant; has an effect only with the crate's feature `sabotage`.
    #[must_use]
    pub const fn sabotaged(sabotage: Sabotage) -> Self {
        let mut clock = Self::new();
        clock.sabotage = sabotage;
        clock
    }

    /// To be called every `tick_ms`, *after* everything that has arrived was handed over. `now_ms` is CLOCK_BOOTTIME or any
    /// monotonic clock; a step back counts as none.
    pub fn tick(&mut self, now_ms: u64, own: OwnSample, s: &Settings) {
        let last = self.last_ms.unwrap_or(now_ms);
        self.last_ms = Some(now_ms.max(last));
        let step = now_ms.saturating_sub(last);
        let pressed = own.pressure_permille > s.pressure_permille || own.steal_permille > s.steal_permille;
        let slept = step > s.step_cap_ms;
        if slept || pressed {
            self.settle_until_ms = now_ms.saturating_add(s.settle_ms);
        }
        self.starved = now_ms < self.settle_until_ms;
        if self.sabotage.is(Sabotage::CountOwnStarvation) {
            self.starved = false;
        }
        if !self.starved {
            self.awake_ms = self.awake_ms.saturating_add(step);
        }
    }

    /// Waking time so far.
    #[must_use]
    pub const fn awake_ms(&self) -> u64 {
        self.awake_ms
    }

    /// The observer is starved, or was a moment ago: its views do not count.
    #[must_use]
    pub const fn starved(&self) -> bool {
        self.starved
    }
}

/// One path to one peer: when it was last heard, and how regular it is (mean and mean deviation, as TCP estimates round
/// trips: Jacobson 1988). All in the observer's waking time.
#[derive(Clone, Debug)]
pub struct PathClock {
    last_ms: u64,
    /// Mean interval times 8.
    mean8: u64,
    /// Mean deviation times 4.
    dev4: u64,
    heard: bool,
}

impl PathClock {
    /// A path that is expected to be heard from now on.
    #[must_use]
    pub fn new(awake_ms: u64, s: &Settings) -> Self {
        Self {
            last_ms: awake_ms,
            mean8: s.heartbeat_ms.saturating_mul(8),
            dev4: s.heartbeat_ms.saturating_mul(2),
            heard: false,
        }
    }

    /// A heartbeat arrived.
    pub fn heard(&mut self, awake_ms: u64) {
        if self.heard {
            let interval = awake_ms.saturating_sub(self.last_ms).min(60_000);
            let mean = self.mean8 / 8;
            let off = interval.abs_diff(mean);
            self.mean8 = self.mean8 - mean + interval;
            self.dev4 = self.dev4 - self.dev4 / 4 + off;
        }
        self.heard = true;
        self.last_ms = awake_ms;
    }

    /// How long it has been silent.
    #[must_use]
    pub fn silent_ms(&self, awake_ms: u64) -> u64 {
        awake_ms.saturating_sub(self.last_ms)
    }

    /// How long it may be silent before it is called lost.
    #[must_use]
    pub fn patience_ms(&self, s: &Settings) -> u64 {
        let spread = (self.dev4 / 4).saturating_mul(u64::from(s.deviations));
        let wanted = (self.mean8 / 8).saturating_add(spread);
        wanted.clamp(
            s.path_timeout_min_ms,
            s.path_timeout_max_ms.max(s.path_timeout_min_ms),
        )
    }

    /// It has been silent for longer than it may.
    #[must_use]
    pub fn lost(&self, awake_ms: u64, factor: u32, s: &Settings) -> bool {
        self.silent_ms(awake_ms) > self.patience_ms(s).saturating_mul(u64::from(factor.max(1)))
    }

    /// It was heard at least once.
    #[must_use]
    pub const fn ever_heard(&self) -> bool {
        self.heard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_asleep_or_starved_does_not_count() {
        let s = Settings::default();
        let mut c = OwnClock::new();
        let own = OwnSample::default();
        for t in 0..20 {
            c.tick(t * 100, own, &s);
        }
        assert_eq!(c.awake_ms(), 1900);
        c.tick(60_000, own, &s);
        assert!(c.starved() && c.awake_ms() == 1900);
        c.tick(60_900, own, &s);
        assert!(c.starved(), "a step of 900 ms is one more");
        for t in 0..20 {
            c.tick(60_900 + t * 100, own, &s);
        }
        assert_eq!(c.awake_ms(), 1900 + 1000);
        let pressed = OwnSample {
            pressure_permille: 900,
            ..own
        };
        c.tick(62_900, pressed, &s);
        assert!(c.starved());
        c.tick(1, own, &s);
        assert_eq!(c.awake_ms(), 2900);
    }

    #[test]
    fn patience_follows_the_jitter_within_its_bounds() {
        let s = Settings::default();
        let mut regular = PathClock::new(0, &s);
        let mut jittery = PathClock::new(0, &s);
        for i in 1..200u64 {
            regular.heard(i * 200);
            jittery.heard(i * 200 + if i % 2 == 0 { 0 } else { 180 });
        }
        assert_eq!(regular.patience_ms(&s), s.path_timeout_min_ms);
        assert!(jittery.patience_ms(&s) > 1_200, "{}", jittery.patience_ms(&s));
        for i in 0..50u64 {
            jittery.heard(100_000 + i * i * 10_000);
        }
        assert_eq!(jittery.patience_ms(&s), s.path_timeout_max_ms);
        assert!(!regular.lost(199 * 200 + 1_000, 1, &s) && regular.lost(199 * 200 + 1_001, 1, &s));
        assert!(!regular.lost(199 * 200 + 2_900, 3, &s));
    }
}
