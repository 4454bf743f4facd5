//! A watchdog for the guest, as the ACPI table WDAT describes it (Microsoft, "Hardware Watchdog Timers Design Specification"): Linux
//! (`wdat_wdt`) and Windows find it by themselves, and it does nothing until they start it.
//!
//! | port | width | read | write |
//! |---|---|---|---|
//! | 0 | 1 | 1: it runs | 1: run, 0: stop |
//! | 1 | 1 | 0 | anything: count from the period again |
//! | 4 | 4 | the period | the period, which counts from the next reload or start on |
//! | 8 | 4 | what is left | - |
//!
//! Periods are ticks of [`TICK_MS`]. Time counts only while the guest runs: whoever runs the machine looks at it now and then
//! ([`Watchdog::look`]), and a look that comes late, as on a host that stood still, is not held against the guest.

use super::check_key;
use crate::devices::bus::{BusDevice, Stateful};
use crate::state::{StateError, StateKind, StateRecord};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Its first port.
pub const PORT: u16 = 0x620;
/// Ports.
pub const PORTS: u64 = 12;
/// One tick.
pub const TICK_MS: u32 = 100;
/// The shortest period, ticks.
pub const TICKS_MIN: u32 = 10;
/// The longest period, ticks.
pub const TICKS_MAX: u32 = 36_000;
/// Control: see the table above.
pub const CONTROL: u64 = 0;
/// Reload.
pub const RELOAD: u64 = 1;
/// The period.
pub const PERIOD: u64 = 4;
/// What is left.
pub const LEFT: u64 = 8;
/// Of a time between two looks, no more than this counts.
const LOOK_MAX: Duration = Duration::from_millis(500);
/// History: 1 = first.
const STATE_VERSION: u16 = 1;

/// The device. It stands still until the guest starts it.
#[derive(Debug)]
pub struct Watchdog {
    state: State,
    looked: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct State {
    runs: bool,
    period: u32,
    left_us: u64,
}

impl Default for Watchdog {
    fn default() -> Self {
        let mut state = State {
            runs: false,
            period: 300,
            left_us: 0,
        };
        state.reload();
        Self { state, looked: None }
    }
}

impl State {
    fn reload(&mut self) {
        self.left_us = u64::from(self.period) * u64::from(TICK_MS) * 1000;
    }

    fn register(&self, offset: u64) -> [u8; 4] {
        match offset {
            CONTROL => u32::from(self.runs),
            PERIOD => self.period,
            LEFT => (self.left_us / 1000 / u64::from(TICK_MS)) as u32,
            _ => 0,
        }
        .to_le_bytes()
    }
}

impl Watchdog {
    /// Lets the time since the last look pass. Whether it has run out, which it says until the guest feeds it, or is reset: also to
    /// another process that has it then.
    pub fn look(&mut self, now: Instant, guest_runs: bool) -> bool {
        let before = self.looked.replace(now);
        if !self.state.runs || !guest_runs {
            return false;
        }
        let passed = before.map_or(Duration::ZERO, |b| now.saturating_duration_since(b));
        let passed = passed.min(LOOK_MAX).as_micros() as u64;
        self.state.left_us = self.state.left_us.saturating_sub(passed);
        self.state.left_us == 0
    }

    /// Whether the guest uses it.
    #[must_use]
    pub const fn runs(&self) -> bool {
        self.state.runs
    }
}

impl BusDevice for Watchdog {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let register = self.state.register(offset);
        for (to, from) in data.iter_mut().zip(register) {
            *to = from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (CONTROL, &[value]) => {
                let runs = value & 1 != 0;
                if runs && !self.state.runs {
                    self.state.reload();
                }
                self.state.runs = runs;
            }
            (RELOAD, &[_]) => {
                self.state.reload();
                // What passed before is not held against it.
                self.looked = None;
            }
            (PERIOD, &[a, b, c, d]) => {
                self.state.period = u32::from_le_bytes([a, b, c, d]).clamp(TICKS_MIN, TICKS_MAX);
            }
            _ => {}
        }
    }
}

impl Stateful for Watchdog {
    fn state_key(&self) -> (StateKind, u16) {
        (StateKind::Watchdog, 0)
    }

    fn save(&mut self) -> Result<StateRecord, StateError> {
        StateRecord::encode(StateKind::Watchdog, 0, STATE_VERSION, &self.state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        check_key(record, StateKind::Watchdog, 0)?;
        let mut state: State = record.decode(STATE_VERSION)?;
        state.period = state.period.clamp(TICKS_MIN, TICKS_MAX);
        self.state = state;
        self.looked = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        device: Watchdog,
        now: Instant,
    }

    impl Bench {
        fn new(ticks: u32) -> Self {
            let mut device = Watchdog::default();
            device.write(PERIOD, &ticks.to_le_bytes());
            device.write(CONTROL, &[1]);
            Self {
                device,
                now: Instant::now(),
            }
        }

        /// Looks every 100 ms until it fires; after how many ms, if at all.
        fn fires(&mut self, within_ms: u64, runs: bool) -> Option<u64> {
            (0..=within_ms).step_by(100).find(|ms| {
                let now = self.now + Duration::from_millis(*ms);
                self.device.look(now, runs)
            })
        }
    }

    #[test]
    fn it_fires_when_it_is_not_fed_and_until_it_is() {
        let mut b = Bench::new(20);
        assert_eq!(b.fires(60_000, true), Some(2000));
        b.now += Duration::from_millis(2100);
        assert!(b.device.look(b.now, true), "it stays so");
        let mut next = Watchdog::default();
        next.restore(&b.device.save().unwrap()).unwrap();
        assert!(next.look(b.now, true), "also in another process");
        b.device.write(RELOAD, &[1]);
        b.now += Duration::from_millis(100);
        assert_eq!(b.fires(1000, true), None);
        b.device.write(RELOAD, &[1]);
        b.now += Duration::from_millis(1100);
        assert_eq!(b.fires(60_000, true), Some(2000));
        // A guest that never starts it is never reset.
        let mut idle = Bench::new(20);
        idle.device.write(CONTROL, &[0]);
        assert_eq!(idle.fires(60_000, true), None);
    }

    #[test]
    fn time_in_which_the_guest_did_not_run_is_not_held_against_it() {
        let mut b = Bench::new(20);
        assert_eq!(b.fires(60_000, false), None, "paused");
        b.now += Duration::from_secs(60);
        assert!(!b.device.look(b.now, true));
        // The host stood still for an hour.
        b.now += Duration::from_secs(3600);
        assert!(!b.device.look(b.now, true));
        b.now += Duration::from_secs(3600);
        assert_eq!(
            b.fires(60_000, true),
            Some(1000),
            "two looks took half a second each"
        );
    }

    #[test]
    fn a_saved_one_goes_on_with_what_was_left() {
        let mut b = Bench::new(20);
        assert_eq!(b.fires(1500, true), None);
        let saved = b.device.save().unwrap();
        let mut next = Bench::new(3000);
        next.device.restore(&saved).unwrap();
        assert_eq!(next.fires(60_000, true), Some(500));
        let mut word = [0; 4];
        next.device.read(PERIOD, &mut word);
        assert_eq!(u32::from_le_bytes(word), 20);
    }

    #[test]
    fn a_guest_can_write_what_it_likes() {
        let mut device = Watchdog::default();
        for offset in 0..16 {
            for len in [0, 1, 2, 4, 8] {
                device.write(offset, &vec![0xff; len]);
                device.read(offset, &mut vec![0; len]);
            }
        }
        let mut word = [0; 4];
        device.read(PERIOD, &mut word);
        assert_eq!(u32::from_le_bytes(word), TICKS_MAX);
        device.write(PERIOD, &0u32.to_le_bytes());
        device.read(PERIOD, &mut word);
        assert_eq!(u32::from_le_bytes(word), TICKS_MIN);
    }
}
