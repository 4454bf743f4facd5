//! When a guest that panicked or hangs is reset by its host: in place, with back-off. A pure state machine.
//!
//! ```text
//! panic ----------- grace (the guest may start itself anew) ----+
//! watchdog fired ----------------------------------------------+--> due, once the pause after the last such reset is over
//! ```
//! Each reset within [`SETTLED`] of the one before doubles the pause, so that a guest that cannot come up does not keep its host busy;
//! one that was well for longer begins anew. A failover would not help: the guest's memory, with what is wrong in it, goes along.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// So long a guest that panicked may take to start itself anew.
const GRACE: Duration = Duration::from_secs(10);
/// As long as a crash kernel writes the memory down.
const GRACE_CRASH_KERNEL: Duration = Duration::from_secs(600);
/// The pause after the first reset, and the longest.
const PAUSE: Duration = Duration::from_secs(10);
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// A guest that was well for so long after a reset has come up.
const SETTLED: Duration = Duration::from_secs(600);

/// What happened to the guest so far, in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mishaps {
    /// Its kernel said that it panicked.
    pub panics: u64,
    /// It was reset because it had not started itself anew after that.
    pub panic_resets: u64,
    /// It was reset because it did not feed its watchdog.
    pub watchdog_resets: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Panicked,
    Hangs,
}

/// See the module.
#[derive(Debug, Default)]
pub struct GuestCare {
    /// A guest that panicked is reset too, not only counted.
    panics_too: bool,
    wrong: Option<(Wrong, Instant)>,
    last: Option<(Instant, Duration)>,
    done: Mishaps,
}

impl GuestCare {
    /// `panics_too`: a guest that panicked is reset as well. Its watchdog resets it in any case.
    #[must_use]
    pub fn new(panics_too: bool) -> Self {
        Self {
            panics_too,
            ..Self::default()
        }
    }

    /// The guest's kernel said `times` times that it panicked; `crash_kernel`: another one has taken over from it.
    pub fn panicked(&mut self, now: Instant, times: u64, crash_kernel: bool) {
        self.done.panics += times;
        if self.panics_too && times > 0 {
            let grace = if crash_kernel { GRACE_CRASH_KERNEL } else { GRACE };
            let at = now + grace;
            match &mut self.wrong {
                None => self.wrong = Some((Wrong::Panicked, at)),
                // Its crash kernel is at work after all.
                Some((Wrong::Panicked, due)) if crash_kernel => *due = at.max(*due),
                Some(_) => {}
            }
        }
    }

    /// What its watchdog says now. One that was fed in time after all is left alone.
    pub fn watchdog(&mut self, now: Instant, fired: bool) {
        match (fired, self.wrong) {
            (true, Some((Wrong::Hangs, _))) => {}
            (true, _) => self.wrong = Some((Wrong::Hangs, now)),
            (false, Some((Wrong::Hangs, _))) => self.wrong = None,
            (false, _) => {}
        }
    }

    /// Whether the guest is to be reset now, and why. Holds until [`GuestCare::restarted`].
    #[must_use]
    pub fn due(&self, now: Instant) -> Option<&'static str> {
        let (wrong, at) = self.wrong?;
        let rested = self.last.is_none_or(|(last, pause)| now >= last + pause);
        let why = match wrong {
            Wrong::Panicked => "its kernel panicked, and it did not start anew by itself",
            Wrong::Hangs => "it did not feed its watchdog: it hangs",
        };
        (now >= at && rested).then_some(why)
    }

    /// It starts anew, by whomever.
    pub fn restarted(&mut self, now: Instant) {
        let due = self.due(now).is_some();
        let Some((wrong, _)) = self.wrong.take() else {
            return;
        };
        if !due {
            return;
        }
        match wrong {
            Wrong::Panicked => self.done.panic_resets += 1,
            Wrong::Hangs => self.done.watchdog_resets += 1,
        }
        let pause = match self.last {
            Some((last, pause)) if now.saturating_duration_since(last) < SETTLED + pause => {
                (pause * 2).min(PAUSE_MAX)
            }
            _ => PAUSE,
        };
        self.last = Some((now, pause));
    }

    /// It goes on elsewhere, with what is wrong with it.
    pub fn left(&mut self) {
        self.wrong = None;
    }

    /// What happened so far.
    #[must_use]
    pub const fn mishaps(&self) -> Mishaps {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn a_panic_has_its_grace_and_a_watchdog_none() {
        let t = Instant::now();
        let mut care = GuestCare::new(true);
        care.panicked(t, 1, false);
        care.panicked(t + s(9), 5, false);
        assert_eq!(care.due(t + s(9)), None);
        assert!(care.due(t + s(10)).unwrap().contains("panicked"));
        // It started anew by itself, a moment before.
        care.restarted(t + s(9));
        assert_eq!(care.due(t + s(3600)), None);
        assert_eq!(
            care.mishaps(),
            Mishaps {
                panics: 6,
                ..Mishaps::default()
            }
        );
        care.panicked(t + s(20), 1, false);
        care.panicked(t + s(21), 1, true);
        assert_eq!(care.due(t + s(600)), None, "a crash kernel is at work");
        care.watchdog(t + s(601), true);
        assert!(care.due(t + s(601)).unwrap().contains("watchdog"));
        care.restarted(t + s(601));
        assert_eq!(care.mishaps().watchdog_resets, 1);
        // Only counted where nobody asked for more.
        let mut counts = GuestCare::new(false);
        counts.panicked(t, 1, false);
        assert_eq!((counts.due(t + s(3600)), counts.mishaps().panics), (None, 1));
    }

    #[test]
    fn a_guest_that_does_not_come_up_is_left_in_peace_longer_and_longer() {
        let t = Instant::now();
        let mut care = GuestCare::new(true);
        let (mut now, mut at) = (t, Vec::new());
        while at.len() < 10 {
            care.panicked(now, 1, false);
            now += s(1);
            if care.due(now).is_some() {
                care.restarted(now);
                at.push(now);
            }
        }
        let gaps: Vec<u64> = at.windows(2).map(|w| (w[1] - w[0]).as_secs()).collect();
        assert_eq!(gaps, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        // It was well for long: as if nothing had happened.
        now += s(1201);
        care.watchdog(now, true);
        assert!(care.due(now).is_some());
        care.restarted(now);
        care.watchdog(now + s(5), true);
        assert_eq!(care.due(now + s(9)), None);
        assert!(care.due(now + s(10)).is_some());
        // It came back by itself meanwhile.
        care.watchdog(now + s(10), false);
        assert_eq!(care.due(now + s(3600)), None);
    }
}
