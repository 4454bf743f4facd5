//! Legacy parts of a PC: serial port, keyboard controller, pvpanic, ACPI power, clock, watchdog, debug console.
//!
//! All are port I/O devices, most of one byte per register. None of them blocks, queues without bound, or logs what a
//! guest does (a guest that hammers a port costs its own time only); what the machine must act upon is a
//! [`GuestEvent`].

pub mod debugcon;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod sink;
pub mod watchdog;

pub use debugcon::DebugCon;
pub use i8042::I8042;
pub use power::Power;
pub use pvpanic::PvPanic;
pub use rtc::Rtc;
pub use serial::SerialPort;
pub use sink::{FdSink, NullSink, OutputSink};
pub use watchdog::Watchdog;

use crate::state::{StateError, StateKind, StateRecord};

/// What a guest tells its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestEvent {
    /// The guest turned itself off (ACPI S5).
    Shutdown,
    /// The guest wants to start again.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The guest's kernel panicked and a crash kernel has taken over.
    CrashLoaded,
}

/// Takes a guest's events. Called on a vCPU thread with the device's lock held: it must only note the event and
/// wake someone, and take no device's lock. A guest can repeat events as fast as it can write a port.
pub trait EventSink: Send + Sync {
    /// Notes one event.
    fn guest_event(&self, event: GuestEvent);
}

/// Refuses a record that belongs to another part of the machine.
pub(crate) fn check_key(record: &StateRecord, kind: StateKind, instance: u16) -> Result<(), StateError> {
    if (record.kind, record.instance) == (kind, instance) {
        Ok(())
    } else {
        Err(StateError::Refused(format!(
            "state of {:?}#{} was given to {kind:?}#{instance}",
            record.kind, record.instance
        )))
    }
}

#[cfg(test)]
mod tests;
