//! pvpanic (QEMU docs/specs/pvpanic): the guest says that its kernel panicked.
//!
//! A read tells which events the device takes; a write reports events, one bit each.

use super::{EventSink, GuestEvent, check_key};
use crate::devices::bus::{BusDevice, Stateful};
use crate::state::{StateError, StateKind, StateRecord};
use std::sync::Arc;

/// The port, fixed by the specification.
pub const PORT: u16 = 0x505;
/// Ports.
pub const PORTS: u64 = 1;
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;
/// Version of the (empty) state. History: 1 = first.
const STATE_VERSION: u16 = 1;

/// The device.
pub struct PvPanic(Arc<dyn EventSink>);

impl PvPanic {
    /// A device that reports panics to `events`.
    #[must_use]
    pub fn new(events: Arc<dyn EventSink>) -> Self {
        Self(events)
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [first, ..] = data {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let Some(&bits) = data.first() else { return };
        if bits & PANICKED != 0 {
            self.0.guest_event(GuestEvent::Panic);
        }
        if bits & CRASH_LOADED != 0 {
            self.0.guest_event(GuestEvent::CrashLoaded);
        }
    }
}

impl Stateful for PvPanic {
    fn state_key(&self) -> (StateKind, u16) {
        (StateKind::PvPanic, 0)
    }

    fn save(&mut self) -> Result<StateRecord, StateError> {
        StateRecord::encode(StateKind::PvPanic, 0, STATE_VERSION, &())
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        check_key(record, StateKind::PvPanic, 0)?;
        record.decode::<()>(STATE_VERSION)
    }
}
