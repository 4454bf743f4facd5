//! The keyboard controller's one command that a machine without keyboard needs: 0xFE at port 0x64 pulses reset.
//!
//! Reads give 0xFF, as from an empty port: with 0x00 ("ready") Linux takes a controller for present and waits a
//! second for its answers. Before a reset Linux polls the busy bit for about 0.1 s, then writes the command anyway;
//! it comes here only if the ACPI reset register did not work.

use super::{EventSink, GuestEvent, check_key};
use crate::devices::bus::{BusDevice, Stateful};
use crate::state::{StateError, StateKind, StateRecord};
use std::sync::Arc;

/// Command and status port.
pub const PORT: u16 = 0x64;
/// Ports.
pub const PORTS: u64 = 1;
const PULSE_RESET: u8 = 0xfe;
/// Version of the (empty) state. History: 1 = first.
const STATE_VERSION: u16 = 1;

/// The controller.
pub struct I8042(Arc<dyn EventSink>);

impl I8042 {
    /// A controller that reports resets to `events`.
    #[must_use]
    pub fn new(events: Arc<dyn EventSink>) -> Self {
        Self(events)
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            self.0.guest_event(GuestEvent::Reset);
        }
    }
}

impl Stateful for I8042 {
    fn state_key(&self) -> (StateKind, u16) {
        (StateKind::I8042, 0)
    }

    fn save(&mut self) -> Result<StateRecord, StateError> {
        StateRecord::encode(StateKind::I8042, 0, STATE_VERSION, &())
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        check_key(record, StateKind::I8042, 0)?;
        record.decode::<()>(STATE_VERSION)
    }
}
