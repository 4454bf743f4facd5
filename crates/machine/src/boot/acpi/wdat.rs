//! WDAT, the watchdog's table: for each action of a driver, which register to read or write ([`watchdog`]'s).
//!
//! Layout: Microsoft, "Hardware Watchdog Timers Design Specification"; field by field as in ACPICA's `actbl3.h`.

use super::{OEM_ID, OEM_REVISION, OEM_TABLE};
use crate::devices::legacy::watchdog;
use acpi_tables::sdt::Sdt;

/// Bytes before the entries.
const HEADER: u32 = 68;
/// It is there, and can be used.
const FLAG_ENABLED: u8 = 1;

const READ_VALUE: u8 = 0;
const READ_COUNTDOWN: u8 = 1;
const WRITE_VALUE: u8 = 2;
const WRITE_COUNTDOWN: u8 = 3;

const RESET: u8 = 1;
const GET_LEFT: u8 = 4;
const GET_PERIOD: u8 = 5;
const SET_PERIOD: u8 = 6;
const GET_RUNNING: u8 = 8;
const SET_RUNNING: u8 = 9;
const GET_STOPPED: u8 = 10;
const SET_STOPPED: u8 = 11;

struct Entry {
    action: u8,
    instruction: u8,
    register: u64,
    bytes: u8,
    value: u32,
}

const ENTRIES: &[Entry] = &[
    entry(RESET, WRITE_VALUE, watchdog::RELOAD, 1, 1),
    entry(GET_LEFT, READ_COUNTDOWN, watchdog::LEFT, 4, 0),
    entry(GET_PERIOD, READ_COUNTDOWN, watchdog::PERIOD, 4, 0),
    entry(SET_PERIOD, WRITE_COUNTDOWN, watchdog::PERIOD, 4, 0),
    entry(GET_RUNNING, READ_VALUE, watchdog::CONTROL, 1, 1),
    entry(SET_RUNNING, WRITE_VALUE, watchdog::CONTROL, 1, 1),
    entry(GET_STOPPED, READ_VALUE, watchdog::CONTROL, 1, 0),
    entry(SET_STOPPED, WRITE_VALUE, watchdog::CONTROL, 1, 0),
];

const fn entry(action: u8, instruction: u8, register: u64, bytes: u8, value: u32) -> Entry {
    Entry {
        action,
        instruction,
        register,
        bytes,
        value,
    }
}

/// The table.
pub(super) fn table() -> Sdt {
    let mut t = Sdt::new(*b"WDAT", HEADER, 1, OEM_ID, OEM_TABLE, OEM_REVISION);
    t.write_u32(36, HEADER - 36);
    // Not behind PCI: all ones in the low bytes of segment, bus, device, function.
    t.write_u16(40, 0xff);
    for at in 42..45 {
        t.write_u8(at, 0xff);
    }
    t.write_u32(48, watchdog::TICK_MS);
    t.write_u32(52, watchdog::TICKS_MAX);
    t.write_u32(56, watchdog::TICKS_MIN);
    t.write_u8(60, FLAG_ENABLED);
    t.write_u32(64, ENTRIES.len() as u32);
    for e in ENTRIES {
        // A generic address (ACPI 6.5, 5.2.3.2): system I/O, width in bits, offset, access size (1: byte, 3: double word).
        let access = if e.bytes == 1 { 1 } else { 3 };
        let mut raw = vec![e.action, e.instruction, 0, 0, 1, e.bytes * 8, 0, access];
        raw.extend((u64::from(watchdog::PORT) + e.register).to_le_bytes());
        raw.extend(e.value.to_le_bytes());
        let mask = if e.bytes == 1 { 0xff } else { u32::MAX };
        raw.extend(mask.to_le_bytes());
        t.append_slice(&raw);
    }
    t
}
