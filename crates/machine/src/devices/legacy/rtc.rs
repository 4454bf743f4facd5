//! The CMOS clock (MC146818) as far as a guest needs it to know the date at boot.
//!
//! Port 0x70 chooses a register, port 0x71 reads it. Every read takes the wall clock of the host anew (UTC, BCD, 24
//! hours); the guest cannot set it, and there are no alarms. So the only state is the chosen register.

use super::check_key;
use crate::devices::bus::{BusDevice, Stateful};
use crate::state::{StateError, StateKind, StateRecord};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// First port: the index; the next one is the data.
pub const PORT: u16 = 0x70;
/// Ports.
pub const PORTS: u64 = 2;
/// Version of the state. History: 1 = first.
const STATE_VERSION: u16 = 1;
/// Bit 7 of the index port masks NMIs on a PC.
const INDEX_MASK: u8 = 0x7f;
/// Register A: 32.768 kHz time base, no update in progress.
const REGISTER_A: u8 = 0x26;
/// Register B: 24 hours, BCD, no interrupts.
const REGISTER_B: u8 = 0x02;
/// Register D: the contents are valid.
const REGISTER_D: u8 = 0x80;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    index: u8,
}

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    index: u8,
    now: fn() -> i64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self {
            index: 0,
            now: || clock_gettime(ClockId::Realtime).tv_sec,
        }
    }
}

impl Rtc {
    /// A clock that takes seconds since 1970 from `now`, for tests.
    #[must_use]
    pub fn with_clock(now: fn() -> i64) -> Self {
        Self { index: 0, now }
    }

    fn register(&self, index: u8) -> u8 {
        let t = Calendar::of((self.now)());
        match index {
            0x00 => bcd(t.second),
            0x02 => bcd(t.minute),
            0x04 => bcd(t.hour),
            0x06 => t.weekday,
            0x07 => bcd(t.day),
            0x08 => bcd(t.month),
            0x09 => bcd((t.year % 100) as u8),
            0x0a => REGISTER_A,
            0x0b => REGISTER_B,
            0x0d => REGISTER_D,
            crate::boot::acpi::CMOS_CENTURY => bcd((t.year / 100 % 100) as u8),
            _ => 0,
        }
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10 % 10) << 4) | (value % 10)
}

struct Calendar {
    year: u32,
    month: u8,
    day: u8,
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Calendar {
    /// Proleptic Gregorian calendar, by eras of 400 years that begin on 1 March; years 1970 to 9999.
    fn of(seconds: i64) -> Self {
        let seconds = seconds.clamp(0, 253_402_300_799).unsigned_abs();
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let since_era = days + 719_468; // days from 0000-03-01 to 1970-01-01
        let (era, day_of_era) = (since_era / 146_097, since_era % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153; // months from March
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        Self {
            year: (year_of_era + era * 400 + u64::from(month <= 2)) as u32,
            month: month as u8,
            day: (day_of_year - (153 * shifted + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8, // 1 is Sunday; 1970-01-01 was a Thursday
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (1, [byte]) = (offset, data) {
            *byte = self.register(self.index);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, &[index]) = (offset, data) {
            self.index = index & INDEX_MASK;
        }
    }
}

impl Stateful for Rtc {
    fn state_key(&self) -> (StateKind, u16) {
        (StateKind::Rtc, 0)
    }

    fn save(&mut self) -> Result<StateRecord, StateError> {
        StateRecord::encode(StateKind::Rtc, 0, STATE_VERSION, &State { index: self.index })
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        check_key(record, StateKind::Rtc, 0)?;
        let state: State = record.decode(STATE_VERSION)?;
        self.index = state.index & INDEX_MASK;
        Ok(())
    }
}
