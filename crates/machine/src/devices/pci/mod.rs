//! PCI: configuration space, the root that finds functions, message-signalled interrupts.
//!
//! One bus, one function per device, no bridges. BARs are assigned by the monitor before the first instruction, stay
//! where they are (a write of another address is not taken, as if the upper bits were hard-wired), and answer always.

pub mod config;
pub mod msix;
pub mod root;

pub use config::{Capability, ConfigSpace};
pub use msix::{Msix, NO_VECTOR};
pub use root::PciRoot;

use crate::devices::bus::BusDevice;

/// A PCI function as its root sees it; its BAR is a [`BusDevice`] on the MMIO bus.
pub trait PciFunction: BusDevice {
    /// Reads 1, 2 or 4 bytes of configuration space that do not cross a 4-byte boundary.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes 1, 2 or 4 bytes of configuration space that do not cross a 4-byte boundary.
    fn config_write(&mut self, offset: u16, data: &[u8]);
}
