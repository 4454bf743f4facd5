//! ACPI power: sleep control and status, reset, and the event register of the Generic Event Device.
//!
//! | port | register | read | write |
//! |---|---|---|---|
//! | 0x600 | sleep control (ACPI 6.5, 4.8.3.7) | 0 | `SLP_EN` with type 5 turns off |
//! | 0x601 | sleep status | 0 | nothing to clear |
//! | 0x602 | reset | 0 | [`RESET_VALUE`] resets |
//! | 0x603 | event | pending events, cleared by the read | ignored |

use super::{EventSink, GuestEvent, check_key};
use crate::devices::bus::{BusDevice, Stateful};
use crate::state::{StateError, StateKind, StateRecord};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// First port.
pub const PORT: u16 = 0x600;
/// Ports.
pub const PORTS: u64 = 4;
/// Sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = PORT;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = PORT + 1;
/// Reset register.
pub const RESET_PORT: u16 = PORT + 2;
/// Event register of the Generic Event Device.
pub const GED_EVENT_PORT: u16 = PORT + 3;
/// What resets the machine when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x42;
/// Sleep type of `\_S5`.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Interrupt of the Generic Event Device: edge-triggered, active high.
pub const GED_IRQ: u32 = 9;
/// Event bit: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;

const SLEEP_ENABLE: u8 = 1 << 5;
/// Version of the state. History: 1 = first.
const STATE_VERSION: u16 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    pending: u8,
}

/// The power device.
pub struct Power {
    events: Arc<dyn EventSink>,
    irq: EventFd,
    pending: u8,
}

impl Power {
    /// A device that reports to `events` and interrupts through `irq` (nonblocking, an irqfd on [`GED_IRQ`]).
    #[must_use]
    pub fn new(irq: EventFd, events: Arc<dyn EventSink>) -> Self {
        Self {
            events,
            irq,
            pending: 0,
        }
    }

    /// Presses the power button; the guest is expected to turn itself off. Pressing again before the guest has
    /// seen it rings once more but is one event.
    pub fn press_power_button(&mut self) {
        self.pending |= EVENT_POWER_BUTTON;
        self.interrupt();
    }

    fn interrupt(&self) {
        // A full counter means that the interrupt is already on its way.
        if let Err(e) = self.irq.write(1) {
            tracing::debug!(error = %e, "power interrupt not delivered");
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (3, [byte]) = (offset, data) {
            *byte = std::mem::take(&mut self.pending);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[value]) if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF => {
                self.events.guest_event(GuestEvent::Shutdown);
            }
            (2, &[RESET_VALUE]) => self.events.guest_event(GuestEvent::Reset),
            _ => {}
        }
    }
}

impl Stateful for Power {
    fn state_key(&self) -> (StateKind, u16) {
        (StateKind::AcpiPower, 0)
    }

    fn save(&mut self) -> Result<StateRecord, StateError> {
        let state = State {
            pending: self.pending,
        };
        StateRecord::encode(StateKind::AcpiPower, 0, STATE_VERSION, &state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        check_key(record, StateKind::AcpiPower, 0)?;
        let state: State = record.decode(STATE_VERSION)?;
        if state.pending & !EVENT_POWER_BUTTON != 0 {
            return Err(StateError::Refused(format!(
                "ACPI power: unknown pending events {:#04x}",
                state.pending
            )));
        }
        self.pending = state.pending;
        if self.pending != 0 {
            // The edge may have been lost with the old process; a second one finds nothing pending and is harmless.
            self.interrupt();
        }
        Ok(())
    }
}
