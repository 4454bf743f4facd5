//! Slows a guest down that dirties faster than its links carry: it stands still for a share of each slice of time, and
//! always runs for the rest, so that it makes progress whatever happens.
//!
//! ```text
//! |<------------- slice ------------->|
//! | runs (100 - percent) | stands still |
//! ```

use std::time::{Duration, Instant};
use steadfast_machine::machine::Machine;
use steadfast_machine::quiesce::Quiesced;

/// Long enough that the cost of stopping does not count, short enough that the guest's timers do not notice.
const SLICE: Duration = Duration::from_millis(20);
/// The strongest there is.
const PERCENT_MAX: u8 = 90;

/// See the module.
pub struct Throttle {
    percent: u8,
    most: u8,
    stopped: bool,
    next: Instant,
}

impl Throttle {
    /// Not at all.
    pub fn new(now: Instant) -> Self {
        Self {
            percent: 0,
            most: 0,
            stopped: false,
            next: now,
        }
    }

    /// Share of the time that the guest stands still, in percent.
    pub fn percent(&self) -> u8 {
        self.percent
    }

    /// The strongest that there was.
    pub fn most(&self) -> u8 {
        self.most
    }

    /// Sets that share; the guest may have to go on at once.
    pub fn set(&mut self, percent: u8, machine: &Machine, now: Instant) {
        self.percent = percent.min(PERCENT_MAX);
        self.most = self.most.max(self.percent);
        if self.percent == 0 && self.stopped {
            self.stopped = false;
            machine.resume();
        }
        self.next = now;
    }

    /// This host runs the guest no more.
    pub fn step_down(&mut self) {
        (self.percent, self.stopped) = (0, false);
    }

    /// The guest runs, whoever let it (a cut does).
    pub fn runs(&mut self) {
        self.stopped = false;
    }

    /// Stops the guest or lets it go on, if it is time to. Returns how long until then.
    pub fn turn(&mut self, machine: &Machine, now: Instant) -> Option<Duration> {
        if self.percent == 0 {
            return None;
        }
        if now >= self.next {
            let still = SLICE * u32::from(self.percent) / 100;
            if self.stopped {
                machine.resume();
                self.stopped = false;
                self.next = now + (SLICE - still);
            } else {
                // A guest that does not stop now is asked again in the next slice.
                self.stopped = machine.quiesce().map(Quiesced::keep_stopped).is_ok();
                self.next = now + still;
            }
        }
        Some(self.next.saturating_duration_since(now))
    }
}
